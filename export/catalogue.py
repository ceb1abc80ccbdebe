"""The versions of a model, as a person keeps them: which one is served, promotion, roll-back, retention, checksums.

    SERVED/7, SERVED/8        in place: servers serve the newest of them
    SERVED/aside/9            taken out of service; servers pass over it, because it is no number
    SERVED/.last_version      the highest number so far

TensorFlow Serving and stem-serve serve the highest number, so a version is promoted by moving every higher one aside. A
promotion moves the served version last. So at any moment, and after a kill, either the version before or the promoted
one is the highest, and both are whole. Nothing is lost: what is aside can be promoted again under its own number.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from export import publish
from export.publish import ASIDE
from export.server.directories import version_directories
from stem_util import files, owned
from stem_util.errors import UserError, did_you_mean

_DELETED = ".deleted-"
VERDICT = "verdict.json"
"""File of the gate's verdict, in a version that passed it."""


@dataclass(frozen=True)
class Version:
    """A version under a directory of versions.

    Attributes:
      number: its number.
      path: its directory.
      served: it is the newest in place.
      aside: it was taken out of service.
    """

    number: int
    path: Path
    served: bool
    aside: bool

    @property
    def model(self) -> str:
        """The model's name; "" if its manifest does not say."""
        return publish.model_of(self.path)

    @property
    def time(self) -> datetime:
        """When its graph was written."""
        try:
            seconds = (self.path / "saved_model.pb").stat().st_mtime
        except OSError:
            seconds = self.path.stat().st_mtime
        return datetime.fromtimestamp(seconds, UTC)

    @property
    def bytes(self) -> int:
        """Of its files."""
        return publish.size(self.path)

    @property
    def verdict(self) -> str:
        """What the gate said of it; "" if it was published without."""
        try:
            tree = json.loads((self.path / VERDICT).read_bytes())
            held = sum(check["outcome"] == "holds" for check in tree["checks"])
            against = tree["served"]["version"] if tree["served"] else "nothing"
            return f"{held} rules held, against {against}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def versions(directory: Path) -> list[Version]:
    """All versions, in place and aside, by number.

    Raises:
      UserError: ``directory`` holds no versions.
    """
    _check(directory)
    before = None
    while before != (aside := _numbered(directory / ASIDE)):  # again, where another job has moved one meanwhile
        before, in_place = aside, _numbered(directory)
    if not (in_place or aside):
        raise UserError(f"{directory} holds no versions: stem-export and stem-publish write them there")
    if twice := sorted(in_place.keys() & aside.keys()):
        raise UserError(f"{directory} holds version {twice[0]} twice, in place and in {ASIDE}/: remove one of the two")
    found = [Version(number, path, number == max(in_place), False) for number, path in in_place.items()]
    found += [Version(number, path, False, True) for number, path in aside.items()]
    return sorted(found, key=lambda version: version.number)


def _numbered(directory: Path) -> dict[int, Path]:
    return version_directories(directory).versions if directory.is_dir() else {}


def promote(directory: Path, number: int) -> None:
    """Makes a version the one that is served, by moving all newer ones aside; it may be aside itself.

    Raises:
      UserError: there is no such version, or its files are not those that were published.
    """
    with _moving(directory):
        _promote(directory, number)


def roll_back(directory: Path) -> int:
    """Promotes the newest version in place before the served one; returns its number.

    Raises:
      UserError: there is none, or its files are not those that were published.
    """
    with _moving(directory):
        in_place = [version.number for version in versions(directory) if not version.aside]
        if len(in_place) < 2:
            raise UserError(f"{directory} has no version before the served one to roll back to")
        _promote(directory, in_place[-2])
        return in_place[-2]


def _promote(directory: Path, number: int) -> None:
    known = {version.number: version for version in versions(directory)}
    if number not in known:
        names = [str(n) for n in known]
        raise UserError(
            f"{directory} has no version {number}{did_you_mean(str(number), names) or '.'} Versions: {', '.join(names)}"
        )
    if why := publish.damage(known[number].path):
        raise UserError(f"{known[number].path} is not the version that was published, so it was not promoted: {why}")
    aside = files.make_directory(directory / ASIDE)
    newer = [version for n, version in known.items() if n > number and not version.aside]
    if known[number].aside:
        _move(known[number].path, directory)
    for version in newer:  # ascending: the served version goes last, and until then it is served
        _move(version.path, aside)


def _move(version: Path, directory: Path) -> None:
    os.rename(version, directory / version.name)
    files.sync(directory)
    files.sync(version.parent)


def retain(directory: Path, keep: int) -> list[int]:
    """Deletes all but the newest ``keep`` versions in place, of which one is served, and as many aside.

    Returns:
      The numbers that were deleted.

    Raises:
      UserError: ``keep`` is less than 1, or ``directory`` serves no version, or a damaged one, so that an older one may
        be needed.
    """
    if keep < 1:
        raise UserError(f"{keep} versions cannot be kept: the served one is never deleted, so keep 1 or more")
    with _moving(directory):
        known = versions(directory)
        served = next((version for version in known if version.served), None)
        if served is None:
            raise UserError(f"{directory} serves no version: promote one of {ASIDE}/ first")
        if why := publish.damage(served.path):
            raise UserError(
                f"{served.path}, which is served, is not the version that was published, so nothing was deleted: "
                f"{why}; promote another one first"
            )
        old = [v for aside in (False, True) for v in [v for v in known if v.aside == aside][:-keep]]
        for version in old:
            gone = directory / f"{_DELETED}{version.number}"
            os.rename(version.path, gone)
            _remove(gone)
        files.sync(directory)
    return sorted(version.number for version in old)


def verify(directory: Path) -> dict[int, str]:
    """How the files of each version differ from those that were published; "" where they do not."""
    return {version.number: publish.damage(version.path) for version in versions(directory)}


@contextlib.contextmanager
def _moving(directory: Path) -> Iterator[None]:
    """Held while versions are moved; removes what a killed deletion left."""
    _check(directory)
    with publish.moving(directory):
        for leftover in directory.glob(f"{_DELETED}*"):
            _remove(leftover)
        yield


def _remove(version: Path) -> None:
    """Deletes a version, or the link to one."""
    if version.is_symlink():
        version.unlink()
    else:
        shutil.rmtree(version)


def _check(directory: Path) -> None:
    """Raises UserError for a directory that is missing or of another kind."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    if not owned.check(directory, owned.VERSIONS):
        raise UserError(f"{directory} holds no versions: stem-export and stem-publish write them there")
