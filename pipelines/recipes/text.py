"""Reads raw text files whose layout a recipe knows, and says where a file is cut or another one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.log import casts, source
from pipelines.log.parts import Chunk, CsvOptions, Log
from stem_util.errors import UserError

_INTEGER = re.compile(r"[-+]?[0-9]{1,19}")

Kind = Literal["text", "integer", "optional integer", "label"]
"""What a column holds. Labels are 0 and 1; texts and optional integers may be missing."""


def tables(
    path: Path,
    columns: Mapping[str, Kind],
    get: str,
    *,
    delimiter: str = ",",
    header: bool = False,
    nulls: tuple[str, ...] = ("",),
) -> Iterator[pa.Table]:
    """Yields the rows of a file in order, as strings and int64; spaces around values are removed.

    Args:
      path: the file, UTF-8.
      columns: the columns to read. Without a header these are all there are, in order.
      get: how to get the file, the fix in an error.
      delimiter: one character.
      header: whether the first line names the columns. If so, values may be quoted.
      nulls: texts that mean a missing value.

    Raises:
      UserError: the file is no text, a column is missing, a row has another number of values, a value is none of the
        column's kind, or there are no rows.
    """
    csv = CsvOptions(delimiter, () if header else tuple(columns), nulls, quotes=header)
    expected = 0
    with _in_terms_of_recipes(path, get):
        log = source.open_log([str(path)], csv)
    for name in columns:
        if name not in log.types:
            names = ", ".join(log.types)
            raise UserError(f"{path}: its first line names no column {name} ({names}): the file is another one; {get}")
    for chunk in _chunks(path, log, list(columns), get):
        if chunk.malformed:
            gap = np.flatnonzero(chunk.rows != expected + np.arange(len(chunk.rows)))
            row = expected + (int(gap[0]) if len(gap) else len(chunk.rows))
            raise wrong_length(path, row + 1 + header, list(log.types), get)
        expected += len(chunk.rows)
        yield pa.table({name: _column(chunk, name, kind, header, get) for name, kind in columns.items()})
    if not expected:
        raise UserError(f"{path} holds no rows: the file is cut or another one; {get}")


def _chunks(path: Path, log: Log, columns: list[str], get: str) -> Iterator[Chunk]:
    with _in_terms_of_recipes(path, get):
        yield from source.read(log, log.units[0], columns, skip_malformed=True)


@contextlib.contextmanager
def _in_terms_of_recipes(path: Path, get: str) -> Iterator[None]:
    """Replaces what an error advises to do about a log of one's own by how to get the raw file."""
    try:
        yield
    except UserError as error:
        what = ": ".join(str(error).removeprefix(str(path)).split(": ")[:2])
        raise UserError(f"{path}{what}: the file is cut or another one; {get}") from None


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
      UserError: it is none of 64 bits.
    """
    if not _INTEGER.fullmatch(value) or not -(2**63) <= (number := int(value)) < 2**63:
        raise not_integer(path, line, column, value, get)
    return number


def wrong_length(path: Path, line: int, columns: Sequence[str], get: str) -> UserError:
    """The error for a line with another number of values than there are columns."""
    return UserError(
        f"{path}, line {line:,}: should have {len(columns)} values ({', '.join(columns[:3])}, ...): the file is cut or "
        f"another one; {get}"
    )


def not_integer(path: Path, line: int, column: str, value: str, get: str) -> UserError:
    """The error for a value that is no integer."""
    return UserError(f"{path}, line {line:,}: {column} is '{value}', no integer: the file is damaged; {get}")


def _column(chunk: Chunk, name: str, kind: Kind, header: bool, get: str) -> pa.Array:
    array = chunk.columns[name]
    cast, bad = casts.to_text(array) if kind == "text" else casts.to_int64(array)
    if kind == "label":
        bad |= ~casts.to_numpy(pc.is_in(cast, pa.array([0, 1])))
    elif kind == "integer":
        bad |= casts.to_numpy(cast.is_null())
    if not bad.any():
        return cast
    row = int(np.argmax(bad))
    path, line, value = Path(chunk.path), int(chunk.rows[row]) + 1 + header, array[row].as_py() or b""
    shown = value.decode(errors="replace")
    if kind == "text":
        raise UserError(f"{path}, line {line:,}: {name} is not UTF-8 ('{shown}'): the file is damaged; {get}")
    if kind == "label":
        raise UserError(f"{path}, line {line:,}: {name} is '{shown}', not 0 or 1: the file is damaged; {get}")
    raise not_integer(path, line, name, shown, get)
