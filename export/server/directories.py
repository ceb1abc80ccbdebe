"""Version directories on disk."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

Fingerprint = tuple[tuple[str, int, int, int], ...]
_INT64 = 1 << 63


@dataclasses.dataclass
class Listing:
    """What a base path holds.

    Attributes:
      versions: paths by number, complete or not.
      ignored: one sentence for each directory whose name is a number but which is not a version.
    """

    versions: dict[int, Path]
    ignored: list[str]


def version_directories(base_path: Path) -> Listing:
    """The versions under ``base_path``.

    Names are read as in TensorFlow Serving: decimal, within int64. ``007`` is 7, and `.3.partial` is not a version.

    Raises:
      OSError: ``base_path`` cannot be listed.
    """
    listing = Listing({}, [])
    names = [name for name in os.listdir(base_path) if name.isascii() and name.isdecimal()]
    for name in sorted(names, key=lambda name: (len(name), name)):  # the shortest of two spellings is the usual one
        path = base_path / name
        if not path.is_dir():
            continue
        if len(name.lstrip("0")) > 19 or int(name) >= _INT64:
            listing.ignored.append(f"{path} is not a version: the largest is {_INT64 - 1}")
        elif int(name) in listing.versions:
            listing.ignored.append(f"{path} is ignored: {listing.versions[int(name)]} is version {int(name)}, too")
        else:
            listing.versions[int(name)] = path
    return listing


def fingerprint(path: Path) -> Fingerprint:
    """Names, sizes and times of a version's files and directories, to see changes, also of permissions."""
    seen = [_look(os.fspath(path))]
    for directory, directories, names in os.walk(path):
        seen += [_look(os.path.join(directory, name)) for name in (*directories, *names)]
    return tuple(sorted(seen))


def _look(path: str) -> tuple[str, int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return path, 0, 0, 0
    return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns
