"""QK-Video of Tenrec: the file ctr_data_1M.csv, each user's rows divided in their order."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import schema_yaml
from pipelines.convert.options import Options
from pipelines.manifest import SPLITS
from pipelines.recipes import text
from pipelines.recipes.recipe import Prepare, RawFile, Recipe, Setting
from stem_util.errors import UserError
from stem_util.progress import Progress

_LOG = "ctr_data_1M.csv"
_GET = "download Tenrec.zip from https://tenrec0.github.io (its licence has to be accepted) and unpack it"
COLUMNS: dict[str, text.Kind] = {
    "user_id": "integer",
    "item_id": "integer",
    "click": "label",
    "follow": "label",
    "like": "label",
    "share": "label",
    "video_category": "optional integer",
    "watching_times": "optional integer",
    "gender": "optional integer",
    "age": "optional integer",
    **{f"hist_{place}": "optional integer" for place in range(1, 11)},
}
"""The columns that are read."""
_NULLS = ("", "\\N")
_TENTHS = (8, 9)
"""Of a user's n rows, those from floor(8 n / 10) on are validation, and those from floor(9 n / 10) on are test."""
_MOST = 10**8
"""User ids above this are not Tenrec's, which end at about 5 million."""


def _prepare(given: Prepare) -> Options:
    schema, path = schema_yaml.load("qk_video"), given.files[_LOG]
    if given.settings["fields"] == "15":
        features = tuple(feature for feature in schema.features if feature.name != "watching_times")
        schema = dataclasses.replace(schema, features=features)
    return Options(schema=schema, output="", given=_write(given.scratch, path, _rows_by_user(path)))


def _rows_by_user(path: Path) -> NDArray[np.int64]:
    """The number of rows of each user, [largest id + 1]."""
    rows = np.zeros(0, np.int64)
    with Progress(None, unit="rows", desc="count") as progress:
        for table in text.tables(path, {"user_id": "integer"}, _GET, header=True):
            users = table["user_id"].to_numpy()
            if len(users) and not 0 <= users.min() <= users.max() <= _MOST:
                found = f"{users.min()} to {users.max()}"
                raise UserError(f"{path}: users {found} are not Tenrec's: the file is another one; {_GET}")
            earlier, rows = rows, np.bincount(users, minlength=len(rows))
            rows[: len(earlier)] += earlier
            progress.update(len(table))
    return rows


def _write(scratch: Path, path: Path, rows: NDArray[np.int64]) -> dict[str, str]:
    """Writes a Parquet file for each split; returns their paths."""
    paths = {split: str(scratch / f"{split}.parquet") for split in SPLITS}
    schema = pa.schema({name: pa.int64() for name in COLUMNS})
    before = np.zeros(len(rows), np.int64)
    with contextlib.ExitStack() as stack, Progress(int(rows.sum()), unit="rows", desc="prepare") as progress:
        writers = [stack.enter_context(pq.ParquetWriter(paths[split], schema)) for split in SPLITS]
        for table in text.tables(path, COLUMNS, _GET, header=True, nulls=_NULLS):
            users = table["user_id"].to_numpy()
            after = 10 * (before[users] + _places(users) + 1)
            before += np.bincount(users, minlength=len(rows))
            splits = sum((after > tenths * rows[users]).astype(np.int8) for tenths in _TENTHS)
            for split, writer in enumerate(writers):
                writer.write_table(table.filter(splits == split))
            progress.update(len(table))
    return paths


def _places(users: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many earlier rows have the same user, [N]."""
    order = np.argsort(users, kind="stable")
    first = np.flatnonzero(np.diff(users[order], prepend=-1))
    places = np.empty(len(users), np.int64)
    places[order] = np.arange(len(users)) - np.repeat(first, np.diff(first, append=len(users)))
    return places


RECIPE = Recipe(
    name="qk_video",
    title="QK-Video (Tenrec): video clicked, and liked",
    about="""\
One row is a video shown to a user. The STEM paper does not say how it prepared QK-Video, but its numbers do: 120.3
million rows and a click rate of 24 % are those of Tenrec's file ctr_data_1M.csv (not of QK-video.csv, which has 493
million rows); the 16 fields are all its columns but the four labels; and its three sizes come about when each user's n
rows are divided in the file's order, train up to floor(.8 n), validation up to floor(.9 n). (A random split would give
96.3M, 12.0M and 12.0M.) This is our reading; the statistics that are printed say how well it fits.
One of the 16 is watching_times, how often the user watched the video. It is known only afterwards and gives the click
away. This may be why the paper's AUC of click is .92, where Tenrec's own benchmark, without it and on a sample of the
rows, has about .79. With --fields=15 it is left out; do so unless you compare with the paper.
Values seen fewer than 10 times in train share one id, and Table 1 counts the users and items that are left. The file is
read twice, in blocks: until the conversion, memory stays below 1 GB, and the prepared log takes less disk than the raw
file.""",
    source="Yuan et al., Tenrec, NeurIPS 2022 Datasets and Benchmarks, https://tenrec0.github.io",
    licence="Tenrec's own, to be accepted before the download: research only (CC BY-NC 4.0)",
    get=_GET,
    files=(RawFile(_LOG, f"CSV with a header: {', '.join(COLUMNS)}; \\N is a missing category"),),
    prepare=_prepare,
    published={
        "train samples": "95.9M",
        "validation samples": "12.0M",
        "test samples": "12.5M",
        "frequent users": "970K",
        "frequent items": "760K",
        "fields": "16",
        "tasks": "2",
        "click rate": "24.01%",
        "like rate": "2.03%",
    },
    published_in="the STEM paper, Table 1",
    config="qk_video",
    settings=(
        Setting(
            "fields", "16", "16: the paper's; 15: without watching_times, which gives click away.", choices=("16", "15")
        ),
    ),
)
