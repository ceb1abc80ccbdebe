"""Casts columns of the log to int64, UTF-8 strings, float64, bools, and lists of int64 or strings.

Whole columns are cast at once; bad values are looked for only when that fails. Each ``to_`` function returns the cast
array, in which missing values are null, and a mask of the values that could not be cast, which are null too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

EMPTY: dict[str, Any] = {"int64": -(2**63), "string": b"", "float32": float("nan")}
"""The value of each dtype that means a missing value, in requests as in logs."""


@dataclass(frozen=True)
class Lists:
    """A column of lists: the values of all rows, one after another, and the number of values per row.

    Attributes:
      values: int64 or string [sum of lengths]; missing values are null.
      lengths: int64 [n].
      missing: bool [n]: whether the row is null or holds a missing value.
    """

    values: pa.Array
    lengths: np.ndarray
    missing: np.ndarray


def to_numpy(array: pa.Array) -> np.ndarray:
    """A numpy array of a primitive or boolean array without nulls."""
    return array.to_numpy(zero_copy_only=False)


def try_cast(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """Casts the array; on failure casts each half, down to the single values that cannot be cast."""
    try:
        return array.cast(kind), np.zeros(len(array), bool)
    except pa.ArrowInvalid:
        if len(array) == 1:
            return pa.nulls(1, kind), np.ones(1, bool)
        half = len(array) // 2
        left, left_bad = try_cast(array.slice(0, half), kind)
        right, right_bad = try_cast(array.slice(half), kind)
        return pa.concat_arrays([left, right]), np.concatenate([left_bad, right_bad])


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are strings or bytes."""
    types = pa.types
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether values of this type are lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values, dictionary-encoded or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def common_type(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both for the casts of this module, or None if there is none."""
    if left == right:
        return left
    left, right = plain_type(left), plain_type(right)
    types = pa.types
    if types.is_null(left) or types.is_null(right) or left == right:
        return right if types.is_null(left) else left
    if is_text(left) and is_text(right):
        return _common_text(left, right)
    if is_number(left) and is_number(right):
        return _common_number(left, right)
    if is_list(left) and is_list(right):
        value = common_type(left.value_type, right.value_type)
        large = types.is_large_list(left) or types.is_large_list(right)
        return None if value is None else pa.large_list(value) if large else pa.list_(value)
    if types.is_temporal(left) and types.is_temporal(right):
        return _common_time(left, right)
    return _permissive(left, right)


def _common_text(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    both, types = (left, right), pa.types
    large = any(types.is_large_string(kind) or types.is_large_binary(kind) for kind in both)
    if any(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) for kind in both):
        return pa.large_binary() if large else pa.binary()
    return pa.large_string() if large else pa.string()


def _common_number(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    """Bools count as integers, integers beside floats as floats. Only unsigned types may exceed int64."""
    types = pa.types
    if types.is_floating(left) or types.is_floating(right):
        return pa.float64()
    large = pa.uint64() in (left, right) and not any(map(types.is_signed_integer, (left, right)))
    return pa.uint64() if large else pa.int64()


def _common_time(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """Beside timestamps without a zone, dates are midnights. Zones only decide how a time is shown."""
    types = pa.types
    zones = {kind.tz for kind in (left, right) if types.is_timestamp(kind)}
    left, right = (pa.timestamp("ms") if zones == {None} and types.is_date(kind) else kind for kind in (left, right))
    if len(zones) == 2 and None not in zones:
        left, right = pa.timestamp(left.unit, "UTC"), pa.timestamp(right.unit, "UTC")
    return _permissive(left, right)


def _permissive(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """The common type by Arrow's own rules, or None if Arrow cannot cast both to it."""
    schemas = [pa.schema([("", kind)]) for kind in (left, right)]
    try:
        common = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        for kind in (left, right):
            pa.nulls(1, kind).cast(common)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return None
    return common


def to_type(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Casts to a `common_type`; values that do not fit, such as unsigned integers beyond int64, become null."""
    if array.type == kind:
        return array
    array = plain(array)
    if pa.types.is_boolean(array.type) and pa.types.is_floating(kind):
        array = array.cast(pa.int8())
    if pa.types.is_floating(kind):
        return array.cast(kind, safe=False)  # integers beyond 2^53 are rounded
    return try_cast(array, kind)[0]


def is_int(kind: pa.DataType) -> bool:
    """Whether values of this type are integers or bools, which become int64."""
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def is_number(kind: pa.DataType) -> bool:
    """Whether values of this type are numbers; bools are 0 and 1."""
    return is_int(kind) or pa.types.is_floating(kind)


def is_time(kind: pa.DataType) -> bool:
    """Whether values of this type can be times: numbers, dates, timestamps, and text, which is judged by its values."""
    return pa.types.is_temporal(kind) or is_number(kind) or is_text(kind)


def plain(array: pa.Array) -> pa.Array:
    """The values, dictionary-decoded."""
    return array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array


def _null_where(array: pa.Array, mask: pa.Array) -> pa.Array:
    return pc.if_else(mask, pa.scalar(None, array.type), array)


def to_text(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Casts to strings [n]; bytes that are not UTF-8 are bad. The empty string becomes null."""
    array = plain(array)
    if not is_text(array.type):
        array = array.cast(pa.string())
    # By way of bytes: Parquet readers do not check that a string column is UTF-8, this cast does.
    text, bad = try_cast(array.cast(pa.binary()), pa.string())
    empty = pc.equal(pc.binary_length(text), 0)
    return (_null_where(text, empty) if pc.any(empty).as_py() else text), bad


def to_int64(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Casts to int64 [n]; texts that are not integers and integers beyond int64 are bad. -2^63 becomes null.

    A text may be a whole number written as a float, as pandas writes integers beside missing values: 18.0 is 18. Beyond
    2^53, where floats are rounded, it is bad.
    """
    array = plain(array)
    if is_text(array.type):
        text, undecodable = to_text(array)
        integers, bad = _integers(pc.utf8_trim_whitespace(text))
        bad |= undecodable
    else:
        integers, bad = try_cast(array, pa.int64())
    empty = pc.equal(integers, EMPTY["int64"])
    return (_null_where(integers, empty) if pc.any(empty).as_py() else integers), bad


def _integers(text: pa.Array) -> tuple[pa.Array, np.ndarray]:
    try:
        return text.cast(pa.int64()), np.zeros(len(text), bool)
    except pa.ArrowInvalid:
        whole = pc.replace_substring_regex(text, pattern=r"^([-+]?[0-9]+)\.0*$", replacement=r"\1")
        integers, bad = try_cast(whole, pa.int64())
        beyond = pc.or_(pc.greater(integers, 2**53), pc.less(integers, -(2**53)))  # abs(-2^63) would be an error
        rounded = pc.and_(pc.not_equal(whole, text), beyond)
        rounded = pc.fill_null(rounded, False)
        return _null_where(integers, rounded), bad | to_numpy(rounded)


def to_float64(array: pa.Array, *, bools: bool = False) -> tuple[pa.Array, np.ndarray]:
    """Casts to float64 [n]; texts that are not numbers are bad. NaN becomes null; infinities are left to the caller.

    With ``bools``, the texts true and false, in any case, are 1 and 0.
    """
    array = plain(array)
    if is_text(array.type):
        text, undecodable = to_text(array)
        text = pc.utf8_trim_whitespace(text)
        floats, bad = _floats(text, bools)
        bad |= undecodable
    else:
        if pa.types.is_boolean(array.type):
            array = array.cast(pa.int8())
        # safe=False: integers beyond 2^53 are rounded; they become float32 later anyway.
        floats, bad = array.cast(pa.float64(), safe=False), np.zeros(len(array), bool)
    empty = pc.is_nan(floats)
    return (_null_where(floats, empty) if pc.any(empty).as_py() else floats), bad


def _floats(text: pa.Array, bools: bool) -> tuple[pa.Array, np.ndarray]:
    try:
        return text.cast(pa.float64()), np.zeros(len(text), bool)
    except pa.ArrowInvalid:
        if bools:
            words = pc.utf8_lower(text)
            text = pc.if_else(pc.equal(words, "true"), "1", pc.if_else(pc.equal(words, "false"), "0", text))
        return try_cast(text, pa.float64())


def to_bools(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Casts bools, 0 and 1, and the texts true and false (in any case) to bool [n]; all other values are bad."""
    numbers, bad = to_float64(array, bools=True)
    known = to_numpy(pc.is_in(numbers, pa.array([0.0, 1.0, None], pa.float64())))
    bad |= ~known
    return _null_where(pc.equal(numbers, 1), pa.array(bad)), bad


def _without_ends(text: pa.Array, separator: str) -> pa.Array:
    """Removes a separator at the ends of the text that lost its spaces: with ", ", the text "a, b," becomes "a, b"."""
    if separator != separator.lstrip(" "):
        text = pc.replace_substring_regex(text, pattern="^" + re.escape(separator.lstrip(" ")), replacement="")
    if separator != separator.rstrip(" "):
        text = pc.replace_substring_regex(text, pattern=re.escape(separator.rstrip(" ")) + "$", replacement="")
    return text


def to_lists(array: pa.Array, dtype: str, separator: str | None) -> tuple[Lists, np.ndarray]:
    """Casts a list column, or text that ``separator`` splits, to lists [n]; rows with a bad value are bad."""
    array = plain(array)
    if is_list(array.type):
        if pa.types.is_fixed_size_list(array.type):
            array = array.cast(pa.list_(array.type.value_type))
        undecodable = np.zeros(len(array), bool)
    elif pa.types.is_null(array.type):
        array, undecodable = pa.nulls(len(array), pa.list_(pa.null())), np.zeros(len(array), bool)
    else:
        text, undecodable = to_text(array)
        array = pc.split_pattern(_without_ends(text, str(separator)), separator)
    lengths = to_numpy(pc.fill_null(pc.list_value_length(array), 0)).astype(np.int64)
    rows = np.repeat(np.arange(len(array)), lengths)
    flat = array.flatten()  # skips values behind null lists
    values, bad_values = {"int64": to_int64, "string": to_text, "float32": to_float64}[dtype](flat)
    missing = to_numpy(array.is_null()).copy()
    missing[rows[to_numpy(values.is_null())]] = True
    bad = undecodable.copy()
    bad[rows[bad_values]] = True
    return Lists(values, lengths, missing & ~bad), bad
