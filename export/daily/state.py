"""The directory of `stem-daily`: what is known about each day, and what each has left.

    .stem-tf           says that these are days of stem-daily
    served/            the published versions, unless --served names another place
    history.csv        one line per day, for people and other programs
    days/2026-11-20/
      day.json         what was done, when and why; written after each step
      output.txt       what the jobs printed
      verdict.json     the gate's comparison with the served version
      data/, run/      the converted log and the run, for as long as --keep says or another day needs them

``day.json`` alone decides what is done. ``history.csv`` is made from it.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stem_util import files, owned
from stem_util.errors import UserError

PUBLISHED, REFUSED, LEFT_OUT = "published", "refused", "left out"
DONE = (PUBLISHED, REFUSED)
"""Decisions that end a day. A day that is left out was begun, and a later one was done before it."""

_NAME = re.compile(r"(?<!\d)\d{4}-\d{2}-\d{2}(?:T\d{2}(?:-\d{2})?)?(?!\d)")
_FORMATS = ("%Y-%m-%d", "%Y-%m-%dT%H", "%Y-%m-%dT%H-%M")
_COLUMNS = ("day", "decision", "version", "rows", "new_ids", "from", "served_auc", "auc", "seconds", "ended", "why")


def day_of(text: str) -> str:
    """The day in the last part of a path: ``logs/day=2026-11-20`` or ``2026-11-20T14.parquet``.

    Raises:
      UserError: there is none, or more than one.
    """
    name = os.path.basename(text.rstrip("/"))
    found = set(_NAME.findall(name))
    if len(found) != 1:
        raise UserError(f"--day is not given, and the name '{name}' of the log has no single date such as 2026-11-20")
    return check_day(found.pop())


def check_day(day: str) -> str:
    """Returns the name of a day, of an hour or of a minute. Names in order are times in order.

    Raises:
      UserError: it is none.
    """
    for form in _FORMATS:
        with contextlib.suppress(ValueError):
            if datetime.datetime.strptime(day, form).strftime(form) == day:
                return day
    raise UserError(f"--day={day}: should be a date such as 2026-11-20, an hour 2026-11-20T14 or a minute T14-30 of it")


class Day:
    """One day: its directory, and ``day.json`` as the dict `record`."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.data, self.run = path / "data", path / "run"
        self.output, self.verdict = path / "output.txt", path / "verdict.json"
        self._record = path / "day.json"
        self.record: dict[str, Any] = {}
        if self._record.exists():
            self.record = files.read_json(self._record, "restore it from a backup, or begin with another --state")

    @property
    def decision(self) -> str:
        """One of `DONE`, `LEFT_OUT`, or "" while the day is not done."""
        return str(self.record.get("decision", ""))

    def write(self, **values: Any) -> None:
        """Changes values of the record and flushes it to the disk."""
        self.record |= values
        files.make_directory(self.path)
        files.write_json(self._record, self.record)

    def said(self) -> str:
        """The decision as a sentence."""
        if self.decision == PUBLISHED:
            return f"{self.name}: published as version {self.record['version']}"
        return f"{self.name}: {self.decision}: {self.record.get('why', '')}"


class State:
    """All days, in order.

    Raises:
      UserError: the directory holds something else.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        owned.check(directory, owned.DAYS)
        self.path = Path(os.path.abspath(directory))
        self._days = self.path / "days"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from working on the days until this one ends.

        Raises:
          UserError: another one does.
        """
        owned.claim(self.path, owned.DAYS)
        files.make_directory(self._days)
        with open(self.path / ".lock", "a+") as file:
            if not files.try_lock(file.fileno()):
                file.seek(0)
                raise UserError(f"another stem-daily (process {file.read().strip()}) works in {self.path}: wait for it")
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def day(self, name: str) -> Day:
        return Day(self._days / name)

    def days(self) -> list[Day]:
        names = sorted(entry.name for entry in self._days.iterdir()) if self._days.is_dir() else []
        return [self.day(name) for name in names if _NAME.fullmatch(name)]

    def done(self) -> list[Day]:
        return [day for day in self.days() if day.decision in DONE]

    def last(self, published: bool, until: int | None = None) -> Day | None:
        """The last day that is done; or the last one that was published, as version ``until`` or one before it."""
        found = [day for day in self.done() if not published or day.decision == PUBLISHED]
        if until is not None:
            found = [day for day in found if day.record["version"] <= until]
        return found[-1] if found else None

    def tidy(self, keep: int) -> None:
        """Writes ``history.csv``, and removes data and runs but those of ``keep`` days and those that the next needs.

        Whether the next day goes on from the last one or from the last published one, it finds what it needs.
        """
        files.write_atomically(self.path / "history.csv", self.history().encode())
        done = self.done()
        needed = {day.name for day in (self.last(published=True), *done[-keep:]) if day is not None}
        newest = done[-1].name if done else ""
        for day in self.days():
            if day.name in needed or day.name > newest:
                continue
            for entry in day.path.iterdir():
                if entry.is_dir():
                    files.remove_tree(entry)

    def history(self) -> str:
        """All days as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(line, self.days()))
        return text.getvalue()


def line(day: Day) -> dict[str, Any]:
    """A day as one line of the history: ``auc`` and ``served_auc`` are means over the tasks that both have."""
    record = day.record
    return {
        "day": day.name,
        "decision": day.decision or ("failed" if "error" in record else "not done"),
        "version": record.get("version", ""),
        "rows": record.get("rows", ""),
        "new_ids": record.get("new_ids", ""),
        "from": record.get("from") or "",
        "served_auc": _rounded(record.get("served_auc")),
        "auc": _rounded(record.get("auc")),
        "seconds": round(sum(step["seconds"] for step in record.get("steps", {}).values())) or "",
        "ended": record.get("ended", ""),
        "why": record.get("why") or record.get("error", ""),
    }


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 4)
