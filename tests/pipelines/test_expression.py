"""Formulas: values worked out by hand, and what a person may get wrong."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines import expression
from pipelines.expression import Mistake, finished, parse, values

NAMES = ("click", "like", "a", "length", "max_")
SCORES: dict[str, NDArray | float] = {
    "click": np.array([0.25, 0.0]),
    "like": np.array([0.5, 1.0]),
    "a": 2.0,
    "length": np.array([np.nan, 7.0]),
}


def value(text: str) -> list[float]:
    formula = parse(text, NAMES, {"size": "is a categorical feature"}, ["length"])
    return np.broadcast_to(values(formula, SCORES), 2).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("click + 2 * like - 1", [0.25, 1.0]),
        ("click - like - 1", [-1.25, -2.0]),
        ("8 / 2 / 2 * like", [1.0, 2.0]),
        ("click ^ a * like", [0.03125, 0.0]),
        ("-2 ^ 2 + click", [-3.75, -4.0]),
        ("2 ^ 3 ^ 2 + click", [512.25, 512.0]),
        ("2 ^ -1 * like", [0.25, 0.5]),
        ("(click + like) * .5e1", [3.75, 5.0]),
        ("- - like", [0.5, 1.0]),
        ("min(click, like, 3) + max(click, 0.1)", [0.5, 0.1]),
        ("clip(click, 0.1, 0.2)", [0.2, 0.1]),
        ("log1p(default(length, 0)) + 0 * click", [0.0, math.log(8)]),
        ("sqrt(like * 2) * exp(0) * log(exp(1))", [1.0, math.sqrt(2)]),
        ("\n click \t", [0.25, 0.0]),
    ],
)
def test_values_by_hand(text: str, expected: list[float]) -> None:
    assert value(text) == pytest.approx(expected)


def test_what_has_no_value_is_last_and_what_is_too_large_is_first() -> None:
    largest = float(np.finfo(np.float32).max)
    assert finished(values(parse("click^-1", NAMES, {}), SCORES)).tolist() == [4.0, largest]
    assert finished(values(parse("0/click", NAMES, {}), SCORES)).tolist() == [0.0, -largest]
    assert finished(values(parse("-exp(1000) + click", NAMES, {}), SCORES)).tolist() == [-largest, -largest]
    assert finished(values(parse("sqrt(click - 1)", NAMES, {}), SCORES)).tolist() == [-largest, -largest]
    assert finished(values(parse("like^200", NAMES, {}), SCORES)).tolist() == [0.0, 1.0]  # 6e-61
    assert finished(np.array([1.5])).dtype == np.float32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clik", "position 1: nothing is named 'clik'; did you mean 'click'? Names: click, like"),
        ("click * size", "position 9: 'size' is a categorical feature"),
        ("click ** 2", "position 8: a power is written ^, not **"),
        ("click like", "position 7: an operator such as + or * should stand before 'like'"),
        ("click *", "position 8: a number, a name or a bracket is missing at the end"),
        ("", "position 1: a number"),
        ("(click", "position 7: a bracket should be closed before the end"),
        ("click)", "position 6: an operator"),
        ("log(click, like)", "position 1: log takes 1 value, and 2 stand here"),
        ("max(click)", "position 1: max takes 2 or more values, and 1 stand here"),
        ("lg(click)", "position 1: no function is named 'lg'; did you mean 'log'? Functions: log, "),
        ("log * click", "position 1: 'log' is a function: write log(...)"),
        ("length * click", "position 1: 'length' may be missing: write default(length, 0)"),
        ("default(click, 0)", "position 9: default is for a feature that may be missing (length), not for 'click'"),
        ("1e999 * click", "position 1: 1e999 is beyond the range of numbers"),
        ("click × 2", r"position 7: '\xd7' has no meaning in a formula"),
        ("ｃlick", r"position 1: '\uff43' has no meaning"),
        ("click; import os", "position 6: ';' has no meaning"),
        ("__import__(click)", "position 1: no function is named '__import__'. Functions: log,"),
        ("click['real']", "position 6: '[' has no meaning"),
        ("click.real", "position 6: '.' has no meaning"),
        ("click\x00", r"position 6: '\x00' has no meaning"),
        ("(" * 900, "position 41: brackets, signs and powers stand more than 40 deep"),
        ("-" * 1900 + "1", "position 41: brackets, signs and powers stand more than 40 deep"),
        ("2^" * 900 + "1", "position 81: brackets, signs and powers stand more than 40 deep"),
        ("log(" * 400, "more than 40 deep"),
        ("1+" * (1 << 19), "the formula has 1,048,576 characters, and 2,000 is the most"),
    ],
)
def test_mistakes(text: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(Mistake) as caught:
        value(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - started < 1


def test_a_long_formula_is_computed_without_deep_calls() -> None:
    assert value("click" + "+1" * 990) == [990.25, 990.0]


def test_names_are_letters_digits_and_underscores() -> None:
    assert expression.is_name("a_1") and not any(map(expression.is_name, ("", "1a", "_a", "a-b", "é", "a b")))
