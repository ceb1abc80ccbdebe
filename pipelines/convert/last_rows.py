"""The last rows of every group, which a leave-last split holds out."""

from __future__ import annotations

import numpy as np


class LastRows:
    """Finds the last three rows of every group, holding about as many rows as it keeps: at most three a group."""

    _KIND = np.dtype([("group", np.int64), ("time", np.uint64), ("row", np.int64)])
    _LAST = 3

    def __init__(self) -> None:
        self._kept = np.zeros(0, self._KIND)
        self._more: list[np.ndarray] = []

    def add(self, groups: np.ndarray, times: np.ndarray, rows: np.ndarray) -> None:
        """Takes in rows: int64 [n] keys of groups, uint64 [n] of `order_keys`, int64 [n] distinct places."""
        more = np.empty(len(rows), self._KIND)
        more["group"], more["time"], more["row"] = groups, times, rows
        self.merge(more)

    def merge(self, more: np.ndarray) -> None:
        """Takes in what another one kept."""
        self._more.append(more)
        # Sorting whenever rows have doubled costs no more than a sort of all of them.
        if sum(map(len, self._more)) > max(len(self._kept), 1 << 20):
            self.kept()

    def kept(self) -> np.ndarray:
        """The last rows of each group, by group, then time, then place: structured, ``group``, ``time`` and ``row``."""
        rows = np.concatenate([self._kept, *self._more])
        rows = rows[np.lexsort((rows["row"], rows["time"], rows["group"]))]
        self._kept, self._more = rows[self._from_end(rows) < self._LAST], []
        return self._kept

    @staticmethod
    def _from_end(rows: np.ndarray) -> np.ndarray:
        """How many rows of its group stand behind each."""
        ends = np.append(np.flatnonzero(np.diff(rows["group"])), len(rows) - 1)
        lengths = np.diff(ends, prepend=-1)
        return np.repeat(ends, lengths[: len(ends)]) - np.arange(len(rows)) if len(rows) else np.zeros(0, np.int64)

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """The places of the last row but one, and of the last one, of the groups that have three or more."""
        rows = self.kept()
        from_end = self._from_end(rows)
        first = np.flatnonzero(from_end == self._LAST - 1)  # of a group of three, whose rows stand side by side
        return rows["row"][first + 1], rows["row"][first + 2]
