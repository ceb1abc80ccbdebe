"""Keeps the versions of a served model: lists them, promotes one, rolls back, deletes old ones, checks their files.

    stem-versions list SERVED           # number, model, time, size, the gate's verdict, which one is served
    stem-versions promote SERVED 7      # version 7 is served; newer ones are moved to SERVED/aside
    stem-versions roll_back SERVED      # the version before the served one is served
    stem-versions retain SERVED 5       # deletes all but the newest 5 (and the newest 5 of those aside)
    stem-versions verify SERVED         # compares the files of each version with its manifest

SERVED is a directory or URI of versions, as stem-export and stem-publish write it. stem-serve and TensorFlow Serving
see a change at their next poll, without a restart. See docs/every_day.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from export import catalogue
from stem_tf import report
from stem_util import cli
from stem_util.errors import JobError, UserError, did_you_mean

flags = cli.Flags()

_ACTIONS = ("list", "promote", "roll_back", "retain", "verify")
_NUMBERS = {"promote": "the version's number", "retain": "how many to keep"}


def main(argv: Sequence[str]) -> None:
    action, place, number = _arguments(argv[1:])
    if action == "list":
        print(_table(catalogue.versions(place)))
    elif action == "promote":
        catalogue.promote(place, number)
        print(f"{place}: version {number} is served")
    elif action == "roll_back":
        print(f"{place}: version {catalogue.roll_back(place)} is served")
    elif action == "retain":
        gone = catalogue.retain(place, number)
        print(f"{place}: deleted {', '.join(map(str, gone)) or 'nothing'}")
    else:
        damaged = 0
        for version, why in catalogue.verify(place).items():
            print(f"{place} version {version}: {why or 'whole'}")
            damaged += bool(why)
        if damaged:
            raise JobError(f"{place}: {damaged} of its versions are not what was published")


def _arguments(words: Sequence[str]) -> tuple[str, str, int]:
    """The action, the directory or URI, and the number that `promote` and `retain` take, 0 for the others."""
    if len(words) < 2:
        raise UserError("an action and the directory of the versions are required, as in: stem-versions list SERVED")
    action, directory, *rest = words
    action = action.replace("-", "_")
    if action not in _ACTIONS:
        raise UserError(
            f"{words[0]!r} is not an action{did_you_mean(action, _ACTIONS) or '.'} Actions: {', '.join(_ACTIONS)}"
        )
    if action not in _NUMBERS and rest or len(rest) > 1:
        raise UserError(f"unexpected argument {rest[-1]!r}")
    if action in _NUMBERS and not (rest and rest[0].isascii() and rest[0].isdigit()):
        given = f", not {rest[0]!r}" if rest else ""
        raise UserError(f"stem-versions {action} {directory} needs {_NUMBERS[action]}, a whole number{given}")
    try:
        place = cli.PLACE.parse(directory)
    except ValueError as error:
        raise UserError(f"stem-versions {action}: {error}") from None
    return action, place, int(rest[0]) if rest else 0


def _table(versions: Sequence[catalogue.Version]) -> str:
    lines = [
        [
            str(version.number),
            version.model or "-",
            f"{version.time:%Y-%m-%d %H:%M} UTC",
            report.size(version.bytes),
            "served" if version.served else "aside" if version.aside else "",
            version.verdict or "no gate",
        ]
        for version in versions
    ]
    return report.table(["version", "model", "written", "size", "", "verdict"], lines)


def run() -> None:
    """Console script ``stem-versions``."""
    cli.run(main, flags, "list|promote|roll_back|retain|verify SERVED [NUMBER]")


if __name__ == "__main__":
    run()
