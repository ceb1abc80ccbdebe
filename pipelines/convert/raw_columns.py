"""Keeps the log's own columns: those of validation and test beside the records, and those of a scored log."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from pipelines.log import casts
from pipelines.log.parts import Log
from pipelines.schema import Schema


def integer_columns(schema: Schema) -> set[str]:
    """The columns whose text is read as integers, because they are categorical features of dtype int64."""
    return {f.column for f in schema.features if f.kind == "categorical" and f.dtype == "int64"}


def kept_types(log: Log, schema: Schema) -> dict[str, pa.DataType]:
    """The types in which columns of a log are kept.

    Columns keep the types of the log. Text becomes int64 or float64 if the schema reads it so, else strings.
    """
    ids = {f.column for f in schema.features if f.kind != "numeric"}
    typed = {f.column: pa.float64() for f in schema.features if f.kind == "numeric" and f.column not in ids}
    typed |= dict.fromkeys(integer_columns(schema), pa.int64())
    text = log.types if log.text else log.directory_columns
    return dict(log.types) | {name: typed.get(name, pa.string()) for name in text}


def kept_columns(columns: Mapping[str, pa.Array], kinds: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
    """Casts columns of good rows to `kept_types`."""
    return {name: _kept(array, kinds[name]) for name, array in columns.items()}


def _kept(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if not casts.is_text(array.type) or array.type == kind:
        return casts.to_type(array, kind)
    if pa.types.is_integer(kind):
        return casts.to_int64(array)[0]
    return casts.to_float64(array)[0] if pa.types.is_floating(kind) else _decoded(array, kind)


def _decoded(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Decodes text. Bytes that are not UTF-8, which only columns outside the schema can have, become U+FFFD."""
    try:
        return array.cast(kind)
    except pa.ArrowInvalid:
        texts = [None if v is None else v.decode(errors="replace") for v in array.cast(pa.binary()).to_pylist()]
        return pa.array(texts, kind)
