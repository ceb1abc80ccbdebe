"""Outputs appear whole or not at all."""

import os
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.staging import staged


def _fill(output: Path, text: str, *, overwrite: bool = False) -> None:
    with staged(str(output), marker="done", overwrite=overwrite) as directory:
        Path(directory, "done").write_text(text)


def test_appears_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with staged(str(output), marker="done", overwrite=False) as directory:
        Path(directory, "done").write_text("x")
        assert not output.exists()
    assert (output / "done").read_text() == "x"
    assert os.listdir(output.parent) == ["out"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(str(tmp_path / "out"), marker="done", overwrite=False):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_overwrite(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    _fill(output, "one")  # an empty directory may be there
    with pytest.raises(UserError, match="out exists already; --overwrite replaces it"):
        _fill(output, "two")
    _fill(output, "two", overwrite=True)
    assert (output / "done").read_text() == "two"
    with pytest.raises(RuntimeError), staged(str(output), marker="done", overwrite=True):
        raise RuntimeError
    assert (output / "done").read_text() == "two"
    assert os.listdir(tmp_path) == ["out"]


def test_foreign_things_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UserError, match="file exists and is not a directory"):
        _fill(tmp_path / "file", "x", overwrite=True)
    with pytest.raises(UserError, match="holds something else .no done."):
        _fill(tmp_path / "photos", "x", overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_two_jobs_refuse_the_same_output(tmp_path: Path) -> None:
    with staged(str(tmp_path / "out"), marker="done", overwrite=False) as directory:
        with pytest.raises(UserError, match="another job is writing .*out"):
            _fill(tmp_path / "out", "x")
        Path(directory, "done").touch()
    _fill(tmp_path / "out", "x", overwrite=True)


def test_leftovers_of_killed_jobs(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-1").mkdir()
    (tmp_path / ".out.lock").touch()
    (tmp_path / ".outer.partial-1").mkdir()
    _fill(tmp_path / "out", "x")
    assert sorted(os.listdir(tmp_path)) == [".outer.partial-1", "out"]
    # Killed after the old output was set aside: it comes back, and a failing job leaves it.
    os.rename(tmp_path / "out", tmp_path / ".out.replaced-1")
    with pytest.raises(UserError, match="exists already"):
        _fill(tmp_path / "out", "y")
    assert (tmp_path / "out" / "done").read_text() == "x"
