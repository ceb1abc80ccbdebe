"""Checks that files are the ones that a manifest describes, and stay the same while a job reads them.

A check costs one stat. The content is read at the first check of a small file, and again when inode, size or time have
changed: a file that was copied or restored passes, one with other content does not. If the file system has locks,
nobody replaces converted data while they are read.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import google_crc32c

from stem_util import files, stores
from stem_util.errors import UserError

_READ_BYTES = 8 << 20
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


@dataclass(frozen=True)
class File:
    """A file as it was written: its size, and the CRC-32C of its content in hex."""

    bytes: int
    crc32c: str


@dataclass(frozen=True)
class Stamp:
    """Inode, size and time of a file. As long as they stay the same, the file was not touched."""

    inode: int
    bytes: int
    mtime_ns: int


def stamp(path: str) -> Stamp:
    """The stamp of a file, which may be in a store (those have no inodes)."""
    if stores.is_uri(path):
        stored = stores.stamp(path)
        return Stamp(0, stored.bytes, stored.mtime_ns)
    status = os.stat(path)
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


def crc32c(path: str) -> str:
    """CRC-32C of a file's content, in hex."""
    checksum = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while data := file.read(_READ_BYTES):
            checksum.update(data)
    return checksum.hexdigest().decode()


def file_of(content: bytes) -> File:
    return File(len(content), google_crc32c.Checksum(content).hexdigest().decode())


def recorded(path: str) -> File:
    """Size and checksum of a file that was just written."""
    return File(os.path.getsize(path), crc32c(path))


class Watch:
    """Checks files repeatedly, and reads their content only when they seem to have changed."""

    def __init__(self) -> None:
        self._seen: dict[str, Stamp] = {}

    def check(self, path: str, size: int, same: Callable[[], bool], *, read: bool, way_out: str) -> Stamp:
        """Makes sure that a file is the one that was recorded.

        Args:
          path: the file.
          size: its recorded size.
          same: reads the content, and returns whether it is the recorded one.
          read: read the content at the first check, too.
          way_out: the fix, for the error.

        Raises:
          UserError: the file is missing or has changed.
        """
        try:
            now = stamp(path)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path} is missing: {way_out}") from None
        before = self._seen.get(path)
        if now == before:
            return now
        if now.bytes != size:
            raise UserError(f"{path} has changed since the conversion ({now.bytes:,} bytes, {size:,} then): {way_out}")
        if (read or before is not None) and not same():
            raise UserError(f"{path} has changed since the conversion (its checksum differs): {way_out}")
        self._seen[path] = now
        return now

    def check_file(self, path: str, file: File, way_out: str) -> None:
        """Makes sure that a small file is the one that was recorded; reads its content at the first check."""
        self.check(path, file.bytes, lambda: crc32c(path) == file.crc32c, read=True, way_out=way_out)


@contextlib.contextmanager
def locked(path: str, *, exclusive: bool, why: str) -> Iterator[None]:
    """Holds a shared or exclusive lock on a file. The system releases it when the process ends, however it ends.

    If the file system has no locks, nothing is held.

    Raises:
      UserError: another process holds a lock that excludes this one; the message is ``why``.
    """
    descriptor = os.open(path, os.O_RDWR if exclusive else os.O_RDONLY)  # over NFS an exclusive lock needs writing
    try:
        try:
            free = files.try_lock(descriptor, shared=not exclusive)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            free = True
        if not free:
            raise UserError(why)
        yield
    finally:
        os.close(descriptor)
