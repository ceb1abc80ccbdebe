"""How much time a call has left."""

from __future__ import annotations

import time


class Deadline:
    """``seconds`` from now; raises ValueError when that is not a positive number."""

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"timeout is {seconds!r}; it should be a positive number of seconds")
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds; negative once the deadline has passed."""
        return self._end - time.monotonic()
