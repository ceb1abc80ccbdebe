"""Drafts a schema from a log; comments say what was guessed, and why.

    stem-describe data/*.parquet > schema.yaml
    stem-describe --label=is_click,"marital_stat=Never married","rating>=4" --output=schema.yaml data/

LOG: CSV or Parquet files, globs or directories, on this machine or in a store (s3://, gs://, hdfs://), of whose rows a
sample is read. Columns that look like outcomes, or that predict a label too well by themselves, are commented out. Read
the draft before you use it: it is guessed from names and values alone.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from pipelines.describe import description
from pipelines.jobs import csv_flags
from stem_util import cli, files
from stem_util.errors import UserError

flags = cli.Flags()

_LABEL = flags.DEFINE_list(
    "label",
    [],
    "Columns to predict: column, column=value (label 1 where it has that value) or column>=number (label 1 from that "
    "number on). Guessed if not given.",
)
_OUTPUT = flags.DEFINE(cli.PATH, "output", None, "File to write (default: stdout).")
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace --output if it exists.")
_ROWS = flags.DEFINE_integer("sample_rows", 200_000, "Rows to sample from the log.", lower_bound=1)
_CSV = csv_flags.CsvFlags(flags)


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2:
        raise UserError("which log? Give CSV or Parquet files, globs or directories")
    if _OUTPUT.value and os.path.exists(_OUTPUT.value) and not _OVERWRITE.value:
        raise UserError(f"{_OUTPUT.value}: exists; choose another --output, or pass --overwrite")
    if _OUTPUT.value:
        _check_output(_OUTPUT.value)
    found = description.describe(argv[1:], _CSV.options(), _LABEL.value, _ROWS.value)
    if _OUTPUT.value:
        files.write_atomically(_OUTPUT.value, found.text.encode())
    else:
        print(found.text, end="", flush=True)
    where = _OUTPUT.value or "SCHEMA.yaml"
    print("\n".join(found.summary), file=sys.stderr)
    print(f"next      check {where}, then: {found.command(where, 'DIR')}", file=sys.stderr)


def _check_output(path: str) -> None:
    """Refuses to replace a file that is no schema, even with --overwrite. An edited draft may have mistakes."""
    if not os.path.exists(path):
        return
    try:
        with open(path, "rb") as file:
            text = file.read(1 << 20).decode()
    except (OSError, UnicodeDecodeError):
        text = "unreadable"
    if text.strip() and not (text.startswith(f"# {description.HEAD}") or re.search(r"^features:", text, re.MULTILINE)):
        raise UserError(f"{path} exists and is no schema; choose another --output")


def run() -> None:
    """Console script ``stem-describe``."""
    cli.run(main, flags, "LOG...")


if __name__ == "__main__":
    run()
