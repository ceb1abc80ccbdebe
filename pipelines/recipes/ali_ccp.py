"""Ali-CCP: skeletons of samples joined with the features that samples have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import schema_yaml
from pipelines.convert.options import Options
from pipelines.log import casts
from pipelines.recipes import text
from pipelines.recipes.recipe import Prepare, RawFile, Recipe, write
from stem_util.errors import UserError

_GET = (
    "download sample_train.tar.gz and sample_test.tar.gz from https://tianchi.aliyun.com/dataset/408 (with an account "
    "there) and unpack both into one directory"
)
_FEATURES: dict[str, text.Kind] = {"feature_num": "integer", "feature_list": "text"}
_COMMON: dict[str, text.Kind] = {"common_feature_index": "text", **_FEATURES}
_SKELETON: dict[str, text.Kind] = {"sample_id": "text", "click": "label", "buy": "label", **_COMMON}
_OF_USERS = {
    "101": "user_id",
    "121": "profile",
    "122": "profile_group",
    "124": "gender",
    "125": "age",
    "126": "consumption_1",
    "127": "consumption_2",
    "128": "occupation",
    "129": "geography",
}
_OF_SAMPLES = {
    "205": "item_id",
    "206": "category",
    "207": "shop",
    "216": "brand",
    "508": "history_category",
    "509": "history_shop",
    "702": "history_brand",
    "853": "history_intention",
    "301": "position",
}
_FEATURE = "^(?P<field>[^\x02]+)\x02(?P<id>[0-9]{1,18})\x03."


def _prepare(given: Prepare) -> Options:
    paths = {}
    for split in ("train", "test"):
        skeletons, common = (given.files[f"{name}_{split}.csv"] for name in ("sample_skeleton", "common_features"))
        paths[split] = str(write(given.scratch, _rows(skeletons, common), name=split))
    return Options(schema=schema_yaml.load("ali_ccp"), output="", given=paths, validation_share=0.1)


def _rows(skeletons: Path, common: Path) -> Iterator[pa.Table]:
    """The rows of a file of skeletons, each with the common features that it names."""
    users = pa.concat_tables(_parsed(common, _COMMON, _OF_USERS, "user_id")).combine_chunks()
    indices = users["common_feature_index"].combine_chunks()
    line = 1
    for table in _parsed(skeletons, _SKELETON, _OF_SAMPLES, "item_id"):
        places = pc.index_in(table["common_feature_index"].combine_chunks(), value_set=indices)
        if places.null_count:
            row = int(np.argmax(casts.to_numpy(places.is_null())))
            raise UserError(
                f"{skeletons}, line {line + row:,}: the common features {table['common_feature_index'][row]} are not "
                f"in {common}: one of the two files is cut or another one; {_GET}"
            )
        line += len(table)
        yield pa.table(
            {name: users[name].take(places) for name in _OF_USERS.values()}
            | {name: table[name] for name in (*_OF_SAMPLES.values(), "click", "buy")}
        )


def _parsed(path: Path, columns: Mapping[str, text.Kind], fields: Mapping[str, str], needed: str) -> Iterator[pa.Table]:
    """The rows of a raw file, with columns of ids for the fields of its lists of features.

    A list is ``field \\x02 id \\x03 value``, repeated with \\x01 between. The id is null where a list lacks the field,
    and the last one where a list has several.

    Raises:
      UserError: a list has no such form, fewer features than its number says, or lacks the field ``needed``.
    """
    line = 1
    for table in text.tables(path, columns, _GET):
        lists = pc.split_pattern(table["feature_list"].combine_chunks(), "\x01")
        sizes = casts.to_numpy(pc.fill_null(pc.list_value_length(lists), 0))
        rows = np.repeat(np.arange(len(table)), sizes)
        found = pc.extract_regex(lists.flatten(), _FEATURE)
        bad = sizes < table["feature_num"].to_numpy()
        bad[rows[casts.to_numpy(found.is_null())]] = True
        ids = {name: _ids(found, number, rows, len(table)) for number, name in fields.items()}
        bad |= casts.to_numpy(ids[needed].is_null())
        if bad.any():
            raise UserError(
                f"{path}, line {line + int(np.argmax(bad)):,}: its features are not as many as its number says, have "
                f"another form, or lack {needed}: the file is cut or another one; {_GET}"
            )
        line += len(table)
        yield pa.table({name: table[name] for name in columns if name not in _FEATURES} | ids)


def _ids(found: pa.StructArray, field: str, rows: np.ndarray, length: int) -> pa.Array:
    """The ids of one field, int64 [length]; ``rows`` are the rows of the features found."""
    here = np.flatnonzero(casts.to_numpy(pc.fill_null(pc.equal(found.field("field"), field), False)))
    ids, missing = np.zeros(length, np.int64), np.ones(length, bool)
    ids[rows[here]] = found.field("id").take(pa.array(here)).cast(pa.int64()).to_numpy()
    missing[rows[here]] = False
    return pa.array(ids, mask=missing)


RECIPE = Recipe(
    name="ali_ccp",
    title="Ali-CCP: item clicked, and bought after the click",
    about="""\
One row is an item that Taobao recommended. click is about all rows; conversion, bought, is about the clicked ones.
The PLE paper does not name its features: these are the 18 of AITM's code (Xi et al., KDD 2021), one id each, without
the user's histories and the item's intentions, which are lists, and without the features' values. Of the crossed
history of intentions (853), which may hold several ids, the last is taken, as there. Ids seen fewer than 10 times in
train share one. The test file is test; the papers do not say what they validate on, so a tenth of the train file at
random is validation. Skeletons are read in blocks and joined with the common features, of which 18 short columns are
kept: until the conversion, memory stays below 2 GB, and the prepared log takes less disk than the skeletons.""",
    source="Ma et al., Entire Space Multi-Task Model, SIGIR 2018, https://tianchi.aliyun.com/dataset/408",
    licence="the terms on its page at Tianchi",
    get=_GET,
    files=(
        RawFile("sample_skeleton_train.csv", f"values with commas between them, no header: {', '.join(_SKELETON)}"),
        RawFile("common_features_train.csv", f"the same: {', '.join(_COMMON)}"),
        RawFile("sample_skeleton_test.csv", "as for train"),
        RawFile("common_features_test.csv", "as for train"),
    ),
    prepare=_prepare,
    published={"samples": "84M", "users": "0.4M", "items": "4.3M", "tasks": "2"},
    published_in="the PLE paper, section 5.2.1, and the ESMM paper, Table 1",
    config="ali_ccp",
)
