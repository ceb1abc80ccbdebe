"""The remaining time of a call."""

from __future__ import annotations

import numbers
import time
from typing import Any

LONGEST = 86400.0
"""A day. A call that may wait for ever holds its thread for ever, and gRPC has no deadline that far off."""


class Deadline:
    """``seconds`` from now.

    Raises:
      TypeError: ``seconds`` is not a number.
      ValueError: it is not above 0, or is more than a day.
    """

    def __init__(self, seconds: Any) -> None:
        self._end = time.monotonic() + checked_seconds(seconds, "timeout")

    def remaining(self) -> float:
        """Seconds; negative once the deadline has passed."""
        return self._end - time.monotonic()


def checked_seconds(seconds: Any, what: str) -> float:
    """``seconds`` as a float; raises TypeError or ValueError as `Deadline` does."""
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
        raise TypeError(f"{what} is {seconds!r} ({type(seconds).__name__}); a number of seconds is expected")
    try:
        number = float(seconds)
    except OverflowError:  # an integer beyond floats
        number = float("inf")
    if not 0 < number <= LONGEST:
        raise ValueError(f"{what} is {seconds!r}; it should be a positive number of seconds, at most {LONGEST:,.0f}")
    return number
