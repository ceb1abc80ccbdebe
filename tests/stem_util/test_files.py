"""Files are replaced whole, after they have reached the disk."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from stem_util import files
from stem_util.errors import UserError


def test_nothing_is_renamed_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        done.append(("fsync", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        fsync(descriptor)

    def note_replace(old: Any, new: Any) -> None:
        done.append(("replace", Path(old).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    files.write_json(tmp_path / "file.json", {"a": 1})
    beside = done[0][1]
    assert done == [("fsync", beside), ("replace", beside), ("fsync", tmp_path.name)]
    assert os.listdir(tmp_path) == ["file.json"]

    done.clear()
    made = files.make_directory(tmp_path / "a" / "b")
    assert made.is_dir() and sorted(done) == [("fsync", "a"), ("fsync", tmp_path.name)]


def test_a_file_system_that_flushes_no_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        files.write_atomically(tmp_path / "file", b"")


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "file", b"old")
    with pytest.raises(ZeroDivisionError), files.replace_file(tmp_path / "file") as beside:
        beside.write_bytes(b"half")
        1 / 0  # noqa: B018
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "there").write_text("old")
    for name in ("there", "dangling"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
        files.write_atomically(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink() and (tmp_path / "elsewhere" / name).read_bytes() == b"new"


@pytest.mark.parametrize("name", ["lr[0.1]*?\\", "two\nlines", "日本 語 % #", "n" * 255])
def test_any_name(tmp_path: Path, name: str) -> None:
    files.write_atomically(tmp_path / name, b"one")
    files.write_atomically(tmp_path / name, b"two")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"two"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("directory", "pipe"):
        with pytest.raises(UserError, match=f"{name} exists and is not a file"):
            files.write_atomically(tmp_path / name, b"")


def test_several_writers_and_leftovers_of_dead_ones(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with files.replace_file(path) as first:
        first.write_bytes(b"first")
        stale, foreign = first.with_name(first.name.replace("stem-tf-", "stem-tf-0")), tmp_path / ".file.1.tmp"
        stale.touch()
        foreign.touch()
        with files.replace_file(path) as second:
            assert first.exists() and not stale.exists() and foreign.exists()
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert sorted(os.listdir(tmp_path)) == [".file.1.tmp", "file"]


def test_a_lock_may_be_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    with files.locked(lock, "out"):
        with pytest.raises(UserError, match="another job is writing out"), files.locked(lock, "out"):
            pass
    how: list[int] = []
    flock = fcntl.flock

    def note(descriptor: int, operation: int) -> None:
        how.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", note)
    with files.locked(lock, "out", wait=True):
        pass
    assert how == [fcntl.LOCK_EX] and not lock.exists()


def test_json_of_any_text(tmp_path: Path) -> None:
    value = {"Straße": os.fsdecode(b"/log/\xff.csv"), "列": 0.5}  # the bytes of a path need not be UTF-8
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json", "") == value
    assert '"Straße": "/log/\\udcff.csv"' in (tmp_path / "a.json").read_text(encoding="utf-8")
