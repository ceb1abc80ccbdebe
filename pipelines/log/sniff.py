"""Looks at the first lines of a CSV file: which character separates values, and does the first line hold names?"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pyarrow as pa

from pipelines.log import csv_text
from pipelines.log.parts import CsvOptions, Log
from stem_util.errors import UserError

_BYTES = 1 << 16
_DELIMITERS = (",", "\t", ";", "|", " ")
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_NAME = re.compile(r"[^\W\d_]")
_NO_NAMES = {"na", "n/a", "nan", "null", "none", "inf", "-inf"}  # texts that mean a missing value
_SHOWN = 4


@dataclass(frozen=True)
class Look:
    """What the first lines show.

    Attributes:
      csv: the options, with the delimiter that was found.
      advice: what to do about the first line, or None if it holds names.
    """

    csv: CsvOptions
    advice: str | None = None


def look(path: str, options: CsvOptions) -> Look:
    """Finds the delimiter, if none is given, and examines the first line.

    Raises:
      UserError: values are separated by two colons.
    """
    lines = _lines(path)
    if not lines:
        return Look(options)
    if options.delimiter is None and len(_rows(lines[:1], options.delimiter_of(path))[0]) == 1:
        if all(line.count("::") == lines[0].count("::") > 0 for line in lines):
            tsv = f"{path.rsplit('.', 1)[0]}.tsv"
            raise UserError(
                f"{path}: its values are separated by '::', which is not CSV. Write tabs, as in: "
                f"sed 's/::/\\t/g' {path} > {tsv}; if the first line holds no names, give them: "
                f"--csv_columns={','.join('abcdefgh'[: lines[0].count('::') + 1])}"
            )
        found = [delimiter for delimiter in _DELIMITERS if _parts(lines, delimiter)]
        if found:
            best = max(found, key=lambda delimiter: len(_rows(lines[:1], delimiter)[0]))
            options = replace(options, delimiter=best)
    rows = _rows(lines, options.delimiter_of(path))
    return Look(options, _advice(path, rows, options))


def explain(log: Log, columns: Iterable[str]) -> None:
    """If a CSV log lacks columns that are used, explains that by its first line, if it can.

    Raises:
      UserError: values are separated by another character, or the first line holds no names.
    """
    if not log.text or all(column in log.types or column in log.problems for column in columns):
        return
    path, given = log.files[0], log.csv.delimiter_of(log.files[0])
    seen = look(path, log.csv)
    if (found := seen.csv.delimiter_of(path)) != given:
        raise UserError(
            f"{path}: its values seem to be separated by {found!r}, not by {given!r}: "
            f"--csv_delimiter={'tab' if found == chr(9) else repr(found)}"
        )
    if seen.advice is not None:
        raise UserError(seen.advice)


def _lines(path: str) -> list[str]:
    """The first whole lines that are not empty."""
    try:
        with csv_text.open_bytes(path) as file:
            data = file.read(_BYTES)
    except (pa.ArrowException, OSError):
        return []
    lines = data.decode("utf-8-sig", "replace").splitlines()
    return [line for line in (lines[:-1] if len(data) == _BYTES else lines) if line.strip()]


def _rows(lines: list[str], delimiter: str) -> list[list[str]]:
    try:
        return list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    except csv.Error:
        return [line.split(delimiter) for line in lines]


def _parts(lines: list[str], delimiter: str) -> bool:
    """Whether a delimiter splits nearly all lines (a space: all) into as many values as the first, at least two."""
    sizes = [len(row) for row in _rows(lines, delimiter)]
    share = sizes.count(sizes[0]) / len(sizes)
    return share == 1 and sizes[0] > 2 if delimiter == " " else share >= 0.9 and sizes[0] > 1


def _advice(path: str, rows: list[list[str]], options: CsvOptions) -> str | None:
    first, others = [value.strip() for value in rows[0]], rows[1:]
    if options.columns:
        if first == list(options.columns):
            return f"{path}: the first line holds the names of --csv_columns: leave the flag out"
        return None
    if not _is_data(first, [row for row in others if len(row) == len(first)]):
        return None
    shown = ", ".join(first[:_SHOWN]) + (", ..." if len(first) > _SHOWN else "")
    names = ",".join(f"name{i + 1}" for i in range(min(len(first), _SHOWN)))
    return (
        f"{path}: the first line looks like data, not like names ({shown}): name its {len(first)} columns, as in "
        f"--csv_columns={names}{',...' if len(first) > _SHOWN else ''}"
    )


def _is_data(first: list[str], others: list[list[str]]) -> bool:
    """Whether the first line is data: numbers above numbers, or texts that occur again below; no name above numbers."""
    if first == [str(i) for i in range(len(first))] or not others:
        return False  # pandas numbers columns that have no names
    like = 0
    for i, value in enumerate(first):
        below = [row[i].strip() for row in others]
        numbers = sum(bool(_NUMBER.fullmatch(other)) for other in below) >= len(below) / 2
        if numbers and _NAME.search(value) and value.lower() not in _NO_NAMES and value not in below:
            return False
        like += (bool(_NUMBER.fullmatch(value)) and numbers) or (value != "" and value in below)
    return like >= len(first) / 4
