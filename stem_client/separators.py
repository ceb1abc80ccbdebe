"""Splits a list that is written as one text, as conversion does."""

from __future__ import annotations

import re
from typing import Any

_INTEGER = re.compile(r"(-?[0-9]+)(\.0*)?", re.ASCII)
_HEX = re.compile(r"0[xX][0-9a-fA-F]{1,16}", re.ASCII)
_ROUNDED = 2**53


class NotAnInteger(ValueError):
    """A piece of a text is not an integer."""


def split(text: str, separator: str, dtype: str) -> list[Any]:
    """Returns the values of a text in order; None for empty pieces.

    Spaces around separators are kept in strings and ignored around integers. A separator of several characters may
    lack its spaces at the ends of the text: "a, b," is a and b.

    Args:
      text: as in a column of the log.
      separator: of the schema's feature.
      dtype: "int64" or "string".

    Raises:
      NotAnInteger: naming the piece.
    """
    if separator != separator.lstrip(" "):
        text = text.removeprefix(separator.lstrip(" "))
    if separator != separator.rstrip(" "):
        text = text.removesuffix(separator.rstrip(" "))
    pieces = text.split(separator)
    if dtype == "string":
        return [piece or None for piece in pieces]
    return [_integer(piece) if piece else None for piece in pieces]


def _integer(piece: str) -> int:
    digits = piece.strip()
    if _HEX.fullmatch(digits):
        number = int(digits, 16)
        return number - 2**64 if number >= 2**63 else number
    match = _INTEGER.fullmatch(digits)
    if match is not None:
        number = int(match[1][:4000])  # Python does not read longer ones, and they are beyond int64
        # It is written as a float, and may have been rounded.
        if -(2**63) <= number < 2**63 and (match[2] is None or abs(number) <= _ROUNDED):
            return number
    raise NotAnInteger(piece)
