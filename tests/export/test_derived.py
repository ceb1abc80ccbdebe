"""Outputs made of scores: the graph gives what NumPy gives, for formulas that nobody would write, too."""

from __future__ import annotations

import random

import numpy as np
import tensorflow as tf

from export import derived
from pipelines import expression, outputs
from pipelines.schema import Feature, Label, Ranking, Schema, Task

NUMBERS = ("0", "1", "2", "0.5", "1e-30", "3e38", "1e300", "7.25")
AWKWARD = np.array([0, 0, 1e-38, 1e-30, 0.2, 0.5, 1, 1, 3, 1e30, 3e38, np.inf, -np.inf, np.nan], np.float32)


def formula(draw: random.Random, depth: int) -> str:
    """A random formula of the names click, watched and length."""
    if not depth or draw.random() < 0.15:
        return draw.choice([*NUMBERS, "click", "click", "watched", "default(length, 3)"])
    x, y, z = (formula(draw, depth - 1) for _ in range(3))
    kind = draw.choice([*"+-*/^", "-x", "log", "log1p", "sqrt", "exp", "min", "max", "clip"])
    if kind in "+-*/^":
        return f"({x} {kind} {y})"
    several = {"-x": f"-{x}", "min": f"min({x}, {y}, {z})", "max": f"max({x}, {y})", "clip": f"clip({x}, {y}, {z})"}
    return several.get(kind, f"{kind}({x})")


def schema(score: str) -> Schema:
    return Schema(
        "random",
        (Feature("length", "numeric", "item", "length", "float32"),),
        (Task("click", Label("click")), Task("watched", Label("seconds"), "regression")),
        ranking=Ranking(f"{score} + 0 * click"),
    )


def test_the_graph_gives_what_numpy_gives() -> None:
    draw = random.Random(7)
    drawn = [schema(formula(draw, 4)) for _ in range(80)]
    numbers = np.random.default_rng(7)
    scores = {
        "click": numbers.choice(AWKWARD[:8], 60),
        "watched": np.r_[numbers.normal(0, 5, 30), numbers.choice(AWKWARD[:11], 30)].astype(np.float32),
    }
    length = numbers.choice(AWKWARD, 60)

    # Specs without sizes, as in an export: TensorFlow may then fold nothing that it knows the size of.
    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.float32)] * 3)
    def graph(click: tf.Tensor, watched: tf.Tensor, raw: tf.Tensor) -> list[tf.Tensor]:
        given = {"click": click, "watched": watched}
        return [
            derived.values(one, given, {"length": tf.where(tf.math.is_finite(raw), raw, np.nan)})["ranking_score"]
            for one in drawn
        ]

    found = graph(scores["click"], scores["watched"], length)
    kinds: set[str] = set()
    compared: list[float] = []
    moved = [("click", scores["click"], 1e-12), ("watched", scores["watched"], -2e-12), ("length", length, 3e-12)]
    for one, value in zip(drawn, found, strict=True):
        (output,) = outputs.of(one)
        expected = output.values(scores, {"length": length})
        assert value.dtype == tf.float32 and np.isfinite(value).all()
        # TensorFlow may add in another order: large numbers that cancel each other, where the last bit decides.
        near = {name: values.astype(np.float64) * (1 + factor) for name, values, factor in moved}
        with np.errstate(over="ignore"):
            stable = np.isclose(output.values(near, {"length": near["length"]}), expected, rtol=1e-6, atol=0)
        np.testing.assert_allclose(value.numpy()[stable], expected[stable], rtol=2e-6, err_msg=output.formula.text)
        compared.append(stable.mean())
        largest = np.float32(expression.LARGEST)
        kinds |= {name for name, x in (("largest", largest), ("lowest", -largest)) if (expected == x).any()}
        kinds |= {"several"} if len(np.unique(expected)) > 5 else set()
    assert np.mean(compared) > 0.95
    assert kinds == {"largest", "lowest", "several"}


def test_numbers_of_the_request_spread_over_its_candidates() -> None:
    one = schema("click * default(length, 2)")
    click = tf.constant([[0.5, 1.0], [0.25, 0.0]])
    found = derived.values(one, {"click": click}, {"length": tf.constant([[4.0], [np.nan]])})
    assert found["ranking_score"].numpy().tolist() == [[2.0, 4.0], [0.5, 0.0]]
    constant = derived.values(schema("0 * click"), {"click": click}, {})
    assert constant["ranking_score"].numpy().tolist() == [[0, 0], [0, 0]]
