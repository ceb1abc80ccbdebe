"""Converts the values of a service to the arrays that a model takes. Possible mistakes are refused, not converted.

    int64    integers, and floats that are whole numbers (as in a pandas column with missing values)
    string   str (as UTF-8) and bytes
    float32  numbers that are finite in float32

A missing value (None, NaN, pandas.NA) becomes the model's empty value: -2^63, b"" or NaN. A list may be one text if its
separator is known.
"""

from __future__ import annotations

import itertools
import operator
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from stem_client import separators
from stem_client.errors import FeatureError
from stem_client.metadata import Feature

_EMPTY: dict[str, Any] = {"int64": -(2**63), "string": b"", "float32": float("nan")}
_ARRAYS = {"int64": np.int64, "string": np.object_, "float32": np.float32}
# From these numbers on, floats of that many bytes skip integers, so the meant integer is unknown.
_INEXACT = {2: 11, 4: 24, 8: 53}
_PYTHON_FLOAT = 8


class _Wrong(Exception):
    """What is wrong, and where: at a row, at a place in the values of all rows, or (neither) in general."""

    def __init__(self, reason: str, *, row: int | None = None, flat: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.row, self.flat = reason, row, flat


def encode(feature: Feature, values: Any, label: str, row_word: str | None, separator: str | None = None) -> np.ndarray:
    """Returns an array with one row for each of ``values``.

    Args:
      feature: what the model takes.
      values: a sequence, an array or a pandas Series, one entry per row.
      label: the name of the feature in errors: "item feature 'length'".
      row_word: the name of a row in errors: "item"; None if there is only one row.
      separator: of a list that is written as text, or None.

    Returns:
      int64, float32 or (for strings) bytes objects; [rows] for a value, [rows, L] for a list, [rows, n] for a vector.

    Raises:
      FeatureError: naming feature, row and element.
    """
    lengths: np.ndarray | None = None
    try:
        rows = _sequence(values)
        if feature.kind == "value":
            if isinstance(rows, np.ndarray) and rows.ndim != 1:
                raise _Wrong(f"has shape {rows.shape}; one value for each {row_word or 'row'} is expected")
            return _CONVERT[feature.dtype](rows)
        flat, lengths = _flatten(feature, rows, separator)
        converted = _CONVERT[feature.dtype](flat)
        if feature.kind == "list" and feature.length is not None:
            return _first(feature, converted, lengths)
        return _pad(feature, converted, lengths)
    except _Wrong as wrong:
        row, element = wrong.row if wrong.flat is None else wrong.flat, None
        if wrong.flat is not None and lengths is not None:
            ends = np.cumsum(lengths)
            row = int(np.searchsorted(ends, wrong.flat, side="right"))
            element = wrong.flat - int(ends[row] - lengths[row])
        places = [label]
        if row is not None and row_word is not None:
            places.append(f"{row_word} {row}")
        if element is not None:
            places.append(f"element {element}")
        raise FeatureError(f"{', '.join(places)} {wrong.reason}") from None


def _sequence(values: Any) -> list[Any] | tuple[Any, ...] | np.ndarray:
    """Turns values into a list of Python objects, or an array of bools, numbers or strings."""
    if isinstance(values, list | tuple):
        return values
    if isinstance(values, np.ndarray) and hasattr(values, "mask"):
        return values.tolist()  # a masked array: None where masked
    if hasattr(values, "__array__"):
        # A pandas column of nullable integers with missing values would become floats; one of floats keeps their width.
        dtype: Any = getattr(values, "dtype", np.dtype(object))
        floats = getattr(getattr(dtype, "numpy_dtype", None), "kind", "") == "f"
        if floats and hasattr(values, "to_numpy"):
            values = values.to_numpy(dtype=dtype.numpy_dtype, na_value=np.nan)
        else:
            values = np.asarray(values) if isinstance(dtype, np.dtype) else np.asarray(values, np.object_)
        if values.ndim:
            if values.dtype.kind not in "OTUSbiuf":
                raise _Wrong(f"has dtype {values.dtype}; integers, floats or strings are expected")
            return values.tolist() if values.dtype.kind in "OT" else values
    elif isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray | memoryview):
        return list(values)
    raise _Wrong(f"is {_show(values)}; a list or an array is expected")


def _flatten(feature: Feature, rows: Iterable[Any], separator: str | None) -> tuple[Any, np.ndarray]:
    """Returns the values of all rows in one sequence, and the number per row; for a vector, the model's length."""
    if separator is not None and isinstance(rows, np.ndarray) and rows.ndim == 1:
        rows = rows.tolist()  # of texts
    if isinstance(rows, np.ndarray):
        if rows.ndim != 2:
            raise _Wrong(f"has shape {rows.shape}; a list of values for each row is expected: two dimensions")
        flat: Any = rows.ravel()
        lengths = np.full(rows.shape[0], rows.shape[1])
    else:
        parts = [_part(feature, row, number, separator) for number, row in enumerate(rows)]
        flat = list(itertools.chain.from_iterable(parts))
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    if feature.kind == "vector":
        wrong = lengths != feature.length
        if wrong.any():
            row = int(wrong.argmax())
            raise _Wrong(f"has {lengths[row]} elements; the model takes {feature.length}", row=row)
    return flat, lengths


def _part(feature: Feature, row: Any, number: int, separator: str | None) -> Sequence[Any]:
    """The values of one row: none for a missing list, NaNs for a missing vector."""
    if _missing(row):
        return [None] * (feature.length or 0) if feature.kind == "vector" else []
    try:
        if separator is not None and isinstance(row, str | bytes):
            return _split(feature, row, separator)
        part = _sequence(row)
        if isinstance(part, np.ndarray):
            if part.ndim != 1:
                raise _Wrong(f"has shape {part.shape}; one dimension is expected")
            part = _one_by_one(part)
    except _Wrong as wrong:
        raise _Wrong(wrong.reason, row=number) from None
    return part


def _split(feature: Feature, text: str | bytes, separator: str) -> list[Any]:
    try:
        return separators.split(text if isinstance(text, str) else text.decode("utf-8"), separator, feature.dtype)
    except UnicodeDecodeError:
        raise _Wrong(f"is {_show(text)}, which is not UTF-8") from None
    except separators.NotAnInteger as error:
        raise _Wrong(f"is {_show(text)}, of which {str(error)!r} is no integer; the model takes int64") from None


def _first(feature: Feature, flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[rows, length] as in conversion: the first values that are not empty, filled up with the empty value."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    kept = np.flatnonzero(flat != _EMPTY[feature.dtype])
    flat, rows = flat[kept], rows[kept]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    padded = np.full((len(lengths), feature.length or 0), _EMPTY[feature.dtype], _ARRAYS[feature.dtype])
    fits = place < padded.shape[1]
    padded[rows[fits], place[fits]] = flat[fits]
    return padded


def _pad(feature: Feature, flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[rows, L]: each row's values, filled up with the empty value; L is at least 1."""
    width = feature.length or max(1, int(lengths.max(initial=0)))
    padded = np.full((len(lengths), width), _EMPTY[feature.dtype], _ARRAYS[feature.dtype])
    padded[np.arange(width) < lengths[:, None]] = flat
    return padded


# Flat values to an array: all at once if the types allow it, else one by one, to find the wrong one.


def _each(values: Any, convert: Callable[[Any], Any], dtype: str) -> np.ndarray:
    converted = np.empty(len(values), _ARRAYS[dtype])
    for index, value in enumerate(values):
        try:
            converted[index] = convert(value)
        except _Wrong as wrong:
            raise _Wrong(wrong.reason, flat=index) from None
    return converted


def _int64(values: Any) -> np.ndarray:
    if isinstance(values, np.ndarray):
        if values.dtype.kind == "i" or (values.dtype.kind == "u" and not (values > np.uint64(2**63 - 1)).any()):
            return values.astype(np.int64)
        if values.dtype.kind == "f":
            missing = np.isnan(values)
            numbers = np.where(missing, 0, values)
            if not ((np.abs(numbers) >= _inexact(values.itemsize)) | (numbers != np.floor(numbers))).any():
                return np.where(missing, _EMPTY["int64"], numbers.astype(np.int64))
        values = _one_by_one(values)
    elif set(map(type, values)) <= {int}:
        try:
            return np.array(values, np.int64)
        except OverflowError:
            pass
    return _each(values, _one_int64, "int64")


def _one_int64(value: Any) -> int:
    if _missing(value):
        return _EMPTY["int64"]
    size = value.itemsize if isinstance(value, np.floating) else _PYTHON_FLOAT
    value = _plain(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise _Wrong(f"is {_show(value)}, which is not a whole number; the model takes int64")
        if abs(value) >= _inexact(size):
            floats = "floats" if size == _PYTHON_FLOAT else f"float{8 * size} values"
            raise _Wrong(
                f"is {_show(value)}; {floats} from 2^{_INEXACT[size]} on skip integers, so pass it as an integer"
            )
        return int(value)
    if isinstance(value, bool):
        raise _Wrong(f"is {_show(value)}; the model takes int64, so write {int(value)} if that is meant")
    if not hasattr(value, "__index__"):
        raise _Wrong(f"is {_show(value)}; the model takes int64")
    try:
        number = operator.index(value)
    except TypeError:  # an array has the method too
        raise _Wrong(f"is {_show(value)}; the model takes int64") from None
    if not -(2**63) <= number < 2**63:
        raise _Wrong(f"is {_show(value)}, which int64 does not hold")
    return number


def _inexact(size: int) -> float:
    """The number from which floats of ``size`` bytes skip integers; wider floats than Python's count as Python's."""
    return 2.0 ** _INEXACT[min(size, _PYTHON_FLOAT)]


def _one_by_one(values: np.ndarray) -> list[Any]:
    """Converts to Python's values, but keeps floats, because their width decides which integers they can hold."""
    return list(values) if values.dtype.kind == "f" else values.tolist()


def _float32(values: Any) -> np.ndarray:
    numbers = None
    if isinstance(values, np.ndarray):
        if values.dtype.kind in "iuf":
            numbers = values
        else:
            values = values.tolist()
    elif set(map(type, values)) <= {int, float}:
        try:
            numbers = np.array(values, np.float64)
        except OverflowError:  # an integer beyond float64
            pass
    if numbers is None:
        return _each(values, _one_float32, "float32")
    with np.errstate(over="ignore"):
        converted = numbers.astype(np.float32)
    infinite = np.isinf(converted)
    if infinite.any():
        index = int(infinite.argmax())
        raise _Wrong(f"is {_show(values[index])}, which is not finite in float32", flat=index)
    return converted


def _one_float32(value: Any) -> np.float32:
    if _missing(value):
        return np.float32("nan")
    value = _plain(value)
    # Decimal and Fraction have __float__; numpy's dates, which _plain leaves as they are, have it too.
    number = hasattr(value, "__float__") or hasattr(value, "__index__")
    if not number or isinstance(value, bool | str | bytes | complex | np.generic | np.ndarray):
        raise _Wrong(f"is {_show(value)}; the model takes float32")
    try:
        with np.errstate(over="ignore"):
            converted = np.float32(float(value))
    except OverflowError:
        converted = np.float32("inf")
    if np.isinf(converted):
        raise _Wrong(f"is {_show(value)}, which is not finite in float32")
    return converted


def _string(values: Any) -> np.ndarray:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if set(map(type, values)) <= {str}:
        converted = np.empty(len(values), np.object_)
        try:
            converted[:] = [value.encode("utf-8") for value in values]
            return converted
        except UnicodeEncodeError:
            pass
    return _each(values, _one_string, "string")


def _one_string(value: Any) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode("utf-8")
        except UnicodeEncodeError:
            raise _Wrong(f"is {_show(value)}, which has no UTF-8 form") from None
    if isinstance(value, bytes):
        return bytes(value)
    if _missing(value):
        return b""
    raise _Wrong(f"is {_show(value)}; the model takes strings")


_CONVERT: dict[str, Callable[[Any], np.ndarray]] = {"int64": _int64, "string": _string, "float32": _float32}


def _plain(value: Any) -> Any:
    """Turns a numpy number into Python's; returns anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item() if value.dtype.kind in "biuf" else value
    return value


def _missing(value: Any) -> bool:
    if isinstance(value, float | np.floating):
        return bool(value != value)
    if value is None:
        return True
    pandas = sys.modules.get("pandas")  # without pandas there is no pandas.NA
    return pandas is not None and value is getattr(pandas, "NA", None)


def _show(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"
