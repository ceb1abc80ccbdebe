"""Reads raw rows of a log as tensors of ``serving_default``, cast as in conversion."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.convert.cleaner import Cleaner
from pipelines.convert.raw_columns import kept_columns, kept_types
from pipelines.convert.rows import Rows
from pipelines.convert.split import GivenSplit
from pipelines.log import casts, sniff, source
from pipelines.log.casts import EMPTY, Lists
from pipelines.log.find import find_files
from pipelines.log.parts import CsvOptions, Log
from pipelines.schema import Schema
from pipelines.tfrecord import Example


def without_outcomes(schema: Schema) -> Schema:
    """The schema without labels and keys, which a log to be scored need not have."""
    return dataclasses.replace(schema, tasks=(), group=None, item=None, time=None)


def open_log(patterns: str, schema: Schema, csv: CsvOptions | None = None) -> Log:
    """Opens the log at ``patterns`` (see `pipelines.log.find.find_files`), which must have all columns of the schema.

    Raises:
      UserError: there are no files, a file cannot be read, or columns do not fit the schema.
    """
    log = source.open_log(find_files(patterns), csv)
    sniff.explain(log, Cleaner(schema, GivenSplit(()), drop=False).columns)
    schema.validate_columns(
        log.types, patterns, text=log.text, directories=log.directory_columns, problems=log.problems, served=True
    )
    return log


def read(
    log: Log, schema: Schema, keep: list[str], *, drop_bad_rows: bool = False
) -> Iterator[tuple[Rows, dict[str, pa.Array], Counter[tuple[str, str]]]]:
    """Streams a log: yields good rows, their columns ``keep``, and the number of bad rows by (column, reason).

    ``Rows.row_ids`` are places in the log, from 0: files are in sorted order, and bad rows count.

    Raises:
      UserError: a file is damaged, or conversion would refuse a row and such rows are not dropped.
    """
    cleaner = Cleaner(schema, GivenSplit((2,) * len(log.files)), drop_bad_rows, served=True)
    columns, kinds = list(dict.fromkeys([*cleaner.columns, *keep])), kept_types(log, schema)
    file = start = seen = 0  # file number, place of its first row, rows of the file before this unit
    for unit in log.units:
        if unit.file != file:
            file, start, seen = unit.file, start + seen, 0
        for chunk in source.read(log, unit, columns, skip_malformed=drop_bad_rows):
            rows, bad = cleaner.clean(chunk, start + chunk.rows, file)
            seen += len(chunk.rows) + chunk.malformed
            wanted = dataclasses.replace(chunk, columns={name: chunk.columns[name] for name in keep})
            yield rows, kept_columns(wanted.take(rows.places).columns, kinds), bad


def tensors(schema: Schema, rows: Rows) -> dict[str, np.ndarray]:
    """Features by name: ``[n]``, ``[n, max_length]`` padded with the empty value, or ``[n, length]``."""
    result: dict[str, np.ndarray] = {}
    for feature in schema.features:
        name = feature.name
        if feature.kind == "categorical":
            result[name] = _values(rows.ids[name])
        elif feature.kind == "multivalent":
            result[name] = _padded(rows.lists[name], feature.max_length)
        else:
            result[name] = (rows.numerics if feature.kind == "numeric" else rows.vectors)[name]
    return result


def _values(array: pa.Array) -> np.ndarray:
    """Values as int64 or bytes objects, with the empty value for nulls."""
    if pa.types.is_integer(array.type):
        return casts.to_numpy(array.fill_null(EMPTY["int64"]))
    return casts.to_numpy(array.cast(pa.binary()).fill_null(EMPTY["string"]))


def _padded(lists: Lists, width: int) -> np.ndarray:
    values = _values(lists.values)
    padded = np.full((len(lists.lengths), width), _empty(values), values.dtype)
    padded[np.arange(width) < lists.lengths[:, np.newaxis]] = values
    return padded


def _empty(values: np.ndarray) -> Any:
    """The empty value for int64 or bytes objects."""
    return EMPTY["string" if values.dtype == object else "int64"]


def examples(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Serialises rows of :func:`tensors` as tf.Examples, bytes objects ``[n]``; empty values are left out."""

    def message(row: int) -> bytes:
        example = Example()
        for name, values in arrays.items():
            # A slice stays an array of objects. One bytes object would get the dtype S, which cuts NULs at the end.
            cells = values[row : row + 1].ravel()
            if values.dtype.kind == "f":
                kind, present = "float_list", [] if np.isnan(cells).all() else cells.tolist()
            else:
                kind = "bytes_list" if values.dtype == object else "int64_list"
                present = [cell for cell in cells if cell != _empty(values)]
            if present:
                getattr(example.features.feature[name], kind).value.extend(present)
        return bytes(example.SerializeToString())

    return np.array([message(row) for row in range(len(next(iter(arrays.values()))))], object)
