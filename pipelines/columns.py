"""Whether a log's columns fit a schema: are they there, and do their types allow what the schema does with them?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.types as pat

from pipelines import casts
from pipelines.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pipelines.schema import Feature, Label, Schema, Task


def validate(schema: Schema, log_columns: Mapping[str, pa.DataType], source: str, *, text: bool) -> None:
    """See :meth:`pipelines.schema.Schema.validate_columns`."""
    for path, column in _uses(schema):
        if column not in log_columns:
            raise UserError(
                f"schema {schema.name}: {path}: {column!r} is not in {source}"
                f"{did_you_mean(column, log_columns) or '.'} Columns: {', '.join(log_columns)}"
            )
    for feature in schema.features:
        why = _csv_problem(feature) if text else _feature_problem(feature, _plain(log_columns[feature.column]))
        _refuse(why, schema, f"features.{feature.name}", feature.column, source)
    if text:
        return
    for task in schema.tasks:
        for key, column in task.label.uses.items():
            why = _label_problem(task, key, _plain(log_columns[column]))
            _refuse(why, schema, f"tasks.{task.name}.label", column, source)
        if task.space and task.space.column and not _is_number(kind := _plain(log_columns[task.space.column])):
            why = f"holds {kind}; a space is a column of bools, or of 0 and 1{_cast(task.space.column, 'bool')}"
            _refuse(why, schema, f"tasks.{task.name}.space", task.space.column, source)
    for key, name in (("group", schema.group), ("item", schema.item)):
        if name is not None and not (_is_int(kind := _plain(log_columns[name])) or casts.is_text(kind)):
            _refuse(f"holds {kind}; a key is int64 or string{_cast(name, 'int64')}", schema, key, name, source)


def _is_int(kind: pa.DataType) -> bool:
    """Integers and bools: both are int64 from here on."""
    return pat.is_integer(kind) or pat.is_boolean(kind)


def _is_number(kind: pa.DataType) -> bool:
    return _is_int(kind) or pat.is_floating(kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, dictionary-encoded or not."""
    return kind.value_type if pat.is_dictionary(kind) else kind


def _uses(schema: Schema) -> Iterator[tuple[str, str]]:
    """(key path, column) for every mention of a column."""
    for feature in schema.features:
        yield f"features.{feature.name}.column", feature.column
    for task in schema.tasks:
        yield from ((f"tasks.{task.name}.label.{key}", column) for key, column in task.label.uses.items())
        if task.space is not None and task.space.column is not None:
            yield f"tasks.{task.name}.space.column", task.space.column
    for key, column in (("group", schema.group), ("item", schema.item)):
        if column is not None:
            yield key, column


def _refuse(why: str | None, schema: Schema, path: str, column: str, source: str) -> None:
    if why is not None:
        raise UserError(f"schema {schema.name}: {path}: column {column!r} of {source} {why}")


def _cast(column: str, dtype: str) -> str:
    return f". Cast it when the log is written (pyarrow: table[{column!r}].cast('{dtype}'))"


def _csv_problem(feature: Feature) -> str | None:
    if feature.kind == "multivalent" and feature.separator is None:
        return 'is CSV text: a multivalent feature needs the separator of its values, as in separator: "|"'
    if feature.kind == "dense":
        return "is CSV text, which holds no vectors; write the log as Parquet with a list column"
    return None


def _feature_problem(feature: Feature, kind: pa.DataType) -> str | None:
    """What is wrong with a Parquet column of type ``kind``, or None."""
    column, holds = feature.column, f"holds {kind}"
    if feature.kind == "dense":
        return _dense_problem(feature, kind)
    if feature.kind == "numeric":
        if casts.is_list(kind):
            return f"{holds}; a numeric feature is one number a row. Use kind: dense for vectors"
        return None if _is_number(kind) else f"{holds}; a numeric feature needs numbers{_cast(column, 'float32')}"
    if feature.kind == "categorical" and casts.is_list(kind):
        return f"{holds}; a categorical feature has one value a row. Use kind: multivalent with max_length"
    if feature.kind == "multivalent" and feature.separator is not None:
        if casts.is_list(kind):
            return f"{holds}, which needs no separator; remove it"
        return None if casts.is_text(kind) else f"{holds}; only a text column can be split by a separator; remove it"
    if feature.kind == "multivalent":
        if not casts.is_list(kind):
            return f'{holds}; a multivalent feature needs a list column, or text with a separator, as in separator: "|"'
        kind = _plain(kind.value_type)
    return _id_problem(feature, kind, holds)


def _id_problem(feature: Feature, kind: pa.DataType, holds: str) -> str | None:
    """What is wrong with values of type ``kind`` as ids of the declared dtype, or None."""
    if pat.is_floating(kind):
        return (
            f"{holds}; equal floats are no reliable ids. Use kind: numeric, or write whole numbers"
            f"{_cast(feature.column, 'int64')}"
        )
    if feature.dtype == "int64" and casts.is_text(kind):
        return f"{holds}, not int64; write dtype: string"
    if feature.dtype == "string" and _is_int(kind):
        return f"{holds}, not text; write dtype: int64"
    if not (_is_int(kind) or casts.is_text(kind)):
        return f"{holds}; ids are int64 or string{_cast(feature.column, feature.dtype)}"
    return None


def _dense_problem(feature: Feature, kind: pa.DataType) -> str | None:
    if not casts.is_list(kind) or not _is_number(_plain(kind.value_type)):
        return f"holds {kind}; a dense feature needs a list of numbers, as list<float>"
    if pat.is_fixed_size_list(kind) and kind.list_size != feature.length:
        return f"holds vectors of {kind.list_size} elements, not {feature.length}; write length: {kind.list_size}"
    return None


def _label_problem(task: Task, key: str, kind: pa.DataType) -> str | None:
    """What is wrong with a column of type ``kind`` that the label uses under ``key``, or None."""
    label, holds = task.label, f"holds {kind}"
    if key == "column" and label.values:
        name = "equals" if label.equals is not None else "in"
        first = label.values[0]
        if isinstance(first, str):
            if casts.is_text(kind):
                return None
            numbers = _is_number(kind) and all(str(value).isdigit() for value in label.values)
            return f"{holds}, never the text {first!r}" + (f"; write {_written(name, label, int)}" if numbers else "")
        if _is_number(kind):
            return None
        way_out = f"; write {_written(name, label, str)}" if casts.is_text(kind) else ""
        return f"{holds}, never the number {first}{way_out}"
    if label.thresholds and key != "divide_by":
        limits = " and ".join(label.thresholds)
        if pat.is_boolean(kind) and key == "column":
            return f"{holds}, which is 0 or 1 as it stands; remove {limits}"
        way_out = '. Say which values mean 1, as in in: ["yes", "maybe"]' if casts.is_text(kind) else ""
        return None if _is_number(kind) else f"{holds}; {limits} need numbers{way_out}"
    if _is_number(kind):
        return None
    way_out = '. Say which value means 1, as in equals: "yes"' if task.type == "binary" and casts.is_text(kind) else ""
    return f"{holds}; the label of a {task.type} task needs numbers{way_out}"


def _written(key: str, label: Label, kind: type[int] | type[str]) -> str:
    """The key with its values as numbers, or as texts."""
    values = [str(value) if kind is int else f'"{value}"' for value in label.values]
    return f"{key}: {values[0]}" if key == "equals" else f"{key}: [{', '.join(values)}]"
