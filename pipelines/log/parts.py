"""A log and its parts: units that workers read, chunks that they read at a time, and how CSV files are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipelines.log import casts
from stem_util.errors import UserError, did_you_mean


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


def unreadable(path: str, kind: str, error: Exception) -> UserError:
    """What is said of a file that Arrow cannot read as ``kind``."""
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path}: cannot be read as {kind} ({why})")
