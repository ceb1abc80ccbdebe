"""Describes a log: a draft of its schema, a summary, and the command that converts the log with the draft."""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines import schema_yaml
from pipelines.describe import draft, sample
from pipelines.log import sniff, source
from pipelines.log.find import find_files, is_parquet
from pipelines.log.parts import CsvOptions
from stem_util.errors import UserError

HEAD = "Drafted by stem-describe"
"""The beginning of a draft's first comment."""


@dataclass(frozen=True)
class Description:
    """What was found about a log.

    Attributes:
      text: the drafted schema, YAML with comments.
      summary: lines to print.
      arguments: command-line arguments of the conversion, without --schema and --output.
    """

    text: str
    summary: tuple[str, ...]
    arguments: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(self.summary)

    def command(self, schema_path: str, output: str) -> str:
        """The command line that converts the log with the draft."""
        log, *others = self.arguments
        return shlex.join(["stem-convert", log, f"--schema={schema_path}", f"--output={output}", *others])


def describe(patterns: Sequence[str], options: CsvOptions, labels: Sequence[str], limit: int) -> Description:
    """Drafts a schema.

    Args:
      patterns: files, globs and directories of the log.
      options: how CSV files are written; if the delimiter is not given, it is guessed.
      labels: see `draft.draft`.
      limit: number of rows to sample from the log.

    Raises:
      UserError: the arguments or the log have a mistake, or no column can be a label or a feature.
    """
    files = find_files(",".join(patterns))
    seen = sniff.Look(options) if is_parquet(files[0]) else sniff.look(files[0], options)
    try:
        log = source.open_log(files, seen.csv)
        rows = sample.draw(log, limit)
        text = log.types if log.text else log.directory_columns
        types = {n: str(rows.table.schema.field(n).type if n in text else kind) for n, kind in log.types.items()}
        result = draft.draft(_name(patterns[0]), rows.table, types, labels, rows.rows)
    except UserError as error:
        raise UserError(f"{seen.advice} ({error})") if seen.advice else error from None
    result.left_out.update(log.problems)
    read = f"{len(rows.table):,} rows" if rows.complete else f"a sample of {len(rows.table):,} rows"
    head = [
        f"{HEAD} from {read} of {', '.join(patterns[:2])}{', ...' if len(patterns) > 2 else ''}.",
        "Everything here is a guess: check that every feature is known before the outcome it helps to predict.",
        *([seen.advice] if seen.advice else []),
    ]
    drafted = draft.render(result, head)
    schema_yaml.loads(drafted, "the draft").validate_columns(
        log.types, log.files[0], text=log.text, directories=log.directory_columns, problems=log.problems
    )
    arguments = [",".join(patterns)]
    arguments += ["--split=time", f"--split_column={result.split}"] if result.split else ["--split=random"]
    arguments += ["--on_bad_rows=drop"] if rows.malformed else []
    arguments += _csv_flags(seen.csv)
    return Description(drafted, tuple(_summary(result, rows, read, seen)), tuple(arguments))


def _csv_flags(given: CsvOptions) -> list[str]:
    """The flags that give another job these options; defaults are left out."""
    delimiter = "tab" if given.delimiter == "\t" else given.delimiter
    return [
        *([] if delimiter is None else [f"--csv_delimiter={delimiter}"]),
        *([f"--csv_columns={_as_flag(given.columns)}"] if given.columns else []),
        *([f"--csv_nulls={_as_flag(given.nulls)}"] if given.nulls != CsvOptions().nulls else []),
        *([] if given.quotes else ["--nocsv_quotes"]),
    ]


def _as_flag(values: Sequence[str]) -> str:
    """Writes a list in the form that a flag reads."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def _name(pattern: str) -> str:
    """A name for the data set, from its path: shop for data/shop/*.parquet, log for data/log.csv."""
    parts = [part for part in os.path.abspath(pattern).split(os.sep) if part and "*" not in part and "?" not in part]
    return (parts or ["log"])[-1].split(".")[0]


def _summary(result: draft.Draft, rows: sample.LogSample, read: str, seen: sniff.Look) -> list[str]:
    def names(columns: Sequence[str]) -> str:
        return ", ".join(column or "''" for column in columns) or "none"

    keys = [names([f"{key} {column}" for key, column in result.keys.items()])]
    keys += [f"no {key} by {column}: {why}" for key, (column, why) in result.no_keys.items()]
    return [
        *([f"warning   {seen.advice}"] if seen.advice else []),
        f"read      {read}, {len(rows.table.column_names)} columns",
        *([f"skipped   {rows.malformed:,} CSV rows with a wrong number of columns"] if rows.malformed else []),
        f"features  {names(result.sure_features)}",
        f"tasks     {names(result.sure_tasks)}",
        f"keys      {'; '.join(keys)}",
        f"doubtful  {names(list(result.doubts))}{' (commented out)' if result.doubts else ''}",
        *(f"suspect   {name}: AUC {auc:.3f} on {task}" for name, (auc, task) in result.suspects.items()),
        f"left out  {names(list(result.left_out))}",
        *(f"no split  by {name}: {why}" for name, why in result.no_split.items()),
    ]
