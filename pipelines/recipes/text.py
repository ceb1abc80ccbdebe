"""Reads raw text files whose layout a recipe knows, and says where a file is cut or another one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.log import casts, source
from pipelines.log.parts import Chunk, CsvOptions
from stem_util.errors import UserError


def tables(
    path: Path, columns: Sequence[str], delimiter: str, get: str, integers: Collection[str]
) -> Iterator[pa.Table]:
    """Yields the rows of a file without header or quotes, as strings and int64; spaces around values are removed.

    Args:
      path: the file, UTF-8.
      columns: names of its columns, in order.
      delimiter: one character.
      get: how to get the file, the fix in an error.
      integers: the columns that hold integers.

    Raises:
      UserError: a row has another number of values, or a value is no integer or not UTF-8.
    """
    log, expected = source.open_log([str(path)], CsvOptions(delimiter, tuple(columns), quotes=False)), 0
    for chunk in source.read(log, log.units[0], columns, skip_malformed=True):
        if chunk.malformed:
            gap = np.flatnonzero(chunk.rows != expected + np.arange(len(chunk.rows)))
            line = expected + (int(gap[0]) if len(gap) else len(chunk.rows)) + 1
            raise wrong_length(path, line, columns, get)
        expected += len(chunk.rows)
        yield pa.table({name: _column(chunk, name, name in integers, get) for name in columns})


def split_lines(path: Path, columns: Sequence[str], separator: str, encoding: str, get: str) -> Iterator[list[str]]:
    """Yields the values of each line, for files that are no CSV: a separator of several characters, another encoding.

    Raises:
      UserError: a line has another number of values, or the file is no text in this encoding.
    """
    with open(path, encoding=encoding, newline="\n") as file:
        try:
            for number, line in enumerate(file, start=1):
                values = line.rstrip("\r\n").split(separator)
                if len(values) != len(columns):
                    raise wrong_length(path, number, columns, get)
                yield values
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no {encoding} text ({error.reason} at byte {error.start:,}): {get}") from None


def integer(path: Path, line: int, column: str, value: str, get: str) -> int:
    """A value as an integer.

    Raises:
      UserError: it is none.
    """
    try:
        return int(value)
    except ValueError:
        raise not_integer(path, line, column, value, get) from None


def wrong_length(path: Path, line: int, columns: Sequence[str], get: str) -> UserError:
    """The error for a line with another number of values than there are columns."""
    return UserError(
        f"{path}, line {line:,}: should have {len(columns)} values ({', '.join(columns[:3])}, ...): the file is cut or "
        f"another one; {get}"
    )


def not_integer(path: Path, line: int, column: str, value: str, get: str) -> UserError:
    """The error for a value that is no integer."""
    return UserError(f"{path}, line {line:,}: {column} is '{value}', no integer: the file is damaged; {get}")


def _column(chunk: Chunk, name: str, is_integer: bool, get: str) -> pa.Array:
    array = chunk.columns[name]
    cast, bad = casts.to_int64(array) if is_integer else casts.to_text(array)
    if bad.any():
        place = int(np.argmax(bad))
        path, line, value = Path(chunk.path), int(chunk.rows[place]) + 1, array[place].as_py().decode(errors="replace")
        if is_integer:
            raise not_integer(path, line, name, value, get)
        raise UserError(f"{path}, line {line:,}: {name} is not UTF-8 ('{value}'): the file is damaged; {get}")
    return cast
