"""The log: finding its files, checking that they agree, and reading them as streams of record batches.

A log is a list of CSV or Parquet files. It is cut into units (a CSV file; consecutive row groups of a Parquet file)
that depend on the files alone, so that work on units gives the same result whatever the number of processes.

Only columns that are used have to agree: see `Log.problems`. Directories named ``column=value`` are columns too.
"""

from __future__ import annotations

import glob
import io
import os
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipelines.log import casts, csv_text
from stem_util.errors import UserError, did_you_mean

CHUNK_ROWS = 131_072
_UNIT_ROWS = 1 << 19
_CSV_BLOCK_BYTES = 8 << 20
_HEADER_BYTES = 1 << 20
_PARQUET_SUFFIXES = (".parquet", ".pq")
_PARQUET_MAGIC = b"PAR1"
_NO_VALUE = ("", "__HIVE_DEFAULT_PARTITION__")
_CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")


def find_files(patterns: str) -> list[str]:
    """The log's files, sorted, each once.

    Args:
      patterns: comma-separated files, globs and directories (searched through, links too, hidden names and those that
        begin with an underscore left out, for files ending in .parquet, .pq, .csv, .tsv, .txt, or the text ones with
        .gz, and for Parquet files of any name).

    Raises:
      UserError: a pattern without files.
    """
    found: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        pattern = os.path.expanduser(pattern)
        if os.path.isdir(pattern):
            matches = list(_walk(pattern))
            if not matches:
                raise UserError(
                    f"{pattern}: the directory holds no Parquet files, nor any ending in .csv, .tsv or .txt"
                )
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
    """Files below a directory, each once: what links lead to is left out where it was found without them."""
    seen: set[str] = set()
    waiting = [directory]  # and links, for when the rest was found
    while waiting:
        place = waiting.pop(0)
        if os.path.realpath(place) in seen:
            continue
        if not os.path.isdir(place):
            if _is_log(place):
                seen.add(os.path.realpath(place))
                yield place
            continue
        for parent, directories, names in os.walk(place):
            seen.add(os.path.realpath(parent))
            visible = [name for name in sorted(directories + names) if not name.startswith((".", "_"))]
            paths = {name: os.path.join(parent, name) for name in visible}
            waiting += filter(os.path.islink, paths.values())
            fresh = {n for n, path in paths.items() if not os.path.islink(path) and os.path.realpath(path) not in seen}
            directories[:] = [name for name in directories if name in fresh]
            for path in (paths[name] for name in names if name in fresh):
                if _is_log(path):
                    seen.add(os.path.realpath(path))
                    yield path


def _is_log(path: str) -> bool:
    return path.lower().endswith(_PARQUET_SUFFIXES + _CSV_SUFFIXES) or is_parquet(path)


def is_parquet(path: str) -> bool:
    """Whether a file is read as Parquet: it begins as such files do, or is named so; everything else is CSV."""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC:
                return True
    return path.lower().endswith(_PARQUET_SUFFIXES)


def _directory_columns(path: str) -> dict[str, bytes | None]:
    """What the names of a file's directories say, as in date=2024-01-01/hour=7/part-0.parquet."""
    found: dict[str, bytes | None] = {}
    for part in path.split(os.sep)[:-1]:
        name, equals, value = part.partition("=")
        if name and equals:
            known = None if value in _NO_VALUE else os.fsencode(urllib.parse.unquote(value))
            found[urllib.parse.unquote(name)] = known
    return found


@dataclass(frozen=True)
class CsvOptions:
    """How CSV files are written.

    Attributes:
      delimiter: one character, or None for a tab in .tsv files and a comma elsewhere.
      columns: names of the columns of files without a header line; () when they have one.
      nulls: texts that mean null.
      quotes: whether a value may stand in quotes; else a quote is a character like any.
    """

    delimiter: str | None = None
    columns: tuple[str, ...] = ()
    nulls: tuple[str, ...] = ("",)
    quotes: bool = True

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
      columns: by name; arrays of n, of the types of the file. Columns of CSV files and directories' names are binary.
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
    """The files of a log.

    Attributes:
      files: in row_id order.
      types: the columns that can be read, and the type that holds the values of all files (binary for text).
      units: see `Unit`.
      text: whether the files are CSV.
      csv: how CSV files are written.
      problems: the columns that cannot be read, and why: they are missing in a file, there twice, or of types that do
        not agree. It matters only when such a column is used.
      directories: of each file, the columns that are names of its directories, and their values. Those of `types` hold
        text.
    """

    files: tuple[str, ...]
    types: Mapping[str, pa.DataType]
    units: tuple[Unit, ...]
    text: bool
    csv: CsvOptions = field(default_factory=CsvOptions)
    problems: Mapping[str, str] = field(default_factory=dict)
    directories: tuple[Mapping[str, bytes | None], ...] = ()

    @property
    def directory_columns(self) -> list[str]:
        """The columns of `types` that are names of directories."""
        return [name for name in self.types if any(name in names for names in self.directories)]

    def require(self, column: str, where: str) -> None:
        """Refuses a column that cannot be read; ``where`` is what asks for it.

        Raises:
          UserError: why not.
        """
        if column in self.problems:
            raise UserError(f"{where}: {self.problems[column]}")
        if column not in self.types:
            hint = did_you_mean(column, self.types) or "."
            raise UserError(f"{where}: not in the log{hint} Columns: {', '.join(self.types)}")

    def unit_name(self, unit: Unit) -> str:
        """The unit for people."""
        return f"{unit.path} (from row {unit.first_row:,})" if unit.first_row else unit.path

    def file_rows(self, unit_rows: Sequence[int]) -> list[int]:
        """Rows of each file, of those of each unit."""
        rows = [0] * len(self.files)
        for unit, count in zip(self.units, unit_rows, strict=True):
            rows[unit.file] += count
        return rows

    def alike(self, columns: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
        """Columns of a chunk, whose types are those of its file, as `types`."""
        return {name: casts.to_type(array, self.types[name]) for name, array in columns.items()}


def open_log(files: Sequence[str], csv: CsvOptions | None = None, unit_rows: int | None = None) -> Log:
    """Checks that the files can be read, finds out their columns, and cuts them into units. Reads headers and footers.

    Args:
      files: of the log, in row_id order.
      csv: how CSV files are written.
      unit_rows: about how many rows the consecutive row groups of a unit have together, `_UNIT_ROWS` if not given; 0
        gives a unit to each.

    Raises:
      UserError: an empty or unreadable file, or a mixture of CSV and Parquet.
    """
    csv = csv or CsvOptions()
    text = not is_parquet(files[0])
    schemas: list[list[tuple[str, pa.DataType]]] = []
    units: list[Unit] = []
    for number, path in enumerate(files):
        if os.path.getsize(path) == 0:
            raise UserError(f"{path}: the file is empty (0 bytes)")
        if is_parquet(path) == text:
            raise UserError(f"{path}: a log is either CSV or Parquet; {files[0]} is {'CSV' if text else 'Parquet'}")
        if text:
            schemas.append([(name, pa.binary()) for name in _csv_columns(path, csv)])
            units.append(Unit(len(units), number, path, (), 0, -1))
        else:
            with _open_parquet(path) as file:
                schemas.append(list(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True)))
                units += _parquet_units(
                    path, number, file.metadata, len(units), _UNIT_ROWS if unit_rows is None else unit_rows
                )
    directories = [
        {name: value for name, value in _directory_columns(path).items() if name not in dict(schema)}
        for path, schema in zip(files, schemas, strict=True)
    ]
    for schema, names in zip(schemas, directories, strict=True):
        schema += [(name, pa.binary()) for name in names]
    # What a file without rows says of columns is of no interest, where others have some.
    full = {unit.file for unit in units} or set(range(len(files)))
    types, problems = _agreement([files[i] for i in sorted(full)], [schemas[i] for i in sorted(full)])
    directories = [{n: value for n, value in names.items() if n in types} for names in directories]
    return Log(tuple(files), types, tuple(units), text, csv, problems, tuple(directories))


def _agreement(
    files: Sequence[str], schemas: Sequence[list[tuple[str, pa.DataType]]]
) -> tuple[dict[str, pa.DataType], dict[str, str]]:
    """The columns that all files have with types that agree; the others, and what is wrong with them."""
    types: dict[str, pa.DataType] = {}
    first: dict[str, str] = {}  # the file in which a column was met
    problems: dict[str, str] = {}
    for path, schema in zip(files, schemas, strict=True):
        for name, kind in schema:
            common = casts.common_type(types.setdefault(name, kind), kind)
            if name in first and first[name] == path:
                problems.setdefault(name, f"{path}: the column '{name}' is there more than once")
            elif common is None:
                why = f"{path}: the column '{name}' is {kind}, but {types[name]} in {first[name]}"
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


def _parquet_units(path: str, file: int, metadata: pq.FileMetaData, index: int, unit_rows: int) -> list[Unit]:
    """Consecutive row groups of about ``unit_rows`` rows together."""
    units: list[Unit] = []
    groups: list[int] = []
    first = rows = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if not size:
            continue
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
    given = log.directories[unit.file]
    stored = [name for name in names if name not in given]
    chunks = (
        _read_csv(log, unit, stored, skip_malformed)
        if log.text
        else _read_parquet(unit, stored, chunk_rows or CHUNK_ROWS)
    )
    return chunks if len(stored) == len(names) else _with_directories(chunks, names, given)


def _with_directories(
    chunks: Iterator[Chunk], names: Sequence[str], given: Mapping[str, bytes | None]
) -> Iterator[Chunk]:
    for chunk in chunks:
        made = {n: pa.repeat(pa.scalar(given[n], pa.binary()), len(chunk.rows)) for n in names if n in given}
        yield replace(chunk, columns={name: made[name] if name in made else chunk.columns[name] for name in names})


def _open_parquet(path: str) -> pq.ParquetFile:
    with open(path, "rb") as start:
        magic = start.read(len(_PARQUET_MAGIC))
    if magic != _PARQUET_MAGIC:
        begins = magic.decode(errors="replace")
        raise UserError(f"{path}: is named like Parquet, but begins with {begins!r}: give CSV files another name")
    try:
        file = pq.ParquetFile(path, memory_map=True)
        if any(map(_is_hint, file.schema_arrow.types)):
            return pq.ParquetFile(path, memory_map=True, metadata=_without_hints(file.metadata))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, "Parquet", error) from None
    return file


def _is_hint(kind: pa.DataType) -> bool:
    """Whether a type holds one that only Arrow knows, and that its reader cannot make of every column that has it."""
    if pa.types.is_fixed_size_list(kind) or pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return True
    inner = (kind.field(i).type for i in range(kind.num_fields))
    return _is_hint(kind.value_type) if pa.types.is_dictionary(kind) else any(map(_is_hint, inner))


def _without_hints(metadata: pq.FileMetaData) -> pq.FileMetaData:
    """The footer without the Arrow types of the writer: columns have those that Parquet itself knows.

    A fixed-size list becomes a list: Arrow's reader refuses one with nulls in it.
    """
    footer = io.BytesIO()
    metadata.write_metadata_file(footer)
    return pq.read_metadata(io.BytesIO(footer.getvalue().replace(b"ARROW:schema", b"arrow.schema")))


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
    path: str, csv: CsvOptions, read: csv_text.Text, names: Sequence[str], malformed: _Malformed, header: bool
) -> pyarrow.csv.CSVStreamingReader:
    """Opens a CSV file to read ``names`` as bytes, or, for the first line alone, without names.

    Types are ours to check, so that a bad value can be traced to its row; without threads pyarrow knows the numbers of
    malformed rows.
    """
    columns = None if header else _csv_columns(path, csv)
    return pyarrow.csv.open_csv(
        pa.PythonFile(read, mode="r"),
        read_options=pyarrow.csv.ReadOptions(
            use_threads=False,
            block_size=_HEADER_BYTES if header else _CSV_BLOCK_BYTES,
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
    """The names, but for those that were there before: nobody asks for such columns."""
    return [name if name not in names[:i] else f"{name}\0{i}" for i, name in enumerate(names)]


def _csv_columns(path: str, csv: CsvOptions) -> list[str]:
    """The names that the first line holds, or that were given.

    Raises:
      UserError: the file is no text, or its header is not UTF-8.
    """
    try:
        csv_text.check(path, header=not csv.columns)
        if csv.columns:
            return list(csv.columns)
        text = csv_text.Text(path)
        with _open_csv(path, csv, text, [], _Malformed(0), header=True) as reader:
            names = pa.array([name.encode() for name in reader.schema.names], pa.binary())
            return [name.decode() for name in csv_text.trimmed(names, ()).to_pylist()]
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, "CSV", error) from None


def _read_csv(log: Log, unit: Unit, names: list[str], skip_malformed: bool) -> Iterator[Chunk]:
    malformed = _Malformed(header_lines=0 if log.csv.columns else 1)
    good = reported = 0  # rows parsed, malformed rows handed on
    for batch in _csv_batches(log, unit, names, malformed):
        if malformed.places and not skip_malformed:
            _check_quotes(unit.path, log.csv)
            where = f"{unit.path}, row {malformed.places[0]:,}"
            raise UserError(f"{where}: {malformed.first} (--on_bad_rows=drop counts and skips such rows)")
        # Row i of the good ones lies behind every malformed row that has at most i good rows before it.
        before = np.asarray(malformed.places, np.int64) - np.arange(len(malformed.places))
        for start in range(0, max(batch.num_rows, 1), CHUNK_ROWS):
            part = batch.slice(start, CHUNK_ROWS)
            index = np.arange(good, good + part.num_rows)
            rows = index + np.searchsorted(before, index, "right")
            yield Chunk(unit.path, rows, {name: part.column(name) for name in names}, len(before) - reported)
            good, reported = good + part.num_rows, len(before)


def _csv_batches(log: Log, unit: Unit, names: list[str], malformed: _Malformed) -> Iterator[pa.RecordBatch]:
    """The file's columns, and an empty batch at the end, for malformed rows there.

    Raises:
      UserError: the file cannot be read, or a quote swallows lines of it.
    """
    # With no column to read there would be no rows to count.
    wanted = names or [name for name in log.types if name not in log.directories[unit.file]][:1]
    text, rows = csv_text.Text(unit.path), 0 if log.csv.columns else 1
    try:
        reader = _open_csv(unit.path, log.csv, text, wanted, malformed, header=False)
        while (batch := next(reader, None)) is not None:
            rows += batch.num_rows
            columns = dict(zip(wanted, batch.columns, strict=True))
            if text.marked:
                columns = {name: csv_text.unmarked(array) for name, array in columns.items()}
            columns = {name: csv_text.trimmed(array, log.csv.nulls) for name, array in columns.items()}
            yield pa.RecordBatch.from_pydict(columns)
    except (pa.ArrowException, OSError) as error:
        _check_quotes(unit.path, log.csv)
        raise _damaged(unit.path, "CSV", error) from None
    if text.quoted and text.lines != rows + len(malformed.places):  # a value of several lines, or an empty line
        _check_quotes(unit.path, log.csv)
    yield pa.RecordBatch.from_pydict(dict.fromkeys(wanted, pa.array([], pa.binary())))


def _check_quotes(path: str, csv: CsvOptions) -> None:
    problem = csv_text.unclosed(path, csv.delimiter_of(path)) if csv.quotes else None
    if problem is not None:
        raise problem


def _damaged(path: str, kind: str, error: Exception) -> UserError:
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "straddling" in why:
        why = f"a row of more than {_CSV_BLOCK_BYTES >> 20} MiB"
    return UserError(f"{path}: cannot be read as {kind} ({why})")


def count_rows(log: Log, unit: Unit, *, skip_malformed: bool) -> int:
    """Rows of a unit, malformed ones included; reads a CSV file through."""
    if unit.rows >= 0:
        return unit.rows
    return sum(len(chunk.rows) + chunk.malformed for chunk in read(log, unit, (), skip_malformed=skip_malformed))
