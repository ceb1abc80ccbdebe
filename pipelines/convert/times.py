"""Times for splits: their type, integer keys in the same order, and times given on the command line."""

from __future__ import annotations

import re
import time as clock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.log import casts
from stem_util.errors import UserError

LAST_KEY = 2**64 - 1
"""The largest key of `order_keys`: a split until then has no end."""
_CALENDAR = (631_152_000, 4_102_444_800)
"""1990 and 2100, in seconds since 1970: a number between them, in some unit, is taken for a time."""


def time_kind(array: pa.Array, column: str, named: str = "--split_column") -> pa.DataType:
    """The type by which a time column is ordered; for text, it is guessed from the values. ``named``: by what.

    Raises:
      UserError: the values are neither numbers nor times.
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
    raise UserError(f"{named}={column}: a time should be a number, a date or a timestamp; the column is {kind}")


def kind_of_name(name: str) -> pa.DataType:
    """The Arrow type with this name."""
    timestamp = re.fullmatch(r"timestamp\[(\w+)(?:, tz=(.+))?\]", name)
    return pa.timestamp(*timestamp.groups()) if timestamp else pa.type_for_alias(name)


def time_values(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """Casts a time column to int64, float64 or timestamps (missing ones null), and marks values that cannot be cast."""
    if pa.types.is_timestamp(kind):
        array = casts.plain(array)
        if casts.is_text(array.type):
            text, undecodable = casts.to_text(array)
            values, bad = casts.try_cast(pc.utf8_trim_whitespace(text), kind)
            return values, bad | undecodable
        return casts.try_cast(array, kind)
    return casts.to_float64(array) if pa.types.is_floating(kind) else casts.to_int64(array)


def order_keys(values: pa.Array) -> np.ndarray:
    """Keys, uint64 [n], in the order of the values (int64, float64 or timestamps, without nulls)."""
    if pa.types.is_floating(values.type):
        floats = casts.to_numpy(values) + 0.0  # makes -0.0 equal to 0.0
        bits = floats.view(np.uint64)
        negative = bits >> np.uint64(63) == 1
        return np.where(negative, ~bits, bits | np.uint64(1 << 63))
    return casts.to_numpy(values.cast(pa.int64())).view(np.uint64) ^ np.uint64(1 << 63)


def key_value(key: int, kind: pa.DataType) -> Any:
    """The value behind a key of `order_keys`, as a Python int, float or ISO text."""
    if pa.types.is_floating(kind):
        bits = key ^ (1 << 63) if key >> 63 else ~key & (2**64 - 1)
        return float(np.uint64(bits).view(np.float64))
    integer = key - (1 << 63)
    return str(pa.scalar(integer, pa.int64()).cast(kind)) if pa.types.is_timestamp(kind) else integer


def integers(keys: np.ndarray, kind: pa.DataType) -> np.ndarray:
    """The times behind keys of `order_keys`, int64 [n]: numbers rounded down, timestamps in their unit."""
    if not pa.types.is_floating(kind):
        return (keys ^ np.uint64(1 << 63)).view(np.int64)
    negative = keys >> np.uint64(63) == 0
    floats = np.where(negative, ~keys, keys ^ np.uint64(1 << 63)).view(np.float64)
    return np.floor(np.clip(floats, -(2.0**62), 2.0**62)).astype(np.int64)


def units_per_second(kind: pa.DataType, newest: int) -> int:
    """The unit of the `integers` of a time column: of numbers guessed by the newest one; 0 if they are no dates."""
    if pa.types.is_timestamp(kind):
        return _PER_SECOND[kind.unit]
    first, last = _CALENDAR
    return next((units for units in _PER_SECOND.values() if first * units <= newest < last * units), 0)


def microseconds(times: np.ndarray, units: int) -> np.ndarray:
    """`integers` as microseconds since 1970, int64 [n]; unchanged if ``units`` per second is 0."""
    if units <= 10**6:
        factor = 10**6 // units if units else 1
        return np.clip(times, -(2**62) // factor, 2**62 // factor) * factor
    return times // (units // 10**6)


def in_the_future(time: int) -> bool:
    """Whether a time of `microseconds` is more than a day from now. Clocks and time zones differ by less."""
    return time > (clock.time() + 86_400) * 10**6


def shown(time: int, calendar: bool) -> str:
    """A time of `microseconds` as text."""
    return str(pa.scalar(time, pa.timestamp("us"))).removesuffix(".000000") if calendar else f"{time:,}"


_TIME = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ]+(\d\d(?::\d\d(?::\d\d(?:\.\d{1,9})?)?)?)\s*(Z|[+-]\d\d(?::?\d\d)?)?)?")
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def parse_time(text: str, kind: pa.DataType, flag: str, example: Any) -> int:
    """The key of `order_keys` for a time that is given on the command line as the first one of a split.

    A date means its midnight. A time that is finer than the column's unit is rounded up. A time without an offset is in
    the column's time zone.

    Args:
      text: the flag's value.
      kind: the column's `time_kind`.
      flag: the flag's name.
      example: a value of the column, for the error.

    Raises:
      UserError: the text is no value of the column's type; the message shows valid forms.
    """
    given = f"--{flag}={text}"
    if pa.types.is_timestamp(kind):
        return int(order_keys(pa.array([_moment(text.strip(), kind, given)], pa.int64()))[0])
    values, bad = time_values(pa.array([text.encode()], pa.binary()), kind)
    shown = example.decode() if isinstance(example, bytes) else example
    if bad[0] or values.null_count:
        raise UserError(
            f"{given}: the split column holds numbers ({kind}); write a number in the same form, such as {shown}"
        )
    return int(order_keys(values)[0])


def _moment(text: str, kind: pa.TimestampType, given: str) -> int:
    """A time as a number of units of the column's type since 1970."""
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
                f"{given}: clocks change in {kind.tz}, so this time does not exist or occurs twice; write it with an "
                "offset, as in +01:00"
            ) from error
    units = _PER_SECOND[kind.unit]
    seconds = moment.cast(pa.timestamp("s")).cast(pa.int64()).as_py()
    result = seconds * units - (-int(fraction.ljust(9, "0")) * units // 10**9)  # rounded up
    if not -(2**63) <= result < 2**63:
        raise UserError(f"{given}: the split column holds {kind}, which cannot hold that time")
    return result
