"""Formulas such as ``click^a * log1p(default(duration_ms, 0))``: a small grammar, parsed once, computed anywhere.

::

    sum     = product {("+" | "-") product}
    product = sign {("*" | "/") sign}
    sign    = {"+" | "-"} power
    power   = atom ["^" sign]                                  -a^b is -(a^b), and a^b^c is a^(b^c)
    atom    = number | name | function "(" sum {"," sum} ")" | "(" sum ")"

A formula becomes a list of steps for a stack: operands first, then what is done with them. Whoever computes it brings
the operations, so that NumPy and a TensorFlow graph work from the same steps. Nothing of a text is ever run as code.

Results follow IEEE 754 in float64: ``1 / 0`` and ``0^-1`` are infinite, ``0 / 0``, ``log(-1)`` and ``(-8)^0.5`` are no
number. :func:`finished` says what becomes of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from stem_util.errors import did_you_mean

Value = TypeVar("Value")
Step = tuple[str, str | float]
"""``("name", a name)``, ``("number", a number)``, or an operation and how many operands it takes from the stack."""

LONGEST = 2_000
"""The most characters of a formula."""
DEEPEST = 40
"""How many brackets, signs and powers may stand inside each other."""
_TOKEN = re.compile(
    r"\s*(?:((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"  # number
    r"|([A-Za-z_][A-Za-z0-9_]*)"  # name
    r"|(\S))"  # sign
)
_ARGUMENTS: Mapping[str, tuple[int, int | None]] = {
    "log": (1, 1),
    "log1p": (1, 1),
    "sqrt": (1, 1),
    "exp": (1, 1),
    "min": (2, None),
    "max": (2, None),
    "clip": (3, 3),
    "default": (2, 2),
}
FUNCTIONS = tuple(_ARGUMENTS)
"""``clip(x, low, high)`` is ``min(max(x, low), high)``; ``default(x, y)`` is x, and y where x is missing."""


class Mistake(ValueError):
    """A formula that cannot be read; the message names the place and the fix."""


@dataclass(frozen=True)
class Formula:
    """A formula that has been read.

    Attributes:
      text: as it was written.
      steps: numbers and names, which are put on a stack, and operations, which replace their operands on it.
    """

    text: str
    steps: tuple[Step, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names that occur, each once, in order."""
        return tuple(dict.fromkeys(str(value) for kind, value in self.steps if kind == "name"))

    def compute(self, values: Mapping[str, Value], operations: Mapping[str, Callable[..., Value]]) -> Value:
        """The value.

        Args:
          values: by name.
          operations: ``number`` (of a float), ``negative``, ``+``, ``-``, ``*``, ``/``, ``^``, ``log``, ``log1p``,
            ``sqrt``, ``exp``, ``min``, ``max`` and ``default``.
        """
        stack: list[Value] = []
        for kind, value in self.steps:
            if kind == "name":
                stack.append(values[str(value)])
            elif kind == "number":
                stack.append(operations["number"](value))
            else:
                count = int(value)
                operands = stack[-count:]
                stack[-count:] = [operations[kind](*operands)]
        return stack[0]


NUMPY: Mapping[str, Callable[..., Any]] = {
    "number": np.float64,
    "negative": np.negative,
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "^": np.power,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "min": np.minimum,
    "max": np.maximum,
    "default": lambda x, y: np.where(np.isnan(x), y, x),
}
"""The operations on float64 arrays; a missing value is NaN."""

_FLOAT32 = np.finfo(np.float32)
LARGEST, SMALLEST = float(_FLOAT32.max), float(_FLOAT32.tiny)


def values(formula: Formula, given: Mapping[str, NDArray | float]) -> NDArray[np.float64]:
    """The values of a formula, float64, of the shape that the given arrays have together."""
    with np.errstate(all="ignore"):
        floats = {name: np.asarray(given[name], np.float64) for name in formula.names}
        return np.asarray(formula.compute(floats, NUMPY), np.float64)


def finished(raw: NDArray[np.float64]) -> NDArray[np.float32]:
    """Values as they are served, float32 and always finite, so that they can be sorted.

    What is no number becomes the lowest float32, -3.4e38, and so ranks last. What is beyond float32 becomes its largest
    or lowest value, and what is closer to 0 than 1.2e-38 becomes 0.
    """
    known = np.where(np.isnan(raw), -LARGEST, np.clip(raw, -LARGEST, LARGEST))
    return np.where(np.abs(known) < SMALLEST, 0.0, known).astype(np.float32)


def is_name(text: str) -> bool:
    """Whether a formula can name something so: letters, digits and "_", a letter first."""
    return re.fullmatch("[A-Za-z][A-Za-z0-9_]*", text) is not None


def parse(text: str, names: Collection[str], others: Mapping[str, str], defaults: Collection[str] = ()) -> Formula:
    """Reads a formula.

    Args:
      text: what a person wrote.
      names: what may be named.
      others: names that exist and may not be used here, each with the reason.
      defaults: those of ``names`` that may be missing: they stand in ``default(name, ...)`` and nowhere else.

    Raises:
      Mistake: with the position, from 1, and what is wrong there.
    """
    if len(text) > LONGEST:
        raise Mistake(f"the formula has {len(text):,} characters, and {LONGEST:,} is the most")
    return Formula(text, tuple(_Parser(text, names, others, defaults).steps()))


class _Parser:
    """Reads one formula; one method for each rule of the grammar."""

    def __init__(self, text: str, names: Collection[str], others: Mapping[str, str], defaults: Collection[str]) -> None:
        self._text, self._names, self._others, self._defaults = text, names, others, defaults
        self._tokens = list(_tokens(text))
        self._place = 0
        self._depth = 0

    def steps(self) -> list[Step]:
        steps = self._sum()
        if self._peek():
            self._fail(f"an operator such as + or * should stand before {self._shown()}")
        return steps

    def _peek(self) -> str:
        return self._tokens[self._place][1] if self._place < len(self._tokens) else ""

    def _take(self) -> tuple[str, str]:
        kind, part, _ = self._tokens[self._place]
        self._place += 1
        return kind, part

    def _shown(self) -> str:
        return repr(self._peek()) if self._peek() else "the end"

    def _fail(self, message: str, place: int | None = None) -> NoReturn:
        place = self._place if place is None else place
        at = self._tokens[place][2] if place < len(self._tokens) else len(self._text)
        raise Mistake(f"position {at + 1}: {message}")

    def _left(self, operators: str, operand: Callable[[], list[Step]]) -> list[Step]:
        """Operands between operators that bind to the left."""
        steps = operand()
        while (operator := self._peek()) and operator in operators:
            self._take()
            steps += [*operand(), (operator, 2)]
        return steps

    def _sum(self) -> list[Step]:
        return self._left("+-", self._product)

    def _product(self) -> list[Step]:
        return self._left("*/", self._sign)

    def _sign(self) -> list[Step]:
        self._depth += 1
        if self._depth > DEEPEST:
            self._fail(f"brackets, signs and powers stand more than {DEEPEST} deep inside each other here")
        if self._peek() in ("+", "-"):
            negative = self._take()[1] == "-"
            steps = [*self._sign(), *([("negative", 1)] if negative else [])]
        else:
            steps = self._atom()
            if self._peek() == "^":
                self._take()
                steps = [*steps, *self._sign(), ("^", 2)]
        self._depth -= 1
        return steps

    def _atom(self) -> list[Step]:
        if not self._peek():
            self._fail("a number, a name or a bracket is missing at the end")
        place, (kind, part) = self._place, self._take()
        if kind == "number":
            if not np.isfinite(float(part)):
                self._fail(f"{part} is beyond the range of numbers", place)
            return [("number", float(part))]
        if kind == "name":
            return self._function(part, place) if self._peek() == "(" else self._name(part, place)
        if part == "(":
            steps = self._sum()
            self._close()
            return steps
        if part == "*" and place and self._tokens[place - 1][1] == "*":
            self._fail("a power is written ^, not **", place)
        self._fail(f"a number, a name or a bracket should stand here, not {part!r}", place)

    def _close(self) -> None:
        if self._peek() != ")":
            self._fail(f"a bracket should be closed before {self._shown()}")
        self._take()

    def _name(self, name: str, place: int, may_be_missing: bool = False) -> list[Step]:
        if name in self._others:
            self._fail(f"'{name}' {self._others[name]}", place)
        if name not in self._names:
            known = ", ".join(self._names)
            if name in FUNCTIONS:
                self._fail(f"'{name}' is a function: write {name}(...)", place)
            self._fail(f"nothing is named '{name}'{did_you_mean(name, self._names) or '.'} Names: {known}", place)
        if name in self._defaults and not may_be_missing:
            self._fail(
                f"'{name}' may be missing: write default({name}, 0), with the value that stands in for it", place
            )
        return [("name", name)]

    def _function(self, name: str, place: int) -> list[Step]:
        if name not in FUNCTIONS:
            hint = did_you_mean(name, FUNCTIONS) or "."
            self._fail(f"no function is named '{name}'{hint} Functions: {', '.join(FUNCTIONS)}", place)
        self._take()
        arguments = [self._missing() if name == "default" else self._sum()]
        while self._peek() == ",":
            self._take()
            arguments.append(self._sum())
        self._close()
        least, most = _ARGUMENTS[name]
        if not least <= len(arguments) <= (most or len(arguments)):
            wanted = f"{least}" if most else f"{least} or more"
            self._fail(
                f"{name} takes {wanted} value{'' if wanted == '1' else 's'}, and {len(arguments)} stand here", place
            )
        if name == "clip":
            x, low, high = arguments
            return [*x, *low, ("max", 2), *high, ("min", 2)]
        steps = arguments[0] if least > 1 else [*arguments[0], (name, 1)]
        for argument in arguments[1:]:
            steps = [*steps, *argument, (name, 2)]
        return steps

    def _missing(self) -> list[Step]:
        """The first value of ``default``."""
        place = self._place
        if not self._peek() or self._peek() not in self._defaults:
            self._fail(
                f"default is for a feature that may be missing ({', '.join(self._defaults) or 'there is none here'}), "
                f"not for {self._shown()}"
            )
        return self._name(self._take()[1], place, may_be_missing=True)


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """The kind (``number``, ``name`` or ``sign``), the text and the place of each token."""
    place = 0
    while match := _TOKEN.match(text, place):
        kind = {1: "number", 2: "name", 3: "sign"}[match.lastindex or 3]
        part = match[match.lastindex or 3]
        if kind == "sign" and part not in "+-*/^(),":
            raise Mistake(f"position {match.start(3) + 1}: {part!a} has no meaning in a formula")
        yield kind, part, match.start(match.lastindex or 3)
        place = match.end()
