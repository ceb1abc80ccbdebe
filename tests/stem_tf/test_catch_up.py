"""Missed steps in chunks against the same steps one by one, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from stem_tf.training.catch_up import AdamRows, catch_up
from stem_tf.training.learning_rate import Schedule
from stem_tf.training.optimizers import BETAS, Betas

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def adam(rows: Rows, gradient: np.ndarray, rate: float, step: int, rowwise: bool = False, betas: Betas = BETAS) -> Rows:
    (w, m, v), (b1, b2) = rows, betas
    square = gradient**2
    if rowwise:
        square = square.mean(axis=-1, keepdims=True)
    m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * square
    return w - rate * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + 1e-8), m, v


def trained(
    random: np.random.Generator,
    count: int,
    steps: int,
    l2: float | np.ndarray,
    schedule: Schedule,
    rowwise: bool,
    betas: Betas = BETAS,
) -> Rows:
    """Rows after dense steps with a gradient at one step in ten."""
    w = random.normal(0.0, 1e-4, (count, 2, 3))
    rows: Rows = (w, np.zeros_like(w), np.zeros_like(w[..., :1] if rowwise else w))
    for step in range(1, steps + 1):
        seen = random.random((count, 1, 1)) < 0.1
        gradient = seen * random.normal(0.3, 1.0, w.shape) * 3e-5
        rows = adam(rows, l2 * rows[0] + gradient, float(schedule(tf.constant(step - 1))), step, rowwise, betas)
    return rows


CHUNKS = [
    (l2, within, kind, rowwise, BETAS)
    for l2, within in [(0.0, 1e-3), (1e-6, 4e-3), (1e-4, 6e-2)]
    for kind in ("constant", "cosine")
    for rowwise in (False, True)
]
CHUNKS += [(1e-6, 1e-2, "constant", False, Betas(0.8, 0.999)), (1e-6, 1e-2, "cosine", True, Betas(0.95, 0.9995))]


@pytest.mark.parametrize(("l2", "within", "kind", "rowwise", "betas"), CHUNKS)
def test_chunks_follow_single_steps(l2: float, within: float, kind: str, rowwise: bool, betas: Betas) -> None:
    random = np.random.default_rng(0)
    schedule = Schedule(1e-3, kind, warmup_steps=50, decay_steps=1500)
    start, gaps = 100, np.array([0, 1, 2, 3, 7, 20, 100, 600, 1200])
    rows = trained(random, len(gaps), start, l2, schedule, rowwise, betas)
    done = catch_up(
        AdamRows(*(tf.constant(x, tf.float32) for x in rows)),
        tf.constant(start + gaps.max() - gaps, tf.int32),
        tf.constant(int(start + gaps.max()), tf.int32),
        l2=l2,
        rate=schedule,
        square=lambda g: tf.reduce_mean(tf.square(g), axis=-1, keepdims=True) if rowwise else tf.square(g),
        betas=betas,
    )
    rates = [float(schedule(tf.constant(step))) for step in range(start + gaps.max())]
    for i, gap in enumerate(gaps):
        exact: Rows = tuple(x[i : i + 1] for x in rows)  # type: ignore[assignment]
        for step in range(start + gaps.max() - gap + 1, start + gaps.max() + 1):
            exact = adam(exact, l2 * exact[0], rates[step - 1], step, rowwise, betas)
        error = np.linalg.norm(done.w[i] - exact[0][0])
        assert error <= within * np.linalg.norm(rows[0][i]) + 1e-7, f"gap {gap}"
        if gap == 0:
            for ours, theirs in zip(done, rows, strict=True):
                np.testing.assert_array_equal(ours[i], theirs[i].astype(np.float32))


def test_l2_by_column_and_rows_that_no_step_has_written() -> None:
    """Of rows without moments L2 alone moves those that it is for, by about the learning rate a step."""
    w = np.full((1, 2, 3), 0.05, np.float32)
    rows = AdamRows(tf.constant(w), tf.zeros_like(w), tf.zeros_like(w))
    l2 = tf.constant([[0.0] * 3, [1e-3] * 3])
    none = tf.constant([0])
    done = catch_up(rows, none, tf.constant(10), l2=l2, rate=Schedule(1e-3), square=tf.square)
    exact: Rows = (w.astype(np.float64), np.zeros_like(w, np.float64), np.zeros_like(w, np.float64))
    for step in range(1, 11):
        exact = adam(exact, l2.numpy() * exact[0], 1e-3, step)
    np.testing.assert_array_equal(done.w[:, 0], w[:, 0])
    np.testing.assert_allclose(done.w[:, 1], exact[0][:, 1], rtol=2e-2)
    assert 0.037 < exact[0][0, 1, 0] < 0.041


def test_what_clipping_made_of_missed_steps() -> None:
    """Factors that differ from step to step, by their means over a chunk."""
    random = np.random.default_rng(2)
    factors = random.choice([0.1, 1.0], 401)
    w = np.full((1, 1, 50), 0.05)
    m, v = random.normal(0.0, 1e-6, w.shape), np.full(w.shape, 1e-10)
    sums = tf.constant(np.cumsum(np.stack([factors, factors**2], axis=-1), axis=0))

    def means(a: tf.Tensor, steps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ends = [tf.gather(sums, tf.cast(x, tf.int32)) for x in (a, a + steps)]
        mean = tf.cast(ends[1] - ends[0], tf.float32) / steps[..., tf.newaxis]
        return mean[..., 0], mean[..., 1]

    rows = AdamRows(*(tf.constant(x, tf.float32) for x in (w, m, v)))
    last, now, rate = tf.constant([100]), tf.constant(400), Schedule(1e-3)
    done = catch_up(rows, last, now, l2=1e-4, rate=rate, square=tf.square, scales=means)
    exact: Rows = (w, m, v)
    for step in range(101, 401):
        exact = adam(exact, factors[step] * 1e-4 * exact[0], 1e-3, step)
    move = np.linalg.norm(exact[0] - w)
    assert np.linalg.norm(done.w - exact[0]) < 0.03 * move
    unclipped = catch_up(rows, last, now, l2=1e-4, rate=rate, square=tf.square)
    assert np.linalg.norm(unclipped.w - exact[0]) > 0.1 * move


def test_compiled_as_plain() -> None:
    random = np.random.default_rng(1)
    rows = AdamRows(*(tf.constant(random.random((50, 2, 3)) * scale, tf.float32) for scale in (1e-2, 1e-6, 1e-10)))
    last = tf.constant(random.integers(0, 500, 50), tf.int32)

    def run(compiled: bool) -> AdamRows:
        function = tf.function(
            lambda: catch_up(rows, last, tf.constant(500), l2=1e-5, rate=Schedule(1e-3), square=tf.square),
            jit_compile=compiled,
            autograph=False,
        )
        return function()

    for plain, compiled in zip(run(False), run(True), strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-4, atol=1e-9)
