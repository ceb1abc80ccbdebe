"""Split policies: a row goes to train (0), validation (1) or test (2) by its file, place, time, hash or group."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from pipelines import hashing
from pipelines.convert.times import LAST_KEY, key_value, kind_of_name
from pipelines.manifest import SPLITS
from stem_util import files
from stem_util.errors import UserError


class Divided(Protocol):
    """Rows that a policy divides. A row that lacks a value that the policy asks for is bad.

    Attributes:
      row_ids: int64 [n], ascending.
      file: number of their file in the log.
    """

    @property
    def row_ids(self) -> np.ndarray: ...

    @property
    def file(self) -> int: ...

    def keys(self, column: str) -> np.ndarray:
        """`hashing.key64` of a column's values, int64 [n]."""

    def times(self, column: str, kind: pa.DataType) -> np.ndarray:
        """`times.order_keys` of a column's values, uint64 [n]."""


class SplitPolicy(abc.ABC):
    """Decides for every row whether it belongs to train (0), validation (1) or test (2)."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the log that decide."""
        return ()

    def may_hold(self, file: int, split: int) -> bool:
        """Whether a file may hold rows of a split."""
        del file, split
        return True

    @abc.abstractmethod
    def divide(self, rows: Divided) -> np.ndarray:
        """The split of each row: uint8 [n]."""

    @abc.abstractmethod
    def describe(self, files: Sequence[str]) -> dict[str, Any]:
        """The policy's entry in the manifest, from which :func:`restore` makes it again; ``files`` are the log's."""


@dataclass(frozen=True)
class RandomSplit(SplitPolicy):
    """Rows are divided by a hash of seed and row_id.

    Attributes:
      fractions: shares of train, validation and test.
      seed: seed of the hash.
    """

    fractions: tuple[float, float, float]
    seed: int

    def assign(self, row_ids: np.ndarray) -> np.ndarray:
        """The splits, uint8 [n], of rows by their ids, int64 [n]."""
        return _by_fractions(hashing.seeded64(row_ids, self.seed, "split"), self.fractions)

    def divide(self, rows: Divided) -> np.ndarray:
        return self.assign(rows.row_ids)

    def describe(self, files: Sequence[str]) -> dict[str, Any]:
        return {"by": "random", "fractions": list(self.fractions)}


@dataclass(frozen=True)
class HashSplit(SplitPolicy):
    """Rows are divided by a hash of seed and a column's value, so that equal values stay together.

    Attributes:
      column: the log's column.
      fractions: shares of train, validation and test in the distinct values.
      seed: seed of the hash.
    """

    column: str
    fractions: tuple[float, float, float]
    seed: int

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def assign(self, keys: np.ndarray) -> np.ndarray:
        """The splits, uint8 [n], of rows by their `hashing.key64`, int64 [n]."""
        return _by_fractions(hashing.seeded64(keys, self.seed, "split"), self.fractions)

    def divide(self, rows: Divided) -> np.ndarray:
        return self.assign(rows.keys(self.column))

    def describe(self, files: Sequence[str]) -> dict[str, Any]:
        return {"by": "hash", "column": self.column, "fractions": list(self.fractions)}


def _by_fractions(hashes: np.ndarray, fractions: tuple[float, float, float]) -> np.ndarray:
    uniform = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    ends = np.array([fractions[0], fractions[0] + fractions[1]])
    if fractions[2] == 0:
        ends[1] = 1.0  # 0.9 + 0.1 may round to less
    return np.searchsorted(ends, uniform, "right").astype(np.uint8)


@dataclass(frozen=True)
class TimeSplit(SplitPolicy):
    """Train up to one time, validation up to a second, test after it; equal times stay together.

    Attributes:
      column: the log's column.
      kind: type of its values.
      train_until: the last time of train, as a key of `order_keys`.
      validation_until: the last time of validation, as such a key.
      fractions: the shares by which the limits were found, or None if the limits were given.
    """

    column: str
    kind: pa.DataType
    train_until: int
    validation_until: int
    fractions: tuple[float, float, float] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def assign(self, keys: np.ndarray) -> np.ndarray:
        """The splits, uint8 [n], of rows by their `order_keys`, uint64 [n]."""
        ends = np.array([self.train_until, self.validation_until], np.uint64)
        return np.searchsorted(ends, keys, "left").astype(np.uint8)

    def divide(self, rows: Divided) -> np.ndarray:
        return self.assign(rows.times(self.column, self.kind))

    def describe(self, files: Sequence[str]) -> dict[str, Any]:
        """The entry has the limits in readable form (None: no end), and exactly, as type and keys of `order_keys`."""
        ends = {"train_until": self.train_until, "validation_until": self.validation_until}
        values = {name: None if key == LAST_KEY else key_value(key, self.kind) for name, key in ends.items()}
        fractions = None if self.fractions is None else list(self.fractions)
        head = {"by": "time", "column": self.column, "fractions": fractions}
        return head | values | {"type": str(self.kind), "keys": list(ends.values())}


@dataclass(frozen=True)
class LastSplit(SplitPolicy):
    """The last row of each group is test, the one before it validation, in groups of at least three rows.

    Attributes:
      column: the column of times, which order a group's rows; rows of equal time are ordered by place in the log.
      kind: type of its values.
      group: the column whose values are the groups.
      directory: where `save` keeps the row_ids of both splits.
    """

    column: str
    kind: pa.DataType
    group: str
    directory: str

    FILES: ClassVar = ("validation.npy", "test.npy")

    @property
    def columns(self) -> tuple[str, ...]:
        return self.column, self.group

    def save(self, validation: np.ndarray, test: np.ndarray) -> None:
        """Writes the row_ids, int64, of the two splits, flushed to the disk."""
        os.makedirs(self.directory)
        for name, row_ids in zip(self.FILES, (validation, test), strict=True):
            path = os.path.join(self.directory, name)
            np.save(path, np.sort(row_ids))
            files.sync(path)

    def assign(self, row_ids: np.ndarray) -> np.ndarray:
        """The splits, uint8 [n], of ascending row_ids, int64 [n]; reads only the part of the files for these rows."""
        splits = np.zeros(len(row_ids), np.uint8)
        if not len(row_ids):
            return splits
        for number, name in enumerate(self.FILES, start=1):
            kept = np.load(os.path.join(self.directory, name), mmap_mode="r")
            low, high = np.searchsorted(kept, [row_ids[0], row_ids[-1] + 1])
            splits[np.isin(row_ids, kept[low:high], assume_unique=True)] = number
        return splits

    def divide(self, rows: Divided) -> np.ndarray:
        rows.keys(self.group), rows.times(self.column, self.kind)  # a row without one of them is bad
        return self.assign(rows.row_ids)

    def describe(self, files: Sequence[str]) -> dict[str, Any]:
        return {"by": "leave last", "column": self.column, "group": self.group, "type": str(self.kind)}


@dataclass(frozen=True)
class GivenSplit(SplitPolicy):
    """Each file of the log belongs to one split.

    Attributes:
      file_splits: for each file of the log, its split: 0, 1 or 2.
      rest: divides the rows of train files between train and validation, if validation has no files.
    """

    file_splits: tuple[int, ...]
    rest: HashSplit | RandomSplit | TimeSplit | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return self.rest.columns if self.rest else ()

    def may_hold(self, file: int, split: int) -> bool:
        return split == self.file_splits[file] or (self.rest is not None and (self.file_splits[file], split) == (0, 1))

    def divide(self, rows: Divided) -> np.ndarray:
        number = self.file_splits[rows.file]
        if number or self.rest is None:
            return np.full(len(rows.row_ids), number, np.uint8)
        return self.rest.divide(rows)

    def describe(self, files: Sequence[str]) -> dict[str, Any]:
        paths = [os.path.abspath(path) for path in files]
        by_split = {
            name: [path for path, split in zip(paths, self.file_splits, strict=True) if split == number]
            for number, name in enumerate(SPLITS)
        }
        return {"by": "given files", **by_split, **({"rest": self.rest.describe(files)} if self.rest else {})}


def last_directory(data_dir: str) -> str:
    """The directory in converted data where a `LastSplit` keeps its files."""
    return os.path.join(data_dir, "split")


def restore(description: Mapping[str, Any], data_dir: str, files: Sequence[str], seed: int) -> SplitPolicy:
    """The policy that a manifest describes.

    Args:
      description: the manifest's ``split``.
      data_dir: the manifest's directory.
      files: the log's files.
      seed: seed of the conversion.

    Raises:
      UserError: the description was written by an earlier version and lacks the exact limits.
    """
    by = description["by"]
    if by == "given files":
        given = [set(description[name]) for name in SPLITS]
        numbers = tuple(next(i for i, paths in enumerate(given) if path in paths) for path in files)
        rest: Any = restore(description["rest"], data_dir, files, seed) if "rest" in description else None
        return GivenSplit(numbers, rest)
    if by == "leave last":
        return LastSplit(
            description["column"], kind_of_name(description["type"]), description["group"], last_directory(data_dir)
        )
    if by == "random":
        return RandomSplit(tuple(description["fractions"]), seed)
    if by == "hash":
        return HashSplit(description["column"], tuple(description["fractions"]), seed)
    if "keys" not in description:
        raise UserError("an earlier version converted the log and kept no exact limits of the split: convert it again")
    train_until, validation_until = description["keys"]
    fractions = description["fractions"] and tuple(description["fractions"])
    return TimeSplit(description["column"], kind_of_name(description["type"]), train_until, validation_until, fractions)
