"""Reads CSV files of a log without types: values are bytes, and the schema says what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv

from pipelines.log import csv_text
from pipelines.log.parts import Chunk, CsvOptions, Log, Unit, unreadable
from stem_util.errors import JobError, UserError

_BLOCK_BYTES = 8 << 20
_HEADER_BYTES = 1 << 20


def column_names(path: str, csv: CsvOptions) -> list[str]:
    """The column names from the first line, or those of the options.

    Raises:
      UserError: the file is no text, or its header is not UTF-8.
    """
    try:
        csv_text.check(path, header=not csv.columns)
        if csv.columns:
            return list(csv.columns)
        text = csv_text.Text(path)
        with _open(path, csv, text, [], _Malformed(0), header=True) as reader:
            names = pa.array([name.encode() for name in reader.schema.names], pa.binary())
            return [name.decode() for name in csv_text.trimmed(names, ()).to_pylist()]
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def read(log: Log, unit: Unit, names: list[str], skip_malformed: bool, chunk_rows: int) -> Iterator[Chunk]:
    """Reads columns of a unit as a stream; malformed rows count in the places of rows."""
    malformed = _Malformed(header_lines=0 if log.csv.columns else 1)
    good = reported = 0  # rows parsed, malformed rows reported
    for batch in _batches(log, unit, names, malformed):
        if malformed.places and not skip_malformed:
            _check_quotes(unit.path, log.csv)
            where = f"{unit.path}, row {malformed.places[0]:,}"
            raise UserError(f"{where}: {malformed.first} (--on_bad_rows=drop counts and skips such rows)")
        # Good row i comes after every malformed row that has at most i good rows before it.
        before = np.asarray(malformed.places, np.int64) - np.arange(len(malformed.places))
        for start in range(0, max(batch.num_rows, 1), chunk_rows):
            part = batch.slice(start, chunk_rows)
            index = np.arange(good, good + part.num_rows)
            rows = index + np.searchsorted(before, index, "right")
            yield Chunk(unit.path, rows, {name: part.column(name) for name in names}, len(before) - reported)
            good, reported = good + part.num_rows, len(before)


def _batches(log: Log, unit: Unit, names: list[str], malformed: _Malformed) -> Iterator[pa.RecordBatch]:
    """Yields the file's columns, and at the end an empty batch, so that malformed rows there are reported.

    Raises:
      UserError: the file cannot be read, or an unclosed quote swallows lines.
    """
    # Without any column there would be no rows to count.
    wanted = names or [name for name in log.types if name not in log.directories[unit.file]][:1]
    text, rows = csv_text.Text(unit.path), 0 if log.csv.columns else 1
    try:
        reader = _open(unit.path, log.csv, text, wanted, malformed, header=False)
        while (batch := next(reader, None)) is not None:
            rows += batch.num_rows
            columns = dict(zip(wanted, batch.columns, strict=True))
            if text.marked:
                columns = {name: csv_text.unmarked(array) for name, array in columns.items()}
            columns = {name: csv_text.trimmed(array, log.csv.nulls) for name, array in columns.items()}
            yield pa.RecordBatch.from_pydict(columns)
    except (pa.ArrowException, OSError) as error:
        _check_quotes(unit.path, log.csv)
        raise _unreadable(unit.path, error) from None
    if text.quoted and text.lines != rows + len(malformed.places):  # a value of several lines, or an empty line
        _check_quotes(unit.path, log.csv)
    yield pa.RecordBatch.from_pydict(dict.fromkeys(wanted, pa.array([], pa.binary())))


class _Malformed:
    """Collects the places of rows with a wrong number of columns; pyarrow calls it while parsing."""

    def __init__(self, header_lines: int) -> None:
        self.places: list[int] = []  # 0-based, the header not counted
        self.first = ""
        self._before = header_lines + 1  # pyarrow numbers rows from 1 and counts the header

    def __call__(self, row: pyarrow.csv.InvalidRow) -> str:
        self.first = self.first or f"{row.actual_columns} values, but the file has {row.expected_columns} columns"
        self.places.append(row.number - self._before)
        return "skip"


def _open(
    path: str, csv: CsvOptions, read: csv_text.Text, names: Sequence[str], malformed: _Malformed, header: bool
) -> pyarrow.csv.CSVStreamingReader:
    """Opens a CSV file to read the columns ``names`` as bytes; without names, to read the first line.

    Values stay bytes, so that a bad one can be traced to its row. Without threads, pyarrow knows the numbers of
    malformed rows.
    """
    columns = None if header else column_names(path, csv)
    return pyarrow.csv.open_csv(
        pa.PythonFile(read, mode="r"),
        read_options=pyarrow.csv.ReadOptions(
            use_threads=False,
            block_size=_HEADER_BYTES if header else _BLOCK_BYTES,
            column_names=columns and _unique(columns),
            skip_rows_after_names=int(not header and not csv.columns),
        ),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=csv.delimiter_of(path),
            quote_char='"' if csv.quotes else False,
            newlines_in_values=csv.quotes,
            invalid_row_handler=malformed,
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.binary()),
            include_columns=names,
            strings_can_be_null=True,
            null_values=list(csv.nulls),
            check_utf8=False,
        ),
    )


def _unique(names: Sequence[str]) -> list[str]:
    """The names, where repeated ones are replaced by names that nobody asks for."""
    return [name if name not in names[:i] else f"{name}\0{i}" for i, name in enumerate(names)]


def _check_quotes(path: str, csv: CsvOptions) -> None:
    problem = csv_text.unclosed(path, csv.delimiter_of(path)) if csv.quotes else None
    if problem is not None:
        raise problem


def _unreadable(path: str, error: Exception) -> UserError | JobError:
    if "straddling" in str(error):
        error = ValueError(f"a row of more than {_BLOCK_BYTES >> 20} MiB")
    return unreadable(path, "CSV", error)
