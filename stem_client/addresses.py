"""Which of several addresses a call goes to."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

_STRIKES = 3  # so many deadlines in a row without an answer count as one failure of the connection
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 0.25


class Addresses:
    """Round robin over the places 0 ... count - 1; one that fails is left out for a while.

    The pause is 0.1 s, then 0.2 and 0.25 s; an answer ends it: a server that is back has calls before the next one is
    restarted. After it one call tries the place again, and the others follow once that one has been answered.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._strikes = [0] * count
        self._until = [0.0] * count

    def __len__(self) -> int:
        return len(self._strikes)

    def pick(self, tried: Collection[int] = ()) -> int:
        """The next place: of those not ``tried`` one that has not failed, else one not tried, else any."""
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
        """Whether a call to a place only finds out if it is back, while another place is well."""
        with self._lock:
            return self._strikes[place] >= _STRIKES and min(self._strikes) < _STRIKES

    def answered(self, place: int) -> None:
        if self._strikes[place]:
            with self._lock:
                self._strikes[place], self._until[place] = 0, 0.0

    def failed(self, place: int, *, surely: bool) -> None:
        """``surely``: it refused; otherwise it did not answer in time, which may be the deadline's fault."""
        with self._lock:
            self._strikes[place] += _STRIKES if surely else 1
            if self._strikes[place] >= _STRIKES:
                self._until[place] = time.monotonic() + self._pause(place)

    def _pause(self, place: int) -> float:
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._strikes[place] // _STRIKES - 1, 10))
