"""Outputs appear whole or not at all."""

import os
from pathlib import Path

import pytest

from pipelines.convert.staging import staged
from stem_util import owned
from stem_util.errors import UserError


def _fill(output: Path, text: str, *, overwrite: bool = False) -> None:
    with staged(str(output), kind=owned.DATA, overwrite=overwrite) as directory:
        Path(directory, "done").write_text(text)


def test_appears_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with staged(str(output), kind=owned.DATA, overwrite=False) as directory:
        Path(directory, "done").write_text("x")
        assert not output.exists()
    assert (output / "done").read_text() == "x"
    assert os.listdir(output.parent) == ["out"]
    assert owned.kind_of(output) == owned.DATA


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(str(tmp_path / "out"), kind=owned.DATA, overwrite=False):
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
    with pytest.raises(RuntimeError), staged(str(output), kind=owned.DATA, overwrite=True):
        raise RuntimeError
    assert (output / "done").read_text() == "two"
    assert os.listdir(tmp_path) == ["out"]


def test_what_others_put_into_an_output_is_not_replaced_with_it(tmp_path: Path) -> None:
    output = tmp_path / "out"
    _fill(output, "one")
    (output / "runs" / "first").mkdir(parents=True)
    _fill(output, "two", overwrite=True)  # nothing to lose in empty directories
    (output / "runs").mkdir()
    (output / "runs" / "weights").write_text("a week of training")
    (output / "notes").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"out also holds files that do not belong to it \(notes and 1 more\)"):
        _fill(output, "three", overwrite=True)
    assert (output / "done").read_text() == "two" and (output / "runs" / "weights").exists()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    for name in ("there", "dangling"):
        (tmp_path / name).symlink_to(tmp_path / "big" / name)
    (tmp_path / "big" / "there").mkdir()
    for text in ("one", "two"):
        for name in ("there", "dangling"):
            _fill(tmp_path / name, text, overwrite=True)
            assert (tmp_path / "big" / name / "done").read_text() == text
            assert (tmp_path / name).is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["big", "dangling", "there"]
    assert sorted(os.listdir(tmp_path / "big")) == ["dangling", "there"]


@pytest.mark.parametrize("name", ["lr[0.1]*?", "two\nlines", "日本 語 % #'\"\\", "n" * 255])
def test_any_name(tmp_path: Path, name: str) -> None:
    _fill(tmp_path / name, "one")
    _fill(tmp_path / name, "two", overwrite=True)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name / "done").read_text() == "two"


def test_foreign_things_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UserError, match="file is a file"):
        _fill(tmp_path / "file", "x", overwrite=True)
    with pytest.raises(UserError, match=r"holds something else \(a.jpg\)"):
        _fill(tmp_path / "photos", "x", overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_two_jobs_refuse_the_same_output(tmp_path: Path) -> None:
    with staged(str(tmp_path / "out"), kind=owned.DATA, overwrite=False) as directory:
        with pytest.raises(UserError, match="another job is writing .*out"):
            _fill(tmp_path / "out", "x")
        Path(directory, "done").touch()
    _fill(tmp_path / "out", "x", overwrite=True)


def test_leftovers_of_killed_jobs(tmp_path: Path) -> None:
    owned.claim(tmp_path / ".out.partial-1", owned.DATA)
    (tmp_path / ".out.partial-1" / "half").touch()
    (tmp_path / ".out.partial-2").mkdir()  # killed before it was marked
    (tmp_path / ".out.partial-3").mkdir()  # killed while it was marked
    (tmp_path / ".out.partial-3" / f".{owned.MARKER}.stem-tf-1-ab.tmp").touch()
    (tmp_path / ".out.partial-mine").mkdir()
    (tmp_path / ".out.partial-mine" / "photo").touch()
    (tmp_path / ".out.lock").touch()
    (tmp_path / ".outer.partial-1").mkdir()
    _fill(tmp_path / "out", "x")
    assert sorted(os.listdir(tmp_path)) == [".out.partial-mine", ".outer.partial-1", "out"]
    # Killed after the old output was set aside: it comes back, and a failing job leaves it.
    os.rename(tmp_path / "out", tmp_path / ".out.replaced-1")
    with pytest.raises(UserError, match="exists already"):
        _fill(tmp_path / "out", "y")
    assert (tmp_path / "out" / "done").read_text() == "x"
