"""KuaiRand in its three sizes: the logs of the recommender, with users and videos joined to them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from pipelines import schema_yaml
from pipelines.convert.options import Options
from pipelines.recipes import text
from pipelines.recipes.lookup import Lookup
from pipelines.recipes.recipe import Prepare, RawFile, Recipe, write
from stem_util.errors import UserError

LOG: dict[str, text.Kind] = {
    "user_id": "integer",
    "video_id": "integer",
    "date": "integer",
    "hourmin": "optional integer",
    "time_ms": "integer",
    **dict.fromkeys(("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"), "label"),
    "play_time_ms": "optional integer",
    "duration_ms": "optional integer",
    "profile_stay_time": "optional integer",
    "comment_stay_time": "optional integer",
    "is_profile_enter": "label",
    "is_rand": "optional integer",
    "tab": "optional integer",
}
"""The columns of the logs."""
USERS: dict[str, text.Kind] = {
    "user_id": "integer",
    "user_active_degree": "text",
    **dict.fromkeys(("is_lowactive_period", "is_live_streamer", "is_video_author"), "optional integer"),
    **dict.fromkeys(
        ("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range"), "text"
    ),
    **{f"onehot_feat{number}": "optional integer" for number in range(18)},
}
"""The columns that are read of the users; the file has exact counts beside the ranges."""
VIDEOS: dict[str, text.Kind] = {
    "video_id": "integer",
    "author_id": "optional integer",
    "video_type": "text",
    "upload_dt": "text",
    "upload_type": "text",
    "server_width": "optional integer",
    "server_height": "optional integer",
    "music_id": "optional integer",
    "music_type": "optional integer",
    "tag": "text",
}
"""The columns that are read of the videos."""
_LAST_DAYS = "20220507", "20220508"
"""The days of validation and test."""


def _prepare(given: Prepare, name: str, logs: tuple[str, ...], users: str, videos: str, get: str) -> Options:
    def lookup(file: str, columns: Mapping[str, text.Kind]) -> Lookup:
        return Lookup(next(iter(columns)), text.tables(given.files[file], columns, get, header=True))

    joined = {"user_id": (users, lookup(users, USERS)), "video_id": (videos, lookup(videos, VIDEOS))}
    rows = itertools.chain.from_iterable(_rows(given.files[log], joined, get) for log in logs)
    return Options(
        schema=dataclasses.replace(schema_yaml.load("kuairand_1k"), name=name),
        output="",
        log=str(write(given.scratch, rows)),
        split="time",
        split_column="date",
        validation_from=_LAST_DAYS[0],
        test_from=_LAST_DAYS[1],
    )


def _rows(path: Path, joined: Mapping[str, tuple[str, Lookup]], get: str) -> Iterator[pa.Table]:
    """The rows of a log, with the columns of its users and videos."""
    for table in text.tables(path, LOG, get, header=True):
        columns = dict(zip(table.column_names, table.columns, strict=True))
        for key, (file, lookup) in joined.items():
            try:
                columns |= lookup.columns(table[key].to_numpy())
            except KeyError as error:
                raise UserError(
                    f"{path}: {key} {error} is not in {file}: one of the two files is cut or another one; {get}"
                ) from None
        yield pa.table(columns)


def _recipe(
    size: str, directory: str, parts: int, published: Mapping[str, str], published_in: str, memory: str
) -> Recipe:
    """The recipe of one size. Its logs have ``parts`` files each."""
    name = f"kuairand_{size}"
    get = f"unpack {directory}.tar.gz of https://zenodo.org/records/10439422 and give {directory}/data as --raw"
    periods = ("4_08_to_4_21", "4_22_to_5_08")
    endings = [f"_part{part}" for part in range(1, parts + 1)] if parts > 1 else [""]
    logs = tuple(f"log_standard_{period}_{size}{ending}.csv" for period in periods for ending in endings)
    users, videos = f"user_features_{size}.csv", f"video_features_basic_{size}.csv"
    return Recipe(
        name=name,
        title=f"{directory}: eight kinds of feedback to short videos",
        about=f"""\
One row is a video that Kuaishou's recommender showed to a user; the log of random videos is not used. Tasks A to H of
the STEM paper: click, like, follow, comment, forward, hate, long_view and profile_enter. The paper has 32 fields and
does not name them. The schema's 32 were chosen: ids and attributes of user and video that are known before the video is
shown, the place in the app and the hour; not the videos' statistics, which are sums over the whole month, test days
included. Values seen fewer than 10 times in train share one id. The paper does not give its split either, but its sizes
do: the last day (8 May 2022) is test, the day before validation, all earlier days train. Users and videos are held in
memory while they are joined to the log: about {memory} until the conversion. The prepared log takes less disk than the
raw one.""",
        source="Gao et al., KuaiRand, CIKM 2022, https://kuairand.com, https://doi.org/10.5281/zenodo.10439422",
        licence="CC BY-SA 4.0",
        get=get,
        files=(
            *(RawFile(log, f"CSV with a header: {', '.join(LOG)}" if log == logs[0] else "the same") for log in logs),
            RawFile(users, f"CSV with a header, of which are read: {', '.join(USERS)}"),
            RawFile(videos, f"CSV with a header, of which are read: {', '.join(VIDEOS)}"),
        ),
        prepare=functools.partial(_prepare, name=name, logs=logs, users=users, videos=videos, get=get),
        published=published,
        published_in=published_in,
        config="kuairand_1k",
    )


_README = "KuaiRand's README"
RECIPES = (
    _recipe(
        "1k",
        "KuaiRand-1K",
        parts=1,
        published={
            "samples": "11,713,045",
            "users": "1,000",
            "items": "4,369,953",
            "train samples": "10.9M",
            "validation samples": "0.39M",
            "test samples": "0.42M",
            "frequent items": "189K",
            "fields": "32",
            "tasks": "8",
            "click rate": "37.76%",
            "like rate": "1.54%",
            "follow rate": "0.10%",
            "comment rate": "0.26%",
            "forward rate": "0.08%",
            "hate rate": "0.10%",
            "long_view rate": "26.17%",
            "profile_enter rate": "1.78%",
        },
        published_in="KuaiRand's README and the STEM paper, Table 1",
        memory="0.6 GB",
    ),
    _recipe(
        "pure",
        "KuaiRand-Pure",
        parts=1,
        published={"samples": "1,436,609", "users": "27,285", "items": "7,551"},
        published_in="KuaiRand's README",
        memory="0.5 GB",
    ),
    _recipe(
        "27k",
        "KuaiRand-27K",
        parts=2,
        published={"samples": "322,278,385", "users": "27,285", "items": "32,038,725"},
        published_in="KuaiRand's README",
        memory="2.5 GB",
    ),
)
