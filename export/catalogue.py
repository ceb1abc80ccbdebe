"""The versions of a model, as a person keeps them: which one is served, promotion, roll-back, retention, checksums.

    SERVED/7, SERVED/8        in place: servers serve the newest of them
    SERVED/aside/9            taken out of service; servers pass over it, because it is no number
    SERVED/.last_version      the highest number so far; of a URI, SERVED/_exports/ has all numbers so far

TensorFlow Serving and stem-serve serve the highest number, so a version is promoted by moving every higher one aside. A
promotion moves the served version last. So at any moment, and after a kill, either the version before or the promoted
one is the highest, and both are whole. Nothing is lost: what is aside can be promoted again under its own number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from export import publish, shelves
from export.publish import ASIDE, VERDICT
from export.shelves import Place, Shelf
from pipelines import manifest as manifests
from stem_util.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Version:
    """A version.

    Attributes:
      shelf: where it is kept.
      number: its number.
      place: its directory or URI.
      served: it is the newest in place.
      aside: it was taken out of service.
    """

    shelf: Shelf
    number: int
    place: str
    served: bool
    aside: bool

    @property
    def model(self) -> str:
        """The model's name; "" if its manifest does not say."""
        try:
            return publish.model_in(json.loads(self.shelf.read(self.place, manifests.FILENAME) or b""))
        except (ValueError, RecursionError):
            return ""

    @property
    def time(self) -> datetime:
        """When its graph was written."""
        return self.shelf.written(self.place)

    @property
    def bytes(self) -> int:
        """Of its files."""
        return self.shelf.size(self.place)

    @property
    def verdict(self) -> str:
        """What the gate said of it; "" if it was published without."""
        try:
            tree = json.loads(self.shelf.read(self.place, VERDICT) or b"")
            held = sum(check["outcome"] == "holds" for check in tree["checks"])
            against = tree["served"]["version"] if tree["served"] else "nothing"
            return f"{held} rules held, against {against}"
        except (ValueError, KeyError, TypeError):
            return ""

    @property
    def damage(self) -> str:
        """How it differs from the one that was published, or ""."""
        return self.shelf.damage(self.place)


def versions(place: Place) -> list[Version]:
    """All versions, in place and aside, by number.

    Raises:
      UserError: ``place``, a directory or URI, holds no versions.
    """
    return _versions(shelves.at(place), place)


def _versions(shelf: Shelf, place: Place) -> list[Version]:
    before = None
    while before != (aside := shelf.numbered(aside=True)):  # again, where another job has moved one meanwhile
        before, in_place = aside, shelf.numbered(aside=False)
    if not (in_place or aside):
        raise shelves.no_versions(place)
    if twice := sorted(in_place.keys() & aside.keys()):
        raise UserError(f"{place} holds version {twice[0]} twice, in place and in {ASIDE}/: remove one of the two")
    found = [Version(shelf, number, of, number == max(in_place), False) for number, of in in_place.items()]
    found += [Version(shelf, number, of, False, True) for number, of in aside.items()]
    return sorted(found, key=lambda version: version.number)


def promote(place: Place, number: int) -> None:
    """Makes a version the one that is served, by moving all newer ones aside; it may be aside itself.

    Raises:
      UserError: there is no such version, or its files are not those that were published.
    """
    shelf = shelves.at(place)
    with shelf.moving():
        _promote(shelf, place, number)


def roll_back(place: Place) -> int:
    """Promotes the newest version in place before the served one; returns its number.

    Raises:
      UserError: there is none, or its files are not those that were published.
    """
    shelf = shelves.at(place)
    with shelf.moving():
        in_place = [version.number for version in _versions(shelf, place) if not version.aside]
        if len(in_place) < 2:
            raise UserError(f"{place} has no version before the served one to roll back to")
        _promote(shelf, place, in_place[-2])
        return in_place[-2]


def _promote(shelf: Shelf, place: Place, number: int) -> None:
    known = {version.number: version for version in _versions(shelf, place)}
    if number not in known:
        names = [str(n) for n in known]
        raise UserError(
            f"{place} has no version {number}{did_you_mean(str(number), names)} Versions: {', '.join(names)}"
        )
    if why := known[number].damage:
        raise UserError(f"{known[number].place} is not the version that was published, so it was not promoted: {why}")
    newer = [version for n, version in known.items() if n > number and not version.aside]
    if known[number].aside:
        shelf.move(known[number].place, aside=False)
    for version in newer:  # ascending: the served version goes last, and until then it is served
        shelf.move(version.place, aside=True)


def retain(place: Place, keep: int) -> list[int]:
    """Deletes all but the newest ``keep`` versions in place, of which one is served, and as many aside.

    Returns:
      The numbers that were deleted.

    Raises:
      UserError: ``keep`` is less than 1, or ``place`` serves no version, or a damaged one, so that an older one may be
        needed.
    """
    if keep < 1:
        raise UserError(f"{keep} versions cannot be kept: the served one is never deleted, so keep 1 or more")
    shelf = shelves.at(place)
    with shelf.moving():
        known = _versions(shelf, place)
        served = next((version for version in known if version.served), None)
        if served is None:
            raise UserError(f"{place} serves no version: promote one of {ASIDE}/ first")
        if why := served.damage:
            raise UserError(
                f"{served.place}, which is served, is not the version that was published, so nothing was deleted: "
                f"{why}; promote another one first"
            )
        old = [v for aside in (False, True) for v in [v for v in known if v.aside == aside][:-keep]]
        for version in old:
            shelf.delete(version.place)
    return sorted(version.number for version in old)


def verify(place: Place) -> dict[int, str]:
    """How the files of each version differ from those that were published; "" where they do not."""
    return {version.number: version.damage for version in versions(place)}
