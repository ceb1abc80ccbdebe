"""Atomic and durable writes: to a file beside the target, flushed to the disk and renamed. No TensorFlow is imported.

Links are followed: what a link points to is written, and the link stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stem_util.errors import JobError, UserError, naming_full_disk

_PATTERN = re.compile(r"[][*?\\\ud800-\udfff]")
"""Characters in a path that make it a pattern, and bytes that are not UTF-8."""
_NAME_BYTES = 190
"""Longest file name that other names are made from; Linux file systems allow 255 bytes."""


def sync(path: str | os.PathLike[str]) -> None:
    """Flushes a finished file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (os.path.isdir(path) and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise  # otherwise the file system cannot flush directories, like some network ones
    finally:
        os.close(descriptor)


def sync_tree(directory: str | os.PathLike[str]) -> None:
    """Flushes a directory with everything in it, files before the directories that name them."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(os.path.join(parent, name))
        sync(parent)


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Creates a directory and its missing parents, and flushes them to the disk; returns its real path.

    Raises:
      UserError: ``path`` is a file, or lies under one.
    """
    real = Path(os.path.realpath(path))
    missing = [directory for directory in (real, *real.parents) if not directory.exists()]
    try:
        real.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path} is a file, or lies under one") from None
    for directory in missing:
        sync(directory.parent)
    return real


def leads_outside(name: str) -> bool:
    """Whether a path that should lie below a directory is absolute, or goes up."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether a library that reads paths as UTF-8 patterns would take ``path`` for another one."""
    return _PATTERN.search(os.fspath(path)) is not None


@contextlib.contextmanager
def literal(directory: str | os.PathLike[str]) -> Iterator[str]:
    """Yields a path to a directory, valid in this process and context, for libraries that read paths as patterns.

    TensorFlow finds checkpoints by patterns, and reads names as UTF-8.
    """
    if not is_pattern(directory):
        yield os.fspath(directory)
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def hidden(path: Path, suffix: str) -> Path:
    """A hidden path beside ``path`` that no other file has; a name that is too long to extend is hashed."""
    name = path.name
    if len(os.fsencode(name)) > _NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.{suffix}")


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to; it is flushed to disk and renamed to ``path`` when the context ends without error.

    Readers see the old file or the whole new one. Several jobs may replace one file at once; the last one to end wins.
    Temporary files that killed jobs left are removed.

    Raises:
      UserError: ``path`` is a directory or a device.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} exists and is not a file; choose another path")
    _remove_leftovers(path)
    while True:
        beside = hidden(path, f"stem-tf-{os.getpid()}-{os.urandom(4).hex()}.tmp")
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try_lock(descriptor, wait=True)  # shows other jobs that this one is alive
        if os.path.exists(beside):
            break
        os.close(descriptor)  # another job took it for a leftover before it was locked
    try:
        with naming_full_disk(path):
            yield beside
            sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def moved_into_place(path: str | os.PathLike[str], scratch: str | os.PathLike[str]) -> Iterator[str]:
    """Yields a path in ``scratch`` to write to, and renames it to ``path`` when the context ends without error.

    For files of a directory that is flushed to the disk and published as a whole. Several processes may write the same
    file: each writes one of its own, and the last one to end wins. Once ``scratch`` is removed, none can any more.
    """
    beside = os.path.join(scratch, f"{uuid.uuid4().hex}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


def remove_tree(directory: str | os.PathLike[str]) -> None:
    """Removes a directory, in which others may still be writing: their paths lead nowhere from the first moment on."""
    gone = f"{directory}.{uuid.uuid4().hex}"
    os.rename(directory, gone)
    shutil.rmtree(gone)


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files of `replace_file` for ``path`` whose jobs are dead."""
    start = hidden(path, "stem-tf-").name
    for name in os.listdir(path.parent):
        if not (name.startswith(start) and name.endswith(".tmp")):
            continue
        leftover = path.with_name(name)
        with contextlib.suppress(OSError), open(leftover, "rb") as file:
            if try_lock(file.fileno()):
                leftover.unlink()


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces the content of a file; see :func:`replace_file`."""
    with replace_file(path) as beside:
        beside.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically. NaN is not JSON: give None."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise JobError(f"{path}: {error}") from error
    write_atomically(path, f"{text}\n".encode(errors="backslashreplace"))  # bytes of paths that are not UTF-8


def read_json(path: str | os.PathLike[str], way_out: str) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
      UserError: the file is missing or holds something else. The message ends with ``way_out``, which says what to do.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {way_out}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it should hold a JSON object); {way_out}")
    return value


def try_lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Locks an open file until it is closed or the process ends.

    Args:
      descriptor: descriptor of the open file.
      shared: allows other shared locks beside this one; an exclusive lock allows none.
      wait: waits until no other lock excludes this one.

    Returns:
      False where another lock excludes it.

    Raises:
      OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], output: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """Holds an exclusive lock file and deletes it at the end; a killed job leaves the file, but not the lock.

    Args:
      path: the lock file.
      output: what the job that holds it is writing.
      wait: waits for the other job to end.

    Raises:
      UserError: another job holds the lock, and ``wait`` is False.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not try_lock(descriptor, wait=wait):
            os.close(descriptor)
            raise UserError(f"another job is writing {output}; wait for it or choose another output")
        # The file may have been removed by its holder between our open and our lock: then nobody else sees our lock.
        if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        os.unlink(path)
        os.close(descriptor)
