"""The versions of a model: in a directory on this machine, or at a URI, whose versions are copied to be served."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from export import stored
from stem_util import stores

Fingerprint = tuple[tuple[str, int, int, int], ...]
_INT64 = 1 << 63


@dataclasses.dataclass
class Listing:
    """What a base path holds.

    Attributes:
      versions: paths by number, complete or not; at a URI, those of local copies, which `BasePath.fetch` makes.
      ignored: one sentence for each directory whose name is a number but which is not a version.
    """

    versions: dict[int, Path]
    ignored: list[str]


class BasePath(Protocol):
    """Where the versions of a model are."""

    def listing(self) -> Listing:
        """Raises OSError, or UserError or JobError of a store, where the versions cannot be listed."""

    def fingerprint(self, path: Path) -> Fingerprint:
        """Names, sizes and times of the files of a version of the last listing, to see changes."""

    def fetch(self, path: Path) -> None:
        """Makes the copy of a version of the last listing, if it is at a URI; raises as `export.stored.fetched`."""


def versions_at(place: Path | str) -> BasePath:
    """The versions in a directory, or at a URI."""
    return _Stored(stores.check(os.fspath(place))) if stores.is_uri(place) else _Local(Path(place))


class _Local:
    def __init__(self, path: Path) -> None:
        self._path = path

    def listing(self) -> Listing:
        return version_directories(self._path)

    def fingerprint(self, path: Path) -> Fingerprint:
        return fingerprint(path)

    def fetch(self, path: Path) -> None:
        """It is here."""


class _Stored:
    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._files: dict[str, Fingerprint] = {}

    def listing(self) -> Listing:
        """The versions that have a ``saved_model.pb``, which comes last. Removes copies of those that are gone."""
        found = stored.versions(self._uri, stores.listing(self._uri))
        self._files = {
            version: tuple((name, stamp.bytes, stamp.mtime_ns, 0) for name, stamp in files)
            for version, files in found.items()
        }
        copies = stored.copy_of(f"{self._uri}/0").parent
        for copy in copies.iterdir() if copies.is_dir() else ():
            if copy.name.isdecimal() and copy.name not in found:
                shutil.rmtree(copy, ignore_errors=True)
        named, ignored = _numbered(self._uri, found)
        return Listing({version: stored.copy_of(f"{self._uri}/{name}") for version, name in named.items()}, ignored)

    def fingerprint(self, path: Path) -> Fingerprint:
        return self._files[path.name]

    def fetch(self, path: Path) -> None:
        stored.fetched(f"{self._uri}/{path.name}")


def version_directories(base_path: Path) -> Listing:
    """The versions in a directory, complete or not.

    Raises:
      OSError: ``base_path`` cannot be listed.
    """
    named, ignored = _numbered(base_path, (name for name in os.listdir(base_path) if (base_path / name).is_dir()))
    return Listing({version: base_path / name for version, name in named.items()}, ignored)


def _numbered(place: Path | str, names: Iterable[str]) -> tuple[dict[int, str], list[str]]:
    """Names by their number, and a sentence for each number that is ignored.

    Names are read as in TensorFlow Serving: decimal, within int64. ``007`` is 7, and `.3.partial` is not a version.
    """
    found: dict[int, str] = {}
    ignored = []
    numbers = [name for name in names if name.isascii() and name.isdecimal()]
    for name in sorted(numbers, key=lambda name: (len(name), name)):  # the shortest of two spellings is the usual one
        if len(name.lstrip("0")) > 19 or int(name) >= _INT64:
            ignored.append(f"{place}/{name} is not a version: the largest is {_INT64 - 1}")
        elif int(name) in found:
            ignored.append(f"{place}/{name} is ignored: {place}/{found[int(name)]} is version {int(name)}, too")
        else:
            found[int(name)] = name
    return found, ignored


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
