"""Where the versions of a model are kept, in place and aside: in a directory, or at a URI.

A directory renames a version. A store renames nothing: there a version is copied, ``saved_model.pb`` last, and then
deleted in its old place, ``saved_model.pb`` first. A job that is killed in between leaves a version in both places,
where the one in place counts, or without ``saved_model.pb`` in one of them, where it is none; the next job removes
that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from export import publish, stored
from export.publish import ASIDE, GRAPH
from export.server.directories import version_directories
from stem_util import files, owned, stores
from stem_util.errors import UserError

_DELETED = ".deleted-"


class Shelf(Protocol):
    """The versions of a model. Each is named by its path or URI."""

    def numbered(self, *, aside: bool) -> dict[int, str]:
        """The versions aside, or those in place."""

    def read(self, version: str, name: str) -> bytes | None:
        """A small file of a version; None where it cannot be read."""

    def written(self, version: str) -> datetime:
        """When a version's graph was written."""

    def size(self, version: str) -> int:
        """Bytes of a version's files."""

    def damage(self, version: str) -> str:
        """How a version differs from the one that was published, or ""."""

    def move(self, version: str, *, aside: bool) -> None:
        """Takes a version out of service, or puts it back in place."""

    def delete(self, version: str) -> None:
        """Deletes a version."""

    def moving(self) -> contextlib.AbstractContextManager[None]:
        """Held while versions are moved; removes what killed jobs have left."""


Place = str | os.PathLike[str]
"""A directory or a URI."""


def at(place: Place) -> Shelf:
    """The versions at a path or URI.

    Raises:
      UserError: there are none, or something else.
    """
    return _Stored(stores.check(os.fspath(place))) if stores.is_uri(place) else _Local(Path(place))


def no_versions(place: Place) -> UserError:
    return UserError(f"{place} holds no versions: stem-export and stem-publish write them there")


class _Local:
    """A directory, whose jobs wait for one another."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        if not owned.check(directory, owned.VERSIONS):
            raise no_versions(directory)
        self._directory = directory

    def numbered(self, *, aside: bool) -> dict[int, str]:
        directory = self._directory / ASIDE if aside else self._directory
        found = version_directories(directory).versions if directory.is_dir() else {}
        return {number: str(path) for number, path in found.items()}

    def read(self, version: str, name: str) -> bytes | None:
        try:
            return publish.read_small(Path(version) / name)
        except (OSError, ValueError):
            return None

    def written(self, version: str) -> datetime:
        try:
            seconds = (Path(version) / GRAPH).stat().st_mtime
        except OSError:
            seconds = Path(version).stat().st_mtime
        return datetime.fromtimestamp(seconds, UTC)

    def size(self, version: str) -> int:
        return publish.size(Path(version))

    def damage(self, version: str) -> str:
        return publish.damage(Path(version))

    def move(self, version: str, *, aside: bool) -> None:
        directory = files.make_directory(self._directory / ASIDE) if aside else self._directory
        os.rename(version, directory / Path(version).name)
        files.sync(directory)
        files.sync(Path(version).parent)

    def delete(self, version: str) -> None:
        gone = self._directory / f"{_DELETED}{Path(version).name}"
        os.rename(version, gone)
        _remove(gone)
        files.sync(self._directory)

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        with publish.moving(self._directory):
            for leftover in self._directory.glob(f"{_DELETED}*"):
                _remove(leftover)
            yield


def _remove(version: Path) -> None:
    """Deletes a version, or the link to one."""
    if version.is_symlink():
        version.unlink()
    else:
        shutil.rmtree(version)


class _Stored:
    """A URI. Nothing keeps two jobs from moving its versions at once."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def numbered(self, *, aside: bool) -> dict[int, str]:
        names = stores.listing(self._uri)
        in_place = self._whole(names)
        return (
            {n: uri for n, uri in self._whole(names, f"{ASIDE}/").items() if n not in in_place} if aside else in_place
        )

    def _whole(self, names: dict[str, stores.Stamp], directory: str = "") -> dict[int, str]:
        inside = {name.removeprefix(directory): of for name, of in names.items() if name.startswith(directory)}
        return {int(name): f"{self._uri}/{directory}{name}" for name in stored.versions(self._uri, inside)}

    def read(self, version: str, name: str) -> bytes | None:
        return stores.read(f"{version}/{name}")

    def written(self, version: str) -> datetime:
        return datetime.fromtimestamp(stores.stamp(f"{version}/{GRAPH}").mtime_ns / 1e9, UTC)

    def size(self, version: str) -> int:
        return sum(stamp.bytes for stamp in stores.listing(version).values())

    def damage(self, version: str) -> str:
        return stored.damage(version)

    def move(self, version: str, *, aside: bool) -> None:
        stored.move(version, f"{self._uri}/{ASIDE}" if aside else self._uri)

    def delete(self, version: str) -> None:
        stored.delete(version)

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """A half version above those in place may be the upload of another job, unless it lies aside as a whole."""
        names = stores.listing(self._uri)
        newest, aside = max(self._whole(names), default=0), self._whole(names, f"{ASIDE}/")
        for number in stored.halves(names):
            if int(number) < newest or int(number) in aside:
                stores.delete_below(f"{self._uri}/{number}")
        yield
