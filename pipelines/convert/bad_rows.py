"""Collects bad rows: for the error about the first one, or for the counts of rows that are dropped."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.convert import advice
from pipelines.convert.advice import Wanted
from pipelines.log import casts
from pipelines.log.parts import Chunk
from stem_util.errors import UserError

MALFORMED = ("", "wrong number of columns")


class BadRows:
    """The bad rows of one chunk. A row counts once, for the first problem that was found.

    Attributes:
      counts: number of bad rows by (column, reason), with the malformed ones, which are not in the chunk.
    """

    def __init__(self, chunk: Chunk, drop: bool, served: bool = False) -> None:
        self._chunk, self._drop, self._served = chunk, drop, served
        self._mask = np.zeros(len(chunk.rows), bool)
        self._first: tuple[int, str] | None = None  # the earliest bad row and what is wrong with it
        self.counts: Counter[tuple[str, str]] = Counter({MALFORMED: chunk.malformed} if chunk.malformed else {})

    @property
    def good(self) -> np.ndarray:
        return np.flatnonzero(~self._mask)

    def add(
        self,
        bad: np.ndarray,
        column: str,
        reason: str,
        detail: str,
        values: np.ndarray | None = None,
        wanted: Wanted | None = None,
    ) -> None:
        """Marks rows bad.

        Args:
          bad: bool [n], the rows.
          column: the log's column.
          reason: the reason under which they are counted.
          detail: the message, with ``{}`` in place of the value.
          values: [n], the values to show; those of the column if not given.
          wanted: what values of the column should be, for advice.
        """
        new = bad & ~self._mask
        if not new.any():
            return
        self._mask |= new
        self.counts[column, reason] += int(new.sum())
        place = int(np.flatnonzero(new)[0])
        if not self._drop and (self._first is None or place < self._first[0]):
            array = self._chunk.columns[column] if values is None else pa.array(values)
            value = _raw(array[place])
            if wanted is not None:
                csv = pa.types.is_binary(array.type)
                detail += advice.way_out(value, wanted, self._chunk.path, csv=csv, served=self._served)
            self._first = (place, detail.replace("{}", _shown(value), 1))

    def raise_first(self) -> None:
        if self._first is not None:
            place, detail = self._first
            where = f"{self._chunk.path}, row {self._chunk.rows[place]:,}"
            raise UserError(f"{where}: {detail} (--on_bad_rows=drop counts and skips such rows)")


def _raw(value: pa.Scalar) -> Any:
    """The value; bytes if it is text that is not UTF-8."""
    raw = (value.cast(pa.binary()) if casts.is_text(value.type) else value).as_py()
    if isinstance(raw, bytes):
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw[:60]
    return raw


def _shown(raw: Any) -> str:
    text = repr(raw)
    return "null" if raw is None else text if len(text) <= 60 else text[:57] + "..."
