"""Opens a log as one source of rows: checks that its files agree, and reads them as streams of chunks.

A log is a list of CSV or Parquet files, whose paths may be URIs of a store. It is cut into units (one CSV file, or
consecutive row groups of a Parquet file) that depend on the files alone, so that work on units gives the same result
whatever the number of processes.

Only columns that are used have to agree (see `Log.problems`). Directories named ``column=value`` are columns, too.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from pipelines.log import casts, csv_reader, parquet_reader
from pipelines.log.find import is_parquet
from pipelines.log.parts import Chunk, CsvOptions, Log, Unit
from stem_util import stores
from stem_util.errors import UserError, did_you_mean

CHUNK_ROWS = 131_072
_UNIT_ROWS = 1 << 19
_NO_VALUE = ("", "__HIVE_DEFAULT_PARTITION__")


def open_log(files: Sequence[str], csv: CsvOptions | None = None, unit_rows: int | None = None) -> Log:
    """Checks that the files can be read, finds their columns, and cuts them into units. Reads headers and footers only.

    Args:
      files: the log's files, in row_id order.
      csv: how CSV files are written.
      unit_rows: number of rows per unit of a Parquet file, roughly; `_UNIT_ROWS` if not given; with 0 each row group is
        a unit.

    Raises:
      UserError: a file is empty or unreadable, or CSV and Parquet are mixed.
    """
    csv = csv or CsvOptions()
    text = not is_parquet(files[0])
    schemas: list[list[tuple[str, pa.DataType]]] = []
    units: list[Unit] = []
    for number, path in enumerate(files):
        if file_bytes(path) == 0:
            raise UserError(f"{path}: the file is empty (0 bytes)")
        if is_parquet(path) == text:
            raise UserError(f"{path}: a log is either CSV or Parquet; {files[0]} is {'CSV' if text else 'Parquet'}")
        if text:
            schemas.append([(name, pa.binary()) for name in csv_reader.column_names(path, csv)])
            units.append(Unit(len(units), number, path, (), 0, -1))
        else:
            with parquet_reader.open_parquet(path) as file:
                schemas.append(list(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True)))
                units += parquet_reader.units_of(
                    path, number, file.metadata, len(units), _UNIT_ROWS if unit_rows is None else unit_rows
                )
    directories: list[dict[str, bytes | None]] = []
    for path, schema in zip(files, schemas, strict=True):
        own = dict(schema)
        named = [(name, value) for name, value in _directory_columns(path) if name not in own]
        schema += [(name, pa.binary()) for name, _ in named]
        directories.append(dict(named))
    # Files without rows do not decide the columns, if others have rows.
    full = {unit.file for unit in units} or set(range(len(files)))
    types, problems = _agreement(
        [files[i] for i in sorted(full)], [schemas[i] for i in sorted(full)], [directories[i] for i in sorted(full)]
    )
    directories = [{n: value for n, value in names.items() if n in types} for names in directories]
    return Log(tuple(files), types, tuple(units), text, csv, problems, tuple(directories))


def file_bytes(path: str) -> int:
    """The size of a file of a log."""
    return stores.stamp(path).bytes if stores.is_uri(path) else os.path.getsize(path)


def _directory_columns(path: str) -> list[tuple[str, bytes | None]]:
    """Columns and values in the names of a file's directories, as in date=2024-01-01/hour=7/part-0.parquet."""
    found: list[tuple[str, bytes | None]] = []
    for part in path.split(os.sep)[:-1]:
        name, equals, value = part.partition("=")
        if name and equals:
            known = None if value in _NO_VALUE else urllib.parse.unquote_to_bytes(os.fsencode(value))
            found.append((urllib.parse.unquote(name), known))
    return found


def _agreement(
    files: Sequence[str],
    schemas: Sequence[list[tuple[str, pa.DataType]]],
    directories: Sequence[Mapping[str, bytes | None]],
) -> tuple[dict[str, pa.DataType], dict[str, str]]:
    """The columns that all files have with types that agree, and the problem of each other column."""
    types: dict[str, pa.DataType] = {}
    first: dict[str, str] = {}  # the first file that has the column
    problems: dict[str, str] = {}
    for path, schema, named in zip(files, schemas, directories, strict=True):
        for name, kind in schema:
            common = casts.common_type(types.setdefault(name, kind), kind)
            if name in first and first[name] == path:
                problems.setdefault(name, f"{path}: the column '{name}' is there more than once")
            elif common is None:
                place = " in the name of its directory" if name in named else ""
                why = f"{path}: the column '{name}' is {kind}{place}, but {types[name]} in {first[name]}"
                problems.setdefault(name, why + ": cast one of them when the log is written")
            else:
                types[name] = common
            first.setdefault(name, path)
    for path, schema in zip(files, schemas, strict=True):
        found = dict(schema)
        for name in types.keys() - found.keys() - problems.keys():
            hint = did_you_mean(name, found)
            problems[name] = f"{path}: the column '{name}', which {first[name]} has, is missing{hint}"
    return {name: kind for name, kind in types.items() if name not in problems}, problems


def read(
    log: Log, unit: Unit, columns: Sequence[str] | None, *, skip_malformed: bool, chunk_rows: int | None = None
) -> Iterator[Chunk]:
    """Reads a unit as a stream.

    Args:
      log: the log that the unit belongs to.
      unit: what to read.
      columns: names of the columns to read, or None for all.
      skip_malformed: skip CSV rows with a wrong number of columns, rather than raise.
      chunk_rows: largest number of rows per chunk; `CHUNK_ROWS` if not given.

    Raises:
      UserError: the file is damaged, or a row is malformed; the message names its place.
    """
    names = list(log.types) if columns is None else list(columns)
    given = log.directories[unit.file]
    stored = [name for name in names if name not in given]
    chunks = (
        csv_reader.read(log, unit, stored, skip_malformed, chunk_rows or CHUNK_ROWS)
        if log.text
        else parquet_reader.read(unit, stored, chunk_rows or CHUNK_ROWS)
    )
    return chunks if len(stored) == len(names) else _with_directories(chunks, names, given)


def _with_directories(
    chunks: Iterator[Chunk], names: Sequence[str], given: Mapping[str, bytes | None]
) -> Iterator[Chunk]:
    for chunk in chunks:
        made = {n: pa.repeat(pa.scalar(given[n], pa.binary()), len(chunk.rows)) for n in names if n in given}
        yield replace(chunk, columns={name: made[name] if name in made else chunk.columns[name] for name in names})


def count_rows(log: Log, unit: Unit, *, skip_malformed: bool) -> int:
    """The number of rows in a unit, malformed ones included; reads a whole CSV file."""
    if unit.rows >= 0:
        return unit.rows
    return sum(len(chunk.rows) + chunk.malformed for chunk in read(log, unit, (), skip_malformed=skip_malformed))
