"""Which of train, validation and test a row goes to: 0, 1, 2; by its file, place, time, a hash, or its group's last."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import hashing
from pipelines.log import casts
from stem_util.errors import UserError

LAST_KEY = 2**64 - 1
"""The last key of `order_keys`: a split until then has no end."""


@dataclass(frozen=True)
class RandomSplit:
    """Rows are divided by a hash of seed and row_id.

    Attributes:
      fractions: of train, validation and test.
      seed: of the hash.
    """

    fractions: tuple[float, float, float]
    seed: int
    columns = ()

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

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

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

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def assign(self, keys: np.ndarray) -> np.ndarray:
        """uint8 [n] of uint64 [n], keys of `order_keys`."""
        ends = np.array([self.train_until, self.validation_until], np.uint64)
        return np.searchsorted(ends, keys, "left").astype(np.uint8)

    def describe(self) -> dict[str, Any]:
        """The limits for people (None: no end), and exactly: the type and the keys of `order_keys`."""
        ends = {"train_until": self.train_until, "validation_until": self.validation_until}
        values = {name: None if key == LAST_KEY else key_value(key, self.kind) for name, key in ends.items()}
        return values | {"type": str(self.kind), "keys": list(ends.values())}


@dataclass(frozen=True)
class LastSplit:
    """The last row of each group is test, the one before it validation, in groups of at least three rows.

    Attributes:
      column: of the times that order a group's rows; equal times by place in the log.
      kind: type of its values.
      group: column whose values make the groups.
      directory: holds the row_ids of both splits (`save`).
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
        """Keeps the row_ids, int64, of the two splits, flushed to the disk."""
        os.makedirs(self.directory)
        for name, row_ids in zip(self.FILES, (validation, test), strict=True):
            with open(os.path.join(self.directory, name), "wb") as file:
                np.save(file, np.sort(row_ids))
                file.flush()
                os.fsync(file.fileno())

    def assign(self, row_ids: np.ndarray) -> np.ndarray:
        """uint8 [n] of ascending int64 [n]; holds no more of the files in memory than their part for these rows."""
        splits = np.zeros(len(row_ids), np.uint8)
        if not len(row_ids):
            return splits
        for number, name in enumerate(self.FILES, start=1):
            kept = np.load(os.path.join(self.directory, name), mmap_mode="r")
            low, high = np.searchsorted(kept, [row_ids[0], row_ids[-1] + 1])
            splits[np.isin(row_ids, kept[low:high], assume_unique=True)] = number
        return splits


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


@dataclass(frozen=True)
class GivenSplit:
    """Rows go where their file goes: ``file_splits[i]`` is 0, 1 or 2.

    Attributes:
      file_splits: by file of the log.
      rest: divides the rows of train files between train and validation, where validation has no files.
    """

    file_splits: tuple[int, ...]
    rest: HashSplit | RandomSplit | TimeSplit | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return self.rest.columns if self.rest else ()

    def may_hold(self, file: int, split: int) -> bool:
        """Whether a file may hold rows of a split."""
        return split == self.file_splits[file] or (self.rest is not None and (self.file_splits[file], split) == (0, 1))


SplitPolicy = GivenSplit | HashSplit | LastSplit | RandomSplit | TimeSplit


def last_directory(data_dir: str) -> str:
    """Where a `LastSplit` keeps its files in converted data."""
    return os.path.join(data_dir, "split")


def restore(description: Mapping[str, Any], data_dir: str, files: Sequence[str], seed: int) -> SplitPolicy:
    """The policy that a manifest describes.

    Args:
      description: the manifest's ``split``.
      data_dir: of the manifest.
      files: of the log.
      seed: of the conversion.

    Raises:
      UserError: a description without the exact limits, as earlier versions wrote it.
    """
    by = description["by"]
    if by == "given files":
        given = [set(description[name]) for name in ("train", "validation", "test")]
        numbers = tuple(next(i for i, paths in enumerate(given) if path in paths) for path in files)
        rest: Any = restore(description["rest"], data_dir, files, seed) if "rest" in description else None
        return GivenSplit(numbers, rest)
    if by == "leave last":
        return LastSplit(
            description["column"], _kind(description["type"]), description["group"], last_directory(data_dir)
        )
    if by == "random":
        return RandomSplit(tuple(description["fractions"]), seed)
    if by == "hash":
        return HashSplit(description["column"], tuple(description["fractions"]), seed)
    if "keys" not in description:
        raise UserError("an earlier version converted the log and kept no exact limits of the split: convert it again")
    return TimeSplit(description["column"], _kind(description["type"]), *description["keys"])


def _kind(name: str) -> pa.DataType:
    """The type of that name."""
    timestamp = re.fullmatch(r"timestamp\[(\w+)(?:, tz=(.+))?\]", name)
    return pa.timestamp(*timestamp.groups()) if timestamp else pa.type_for_alias(name)


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


_TIME = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ]+(\d\d(?::\d\d(?::\d\d(?:\.\d{1,9})?)?)?)\s*(Z|[+-]\d\d(?::?\d\d)?)?)?")
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def parse_time(text: str, kind: pa.DataType, flag: str, example: Any) -> int:
    """The key of `order_keys` of a time given on the command line, as the first one of a split.

    A date is its midnight, and a time finer than the column's unit the next that the column can hold. Without an offset
    a time is one of the column's time zone.

    Args:
      text: of the flag.
      kind: of `time_kind`.
      flag: its name.
      example: a value of the column, for the error.

    Raises:
      UserError: text that is no value of the column's type, with the forms that are.
    """
    given = f"--{flag}={text}"
    if pa.types.is_timestamp(kind):
        return int(order_keys(pa.array([_moment(text.strip(), kind, given)], pa.int64()))[0])
    values, bad = time_values(pa.array([text.encode()], pa.binary()), kind)
    shown = example.decode() if isinstance(example, bytes) else example
    if bad[0] or values.null_count:
        raise UserError(f"{given}: the split column holds numbers ({kind}); write one as it stands there, as {shown}")
    return int(order_keys(values)[0])


def _moment(text: str, kind: pa.TimestampType, given: str) -> int:
    """A time in units of the column's type since 1970."""
    parts = _TIME.fullmatch(text)
    forms = "2024-01-31, 2024-01-31T10:00 or 2024-01-31T10:00:00.5"
    forms += f" (as in {kind.tz}), or with an offset: 2024-01-31T10:00Z, 2024-01-31T10:00+01:00" if kind.tz else ""
    if parts is None:
        raise UserError(f"{given}: the split column holds {kind}; write a time as {forms}")
    date, clock, offset = parts.groups()
    if offset and not kind.tz:
        raise UserError(f"{given}: the split column holds {kind}, times without a zone; write it without the offset")
    clock, _, fraction = (clock or "00").partition(".")
    try:
        moment = pa.scalar(f"{date} {clock}{offset or ''}").cast(pa.timestamp("s", "UTC" if offset else None))
    except pa.ArrowInvalid as error:
        raise UserError(f"{given}: there is no such time; write one as {forms}") from error
    if kind.tz and not offset:
        try:
            moment = pc.assume_timezone(moment, kind.tz)
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{given}: clocks change in {kind.tz}: it is no time or two; write it with an offset, as in +01:00"
            ) from error
    units = _PER_SECOND[kind.unit]
    seconds = moment.cast(pa.timestamp("s")).cast(pa.int64()).as_py()
    result = seconds * units - (-int(fraction.ljust(9, "0")) * units // 10**9)  # rounded up
    if not -(2**63) <= result < 2**63:
        raise UserError(f"{given}: the split column holds {kind}, which cannot hold that time")
    return result


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
