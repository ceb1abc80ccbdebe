"""The good rows of a chunk of the log: values are cast, labels made and splits assigned, but nothing is encoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.log.casts import Lists


@dataclass(frozen=True)
class Rows:
    """The good rows of a chunk, n of them.

    Attributes:
      places: int64 [n], their places in the chunk.
      row_ids: int64 [n].
      split: uint8 [n]: 0 train, 1 validation, 2 test.
      times: int64 [n], `times.integers` of the time column; 0 without one.
      ids: raw values by categorical feature: int64 or string [n]; missing ones are null.
      lists: raw values by multivalent feature.
      numerics: by numeric feature: float32 [n]; missing values are NaN.
      vectors: by dense feature: float32 [n, length]; missing elements are 0.
      labels: by task: float32 [n]; NaN outside its sample space.
      weights: by column of row weights: float32 [n], 0 or more; 0 where no task uses the weight.
      keys: raw values by role (group, item): int64 or string [n] without nulls.
    """

    places: np.ndarray
    row_ids: np.ndarray
    split: np.ndarray
    times: np.ndarray
    ids: dict[str, pa.Array]
    lists: dict[str, Lists]
    numerics: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    keys: dict[str, pa.Array]

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of all parts (at least one), one part after another."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if isinstance(values[0], dict):
                joined[field.name] = {name: _join([value[name] for value in values]) for name in values[0]}
            else:
                joined[field.name] = _join(values)
        return cls(**joined)

    @property
    def nbytes(self) -> int:
        """The size of the features' values in bytes."""
        lists = [lists.values for lists in self.lists.values()]
        return sum(values.nbytes for values in (*self.ids.values(), *lists, *self.vectors.values()))

    def take(self, places: np.ndarray) -> Rows:
        """The rows at ascending ``places`` of this object's rows."""
        if len(places) == len(self.row_ids):
            return self
        index = pa.array(places)
        return Rows(
            self.places[places],
            self.row_ids[places],
            self.split[places],
            self.times[places],
            {name: values.take(index) for name, values in self.ids.items()},
            {name: _take_lists(lists, places) for name, lists in self.lists.items()},
            {name: values[places] for name, values in self.numerics.items()},
            {name: values[places] for name, values in self.vectors.items()},
            {name: values[places] for name, values in self.labels.items()},
            {name: values[places] for name, values in self.weights.items()},
            {name: values.take(index) for name, values in self.keys.items()},
        )


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], Lists):
        fields = ([getattr(part, field.name) for part in parts] for field in dataclasses.fields(Lists))
        return Lists(*map(_join, fields))
    return pa.concat_arrays(parts) if isinstance(parts[0], pa.Array) else np.concatenate(parts)


def _take_lists(lists: Lists, places: np.ndarray) -> Lists:
    chosen = np.zeros(len(lists.lengths), bool)
    chosen[places] = True
    values = lists.values.filter(pa.array(np.repeat(chosen, lists.lengths)))
    return Lists(values, lists.lengths[places], lists.missing[places])
