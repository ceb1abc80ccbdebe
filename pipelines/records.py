"""Encoded rows as tf.Example messages: `blocks` (one per few hundred rows) and `rows` (one per row); parses blocks.

Encoded rows are pyarrow record batches, whose column names are the keys of the messages:
``feature:<name>`` int32 (categorical; a fixed-size list of two where it has two hashes), list<int32> (multivalent; two
ids per value where it has two hashes), float32 (numeric), fixed-size list<float32> (dense);
``label:<task>`` float32, NaN outside the task's space; ``weight:<column>`` float32; ``key:group``,
``key:item`` and ``key:row_id`` int64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.schema import Schema
from stem_util.errors import UserError

MOST_VALUES = 2**31 - 1
"""The most values that the lists of one Arrow array can hold together, because offsets are int32."""

_ROWS_AT_A_TIME = 2048
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3  # field numbers in tensorflow.Feature


def lists(lengths: np.ndarray, values: pa.Array, name: str) -> pa.ListArray:
    """A column of lists, made of their ``lengths`` [n] and of their values, one list after another.

    Raises:
      UserError: there are more than `MOST_VALUES` values.
    """
    check_values(len(values), name, f"{len(lengths):,} rows that are read together; lower its max_length or length")
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32)), values)


def check_values(count: int, name: str, where: str) -> None:
    """Raises UserError if the lists of a column have more than `MOST_VALUES` values."""
    if count > MOST_VALUES:
        raise UserError(f"{name} has {count:,} values, more than {MOST_VALUES:,}, in {where}")


def _numpy(array: pa.Array) -> np.ndarray:
    """The values of a primitive array, or all values of a list array, one list after another; little-endian."""
    if pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    values = array.to_numpy()
    return values.astype(values.dtype.newbyteorder("<"), copy=False)


def _lengths(array: pa.ListArray) -> np.ndarray:
    return np.diff(array.offsets.to_numpy()).astype("<i4")


def blocks(batch: pa.RecordBatch, size: int) -> Iterator[tuple[int, bytes]]:
    """Yields (rows, message) for every ``size`` rows; the last block holds the rest.

    Each column is one bytes value: the elements of its rows one after another, little-endian. A multivalent feature has
    a second column, ``length:<name>``, int32: the number of values in each row. The bytes are the same as those of
    protobuf's deterministic serialisation.
    """
    columns: list[tuple[str, np.ndarray, np.ndarray | int]] = []  # key, values, place of each row's first value
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        width: np.ndarray | int = 1
        if pa.types.is_list(array.type):
            lengths = _lengths(array)
            columns.append(("length:" + name.removeprefix("feature:"), lengths, 1))
            width = np.append(0, np.cumsum(lengths, dtype=np.int64))
        elif pa.types.is_fixed_size_list(array.type):
            width = array.type.list_size
        columns.append((name, _numpy(array), width))
    columns.sort(
        key=lambda column: column[0].encode() + b"\xff"
    )  # protobuf's order: a key comes after longer keys that begin with it
    flat = [(name, values.view(np.uint8).data, width * values.itemsize) for name, values, width in columns]
    for start in range(0, batch.num_rows, size):
        end = min(start + size, batch.num_rows)
        parts: list[bytes | memoryview] = []
        for name, data, width in flat:
            if isinstance(width, int):
                part = data[start * width : end * width]
            else:
                part = data[width[start] : width[end]]
            parts += (_header(len(part), name, _BYTES_LIST), part)
        yield end - start, b"".join([_tag(1, sum(map(len, parts))), *parts])


class BadBlock(ValueError):
    """A message is not a block as `blocks` writes it for this schema."""


def parse(schema: Schema, messages: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Parses blocks into columns by record key: [n], or [n, length] (multivalent features padded with 0).

    Raises:
      BadBlock: a block has another form than `blocks` writes, lacks a column, or has columns of different lengths.
    """
    found: dict[bytes, list[memoryview]] = {}
    known: dict[int, _Places] = {}  # by message size: most blocks have the same places
    for message in messages:
        places = known.get(len(message))
        if places is None or b"".join([message[part] for part in places.between]) != places.headers:
            try:
                places = known[len(message)] = _Places.of(message)
            except IndexError:
                raise BadBlock("a block ends early") from None
        view = memoryview(message)
        for name, part in places.columns.items():
            found.setdefault(name, []).append(view[part])

    def column(key: str, kind: type) -> np.ndarray:
        parts = found.get(key.encode(), [])
        if len(parts) != len(messages):
            raise BadBlock(f"a block lacks {key}")
        data = b"".join(parts)  # little-endian arrays: joining their bytes joins the arrays
        if len(data) % np.dtype(kind).itemsize:
            raise BadBlock(f"{key} of a block ends early")
        return np.frombuffer(data, np.dtype(kind).newbyteorder("<")).astype(kind, copy=False)

    multivalent = {f"feature:{f.name}": f"length:{f.name}" for f in schema.features if f.kind == "multivalent"}
    count = len(column("key:row_id", np.int64))
    result = {}
    for key, (kind, width) in shapes(schema):
        values = column(key, kind)
        if key in multivalent:
            lengths = column(multivalent[key], np.int32)
            sound = len(lengths) == count and len(values) == lengths.sum(dtype=np.int64)
            if sound and count:
                sound = lengths.min() >= 0 and lengths.max() <= width
        else:
            sound = len(values) == count * max(width, 1)
        if not sound:
            raise BadBlock(f"the columns of a block differ in length: {key}")
        if key in multivalent:
            values = padded(values, lengths, width)
        result[key] = values.reshape(count, width) if width else values
    return result


@dataclass(frozen=True)
class _Places:
    """Where the columns lie in a block.

    Attributes:
      columns: the place of each column's bytes.
      between: the places of the bytes between columns.
      headers: the bytes at these places.
    """

    columns: dict[bytes, slice]
    between: list[slice]
    headers: bytes

    @classmethod
    def of(cls, message: bytes) -> _Places:
        """The places in a tf.Example whose features hold one bytes value each.

        Raises:
          BadBlock: the message has another form.
          IndexError: the message ends early.
        """
        at, end = _content(message, 0, 0x0A, len(message))  # Example.features
        if end != len(message):
            raise BadBlock(_NO_BLOCK)
        columns, between, before = {}, [], 0
        while at < end:
            at, entry = _content(message, at, 0x0A, end)  # Features.feature
            at, stop = _content(message, at, 0x0A, entry)
            name = message[at:stop]
            at, stop = _content(message, stop, 0x12, entry)
            at, stop = _content(message, at, 0x0A, stop)  # Feature.bytes_list
            at, stop = _content(message, at, 0x0A, stop)  # BytesList.value
            if stop != entry:
                raise BadBlock(_NO_BLOCK)
            columns[name] = slice(at, stop)
            between.append(slice(before, at))
            at = before = stop
        return cls(columns, between, b"".join([message[part] for part in between]))


_NO_BLOCK = "a block is no tf.Example with one bytes value per column"


def _content(message: bytes, at: int, tag: int, end: int) -> tuple[int, int]:
    """Returns where the content of the length-delimited field at ``at`` begins and ends."""
    if message[at] != tag:
        raise BadBlock(_NO_BLOCK)
    size = shift = 0
    while True:
        at += 1
        size |= (message[at] & 127) << shift
        if message[at] < 128:
            break
        shift += 7
    if at + 1 + size > end:
        raise BadBlock("a block ends early")
    return at + 1, at + 1 + size


def shapes(schema: Schema) -> list[tuple[str, tuple[type, int]]]:
    """The columns of records by key: type, and number of values per row (0: a single value rather than a vector)."""
    features: dict[str, tuple[type, int]] = {}
    for feature in schema.features:
        several = feature.ids_per_value if feature.ids_per_value > 1 else 0
        widths = {
            "categorical": several,
            "multivalent": feature.max_length * feature.ids_per_value,
            "numeric": 0,
            "dense": feature.length,
        }
        features[f"feature:{feature.name}"] = (np.int32 if feature.has_ids else np.float32), widths[feature.kind]
    keys = [role for role, column in (("group", schema.group), ("item", schema.item)) if column]
    return [
        *features.items(),
        *((f"label:{name}", (np.float32, 0)) for name in schema.task_names),
        *((f"weight:{column}", (np.float32, 0)) for column in schema.row_weights),
        *((f"key:{role}", (np.int64, 0)) for role in [*keys, "row_id"]),
    ]


def padded(values: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Lists, given by their ``lengths`` [n] and their values one after another, as [n, width], padded with 0."""
    there = np.arange(width) < lengths[:, None]
    matrix = np.zeros(there.shape, values.dtype)
    matrix[there] = values
    return matrix


def rows(batch: pa.RecordBatch) -> Iterator[bytes]:
    """Yields one message per row, with its keys in ascending order.

    The messages are assembled column by column, because protobuf's message class is three times slower (35,000 instead
    of 115,000 rows of 20 columns per second on one core). The bytes of a message lie in one row of a matrix with gaps;
    a mask marks the bytes that count.
    """
    for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
        yield from _rows(batch.slice(start, _ROWS_AT_A_TIME))


def _rows(batch: pa.RecordBatch) -> Iterator[bytes]:
    parts: list[tuple[np.ndarray, np.ndarray]] = []  # (bytes uint8 [n, w], mask bool [n, w])
    for name in sorted(batch.schema.names):
        array = batch.column(name)
        number, data, mask = _packed(array)
        parts += [_prefix(mask.sum(axis=1), name, number), (data, mask)]
    features = sum(mask.sum(axis=1) for _, mask in parts)
    data, mask = _varints(features.astype(np.uint64))
    parts = [(np.full((batch.num_rows, 1), 0x0A, np.uint8), np.ones((batch.num_rows, 1), bool)), (data, mask), *parts]
    present = np.hstack([mask for _, mask in parts])
    flat = np.hstack([data for data, _ in parts])[present].tobytes()
    ends = np.cumsum(present.sum(axis=1)).tolist()
    for begin, end in zip([0, *ends], ends, strict=False):
        yield flat[begin:end]


def _varints(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Base-128 varints of uint64 [n]: bytes [n, w] and their mask."""
    width = max(1, -(-int(values.max(initial=0)).bit_length() // 7))
    groups = values[:, None] >> (np.arange(width, dtype=np.uint64) * np.uint64(7))
    mask = groups > 0
    mask[:, 0] = True
    more = np.zeros_like(mask)
    more[:, :-1] = mask[:, 1:]
    return (groups & np.uint64(0x7F)).astype(np.uint8) | (more.astype(np.uint8) << 7), mask


def _packed(array: pa.Array) -> tuple[int, np.ndarray, np.ndarray]:
    """Packs a column's values row by row: the field number of their list, bytes [n, w] and their mask."""
    values, count = _numpy(array), len(array)
    if values.dtype == np.float32:
        data = values.view(np.uint8).reshape(count, -1)
        return _FLOAT_LIST, data, np.ones_like(data, bool)
    data, mask = _varints(values.astype(np.int64).view(np.uint64))
    if not pa.types.is_list(array.type):
        return _INT64_LIST, data.reshape(count, -1), mask.reshape(count, -1)
    lengths = _lengths(array)
    there = np.arange(lengths.max(initial=0)) < lengths[:, None]
    wide_data, wide_mask = (np.zeros((*there.shape, data.shape[1]), part.dtype) for part in (data, mask))
    wide_data[there], wide_mask[there] = data, mask
    return _INT64_LIST, wide_data.reshape(count, -1), wide_mask.reshape(count, -1)


def _prefix(lengths: np.ndarray, name: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes before packed values of ``lengths`` [n] bytes: tags, lengths and the key."""
    distinct, place = np.unique(lengths, return_inverse=True)
    headers = [_header(int(length), name, number) for length in distinct]
    width = max(map(len, headers))
    data = np.array([list(header.ljust(width, b"\0")) for header in headers], np.uint8)
    mask = np.arange(width) < np.array([len(header) for header in headers])[:, None]
    return data[place], mask[place]


@functools.lru_cache(maxsize=4096)
def _header(length: int, name: str, number: int) -> bytes:
    """The bytes before the ``length`` bytes of a feature, which holds one bytes value or packed numbers."""
    key = name.encode()
    inner = _tag(1, length) if length or number == _BYTES_LIST else b""  # an empty list has no packed field
    values = _tag(number, len(inner) + length) + inner
    entry = _tag(1, len(key)) + key + _tag(2, len(values) + length) + values
    return _tag(1, len(entry) + length) + entry


def _tag(field: int, size: int) -> bytes:
    """The tag of a field of wire type 2, and its size in bytes."""
    data, mask = _varints(np.array([size], np.uint64))
    return bytes([field << 3 | 2]) + data[mask].tobytes()
