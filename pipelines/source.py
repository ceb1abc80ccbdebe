"""The log: finding its files, checking that they agree, and reading them as streams of record batches.

A log is a list of CSV or Parquet files. It is cut into units (a CSV file; consecutive row groups of a Parquet file)
that depend on the files alone, so that work on units gives the same result whatever the number of processes.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipelines.errors import UserError, did_you_mean

CHUNK_ROWS = 131_072
_UNIT_ROWS = 1 << 19
_CSV_BLOCK_BYTES = 8 << 20
_HEADER_BYTES = 1 << 20
_PARQUET_SUFFIXES = (".parquet", ".pq")
_CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")


def find_files(patterns: str) -> list[str]:
    """The log's files, sorted, each once.

    Args:
      patterns: comma-separated files, globs and directories (searched through, hidden names and those that begin with
        an underscore left out, for files ending in .parquet, .pq, .csv, .tsv, .txt, or the text ones with .gz).

    Raises:
      UserError: a pattern without files.
    """
    found: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        if os.path.isdir(pattern):
            matches = list(_walk(pattern))
            if not matches:
                raise UserError(f"{pattern}: the directory holds no files ending in .parquet, .pq, .csv, .tsv or .txt")
        elif os.path.exists(pattern):
            matches = [pattern]
        else:
            matches = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
            if not matches:
                what = "no file matches it" if glob.has_magic(pattern) else "no such file or directory"
                raise UserError(f"{pattern}: {what}")
        found.update(map(os.path.normpath, matches))
    if not found:
        raise UserError("the log is empty: name at least one file, glob or directory")
    return sorted(found)


def _walk(directory: str) -> Iterator[str]:
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith((".", "_"))]
        for name in names:
            if not name.startswith((".", "_")) and name.lower().endswith(_PARQUET_SUFFIXES + _CSV_SUFFIXES):
                yield os.path.join(parent, name)


def is_parquet(path: str) -> bool:
    """Whether a file is read as Parquet; everything else is CSV."""
    return path.lower().endswith(_PARQUET_SUFFIXES)


@dataclass(frozen=True)
class CsvOptions:
    """How CSV files are written.

    Attributes:
      delimiter: one character, or None for a tab in .tsv files and a comma elsewhere.
      columns: names of the columns of files without a header line; () when they have one.
      nulls: texts that mean null.
    """

    delimiter: str | None = None
    columns: tuple[str, ...] = ()
    nulls: tuple[str, ...] = ("",)

    def delimiter_of(self, path: str) -> str:
        if self.delimiter is not None:
            return self.delimiter
        return "\t" if path.lower().endswith((".tsv", ".tsv.gz")) else ","


@dataclass(frozen=True)
class Unit:
    """A piece of the log that one worker reads at a time.

    Attributes:
      index: its place among the log's units.
      file: its file's place among the log's files.
      path: its file.
      row_groups: of a Parquet file; () for CSV.
      first_row: place within the file of the unit's first row.
      rows: bad rows included; -1 until a CSV file was read through once.
    """

    index: int
    file: int
    path: str
    row_groups: tuple[int, ...]
    first_row: int
    rows: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a unit, up to `CHUNK_ROWS` unless asked otherwise.

    Attributes:
      path: the file.
      rows: int64 [n], each row's place within the file, from 0. Malformed CSV rows leave gaps.
      columns: by name; arrays of n. Columns of CSV files are binary.
      malformed: CSV rows with a wrong number of columns that were skipped since the last chunk.
    """

    path: str
    rows: np.ndarray
    columns: dict[str, pa.Array]
    malformed: int

    def take(self, places: np.ndarray) -> Chunk:
        """Some of the rows, by ascending place."""
        index = pa.array(places)
        columns = {name: array.take(index) for name, array in self.columns.items()}
        return Chunk(self.path, self.rows[places], columns, self.malformed)


@dataclass(frozen=True)
class Log:
    """The files of a log, which agree on their columns.

    Attributes:
      files: in row_id order.
      types: column names and types of the first file (binary for CSV).
      units: see `Unit`.
      csv: how CSV files are written.
      text: whether the files are CSV.
    """

    files: tuple[str, ...]
    types: Mapping[str, pa.DataType]
    units: tuple[Unit, ...]
    text: bool
    csv: CsvOptions = field(default_factory=CsvOptions)


def open_log(files: Sequence[str], csv: CsvOptions | None = None, unit_rows: int | None = None) -> Log:
    """Checks that the files can be read and agree, and cuts them into units. Reads headers and footers only.

    Args:
      files: of the log, in row_id order.
      csv: how CSV files are written.
      unit_rows: about how many rows the consecutive row groups of a unit have together, `_UNIT_ROWS` if not given; 0
        gives a unit to each.

    Raises:
      UserError: an empty or unreadable file, a mixture of CSV and Parquet, a repeated column name, or a file that lacks
        a column of the first file or has it with another type.
    """
    csv = csv or CsvOptions()
    text = not is_parquet(files[0])
    types: dict[str, pa.DataType] = {}
    units: list[Unit] = []
    for number, path in enumerate(files):
        if is_parquet(path) == text:
            raise UserError(f"{path}: a log is either CSV or Parquet; {files[0]} is {'CSV' if text else 'Parquet'}")
        if os.path.getsize(path) == 0:
            raise UserError(f"{path}: the file is empty (0 bytes)")
        if text:
            found = _csv_types(path, csv)
            units.append(Unit(len(units), number, path, (), 0, -1))
        else:
            with _open_parquet(path) as file:
                found = _types(path, file.schema_arrow)
                units += _parquet_units(
                    path, number, file.metadata, len(units), _UNIT_ROWS if unit_rows is None else unit_rows
                )
        _check_agreement(path, found, types or found, files[0])
        types = types or found
    return Log(tuple(files), types, tuple(units), text, csv)


def _types(path: str, schema: pa.Schema) -> dict[str, pa.DataType]:
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the column '{twice[0]}' is there more than once")
    return dict(zip(schema.names, schema.types, strict=True))


def _check_agreement(path: str, found: dict[str, pa.DataType], types: dict[str, pa.DataType], first: str) -> None:
    for name, kind in types.items():
        if name not in found:
            raise UserError(f"{path}: the column '{name}', which {first} has, is missing{did_you_mean(name, found)}")
        if found[name] != kind:
            raise UserError(f"{path}: the column '{name}' is {found[name]}, but {kind} in {first}")


def _parquet_units(path: str, file: int, metadata: pq.FileMetaData, index: int, unit_rows: int) -> list[Unit]:
    """Consecutive row groups of about ``unit_rows`` rows together."""
    units: list[Unit] = []
    groups: list[int] = []
    first = rows = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if groups and rows + size > unit_rows:
            units.append(Unit(index + len(units), file, path, tuple(groups), first, rows))
            groups, first, rows = [], first + rows, 0
        groups.append(group)
        rows += size
    if groups:
        units.append(Unit(index + len(units), file, path, tuple(groups), first, rows))
    return units


def read(
    log: Log, unit: Unit, columns: Sequence[str] | None, *, skip_malformed: bool, chunk_rows: int | None = None
) -> Iterator[Chunk]:
    """Reads a unit as a stream.

    Args:
      log: the log the unit belongs to.
      unit: what to read.
      columns: names to read, or None for all.
      skip_malformed: skip CSV rows with a wrong number of columns, rather than raise.
      chunk_rows: rows of a chunk of Parquet, `CHUNK_ROWS` if not given.

    Raises:
      UserError: the file is damaged, or a malformed row (with its place).
    """
    names = list(log.types) if columns is None else list(columns)
    return (
        _read_csv(log, unit, names, skip_malformed)
        if log.text
        else _read_parquet(unit, names, chunk_rows or CHUNK_ROWS)
    )


def _open_parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, "Parquet", error) from None


def _read_parquet(unit: Unit, names: list[str], chunk_rows: int) -> Iterator[Chunk]:
    row = unit.first_row
    with _open_parquet(unit.path) as file:
        batches = file.iter_batches(chunk_rows, row_groups=unit.row_groups, columns=names, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(unit.path, "Parquet", error) from None
            if batch is None:
                return
            rows = np.arange(row, row + batch.num_rows)
            row += batch.num_rows
            yield Chunk(unit.path, rows, {name: batch.column(name) for name in names}, 0)


class _Malformed:
    """Collects the places of rows with a wrong number of columns; pyarrow calls it while it parses."""

    def __init__(self, header_lines: int) -> None:
        self.places: list[int] = []  # 0-based, the header not counted
        self.first = ""
        self._before = header_lines + 1  # pyarrow numbers rows from 1 and counts the header

    def __call__(self, row: pyarrow.csv.InvalidRow) -> str:
        self.first = self.first or f"{row.actual_columns} values, but the file has {row.expected_columns} columns"
        self.places.append(row.number - self._before)
        return "skip"


def _open_csv(
    path: str, csv: CsvOptions, names: list[str], malformed: _Malformed, block_bytes: int = _CSV_BLOCK_BYTES
) -> pyarrow.csv.CSVStreamingReader:
    """Opens a CSV file to read ``names`` (all columns when there are none) as bytes.

    Types are ours to check, so that a bad value can be traced to its row; without threads pyarrow knows the numbers of
    malformed rows.
    """
    try:
        return pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=block_bytes, column_names=csv.columns or None
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=csv.delimiter_of(path), newlines_in_values=True, invalid_row_handler=malformed
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.binary()),
                include_columns=names,
                strings_can_be_null=True,
                null_values=list(csv.nulls),
                check_utf8=False,
            ),
        )
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, "CSV", error) from None


def _csv_types(path: str, csv: CsvOptions) -> dict[str, pa.DataType]:
    with _open_csv(path, csv, [], _Malformed(0), block_bytes=_HEADER_BYTES) as reader:
        return dict.fromkeys(_types(path, reader.schema), pa.binary())


def _read_csv(log: Log, unit: Unit, names: list[str], skip_malformed: bool) -> Iterator[Chunk]:
    malformed = _Malformed(header_lines=0 if log.csv.columns else 1)
    good = reported = 0  # rows parsed, malformed rows handed on
    # With no column to read there would be no rows to count.
    reader = _open_csv(unit.path, log.csv, names or list(log.types)[:1], malformed)
    ended = False
    while not ended:
        try:
            batch = next(reader, None)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(unit.path, "CSV", error) from None
        if malformed.places and not skip_malformed:
            where = f"{unit.path}, row {malformed.places[0]:,}"
            raise UserError(f"{where}: {malformed.first} (--on_bad_rows=drop counts and skips such rows)")
        if batch is None:  # one more round, for malformed rows at the file's end
            ended, batch = True, pa.RecordBatch.from_pylist([], pa.schema([(name, pa.binary()) for name in names]))
        # Row i of the good ones lies behind every malformed row that has at most i good rows before it.
        before = np.asarray(malformed.places, np.int64) - np.arange(len(malformed.places))
        for start in range(0, max(batch.num_rows, 1), CHUNK_ROWS):
            part = batch.slice(start, CHUNK_ROWS)
            index = np.arange(good, good + part.num_rows)
            rows = index + np.searchsorted(before, index, "right")
            yield Chunk(unit.path, rows, {name: part.column(name) for name in names}, len(before) - reported)
            good, reported = good + part.num_rows, len(before)


def _damaged(path: str, kind: str, error: Exception) -> UserError:
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path}: cannot be read as {kind} ({why})")


def count_rows(log: Log, unit: Unit, *, skip_malformed: bool) -> int:
    """Rows of a unit, malformed ones included; reads a CSV file through."""
    if unit.rows >= 0:
        return unit.rows
    return sum(len(chunk.rows) + chunk.malformed for chunk in read(log, unit, (), skip_malformed=skip_malformed))
