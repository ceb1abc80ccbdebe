"""A log and its parts (units that workers read, chunks that they read at a time), and how CSV files are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipelines.log import casts
from stem_util import stores
from stem_util.errors import JobError, UserError, did_you_mean


@dataclass(frozen=True)
class CsvOptions:
    """How CSV files are written.

    Attributes:
      delimiter: one character, or None for a tab in .tsv files and a comma elsewhere.
      columns: column names, for files without a header line; () if there is one.
      nulls: texts that mean null.
      quotes: whether values may be quoted; otherwise a quote is an ordinary character.
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
      index: its number among the log's units.
      file: the number of its file among the log's files.
      path: its file.
      row_groups: numbers of its row groups in a Parquet file; () for CSV.
      first_row: place of the unit's first row within the file.
      rows: number of rows, bad rows included; -1 for CSV, whose rows have not been counted.
    """

    index: int
    file: int
    path: str
    row_groups: tuple[int, ...]
    first_row: int
    rows: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a unit, by default up to `pipelines.log.source.CHUNK_ROWS`.

    Attributes:
      path: the file.
      rows: int64 [n], each row's place within the file, from 0. Malformed CSV rows leave gaps.
      columns: arrays [n] by name, in the types of the file. Columns of CSV files and of directory names are binary.
      malformed: number of CSV rows with a wrong number of columns that were skipped since the last chunk.
    """

    path: str
    rows: np.ndarray
    columns: dict[str, pa.Array]
    malformed: int

    def take(self, places: np.ndarray) -> Chunk:
        """The rows at ascending ``places``."""
        index = pa.array(places)
        columns = {name: array.take(index) for name, array in self.columns.items()}
        return Chunk(self.path, self.rows[places], columns, self.malformed)


@dataclass(frozen=True)
class Log:
    """The files of a log.

    Attributes:
      files: the files in row_id order.
      types: the columns that can be read, each with the type that holds the values of all files (binary for text).
      units: see `Unit`.
      text: whether the files are CSV.
      csv: how CSV files are written.
      problems: the columns that cannot be read, and why: a file lacks them or has them twice, or their types do not
        agree. An error only if such a column is used.
      directories: for each file, the columns whose values are in the names of its directories, and these values; they
        are text in `types`.
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
        """The columns of `types` whose values are in the names of directories."""
        return [name for name in self.types if any(name in names for names in self.directories)]

    def require(self, column: str, where: str) -> None:
        """Refuses a column that cannot be read.

        Args:
          column: its name.
          where: what asks for the column, for the error.

        Raises:
          UserError: says why it cannot be read.
        """
        if column in self.problems:
            raise UserError(f"{where}: {self.problems[column]}")
        if column not in self.types:
            hint = did_you_mean(column, self.types) or "."
            raise UserError(f"{where}: not in the log{hint} Columns: {', '.join(self.types)}")

    def unit_name(self, unit: Unit) -> str:
        """The unit's name in messages."""
        return f"{unit.path} (from row {unit.first_row:,})" if unit.first_row else unit.path

    def file_rows(self, unit_rows: Sequence[int]) -> list[int]:
        """The number of rows in each file, summed from the number in each unit."""
        rows = [0] * len(self.files)
        for unit, count in zip(self.units, unit_rows, strict=True):
            rows[unit.file] += count
        return rows

    def alike(self, columns: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
        """Casts columns of a chunk from the types of its file to `types`."""
        return {name: casts.to_type(array, self.types[name]) for name, array in columns.items()}


def unreadable(path: str, kind: str, error: Exception) -> UserError | JobError:
    """The error for a file that Arrow cannot read as ``kind``, or that a store does not deliver."""
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    if stores.is_uri(path) and isinstance(error, OSError):
        return JobError(f"{path}: cannot be read ({why})")
    return UserError(f"{path}: cannot be read as {kind} ({why})")
