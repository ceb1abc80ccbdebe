"""What a request may ask of the server."""

from __future__ import annotations

from typing import NamedTuple

MAX_ELEMENTS = 1 << 22
"""Elements of a tensor or a request, unless told otherwise: a shape of a few bytes can ask for any number of them."""


class Limits(NamedTuple):
    """Limits of a request, checked on the shapes that it states, before anything is allocated.

    Attributes:
      rows: rows or candidates: the product of the axes of its scores.
      elements: values of all its tensors together.
    """

    rows: int = 100_000
    elements: int = MAX_ELEMENTS
