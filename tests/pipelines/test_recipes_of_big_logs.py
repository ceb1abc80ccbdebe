"""Recipes of large public logs, from a few hand-made rows in the exact format of their authors' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines import manifest as manifests
from pipelines.recipes import tiktok
from pipelines.recipes.catalogue import RECIPES
from pipelines.recipes.recipe import Made, make
from stem_util.errors import UserError


def made(name: str, raw: Path, output: Path, **settings: object) -> Made:
    defaults = {setting.name: setting.default for setting in RECIPES[name].settings}
    return make(RECIPES[name], str(raw), str(output), {**defaults, **settings})


def raw_rows(output: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(output / "raw" / split).sort_by("row_id").to_pylist()


def refused(name: str, raw: Path, output: Path) -> str:
    with pytest.raises(UserError) as error:
        made(name, raw, output)
    assert not output.exists() and RECIPES[name].get in str(error.value)
    return str(error.value).replace(f"{raw}/", "")


# TikTok: 12 integers with tabs between them, no header; unknown cities and sounds are -1.


def tiktok_line(row: int, **changed: object) -> str:
    values = dict.fromkeys(tiktok.COLUMNS, 100 + row) | {"uid": row % 7, "user_city": -1, "item_city": -1}
    values |= {"channel": 0, "finish": int(row % 3 == 0), "like": int(row % 9 == 0), "video_duration": 9 + row % 3}
    return "\t".join(str(value) for value in (values | changed).values()) + "\n"


def tiktok_log(directory: Path, lines: list[str]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "final_track1_train.txt").write_text("".join(lines))
    return directory


def test_tiktok_is_divided_as_the_authors_divide_it(tmp_path: Path) -> None:
    done = made("tiktok", tiktok_log(tmp_path / "raw", [tiktok_line(row) for row in range(2000)]), tmp_path / "data")
    sizes = [done.manifest.rows(split) for split in manifests.SPLITS]
    assert sum(sizes) == 2000
    assert sizes == pytest.approx([1620, 180, 200], rel=0.15)
    for row in raw_rows(tmp_path / "data", "test"):
        values = tiktok_line(row.pop("row_id")).split()
        assert row == dict(zip(tiktok.COLUMNS, map(int, values), strict=True))
    found = {statistic.name: statistic.found for statistic in done.statistics}
    assert found["frequent users"] == 7 and found["frequent items"] == 0
    assert found["fields"] == 8 and found["finish rate"] == pytest.approx(667 / 2000)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t2\t3\n", "final_track1_train.txt, line 3: should have 12 values (uid, user_city, item_id, ...): "),
        (tiktok_line(0).replace("\t", ","), "final_track1_train.txt, line 3: should have 12 values"),
        (tiktok_line(0, like=2), "final_track1_train.txt, line 3: like is '2', not 0 or 1"),
        (tiktok_line(0, finish=""), "final_track1_train.txt, line 3: finish is '', not 0 or 1"),
        (tiktok_line(0, uid=""), "final_track1_train.txt, line 3: uid is '', no integer"),
        (tiktok_line(0, music_id="x"), "final_track1_train.txt, line 3: music_id is 'x', no integer"),
    ],
)
def test_a_damaged_line_of_tiktok_is_named(line: str, message: str, tmp_path: Path) -> None:
    raw = tiktok_log(tmp_path / "raw", [tiktok_line(0), tiktok_line(1), line, tiktok_line(2)])
    assert message in refused("tiktok", raw, tmp_path / "data")
