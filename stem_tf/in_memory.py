"""Hands tables in memory to code that reads files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stem_util.errors import UserError

Log: TypeAlias = pd.DataFrame | pa.Table | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Rows in memory, or files, globs and directories."""


@contextlib.contextmanager
def files_of(log: Log) -> Iterator[str]:
    """Yields the patterns of a log, separated by commas; a table is in a Parquet file while the context lasts.

    Raises:
      UserError: a table without columns, with two of one name, or with one whose values have no common type; or
        something else than a log.
    """
    if isinstance(log, str | os.PathLike):
        yield os.fspath(log)
    elif isinstance(log, pd.DataFrame | pa.Table):
        _check_names(log)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "log.parquet"
            try:
                table = pa.Table.from_pandas(log, preserve_index=False) if isinstance(log, pd.DataFrame) else log
                pq.write_table(table, path)
            except (pa.ArrowException, TypeError, ValueError) as error:
                why = "; ".join(str(part) for part in error.args)
                raise UserError(f"the table cannot be written as Parquet: {' '.join(why.split())}") from error
            try:
                yield str(path)
            except UserError as error:
                raise UserError(str(error).replace(str(path), "the table")) from error
    elif isinstance(log, Sequence) and all(isinstance(path, str | os.PathLike) for path in log):
        yield ",".join(os.fspath(path) for path in log)
    else:
        kind = f"{type(log).__module__.partition('.')[0]}.{type(log).__name__}".removeprefix("builtins.")
        raise UserError(
            f"a log is a DataFrame, a pyarrow Table, or paths, not a {kind}; join several tables with pandas.concat"
        )


def _check_names(table: pd.DataFrame | pa.Table) -> None:
    names = [str(name) for name in (table.columns if isinstance(table, pd.DataFrame) else table.column_names)]
    if not names:
        raise UserError("the table has no columns")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"the table has more than one column {twice[0]!r}: drop or rename one of them")
