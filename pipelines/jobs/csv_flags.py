"""Flags that say how CSV files are written, for every job that reads logs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from pipelines.log.parts import CsvOptions
from stem_util import cli
from stem_util.errors import UserError


class CsvFlags:
    """Adds these flags to a job's: ``_CSV = csv_flags.CsvFlags(flags)``, then ``_CSV.options()`` in the job."""

    def __init__(self, flags: cli.Flags) -> None:
        self._delimiter = flags.DEFINE_string(
            "csv_delimiter", None, "A character or 'tab' (by default tab in .tsv files)."
        )
        self._columns = flags.DEFINE_list("csv_columns", [], "Column names of CSV files that have no header line.")
        self._nulls = flags.DEFINE_list("csv_nulls", [""], "Texts that mean null in CSV files, as in --csv_nulls=,NA")
        self._quotes = flags.DEFINE_boolean(
            "csv_quotes", True, "A value of a CSV file may stand in quotes; without, a quote is a character like any."
        )

    def options(self) -> CsvOptions:
        """What the flags say.

        Raises:
          UserError: a delimiter that is not one ASCII character, or a column name that is there twice.
        """
        given, columns = self._delimiter.value, self._columns.value
        delimiter = {"tab": "\t", "\\t": "\t"}.get(given, given)
        if delimiter is not None and (len(delimiter) != 1 or ord(delimiter) > 127 or delimiter in '\r\n"'):
            raise UserError(
                f"--csv_delimiter={delimiter}: should be one ASCII character, no quote or line end, or 'tab'"
            )
        if len(set(columns)) < len(columns):
            raise UserError(f"--csv_columns={','.join(columns)}: a name is there more than once")
        return CsvOptions(delimiter, tuple(columns), tuple(self._nulls.value), self._quotes.value)


def arguments(given: CsvOptions) -> list[str]:
    """The flags that say the same to another job: those that differ from their defaults."""
    delimiter = "tab" if given.delimiter == "\t" else given.delimiter
    return [
        *([] if delimiter is None else [f"--csv_delimiter={delimiter}"]),
        *([f"--csv_columns={_list(given.columns)}"] if given.columns else []),
        *([f"--csv_nulls={_list(given.nulls)}"] if given.nulls != CsvOptions().nulls else []),
        *([] if given.quotes else ["--nocsv_quotes"]),
    ]


def _list(values: Sequence[str]) -> str:
    """As a flag reads a list."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()
