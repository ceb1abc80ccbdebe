"""Versions appear whole or not at all, under the next number."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from export.publish import publishing, versions
from stem_util.errors import UserError


def publish(directory: Path) -> int:
    with publishing(directory) as (version, building):
        assert not building.name.isdigit() and building.parent == directory
        (building / "assets").mkdir()
        (building / "assets" / "file").write_text("whole")
    return version


def test_the_next_number_after_the_highest(tmp_path: Path) -> None:
    models = tmp_path / "new" / "models"
    assert publish(models) == 1
    for name in ("7", "canary", "9x", "-12", "²"):
        (models / name).mkdir()
    (models / "30").write_text("a file")
    assert versions(models) == [1, 7]
    assert publish(models) == 8
    assert (models / "8" / "assets" / "file").read_text() == "whole"
    assert sorted(path.name for path in models.glob(".*")) == [".last_version", ".stem-tf"]


def test_a_number_that_was_rolled_back_is_not_used_again(tmp_path: Path) -> None:
    assert [publish(tmp_path), publish(tmp_path)] == [1, 2]
    shutil.rmtree(tmp_path / "2")
    assert publish(tmp_path) == 3
    (tmp_path / ".last_version").write_bytes(b"\xff")
    assert publish(tmp_path) == 4


def test_nothing_is_published_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), publishing(tmp_path) as (_, building):
        (building / "file").write_text("half")
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == [".stem-tf"]


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    assert publish(tmp_path) == 1
    (tmp_path / ".partial-1" / "variables").mkdir(parents=True)
    assert publish(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".last_version", ".stem-tf", "1", "2"]


def test_two_exports_do_not_race(tmp_path: Path) -> None:
    with (
        publishing(tmp_path) as (version, _),
        pytest.raises(UserError, match="another job is writing"),
        publishing(tmp_path),
    ):
        pass
    assert version == 1 and versions(tmp_path) == [1]


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file[,;] "), publishing(path):
            pass
