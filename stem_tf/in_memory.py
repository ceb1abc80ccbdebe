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
      UserError: the values of a table's column have no common type.
    """
    if isinstance(log, str | os.PathLike):
        yield os.fspath(log)
    elif isinstance(log, pd.DataFrame | pa.Table):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "log.parquet"
            try:
                table = pa.Table.from_pandas(log, preserve_index=False) if isinstance(log, pd.DataFrame) else log
                pq.write_table(table, path)
            except pa.ArrowException as error:
                raise UserError(f"the table cannot be written as Parquet: {' '.join(str(error).split())}") from error
            try:
                yield str(path)
            except UserError as error:
                raise UserError(str(error).replace(str(path), "the table")) from error
    else:
        yield ",".join(os.fspath(path) for path in log)
