"""Which of train, validation and test a row goes to: 0, 1, 2, or by the file it is in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import casts, hashing
from pipelines.errors import UserError

LAST_KEY = 2**64 - 1
"""The last key of `order_keys`: a split until then has no end."""


@dataclass(frozen=True)
class GivenSplit:
    """Rows go where their file goes: ``file_splits[i]`` is 0, 1 or 2."""

    file_splits: tuple[int, ...]


@dataclass(frozen=True)
class RandomSplit:
    """Rows are divided by a hash of seed and row_id.

    Attributes:
      fractions: of train, validation and test.
      seed: of the hash.
    """

    fractions: tuple[float, float, float]
    seed: int

    def assign(self, row_ids: np.ndarray) -> np.ndarray:
        """uint8 [n] of int64 [n]."""
        return _divide(hashing.seeded64(row_ids, self.seed, "split"), self.fractions)


@dataclass(frozen=True)
class HashSplit:
    """Rows are divided by a hash of seed and a column's value, so that equal values stay together.

    Attributes:
      column: of the log.
      fractions: of train, validation and test, as shares of the values.
      seed: of the hash.
    """

    column: str
    fractions: tuple[float, float, float]
    seed: int

    def assign(self, keys: np.ndarray) -> np.ndarray:
        """uint8 [n] of int64 [n], keys of `hashing.key64`."""
        return _divide(hashing.seeded64(keys, self.seed, "split"), self.fractions)


def _divide(hashes: np.ndarray, fractions: tuple[float, float, float]) -> np.ndarray:
    uniform = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    ends = np.array([fractions[0], fractions[0] + fractions[1]])
    if fractions[2] == 0:
        ends[1] = 1.0  # .9 + .1 may round to less
    return np.searchsorted(ends, uniform, "right").astype(np.uint8)


@dataclass(frozen=True)
class TimeSplit:
    """Train up to one time, validation up to a second, test after it; equal times stay together.

    Attributes:
      column: of the log.
      kind: type of its values.
      train_until: the last time of train, as a key of `order_keys`.
      validation_until: the last time of validation, likewise.
    """

    column: str
    kind: pa.DataType
    train_until: int
    validation_until: int

    def assign(self, keys: np.ndarray) -> np.ndarray:
        """uint8 [n] of uint64 [n], keys of `order_keys`."""
        ends = np.array([self.train_until, self.validation_until], np.uint64)
        return np.searchsorted(ends, keys, "left").astype(np.uint8)

    def describe(self) -> dict[str, Any]:
        """The limits for people (None: no end), and exactly: the type and the keys of `order_keys`."""
        ends = {"train_until": self.train_until, "validation_until": self.validation_until}
        values = {name: None if key == LAST_KEY else key_value(key, self.kind) for name, key in ends.items()}
        return values | {"type": str(self.kind), "keys": list(ends.values())}


SplitPolicy = GivenSplit | HashSplit | RandomSplit | TimeSplit


def restore(description: Mapping[str, Any], files: Sequence[str], seed: int) -> SplitPolicy:
    """The policy that a manifest describes.

    Args:
      description: the manifest's ``split``.
      files: of the log.
      seed: of the conversion.

    Raises:
      UserError: a description without the exact limits, as earlier versions wrote it.
    """
    by = description["by"]
    if by == "given files":
        given = [set(description[name]) for name in ("train", "validation", "test")]
        return GivenSplit(tuple(next(i for i, paths in enumerate(given) if path in paths) for path in files))
    if by == "random":
        return RandomSplit(tuple(description["fractions"]), seed)
    if by == "hash":
        return HashSplit(description["column"], tuple(description["fractions"]), seed)
    if "keys" not in description:
        raise UserError("an earlier version converted the log and kept no exact limits of the split: convert it again")
    timestamp = re.fullmatch(r"timestamp\[(\w+)(?:, tz=(.+))?\]", description["type"])
    kind = pa.timestamp(*timestamp.groups()) if timestamp else pa.type_for_alias(description["type"])
    return TimeSplit(description["column"], kind, *description["keys"])


def time_values(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """A time column as int64, float64 or a timestamp (missing values null), and which values cannot be cast."""
    if pa.types.is_timestamp(kind):
        array = casts.plain(array)
        if casts.is_text(array.type):
            text, undecodable = casts.to_text(array)
            values, bad = casts.try_cast(pc.utf8_trim_whitespace(text), kind)
            return values, bad | undecodable
        return casts.try_cast(array, kind)
    return casts.to_float64(array) if pa.types.is_floating(kind) else casts.to_int64(array)


def time_kind(array: pa.Array, column: str) -> pa.DataType:
    """The type in which a column's values are ordered; that of text is guessed from the values given.

    Raises:
      UserError: values that are neither numbers nor times.
    """
    kind = casts.plain_type(array.type)
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_timestamp(kind):
        return kind
    if pa.types.is_date(kind):
        return pa.timestamp("ms")
    if casts.is_text(kind):
        for guess in (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
            if len(array) and not time_values(array, guess)[1].any():
                return guess
    raise UserError(f"--split_column={column}: a time should be a number, a date or a timestamp; the column is {kind}")


def order_keys(values: pa.Array) -> np.ndarray:
    """uint64 [n] that sort as the values do (int64, float64 or timestamp without nulls)."""
    if pa.types.is_floating(values.type):
        floats = casts.to_numpy(values) + 0.0  # -0.0 and 0.0 are one time
        bits = floats.view(np.uint64)
        negative = bits >> np.uint64(63) == 1
        return np.where(negative, ~bits, bits | np.uint64(1 << 63))
    return casts.to_numpy(values.cast(pa.int64())).view(np.uint64) ^ np.uint64(1 << 63)


def key_value(key: int, kind: pa.DataType) -> Any:
    """The value of a key of `order_keys`, as a Python int, float or ISO text."""
    if pa.types.is_floating(kind):
        bits = key ^ (1 << 63) if key >> 63 else ~key & (2**64 - 1)
        return float(np.uint64(bits).view(np.float64))
    integer = key - (1 << 63)
    return str(pa.scalar(integer, pa.int64()).cast(kind)) if pa.types.is_timestamp(kind) else integer


def parse_time(text: str, kind: pa.DataType, flag: str) -> int:
    """The key of `order_keys` of a time given on the command line.

    Raises:
      UserError: text that is no value of the column's type.
    """
    values, bad = time_values(pa.array([text.encode()], pa.binary()), kind)
    if bad[0] or values.null_count:
        raise UserError(f"--{flag}={text}: not a value of the split column's type, {kind}")
    return int(order_keys(values)[0])


def kth_smallest(pieces: Callable[[], Iterable[np.ndarray]], ranks: Sequence[int], bins: int = 1 << 16) -> list[int]:
    """Exact order statistics of more numbers than fit in memory, by histograms that close in on them.

    Args:
      pieces: gives the numbers, uint64 arrays, anew at every call.
      ranks: 1-based; each from 1 to the count of the numbers.
      bins: of a histogram; a pass narrows the range of candidates by this factor.

    Returns:
      For each rank the number that stands there in ascending order.
    """
    low, high = 2**64 - 1, 0
    for piece in pieces():
        if len(piece):
            low, high = min(low, int(piece.min())), max(high, int(piece.max()))
    ranges = [(low, high)] * len(ranks)  # inclusive
    left = list(ranks)  # rank within the range
    while any(low < high for low, high in ranges):
        widths = [(high - low) // bins + 1 for low, high in ranges]
        counts = [np.zeros(bins, np.int64) for _ in ranges]
        for piece in pieces():
            for (low, high), width, count in zip(ranges, widths, counts, strict=True):
                inside = piece[(piece >= np.uint64(low)) & (piece <= np.uint64(high))]
                places = (inside - np.uint64(low)) // np.uint64(width)
                count += np.bincount(places.astype(np.int64), minlength=bins)
        for i, ((low, high), width) in enumerate(zip(ranges, widths, strict=True)):
            below = np.cumsum(counts[i])
            place = int(np.searchsorted(below, left[i], "left"))
            left[i] -= int(below[place - 1]) if place else 0
            ranges[i] = (low + place * width, min(high, low + (place + 1) * width - 1))
    return [low for low, _ in ranges]
