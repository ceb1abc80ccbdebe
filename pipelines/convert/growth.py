"""Vocabularies that grow from one conversion to the next: which values are known, have an id, or are forgotten.

Beside a vocabulary, converted data keep what the next conversion goes on from, row by row in Parquet files::

    history/seen/<feature>.parquet      row i belongs to id i + 2: the conversion and the time in which it was last seen
    history/rare/<feature>.parquet      values that are below the minimum count: value, count, conversion, time
    history/changed/<feature>.parquet   the ids that now mean something else than in the ancestor: id, before, after

Times are `times.microseconds`, and `UNKNOWN` where rows have none. The empty value stands for "no value".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import manifest
from pipelines.log.casts import EMPTY
from pipelines.vocabulary import FIRST_ID
from stem_util.errors import UserError

UNKNOWN = -(2**63)
"""The time of a value that was last seen in a log without times."""
RARE_KEPT = 1 << 24
"""How many values without an id are remembered for each feature: those seen last and, among them, most often."""
_SECONDS = {"d": 86_400, "h": 3_600}


@dataclass(frozen=True)
class Forget:
    """After how long a value that is not seen loses its id.

    Attributes:
      seconds: the time between its last row and the newest row of the log, or 0.
      conversions: the number of conversions in a row that have not seen it, or 0.
    """

    seconds: int = 0
    conversions: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``30d``, ``12h`` or a number of conversions.

        Raises:
          UserError: it is none of these.
        """
        match = re.fullmatch(r"([1-9]\d{0,8})([dh]?)", text)
        if match is None:
            raise UserError(f"--forget={text}: should be a time as in 30d or 12h, or a number of conversions as in 7")
        number, unit = int(match[1]), match[2]
        return cls(seconds=number * _SECONDS[unit]) if unit else cls(conversions=number)


@dataclass(frozen=True)
class Step:
    """One conversion in a line of them.

    Attributes:
      ancestor: the data directory that it extends, or None for the first.
      generation: its number, from 1.
      first: time of the log's first row, or `UNKNOWN`.
      units: units per second of the log's times (see `times.microseconds`), or None if it has no times.
      seen_since: values that were last seen before this time are forgotten.
      seen_until: values that were last seen in this conversion, or in an earlier one, are forgotten.
    """

    ancestor: str | None
    generation: int
    first: int = UNKNOWN
    units: int | None = None
    seen_since: int = UNKNOWN
    seen_until: int = 0


@dataclass(frozen=True)
class Known:
    """Values and what is known of each, n of them.

    Attributes:
      values: int64 or binary [n].
      counts: int64 [n]; 0 for an id that is free.
      seen: int32 [n], the last conversion whose train rows have the value.
      times: int64 [n], the last time in these rows.
    """

    values: pa.ChunkedArray
    counts: np.ndarray
    seen: np.ndarray
    times: np.ndarray

    @classmethod
    def load(cls, data_dir: str, feature: str) -> tuple[Known, Known]:
        """The values of a feature that have ids, in the order of these, and those that have none.

        Raises:
          UserError: a file is missing or damaged.
        """
        try:
            vocabulary = pq.read_table(manifest.vocabulary_path(data_dir, feature))
            seen, rare = (pq.read_table(manifest.history_path(data_dir, what, feature)) for what in ("seen", "rare"))
        except (pa.ArrowException, OSError) as error:
            why = str(error).partition("\n")[0]
            raise UserError(f"{data_dir}: what is known of '{feature}' cannot be read ({why})") from error
        return cls._of(vocabulary, seen), cls._of(rare, rare)

    @classmethod
    def _of(cls, counted: pa.Table, seen: pa.Table) -> Known:
        return cls(
            counted["value"],
            counted["count"].to_numpy().copy(),
            seen["conversion"].to_numpy().copy(),
            seen["time"].to_numpy().copy(),
        )

    @classmethod
    def nothing(cls, kind: pa.DataType) -> Known:
        """No values, of this type."""
        numbers = np.zeros(0, np.int64)
        return cls(pa.chunked_array([], kind), numbers, numbers.astype(np.int32), numbers)

    def __len__(self) -> int:
        return len(self.counts)

    def __add__(self, other: Known) -> Known:
        return Known(
            pa.chunked_array([*self.values.chunks, *other.values.chunks], self.values.type),
            np.concatenate([self.counts, other.counts]),
            np.concatenate([self.seen, other.seen]),
            np.concatenate([self.times, other.times]),
        )

    def take(self, places: np.ndarray) -> Known:
        return Known(self.values.take(pa.array(places)), self.counts[places], self.seen[places], self.times[places])

    def add(self, counted: Known, step: Step) -> np.ndarray:
        """Adds what a conversion has counted of these values; returns which of the counted ones they are, bool [m]."""
        found = pc.index_in(self.values, value_set=counted.values).fill_null(-1).to_numpy()
        mine = np.flatnonzero(found >= 0)
        places = found[mine]
        self.counts[mine] += counted.counts[places]
        self.seen[mine] = step.generation
        if step.units is None:
            self.times[mine] = UNKNOWN
        else:
            self.times[mine] = np.maximum(self.times[mine], counted.times[places])
            # The others were last seen before this log began, whenever that was.
            self.times[self.times == UNKNOWN] = step.first
        theirs = np.zeros(len(counted), bool)
        theirs[places] = True
        return theirs

    def forgotten(self, step: Step) -> np.ndarray:
        """Which values are forgotten, bool [n]."""
        old = (self.times < step.seen_since) & (self.times != UNKNOWN) | (self.seen <= step.seen_until)
        return old & (self.counts > 0)


@dataclass(frozen=True)
class Grown:
    """A feature's values after a conversion.

    Attributes:
      known: the values that have ids, in the order of these.
      rare: those that have none.
      distinct: the number of both, before the `RARE_KEPT` were chosen.
      new: the number of values that got an id.
      evicted: the number of values that lost theirs.
      reassigned: the number of new values whose id belonged to another value.
      changed: the ids that mean something else than in the ancestor: columns id, before, after.
    """

    known: Known
    rare: Known
    distinct: int
    new: int
    evicted: int
    reassigned: int
    changed: pa.Table

    @property
    def free(self) -> int:
        """The number of free ids."""
        return int(np.count_nonzero(self.known.counts == 0))


def grow(known: Known, rare: Known, counted: Known, min_count: int, step: Step, rare_kept: int = RARE_KEPT) -> Grown:
    """Adds a conversion's counts to those of its ancestor.

    A value that has an id keeps it. The others get one when their counts of all conversions reach ``min_count``, in the
    order of (-count, value): first the free ids from the lowest on, then new ones behind. So the result does not depend
    on the order in which values were counted.

    Args:
      known: the ancestor's values that have ids.
      rare: its values that have none; both are changed.
      counted: the values of this conversion's train rows, each once.
      min_count: the feature's minimum count.
      step: the conversion.
      rare_kept: how many values without an id to keep.
    """
    new_to_all = ~(known.add(counted, step) | rare.add(counted, step))
    lost = known.forgotten(step)
    free = np.flatnonzero(lost | (known.counts == 0))
    rare = rare + counted.take(np.flatnonzero(new_to_all))
    rare = rare.take(np.flatnonzero(~rare.forgotten(step)))  # in a long log, new values may be old ones, too
    frequent = rare.counts >= min_count
    new = _by_count(rare.take(np.flatnonzero(frequent)))
    rare = rare.take(np.flatnonzero(~frequent))
    distinct = len(known) - len(free) + len(new) + len(rare)
    reused = free[: len(new)]
    grown = _placed(known, new, free)
    differs = lost.copy()
    differs[reused] = True
    ids = np.flatnonzero(differs)
    changed = {
        "id": (ids + FIRST_ID).astype(np.int32),
        "before": known.values.take(pa.array(ids)),
        "after": grown.values.take(pa.array(ids)),
    }
    return Grown(
        grown, _latest(rare, rare_kept), distinct, len(new), int(np.count_nonzero(lost)), len(reused), pa.table(changed)
    )


def _by_count(new: Known) -> Known:
    """The values in the order of (-count, value)."""
    by_value = pc.sort_indices(new.values).to_numpy()
    return new.take(by_value[np.argsort(-new.counts[by_value], kind="stable")])


def _placed(known: Known, new: Known, free: np.ndarray) -> Known:
    """Values that have ids, once ``new`` ones took the ``free`` ids, int64 [f], and ids behind; others stay free."""
    kind = known.values.type
    empty = pa.chunked_array([pa.array([EMPTY["int64" if pa.types.is_integer(kind) else "string"]], kind)])
    nobody = Known(empty, np.zeros(1, np.int64), np.zeros(1, np.int32), np.full(1, UNKNOWN))
    size, reused = len(known), min(len(free), len(new))
    places = np.arange(size + len(new) - reused)
    places[free] = size + len(new)
    places[free[:reused]] = size + np.arange(reused)
    places[size:] += reused
    return (known + new + nobody).take(places)


def _latest(rare: Known, size: int) -> Known:
    if len(rare) <= size:
        return rare
    return rare.take(np.sort(np.lexsort((-rare.counts, -rare.seen.astype(np.int64)))[:size]))
