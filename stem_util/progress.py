"""Progress of long work: a live bar on a terminal, one plain line per minute elsewhere.

A line counts finished work. A job that prints none for minutes makes no progress.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_NOTES = 0.5
_HOUR = 3600.0


class _Minute:
    """Says when a line is due: a minute after the start, and a minute after each line."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def passed(self, now: float) -> bool:
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return False
        self._last = now
        return True


_of_job: _Minute | None = None


@contextlib.contextmanager
def of_one_job() -> Iterator[None]:
    """Inside this context all progress has one minute in common: many short phases print a line per minute too."""
    global _of_job
    before, _of_job = _of_job, _Minute()
    try:
        yield
    finally:
        _of_job = before


def duration(seconds: float) -> str:
    """``8 s``, ``4 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / _HOUR:.1f} h"


class Progress:
    """Counts work done, and shows it on stderr.

    On a terminal it is a tqdm bar; elsewhere (CI, a log file) one line per minute, and nothing for shorter work. The
    speed in a line is that since the line before.

        with Progress(total=rows, unit="rows", desc="count") as progress:
            progress.update(1000)

    Args:
      total: units of work in all, or None when unknown.
      unit: what is counted, in the plural.
      desc: the phase's name.
      initial: units done before.
      note: returns a text to show after the counts; called only when it is shown.
      stream: where to print; stderr by default.
    """

    def __init__(
        self,
        total: int | None,
        *,
        unit: str,
        desc: str,
        initial: int = 0,
        note: Callable[[], str] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = stream or sys.stderr
        self._total, self._unit, self._desc, self._note = total, unit, desc, note
        self._done = initial
        self._minute = _of_job or _Minute()
        self._last_note = now = time.monotonic()
        self._last_line = now, initial
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total,
                unit=f" {unit}",
                desc=desc,
                initial=initial,
                unit_scale=True,
                dynamic_ncols=True,
                file=self._stream,
                leave=False,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def done(self) -> int:
        """Units of work counted so far."""
        return self._done

    def update(self, amount: int) -> None:
        """Adds ``amount`` units of finished work."""
        self._done += amount
        now = time.monotonic()
        if self._bar is not None:
            if self._note is not None and now - self._last_note >= _SECONDS_BETWEEN_NOTES:
                self._last_note = now
                self._bar.set_postfix_str(self._note(), refresh=False)
            self._bar.update(amount)
            return
        if self._minute.passed(now):
            print(self._line(now), file=self._stream, flush=True)

    def _line(self, now: float) -> str:
        (then, before), self._last_line = self._last_line, (now, self._done)
        rate = (self._done - before) / (now - then) if now > then else 0.0
        total = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._desc}: {self._done:,}{total} {self._unit}"]
        if rate >= 1:
            parts.append(f"{rate:,.0f}/s")
        if self._note is not None:
            parts.append(self._note())
        if self._total is not None and rate:
            parts.append(f"{duration((self._total - self._done) / rate)} left")
        return ", ".join(parts)
