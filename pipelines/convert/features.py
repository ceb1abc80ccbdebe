"""Casts columns of the log to the values of features as the schema says, and notes rows whose values do not fit."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipelines.convert.advice import Wanted
from pipelines.convert.bad_rows import BadRows
from pipelines.log import casts
from pipelines.log.casts import Lists
from pipelines.schema import Feature

_TYPE_NAMES: dict[str, tuple[str, Wanted]] = {
    "int64": ("an int64", "id"),
    "string": ("UTF-8 text", "text"),
    "float32": ("a number", "number"),
}


def categorical(array: pa.Array, feature: Feature, bad: BadRows) -> pa.Array:
    """Values as int64 or string [n]; missing values are null."""
    values, wrong = casts.to_int64(array) if feature.dtype == "int64" else casts.to_text(array)
    _check_type(wrong, feature, bad)
    if feature.missing == "error":
        _check_missing(casts.to_numpy(values.is_null()) & ~wrong, feature, bad)
    return values


def multivalent(array: pa.Array, feature: Feature, bad: BadRows) -> Lists:
    """Lists without missing values, of which the first max_length are kept."""
    lists, wrong = casts.to_lists(array, feature.dtype, feature.separator)
    _check_type(wrong, feature, bad)
    _check_missing(lists.missing, feature, bad)
    rows = np.repeat(np.arange(len(lists.lengths)), lists.lengths)
    present = casts.to_numpy(lists.values.is_valid())
    lengths = np.bincount(rows[present], minlength=len(lists.lengths))
    before = np.cumsum(lengths) - lengths
    order = np.cumsum(present) - 1 - np.repeat(before, lists.lengths)  # place among the row's present values
    kept = present & (order < feature.max_length)
    values = lists.values if kept.all() else lists.values.filter(pa.array(kept))
    return Lists(values, np.minimum(lengths, feature.max_length), lists.missing)


def numeric(array: pa.Array, feature: Feature, bad: BadRows) -> np.ndarray:
    """Values as float32 [n]; missing values are NaN."""
    values, wrong = casts.to_float64(array)
    _check_type(wrong, feature, bad)
    _check_missing(casts.to_numpy(values.is_null()) & ~wrong, feature, bad)
    with np.errstate(over="ignore"):
        floats = casts.to_numpy(values.fill_null(np.nan)).astype(np.float32)
    detail = f"feature '{feature.name}' is {{}}, which is not finite in float32"
    bad.add(np.isinf(floats), feature.column, "not finite", detail)
    if "log1p" in feature.transform:
        detail = f"feature '{feature.name}' is {{}}; log1p needs values above -1"
        bad.add(floats <= -1, feature.column, "log1p of -1 or less", detail)
    return floats


def dense(array: pa.Array, feature: Feature, bad: BadRows) -> np.ndarray:
    """Vectors as float32 [n, length]; a null vector is all 0, and a null or NaN element is 0."""
    lists, wrong = casts.to_lists(array, "float32", feature.separator)
    _check_type(wrong, feature, bad)
    _check_missing(lists.missing, feature, bad)
    empty = casts.to_numpy(array.is_null())
    unequal = (lists.lengths != feature.length) & ~empty
    detail = f"feature '{feature.name}' is {{}}, which does not have {feature.length} elements as the schema says"
    bad.add(unequal, feature.column, "vector of another length", detail)
    with np.errstate(over="ignore"):
        flat = casts.to_numpy(lists.values.fill_null(0.0)).astype(np.float32)
    rows = np.repeat(np.arange(len(array)), lists.lengths)
    infinite = np.zeros(len(array), bool)
    infinite[rows[np.isinf(flat)]] = True
    bad.add(infinite, feature.column, "not finite", f"feature '{feature.name}' is {{}}, which is not finite in float32")
    vectors = np.zeros((len(array), feature.length), np.float32)
    full = lists.lengths == feature.length
    vectors[full] = flat[np.repeat(full, lists.lengths)].reshape(-1, feature.length)
    return vectors


def _check_type(wrong: np.ndarray, feature: Feature, bad: BadRows) -> None:
    name, wanted = _TYPE_NAMES[feature.dtype]
    detail = f"feature '{feature.name}' is {{}}, which is not {name}"
    bad.add(wrong, feature.column, f"not {name}", detail, wanted=wanted if feature.kind != "multivalent" else None)


def _check_missing(missing: np.ndarray, feature: Feature, bad: BadRows) -> None:
    if feature.missing == "error":
        detail = f"feature '{feature.name}' is {{}}, and the schema says missing: error"
        bad.add(missing, feature.column, "missing value", detail)
