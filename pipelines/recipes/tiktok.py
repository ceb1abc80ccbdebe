"""TikTok, track 1 of the ICME 2019 challenge: one text file, as the STEM authors' code uses it."""

from __future__ import annotations

from pipelines import schema_yaml
from pipelines.convert.options import Options
from pipelines.recipes import text
from pipelines.recipes.recipe import Prepare, RawFile, Recipe, write

_LOG = "final_track1_train.txt"
_GET = (
    "unpack final_track1_train.txt.tgz of the ICME 2019 challenge on short video understanding, track 1 (the README of "
    "https://github.com/LiangcaiSu/STEM links to it)"
)
COLUMNS: dict[str, text.Kind] = {
    "uid": "integer",
    "user_city": "optional integer",
    "item_id": "integer",
    "author_id": "optional integer",
    "item_city": "optional integer",
    "channel": "optional integer",
    "finish": "label",
    "like": "label",
    "music_id": "optional integer",
    "device_id": "optional integer",
    "create_time": "optional integer",
    "video_duration": "optional integer",
}
"""The columns of the raw file, in order."""


def _prepare(given: Prepare) -> Options:
    log = write(given.scratch, text.tables(given.files[_LOG], COLUMNS, _GET, delimiter="\t"))
    return Options(
        schema=schema_yaml.load("tiktok"), output="", log=str(log), split="random", fractions=(0.81, 0.09, 0.1)
    )


RECIPE = Recipe(
    name="tiktok",
    title="TikTok (ICME 2019, track 1): video finished, and liked",
    about="""\
One row is a video shown to a user. Features are the eight of the STEM authors' code: uid, item_id, author_id,
item_city, channel, music_id, device_id and video_duration, all categorical; user_city and create_time are not used.
Values seen fewer than 10 times in train share one id, and Table 1 counts the users and items that are left. Split as in
that code: 10 % of all rows at random are test, and 10 % of the others validation; the authors' random numbers are
others than these. Rows are read in blocks: until the conversion, memory stays below 1 GB, and the prepared log takes
less disk than the raw file.""",
    source="ICME 2019 Grand Challenge on Short Video Understanding; Su et al., STEM, AAAI 2024",
    licence="academic research only; no commercial use (README of the STEM authors' code)",
    get=_GET,
    files=(RawFile(_LOG, f"12 integers with tabs between them, no header: {', '.join(COLUMNS)}"),),
    prepare=_prepare,
    published={
        "train samples": "223.4M",
        "validation samples": "24.8M",
        "test samples": "27.6M",
        "frequent users": "560K",
        "frequent items": "1800K",
        "fields": "8",
        "tasks": "2",
        "finish rate": "28.31%",
        "like rate": "1.60%",
    },
    published_in="the STEM paper, Table 1",
    config="tiktok",
)
