"""Checks the features of a call against the model, and makes the tensors of a request."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stem_client import protocol, values
from stem_client.errors import FeatureError
from stem_client.metadata import Feature

_DATA_TYPES = {"int64": protocol.DT_INT64, "string": protocol.DT_STRING, "float32": protocol.DT_FLOAT}
_NONE: Mapping[str, str] = {}
_WIRE: dict[str, np.dtype[Any]] = {"int64": np.dtype("<i8"), "float32": np.dtype("<f4")}


def rank(
    features: Sequence[Feature],
    user: Mapping[str, Any],
    items: Any,
    separators: Mapping[str, str] = _NONE,
    *,
    ignore_extra: bool = False,
) -> tuple[int, dict[str, np.ndarray]]:
    """Tensors of the signature ``rank``: [1], [1, L], [1, n] of the user and [1, N], [1, N, L], [1, N, n] of the items.

    Args:
      features: of the model.
      user: features of the user and the context.
      items: a table of the items' features.
      separators: by list feature: of lists that are written as text.
      ignore_extra: leave out names that are not features of the model, or that belong to the other argument.

    Returns:
      N, and arrays by feature as ``values.encode`` makes them.

    Raises:
      FeatureError.
    """
    if not isinstance(user, Mapping):
        raise FeatureError(f"user is {type(user).__name__}; a mapping of feature to value is expected")
    once = {feature.name: feature for feature in features if not feature.per_item}
    per_item = {feature.name: feature for feature in features if feature.per_item}
    _check_separators(features, separators)
    _check_names(user, once, "user", dict.fromkeys(per_item, "a feature of items: pass it in items"), ignore_extra)
    arrays = {
        name: values.encode(once[name], [user[name]], f"user feature '{name}'", None, separators.get(name))
        for name in sorted(once)
    }
    elsewhere = dict.fromkeys(once, "a feature of the user or the context: pass it in user")
    count, item_arrays = _encode_table(per_item, items, "item", elsewhere, separators, ignore_extra)
    return count, arrays | {name: array[None] for name, array in item_arrays.items()}


def score(
    features: Sequence[Feature], rows: Any, separators: Mapping[str, str] = _NONE, *, ignore_extra: bool = False
) -> tuple[int, dict[str, np.ndarray]]:
    """B and the tensors of the signature ``serving_default``: [B], [B, L], [B, n]. Arguments and errors as `rank`."""
    _check_separators(features, separators)
    return _encode_table({feature.name: feature for feature in features}, rows, "row", {}, separators, ignore_extra)


def write(tensor: Any, array: np.ndarray) -> None:
    """Fills a TensorProto from int64, float32 or bytes objects of any shape."""
    dtype = "string" if array.dtype == np.object_ else array.dtype.name
    tensor.dtype = _DATA_TYPES[dtype]
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    if dtype == "string":
        tensor.string_val.extend(array.ravel().tolist())
    else:
        tensor.tensor_content = array.astype(_WIRE[dtype], copy=False).tobytes()


def _check_separators(features: Sequence[Feature], separators: Mapping[str, str]) -> None:
    lists = [feature.name for feature in features if feature.kind == "list"]
    for name in separators:
        if name not in lists:
            raise FeatureError(
                f"separators: '{name}' is no list of the model; its lists are {', '.join(sorted(lists)) or 'none'}"
            )


def _encode_table(
    features: Mapping[str, Feature],
    table: Any,
    word: str,
    elsewhere: Mapping[str, str],
    separators: Mapping[str, str],
    ignore_extra: bool,
) -> tuple[int, dict[str, np.ndarray]]:
    """Returns the number of rows and each feature's array; ``word`` is the name of a row in errors."""
    columns = _columns(features, table, word, elsewhere, ignore_extra)
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(features):
        label, separator = f"{word} feature '{name}'", separators.get(name)
        arrays[name] = values.encode(features[name], columns[name], label, word, separator)
        first = next(iter(arrays))
        if len(arrays[name]) != len(arrays[first]):
            raise FeatureError(
                f"{word} feature '{first}' has {len(arrays[first])} {word}s and '{name}' has {len(arrays[name])}"
            )
    return len(next(iter(arrays.values()))), arrays


def _columns(
    features: Mapping[str, Feature], table: Any, word: str, elsewhere: Mapping[str, str], ignore_extra: bool
) -> Mapping[str, Any]:
    """Turns a mapping, DataFrame, structured array or list of mappings into a mapping of columns by feature."""
    if isinstance(table, Mapping):
        columns: Mapping[str, Any] = table
    elif isinstance(table, np.ndarray) and table.dtype.names:
        columns = {name: table[name] for name in table.dtype.names}
    elif hasattr(table, "columns") and hasattr(table, "to_numpy"):  # a DataFrame
        columns = {name: table[name] for name in table.columns}
    elif isinstance(table, Sequence) and all(isinstance(row, Mapping) for row in table):
        for number, row in enumerate(table):
            if row.keys() != features.keys():
                _check_names(row, features, f"{word} {number}", elsewhere, ignore_extra)
        return {name: [row[name] for row in table] for name in features}
    else:
        raise FeatureError(
            f"{word}s are {type(table).__name__}; a mapping of arrays, a list of mappings or a DataFrame is expected"
        )
    _check_names(columns, features, f"{word}s", elsewhere, ignore_extra)
    return columns


def _check_names(
    given: Iterable[Any], wanted: Collection[str], where: str, elsewhere: Mapping[str, str], ignore_extra: bool
) -> None:
    """Raises FeatureError for missing and unknown names; ``elsewhere``: names that belong to the other argument."""
    given = list(given)
    problems = [f"'{name}' is missing" for name in sorted(set(wanted).difference(given))]
    for name in given:
        if ignore_extra or name in wanted:
            continue
        if name in elsewhere:
            problems.append(f"'{name}' is {elsewhere[name]}")
            continue
        close = difflib.get_close_matches(str(name), [*wanted, *elsewhere], n=1)
        problems.append(f"{name!r} is no feature of the model" + (f" (did you mean '{close[0]}'?)" if close else ""))
    if problems:
        raise FeatureError(f"{where}: {', '.join(problems)}; the model takes {', '.join(sorted(wanted)) or 'none'}")
