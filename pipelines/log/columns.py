"""Checks that a log's columns fit a schema: they exist, and their types allow what the schema does with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.types as pat

from pipelines.log import casts
from stem_util.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pipelines.schema import Feature, Label, Schema, Task


def validate(
    schema: Schema,
    log_columns: Mapping[str, pa.DataType],
    source: str,
    *,
    text: bool,
    directories: Collection[str] = (),
    problems: Mapping[str, str] = MappingProxyType({}),
    served: bool = False,
) -> None:
    """See :meth:`pipelines.schema.Schema.validate_columns`."""
    for path, column in _uses(schema):
        if column in problems:
            raise UserError(f"{problems[column]} (schema {schema.name} uses it: {path})")
        if column not in log_columns:
            raise UserError(
                f"schema {schema.name}: {path}: {column!r} is not in {source}"
                f"{did_you_mean(column, log_columns) or '.'} Columns: {', '.join(log_columns)}"
            )
    kinds = {name: casts.plain_type(kind) for name, kind in log_columns.items()}
    for feature in schema.features:
        if text or feature.column in directories:
            holds = f"is {'CSV text' if text else 'the name of a directory'}"
            why = _text_problem(feature, holds)
        else:
            holds = f"holds {kinds[feature.column]}"
            why = _feature_problem(feature, kinds[feature.column])
        if why is not None and served:
            why = f"{holds}; the model takes {_taken(feature)}"
        _refuse(why, schema, f"features.{feature.name}", feature.column, source)
    # Text is judged value by value. A column of nulls only may have Arrow's type null, which fits everything.
    typed = {n: kind for n, kind in kinds.items() if not (text or n in directories or pat.is_null(kind))}
    for task in schema.tasks:
        for key, column in task.label.uses.items():
            why = _label_problem(task, key, typed[column]) if column in typed else None
            _refuse(why, schema, f"tasks.{task.name}.label", column, source)
        space = task.space.column if task.space else None
        if space in typed and not casts.is_number(typed[space]):
            why = f"holds {typed[space]}; a space is a column of bools, or of 0 and 1{_cast(space, 'bool')}"
            _refuse(why, schema, f"tasks.{task.name}.space", space, source)
        if task.row_weight in typed and not casts.is_number(kind := typed[task.row_weight]):
            why = f"holds {kind}; a weight is a number of 0 or more{_cast(task.row_weight, 'float32')}"
            _refuse(why, schema, f"tasks.{task.name}.row_weight", task.row_weight, source)
    for key, name in (("group", schema.group), ("item", schema.item)):
        if name in typed and not (casts.is_int(typed[name]) or casts.is_text(typed[name])):
            why = f"holds {typed[name]}; a key is int64 or string{_cast(name, 'int64')}"
            _refuse(why, schema, key, name, source)
    if schema.time in typed and not casts.is_time(kind := typed[schema.time]):
        why = f"holds {kind}; a time is a number, a date or a timestamp"
        _refuse(why, schema, "time", schema.time, source)


def _uses(schema: Schema) -> Iterator[tuple[str, str]]:
    """Yields (key path, column) for every mention of a column in the schema."""
    for feature in schema.features:
        yield f"features.{feature.name}.column", feature.column
    for task in schema.tasks:
        yield from ((f"tasks.{task.name}.label.{key}", column) for key, column in task.label.uses.items())
        if task.space is not None and task.space.column is not None:
            yield f"tasks.{task.name}.space.column", task.space.column
        if task.row_weight is not None:
            yield f"tasks.{task.name}.row_weight", task.row_weight
    for key, column in (("group", schema.group), ("item", schema.item), ("time", schema.time)):
        if column is not None:
            yield key, column


def _refuse(why: str | None, schema: Schema, path: str, column: str, source: str) -> None:
    if why is not None:
        raise UserError(f"schema {schema.name}: {path}: column {column!r} of {source} {why}")


def _taken(feature: Feature) -> str:
    """What the model takes for a feature, and how to write the log so; for errors."""
    if feature.kind == "dense":
        return f"lists of {feature.length} numbers: write the log as Parquet with such a column"
    if feature.kind == "multivalent":
        if feature.separator is not None:
            return f"text with values separated by {feature.separator!r}"
        return f"lists of {feature.dtype}: write the log as Parquet with such a column"
    return f"one {feature.dtype} per row{_cast(feature.column, feature.dtype)}"


_PANDAS = {"int64": "Int64", "string": "string", "float32": "float32", "bool": "boolean"}
"""Types of pandas that hold missing values, by those of a schema."""


def _cast(column: str, dtype: str) -> str:
    return (
        f". Cast it when the log is written (pyarrow: table[{column!r}].cast('{dtype}'); "
        f"pandas: frame[{column!r}].astype('{_PANDAS[dtype]}'))"
    )


def _text_problem(feature: Feature, holds: str) -> str | None:
    if feature.kind == "multivalent" and feature.separator is None:
        return f'{holds}: a multivalent feature needs the separator of its values, as in separator: "|"'
    if feature.kind == "dense":
        return f"{holds}, which holds no vectors; write the log as Parquet with a list column"
    return None


def _feature_problem(feature: Feature, kind: pa.DataType) -> str | None:
    """What is wrong with a Parquet column of type ``kind``, or None."""
    column, holds = feature.column, f"holds {kind}"
    if pat.is_null(kind):
        return None
    if feature.kind == "dense":
        return _dense_problem(feature, kind)
    if feature.kind == "numeric":
        if casts.is_list(kind):
            return f"{holds}; a numeric feature has one number per row. Use kind: dense for vectors"
        return None if casts.is_number(kind) else f"{holds}; a numeric feature needs numbers{_cast(column, 'float32')}"
    if feature.kind == "categorical" and casts.is_list(kind):
        return f"{holds}; a categorical feature has one value per row. Use kind: multivalent with max_length"
    if feature.kind == "multivalent" and feature.separator is not None:
        if casts.is_list(kind):
            return f"{holds}, which needs no separator; remove it"
        return None if casts.is_text(kind) else f"{holds}; only a text column can be split by a separator; remove it"
    if feature.kind == "multivalent":
        if not casts.is_list(kind):
            return f'{holds}; a multivalent feature needs a list column, or text with a separator, as in separator: "|"'
        kind = casts.plain_type(kind.value_type)
    return _id_problem(feature, kind, holds)


def _id_problem(feature: Feature, kind: pa.DataType, holds: str) -> str | None:
    """What is wrong with values of type ``kind`` as ids of the declared dtype, or None."""
    if pat.is_null(kind):
        return None  # all lists are empty
    if pat.is_floating(kind):
        return (
            f"{holds}; floats are not reliable as ids. Use kind: numeric, or write whole numbers"
            f"{_cast(feature.column, 'int64')}"
        )
    if feature.dtype == "int64" and casts.is_text(kind):
        return f"{holds}, not int64; write dtype: string"
    if feature.dtype == "string" and casts.is_int(kind):
        return f"{holds}, not text; write dtype: int64"
    if not (casts.is_int(kind) or casts.is_text(kind)):
        return f"{holds}; ids are int64 or string{_cast(feature.column, feature.dtype)}"
    return None


def _dense_problem(feature: Feature, kind: pa.DataType) -> str | None:
    value = casts.plain_type(kind.value_type) if casts.is_list(kind) else None
    if value is None or not (casts.is_number(value) or pat.is_null(value)):
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
            numbers = casts.is_number(kind) and all(str(value).isdigit() for value in label.values)
            return f"{holds}, never the text {first!r}" + (f"; write {_written(name, label, int)}" if numbers else "")
        if casts.is_number(kind):
            return None
        way_out = f"; write {_written(name, label, str)}" if casts.is_text(kind) else ""
        return f"{holds}, never the number {first}{way_out}"
    if label.thresholds and key != "divide_by":
        limits = " and ".join(label.thresholds)
        if pat.is_boolean(kind) and key == "column":
            return f"{holds}, which is 0 or 1 as it stands; remove {limits}"
        way_out = '. Say which values mean 1, as in in: ["yes", "maybe"]' if casts.is_text(kind) else ""
        return None if casts.is_number(kind) else f"{holds}; {limits} need numbers{way_out}"
    if casts.is_number(kind):
        return None
    way_out = '. Say which value means 1, as in equals: "yes"' if task.type == "binary" and casts.is_text(kind) else ""
    return f"{holds}; the label of a {task.type} task needs numbers{way_out}"


def _written(key: str, label: Label, kind: type[int] | type[str]) -> str:
    """The key with its values written as numbers, or as texts."""
    values = [str(value) if kind is int else f'"{value}"' for value in label.values]
    return f"{key}: {values[0]}" if key == "equals" else f"{key}: [{', '.join(values)}]"
