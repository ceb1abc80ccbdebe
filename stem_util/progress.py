"""Progress of long work: a live bar on a terminal, one plain line per minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_NOTES = 0.5


class Progress:
    """Counts work done, and shows it on stderr.

    On a terminal it is a tqdm bar; elsewhere (CI, a log file) one line per minute, and nothing for shorter work.

        with Progress(total=rows, unit="rows", desc="count") as progress:
            progress.update(1000)

    Args:
      total: units of work in all, or None when unknown.
      unit: what is counted, in the plural.
      desc: the phase's name.
      initial: units done before, which do not count for the speed.
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
        self._done = self._initial = initial
        self._started = self._last_line = self._last_note = time.monotonic()
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
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            total = "" if self._total is None else f" of {self._total:,}"
            rate = (self._done - self._initial) / (now - self._started)
            left = f", {(self._total - self._done) / rate:,.0f} s left" if self._total and rate else ""
            speed = f", {rate:,.0f}/s" if rate >= 1 else ""
            note = f", {self._note()}" if self._note is not None else ""
            print(
                f"{self._desc}: {self._done:,}{total} {self._unit}{speed}{left}{note}",
                file=self._stream,
                flush=True,
            )
