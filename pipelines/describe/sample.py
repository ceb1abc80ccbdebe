"""Draws a uniform sample of a log's rows in bounded memory, and finds the types of CSV columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import sampling
from pipelines.describe import guess
from pipelines.log import casts, source
from pipelines.log.parts import Log
from stem_util.errors import UserError
from stem_util.progress import Progress

_MIN_UNITS, _ROWS = 64, 64 << 19  # of a long log, at least so many units and so many rows are read
_ROW_BYTES = 100  # size of a CSV row, roughly
_INTEGER = r"^[-+]?[0-9]+$"
_NO_NUMBERS = r"[^-+0-9|;,\s]"
_HEAD = 256
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class LogSample:
    """Sampled rows of a log.

    Attributes:
      table: the rows, in the log's order. A column of a CSV log is int64, double, string or (if not UTF-8) binary: the
        narrowest type that holds all rows read. Dictionaries are decoded. Columns that cannot be features are null.
      seen: number of rows that were read.
      rows: number of rows in the log; an estimate where not all of it was read.
      malformed: number of CSV rows with a wrong number of columns, which are not counted in ``seen``.
      complete: whether the table holds every row of the log.
    """

    table: pa.Table
    seen: int
    rows: int
    malformed: int
    complete: bool


def draw(log: Log, limit: int, seed: int = 0) -> LogSample:
    """Draws up to ``limit`` rows, each with the same probability.

    Of a long log, evenly spread units (one CSV file, or about half a million rows of Parquet) are read: at least 64,
    with about 30 million rows. Rare values that decide what a column can be (missing, negative, not finite, ...) are
    always in the sample: one row of each kind that was read.

    Raises:
      UserError: a file is damaged or has no columns.
    """
    rows = sum(source.file_bytes(unit.path) // _ROW_BYTES if log.text else unit.rows for unit in log.units)
    count = min(max(len(log.units) * _ROWS // max(rows, 1), _MIN_UNITS), len(log.units))
    units = [log.units[i * len(log.units) // count] for i in range(count)]
    names = [name for name, kind in log.types.items() if guess.is_read(kind)] or list(log.types)
    if not names:
        raise UserError(f"{log.files[0]}: there is no column that can be read; {'; '.join(log.problems.values())}")
    rng = np.random.default_rng(seed)
    columns = {name: _Column(log.text or name in log.directory_columns) for name in names}
    held: list[pa.Table] = []
    keys: list[np.ndarray] = []
    below, seen, malformed = 1.0, 0, 0
    total = None if log.text else sum(unit.rows for unit in units)
    with Progress(total, unit="rows", desc="sample") as progress:
        for unit in units:
            for chunk in source.read(log, unit, names, skip_malformed=True):
                # Each row gets a random key; the rows with the smallest keys are the sample.
                drawn = rng.random(len(chunk.rows))
                arrays = {name: _plain(array) for name, array in log.alike(chunk.columns).items()}
                for name, column in columns.items():
                    drawn[column.first_of_a_kind(arrays[name])] = 0.0
                keep = drawn < below
                held.append(pa.table(arrays).filter(keep))
                keys.append(drawn[keep])
                if sum(map(len, keys)) > 2 * limit:
                    held, keys, below = _smallest(held, keys, limit)
                seen += len(drawn)
                malformed += chunk.malformed
                progress.update(len(drawn))
    if not held:
        return LogSample(pa.table({name: pa.nulls(0) for name in log.types}), 0, 0, malformed, complete=True)
    kept = _smallest(held, keys, limit)[0][0].combine_chunks()
    table = pa.table(
        {
            name: columns[name].typed(kept.column(name).combine_chunks()) if name in columns else pa.nulls(len(kept))
            for name in log.types
        }
    )
    complete = len(table) == seen and count == len(log.units)
    return LogSample(table, seen, seen * len(log.units) // count, malformed, complete)


class _Column:
    """What the rows read so far show about one column.

    Args:
      text: the column is text, so its type has to be found.
    """

    def __init__(self, text: bool) -> None:
        self._types = (
            [pa.int64(), pa.float64(), pa.string(), pa.binary()] if text else []
        )  # types that may hold every value
        self._seen: set[str] = set()
        self._length: int | None = None  # length of the first list

    def first_of_a_kind(self, array: pa.Array) -> list[int]:
        """Places of the first rows with each kind of value that was not seen before."""
        if self._types:
            array = self._narrowed(array)
        places = []
        for kind, find in self._kinds_of(array):
            if kind in self._seen:
                continue
            # Most kinds occur in the first chunk.
            place = pc.index(find(array.slice(0, _HEAD)), True).as_py()
            place = place if place >= 0 else pc.index(find(array), True).as_py()
            if place >= 0:
                self._seen.add(kind)
                places.append(place)
        return places

    def _kinds_of(self, array: pa.Array) -> Iterator[tuple[str, Callable[[pa.Array], pa.Array]]]:
        """The kinds that values of the array's type can have, each with a function from values [n] to bool [n]."""
        kind = array.type
        yield "missing", lambda part: pc.is_null(part, nan_is_null=True)
        if pa.types.is_signed_integer(kind) or pa.types.is_floating(kind):
            yield "negative", lambda part: pc.less(part, 0)
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            yield "not 0 or 1", lambda part: pc.invert(pc.is_in(part, pa.array([0, 1]).cast(kind)))
        if pa.types.is_floating(kind):
            yield "not finite", lambda part: pc.greater(pc.abs(part), _LARGEST)
        if pa.types.is_uint64(kind):
            yield "beyond int64", lambda part: pc.greater(part, pa.scalar(2**63 - 1, kind))
        if casts.is_text(kind):
            yield "empty", lambda part: pc.equal(pc.binary_length(part), 0)
            yield "not UTF-8", lambda part: _first_without(part, pa.string())
        if pa.types.is_string(kind) and "not UTF-8" not in self._seen:
            yield "not numbers", lambda part: pc.match_substring_regex(part, _NO_NUMBERS)
            yield "no date", lambda part: pc.invert(pc.match_substring_regex(part, guess.DATE))
        if pa.types.is_string(kind) and "no date" not in self._seen:
            yield "no time", lambda part: _first_without(part, pa.timestamp("us"))
            yield "no time in a zone", lambda part: _first_without(part, pa.timestamp("us", "UTC"))
        if casts.is_list(kind):
            if self._length is None:
                lengths = pc.list_value_length(array).drop_null()
                self._length = lengths[0].as_py() if len(lengths) else None
            yield "of another length", lambda part: pc.not_equal(pc.list_value_length(part), self._length)

    def _narrowed(self, array: pa.Array) -> pa.Array:
        """Casts to the narrowest type that holds every value so far; gives up the others."""
        while True:
            try:
                return self.typed(array)
            except pa.ArrowInvalid:
                self._types.pop(0)

    def typed(self, array: pa.Array) -> pa.Array:
        """Casts a text column to the type that holds all its values; returns other columns unchanged.

        Raises:
          ArrowInvalid: the type cannot hold a value.
        """
        if not self._types or self._types[0] == pa.binary():
            return array
        text = array.cast(pa.string())
        if self._types[0] == pa.string():
            return text
        text = pc.utf8_trim_whitespace(pc.if_else(pc.equal(pc.binary_length(text), 0), None, text))
        if guess.has_codes(text):
            raise pa.ArrowInvalid("a code, not a number")
        try:
            return text.cast(self._types[0])
        except pa.ArrowInvalid:
            if self._types[0] == pa.int64() and pc.all(pc.match_substring_regex(text, _INTEGER)).as_py():
                self._types.pop(0)  # the caller drops float64 then, which would round ids beyond int64
            raise


def _first_without(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Marks the first text that cannot be cast: bool [n]."""
    low, high = 0, len(array)  # the first `low` values can be cast, one of the first `high` cannot
    if guess.can_cast(array, kind):
        return pa.array(np.zeros(len(array), bool))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if guess.can_cast(array.slice(low, middle - low), kind) else (low, middle)
    return pa.array(np.arange(len(array)) == low)


def _smallest(
    held: list[pa.Table], keys: list[np.ndarray], limit: int
) -> tuple[list[pa.Table], list[np.ndarray], float]:
    """The rows with the ``limit`` smallest keys, in their order, and the key that new rows must be below."""
    table, key = pa.concat_tables(held), np.concatenate(keys)
    bound = sampling.bound(key, limit)
    if bound is None:
        return [table], [key], 1.0
    keep = (key < bound) | (key == 0)
    return [table.filter(keep)], [key[keep]], float(bound)


def _plain(array: pa.Array) -> pa.Array:
    """Decodes dictionaries, and casts types that few functions support to ones that all support."""
    kind = _plain_type(array.type)
    return array if kind == array.type else array.cast(kind)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if casts.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind):
        return pa.binary()
    return pa.float32() if pa.types.is_float16(kind) else kind
