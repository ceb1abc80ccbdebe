"""Finds the last rows of every group, which a leave-last split holds out."""

from __future__ import annotations

import numpy as np


class LastRows:
    """Finds the last three rows of every group. Memory holds about three rows per group."""

    _KIND = np.dtype([("group", np.int64), ("time", np.uint64), ("row", np.int64)])
    _LAST = 3

    def __init__(self) -> None:
        self._kept = np.zeros(0, self._KIND)
        self._more: list[np.ndarray] = []

    def add(self, groups: np.ndarray, times: np.ndarray, rows: np.ndarray) -> None:
        """Adds rows: group keys int64 [n], times as `order_keys` uint64 [n], and distinct places int64 [n]."""
        more = np.empty(len(rows), self._KIND)
        more["group"], more["time"], more["row"] = groups, times, rows
        self.merge(more)

    def merge(self, more: np.ndarray) -> None:
        """Adds the rows that another instance kept (see `kept`)."""
        self._more.append(more)
        # Sorting only when the number of rows has doubled costs about as much as sorting all of them once.
        if sum(map(len, self._more)) > max(len(self._kept), 1 << 20):
            self.kept()

    def kept(self) -> np.ndarray:
        """The last rows of each group: a structured array (``group``, ``time``, ``row``), sorted by these fields."""
        rows = np.concatenate([self._kept, *self._more])
        rows = rows[np.lexsort((rows["row"], rows["time"], rows["group"]))]
        self._kept, self._more = rows[self._from_end(rows) < self._LAST], []
        return self._kept

    @staticmethod
    def _from_end(rows: np.ndarray) -> np.ndarray:
        """For each row, the number of rows of its group that come after it."""
        ends = np.append(np.flatnonzero(np.diff(rows["group"])), len(rows) - 1)
        lengths = np.diff(ends, prepend=-1)
        return np.repeat(ends, lengths[: len(ends)]) - np.arange(len(rows)) if len(rows) else np.zeros(0, np.int64)

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """The places of the last but one and of the last row of each group with at least three rows."""
        rows = self.kept()
        from_end = self._from_end(rows)
        first = np.flatnonzero(from_end == self._LAST - 1)  # the first of three adjacent rows
        return rows["row"][first + 1], rows["row"][first + 2]
