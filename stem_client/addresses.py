"""Chooses the address of a call, if there are several."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

_STRIKES = 3  # this many unanswered calls in a row count as one failure of the connection
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 0.25


class Addresses:
    """Round robin over the places 0 ... count - 1. A place that fails is left out for a while.

    The pause is 0.1 s, then 0.2 s and 0.25 s: short, so that a restarted server has calls before the next one restarts.
    After the pause one call tries the place, and the others follow when that call was answered.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._strikes = [0] * count
        self._until = [0.0] * count

    def __len__(self) -> int:
        return len(self._strikes)

    def pick(self, tried: Collection[int] = ()) -> int:
        """Returns the next place: one that is not ``tried`` and has not failed, else one not tried, else any."""
        with self._lock:
            now, count = time.monotonic(), len(self)
            order = [(self._next + step) % count for step in range(count)]
            fresh = [place for place in order if place not in tried] or order
            place = next((place for place in fresh if self._until[place] <= now), fresh[0])
            if self._strikes[place] >= _STRIKES:
                self._until[place] = now + self._pause(place)
            self._next = (place + 1) % count
            return place

    def is_probe(self, place: int) -> bool:
        """Whether a call to this place is only a test that it is back, while another place works."""
        with self._lock:
            return self._strikes[place] >= _STRIKES and min(self._strikes) < _STRIKES

    def answered(self, place: int) -> None:
        if self._strikes[place]:
            with self._lock:
                self._strikes[place], self._until[place] = 0, 0.0

    def failed(self, place: int, *, surely: bool) -> None:
        """Notes a failure. ``surely``: it refused; otherwise the deadline passed, which may have been short."""
        with self._lock:
            self._strikes[place] += _STRIKES if surely else 1
            if self._strikes[place] >= _STRIKES:
                self._until[place] = time.monotonic() + self._pause(place)

    def _pause(self, place: int) -> float:
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._strikes[place] // _STRIKES - 1, 10))
