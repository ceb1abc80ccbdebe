"""Features of a call, checked against what the model takes, to the tensors of a request."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stem_client import protocol, values
from stem_client.errors import FeatureError
from stem_client.metadata import Feature

_DATA_TYPES = {"int64": protocol.DT_INT64, "string": protocol.DT_STRING, "float32": protocol.DT_FLOAT}
_WIRE: dict[str, np.dtype[Any]] = {"int64": np.dtype("<i8"), "float32": np.dtype("<f4")}


def rank(features: Sequence[Feature], user: Mapping[str, Any], items: Any) -> tuple[int, dict[str, np.ndarray]]:
    """Tensors of the signature ``rank``: [1], [1, L], [1, n] of the user and [1, N], [1, N, L], [1, N, n] of the items.

    Returns:
      N, and arrays by feature as ``values.encode`` makes them.

    Raises:
      FeatureError.
    """
    if not isinstance(user, Mapping):
        raise FeatureError(f"user is {type(user).__name__}; a mapping of feature to value is expected")
    once = {feature.name: feature for feature in features if not feature.per_item}
    per_item = {feature.name: feature for feature in features if feature.per_item}
    _check_names(user, once, "user", dict.fromkeys(per_item, "a feature of items: pass it in items"))
    arrays = {name: values.encode(once[name], [user[name]], f"user feature '{name}'", None) for name in sorted(once)}
    elsewhere = dict.fromkeys(once, "a feature of the user or the context: pass it in user")
    count, item_arrays = _encode_table(per_item, items, "item", elsewhere)
    return count, arrays | {name: array[None] for name, array in item_arrays.items()}


def score(features: Sequence[Feature], rows: Any) -> tuple[int, dict[str, np.ndarray]]:
    """B and the tensors of the signature ``serving_default``: [B], [B, L], [B, n]. Raises FeatureError."""
    return _encode_table({feature.name: feature for feature in features}, rows, "row", {})


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


def _encode_table(
    features: Mapping[str, Feature], table: Any, word: str, elsewhere: Mapping[str, str]
) -> tuple[int, dict[str, np.ndarray]]:
    """The number of rows and each feature's array; ``word`` is what errors call a row."""
    columns = _columns(features, table, word, elsewhere)
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(features):
        arrays[name] = values.encode(features[name], columns[name], f"{word} feature '{name}'", word)
        first = next(iter(arrays))
        if len(arrays[name]) != len(arrays[first]):
            raise FeatureError(
                f"{word} feature '{first}' has {len(arrays[first])} {word}s and '{name}' has {len(arrays[name])}"
            )
    return len(next(iter(arrays.values()))), arrays


def _columns(features: Mapping[str, Feature], table: Any, word: str, elsewhere: Mapping[str, str]) -> Mapping[str, Any]:
    """A mapping, DataFrame, structured array or list of mappings as a mapping of columns with the right names."""
    if isinstance(table, Mapping):
        columns: Mapping[str, Any] = table
    elif isinstance(table, np.ndarray) and table.dtype.names:
        columns = {name: table[name] for name in table.dtype.names}
    elif hasattr(table, "columns") and hasattr(table, "to_numpy"):  # a DataFrame
        columns = {name: table[name] for name in table.columns}
    elif isinstance(table, Sequence) and all(isinstance(row, Mapping) for row in table):
        for number, row in enumerate(table):
            if row.keys() != features.keys():
                _check_names(row, features, f"{word} {number}", elsewhere)
        return {name: [row[name] for row in table] for name in features}
    else:
        raise FeatureError(
            f"{word}s are {type(table).__name__}; a mapping of arrays, a list of mappings or a DataFrame is expected"
        )
    _check_names(columns, features, f"{word}s", elsewhere)
    return columns


def _check_names(given: Iterable[Any], wanted: Collection[str], where: str, elsewhere: Mapping[str, str]) -> None:
    """Raises FeatureError for missing and unknown names; ``elsewhere`` tells of names that belong to another place."""
    given = list(given)
    problems = [f"'{name}' is missing" for name in sorted(set(wanted).difference(given))]
    for name in given:
        if name in wanted:
            continue
        if name in elsewhere:
            problems.append(f"'{name}' is {elsewhere[name]}")
            continue
        close = difflib.get_close_matches(str(name), [*wanted, *elsewhere], n=1)
        problems.append(f"{name!r} is no feature of the model" + (f" (did you mean '{close[0]}'?)" if close else ""))
    if problems:
        raise FeatureError(f"{where}: {', '.join(problems)}; the model takes {', '.join(sorted(wanted)) or 'none'}")
