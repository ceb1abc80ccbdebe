"""Flags that say how CSV files are written, for every job that reads logs."""

from __future__ import annotations

from pipelines.log.parts import CsvOptions
from stem_util import cli
from stem_util.errors import UserError


class CsvFlags:
    """Adds these flags to a job: ``_CSV = csv_flags.CsvFlags(flags)``, then ``_CSV.options()`` when it runs."""

    def __init__(self, flags: cli.Flags) -> None:
        self._delimiter = flags.DEFINE_string(
            "csv_delimiter",
            None,
            "The character between values, or 'tab' (default: a tab in .tsv files, else a comma).",
        )
        self._columns = flags.DEFINE_list("csv_columns", [], "Column names, for CSV files without a header line.")
        self._nulls = flags.DEFINE_list(
            "csv_nulls", [""], "Texts that mean a missing value in CSV files, as in --csv_nulls=,NA"
        )
        self._quotes = flags.DEFINE_boolean(
            "csv_quotes",
            True,
            "Values of CSV files may be quoted. With --nocsv_quotes a quote is an ordinary character.",
        )

    def options(self) -> CsvOptions:
        """Returns the options that the flags set.

        Raises:
          UserError: the delimiter is not one ASCII character, or a column name is given twice.
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
