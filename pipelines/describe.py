"""Drafts a schema from a log, with what was guessed and why as comments.

    stem-describe data/*.parquet > schema.yaml
    stem-describe --label=is_click,"marital_stat=Never married" --output=schema.yaml data/

Reads a sample of the rows of CSV or Parquet files, globs or directories. Columns that look like outcomes, or that alone
predict a label too well, are commented out. Read the draft before you use it: names and numbers are all it knows.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from pipelines import cli, csv_flags, draft, files, sample, schema, source
from pipelines.errors import UserError

_LABEL = flags.DEFINE_list(
    "label",
    [],
    "Columns to predict, as column or column=value (then 1 where it equals the value). Guessed if not given.",
)
_OUTPUT = flags.DEFINE(cli.PATH, "output", None, "File to write; stdout if not given.")
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace --output if it exists.")
flags.adopt_module_key_flags(csv_flags)
_DRAFTED = "Drafted by stem-describe"
_ROWS = flags.DEFINE_integer("sample_rows", 200_000, "Rows to draw from the log.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2:
        raise UserError("which log? Give CSV or Parquet files, globs or directories")
    if _OUTPUT.value and os.path.exists(_OUTPUT.value) and not _OVERWRITE.value:
        raise UserError(f"{_OUTPUT.value}: exists; choose another --output, or pass --overwrite")
    if _OUTPUT.value:
        _check_output(_OUTPUT.value)
    log = source.open_log(source.find_files(",".join(argv[1:])), csv_flags.options())
    rows = sample.draw(log, _ROWS.value)
    table = rows.table
    types = {name: str(table.schema.field(name).type if log.text else kind) for name, kind in log.types.items()}
    result = draft.draft(_name(argv[1]), table, types, _LABEL.value)
    read = f"{len(table):,} rows" if rows.complete else f"a sample of {len(table):,} rows"
    text = draft.render(
        result,
        [
            f"{_DRAFTED} from {read} of {', '.join(argv[1:3])}{', ...' if len(argv) > 3 else ''}.",
            "Everything here is a guess: check that every feature is known before the outcome it helps to predict.",
        ],
    )
    schema.loads(text, "the draft").validate_columns(log.types, log.files[0], text=log.text)
    if _OUTPUT.value:
        files.write_atomically(_OUTPUT.value, text.encode())
    else:
        print(text, end="")
    _summarise(result, rows, read, argv[1:])


def _check_output(path: str) -> None:
    """Refuses to replace what is no schema, --overwrite or not; a draft that was edited may have mistakes."""
    if not os.path.exists(path):
        return
    try:
        with open(path, "rb") as file:
            text = file.read(1 << 20).decode()
    except (OSError, UnicodeDecodeError):
        text = "unreadable"
    if text.strip() and not (text.startswith(f"# {_DRAFTED}") or re.search(r"^features:", text, re.MULTILINE)):
        raise UserError(f"{path} exists and is no schema; choose another --output")


def _name(pattern: str) -> str:
    """A name for the data set from where it lies: data/shop/*.parquet is shop, data/log.csv is log."""
    parts = [part for part in os.path.abspath(pattern).split(os.sep) if part and "*" not in part and "?" not in part]
    return (parts or ["log"])[-1].split(".")[0]


def _summarise(result: draft.Draft, rows: sample.Sample, read: str, patterns: Sequence[str]) -> None:
    def names(columns: Sequence[str]) -> str:
        return ", ".join(columns) or "none"

    sure = [[column for column in part if column not in result.doubts] for part in (result.features, result.tasks)]
    lines = [
        f"read      {read}, {len(rows.table.column_names)} columns",
        f"features  {names(sure[0])}",
        f"tasks     {names(sure[1])}",
        f"keys      {names([f'{key} {column}' for key, column in result.keys.items()])}",
        f"doubtful  {names(list(result.doubts))}{' (commented out)' if result.doubts else ''}",
        *(f"suspect   {name}: AUC {auc:.3f} on {task}" for name, (auc, task) in result.suspects.items()),
        f"left out  {names(list(result.left_out))}",
    ]
    if rows.malformed:
        lines.insert(1, f"skipped   {rows.malformed:,} CSV rows with a wrong number of columns")
    where = _OUTPUT.value or "SCHEMA.yaml"
    split = f"--split=time --split_column={shlex.quote(result.times[0])}" if result.times else "--split=random"
    log = shlex.quote(",".join(patterns))
    lines.append(f"next      check {where}, then: stem-convert {log} --schema={where} --output=DIR {split}")
    print("\n".join(lines), file=sys.stderr)


def run() -> None:
    """Console script ``stem-describe``."""
    cli.run(main, "LOG...")


if __name__ == "__main__":
    run()
