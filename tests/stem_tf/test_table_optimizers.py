"""Optimizers of a packed table against plain numpy, one row at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from stem_tf.layers.embedding import Field, PackedTable
from stem_tf.training.learning_rate import Schedule
from stem_tf.training.optimizers import BETAS, Betas
from stem_tf.training.table_optimizers import TABLE_OPTIMIZERS, TableOptimizer, stochastic_bfloat16

ROWS, TABLES, DIM = 7, ["task:a", "shared"], 3
L2, SCHEDULE = 0.1, Schedule(1e-3, "exponential", decay_steps=10, decay_rate=0.5)
BATCHES = [[3, 1], [0, 3], [4, 2], [3, 5], [1, 0], [3, 4], [2, 6], [3, 1]]


def made(tables: str, slots: str = "float32", l2: Any = L2, betas: Betas = BETAS) -> TableOptimizer:
    packed = PackedTable([Field("user", rows=ROWS)], DIM, TABLES, 0.1, train_tables=False)
    return TABLE_OPTIMIZERS[tables](packed, l2, SCHEDULE, slots, betas=betas)


def gradients() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.normal(size=(2, len(TABLES) * DIM)) for _ in BATCHES]


def trained(optimizer: TableOptimizer) -> np.ndarray:
    """The table after :data:`BATCHES`, every row up to date."""

    @tf.function
    def step(ids: tf.Tensor, g: tf.Tensor, t: tf.Tensor) -> None:
        gradient = optimizer.gradient(optimizer.read(ids, t - 1), g)
        optimizer.apply(gradient, t)

    for t, (ids, g) in enumerate(zip(BATCHES, gradients(), strict=True), start=1):
        step(tf.constant(ids), tf.constant(g, tf.float32), tf.constant(t))
    optimizer.catch_up(tf.constant(len(BATCHES)))
    return optimizer.table.numpy()


def by_hand(w: np.ndarray, dense: bool, rowwise: bool = False, betas: Betas = BETAS) -> np.ndarray:
    """Torch's Adam on every row, or on the batch's."""
    b1, b2 = betas
    w = w.reshape(ROWS, len(TABLES), DIM).astype(np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (ids, g) in enumerate(zip(BATCHES, gradients(), strict=True), start=1):
        full = L2 * w
        full[ids] += g.reshape(2, len(TABLES), DIM)
        some = np.arange(ROWS) if dense else np.array(ids)
        m[some] = b1 * m[some] + (1 - b1) * full[some]
        square = full**2
        if rowwise:
            square[:] = square.mean(axis=-1, keepdims=True)
        v[some] = b2 * v[some] + (1 - b2) * square[some]
        rate = float(SCHEDULE(tf.constant(t - 1)))
        w[some] -= rate * (m[some] / (1 - b1**t)) / (np.sqrt(v[some] / (1 - b2**t)) + 1e-8)
    return w.reshape(ROWS, -1)


@pytest.mark.parametrize(
    ("tables", "slots", "within"),
    [
        ("dense", "float32", 1e-6),
        ("lazy", "float32", 1e-6),
        ("lazy", "rowwise", 1e-6),
        ("lazy", "bfloat16", 2e-4),
        ("deferred", "float32", 1e-3),
        ("deferred", "rowwise", 1e-3),
        ("deferred", "bfloat16", 1e-3),
    ],
)
def test_adam(tables: str, slots: str, within: float) -> None:
    """Dense and deferred move every row, also by momentum and L2 alone; lazy only the rows that are read."""
    optimizer = made(tables, slots)
    before = optimizer.table.numpy()
    expected = by_hand(before, dense=tables != "lazy", rowwise=slots == "rowwise")
    moved = np.abs(expected - before).max()
    assert moved > 3e-3
    np.testing.assert_allclose(trained(optimizer), expected, atol=within)


@pytest.mark.parametrize(("tables", "within"), [("dense", 1e-6), ("lazy", 1e-6), ("deferred", 1e-3)])
def test_adam_with_other_betas(tables: str, within: float) -> None:
    betas = Betas(0.6, 0.98)
    optimizer = made(tables, betas=betas)
    before = optimizer.table.numpy()
    expected = by_hand(before, dense=tables != "lazy", betas=betas)
    found = trained(optimizer)
    np.testing.assert_allclose(found, expected, atol=within)
    assert np.abs(found - by_hand(before, dense=tables != "lazy")).max() > 5e-4


@pytest.mark.parametrize("tables", TABLE_OPTIMIZERS)
def test_padding_is_zeros_and_adds_nothing_to_the_gradient(tables: str) -> None:
    optimizer, zero = made(tables), tf.constant(0)
    values = tf.ones([2, len(TABLES) * DIM])
    padded = optimizer.read(tf.constant([1, 4, ROWS, ROWS]), zero)
    plain = optimizer.read(tf.constant([1, 4]), zero)
    np.testing.assert_array_equal(padded.w[:2], plain.w)
    np.testing.assert_array_equal(padded.w[2:], tf.zeros_like(plain.w))
    with_padding = optimizer.gradient(padded, tf.concat([values, tf.zeros_like(values)], axis=0))
    norms = [tf.linalg.global_norm([g.values]) for g in (with_padding, optimizer.gradient(plain, values))]
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-6)


@pytest.mark.parametrize(("tables", "slots"), [("dense", "bfloat16"), ("dense", "rowwise"), ("adagrad", "bfloat16")])
def test_slots_that_an_optimizer_does_not_know(tables: str, slots: str) -> None:
    with pytest.raises(ValueError, match=f"should be one of: float32; received '{slots}'"):
        made(tables, slots)


def test_missed_steps_are_clipped_as_they_were() -> None:
    """Only the first row is read again; L2 of the others misses steps whose gradients were scaled down."""

    def table(name: str, clips: bool) -> np.ndarray:
        packed = PackedTable([Field("user", rows=ROWS)], DIM, TABLES, 0.1, train_tables=False)
        packed.table.assign(tf.linspace(tf.fill([len(TABLES) * DIM], 0.05), tf.fill([len(TABLES) * DIM], 0.1), ROWS))
        optimizer = TABLE_OPTIMIZERS[name](packed, 1e-2, Schedule(1e-3), clips=clips)
        gradients = tf.fill([ROWS, len(TABLES) * DIM], 1e-3)
        for t in range(1, 21):
            ids, scale, step = tf.range(ROWS if t == 1 else 1), 1.0 if t == 1 else 0.1, tf.constant(t)
            gradient = optimizer.gradient(optimizer.read(ids, step - 1), gradients[: len(ids)])
            gradient = gradient._replace(values=gradient.values * scale)
            optimizer.apply(gradient, step, scale)
        optimizer.catch_up(tf.constant(20))
        return packed.table.numpy()

    dense = table("dense", True)
    off = [np.abs(table("deferred", clips) - dense).max() for clips in (True, False)]
    assert off[0] < 1e-4 < 1e-3 < off[1]


def test_slots_save_memory() -> None:
    def bytes_a_row(tables: str, slots: str) -> int:
        return sum(slot.dtype.size * slot.shape.num_elements() // ROWS for slot in made(tables, slots).slots)

    width = len(TABLES) * DIM
    assert bytes_a_row("lazy", "float32") == 2 * width * 4
    assert bytes_a_row("lazy", "bfloat16") == 2 * width * 2
    assert bytes_a_row("lazy", "rowwise") == (width + len(TABLES)) * 4
    assert bytes_a_row("deferred", "float32") == 2 * width * 4 + 4
    assert bytes_a_row("adagrad", "float32") == len(TABLES) * 4


def test_rowwise_adagrad() -> None:
    optimizer = made("adagrad")
    w = optimizer.table.numpy().reshape(ROWS, len(TABLES), DIM).astype(np.float64)
    total = np.zeros((ROWS, len(TABLES), 1))
    for t, (ids, g) in enumerate(zip(BATCHES, gradients(), strict=True)):
        full = g.reshape(2, len(TABLES), DIM) + L2 * w[ids]
        total[ids] += (full**2).mean(axis=-1, keepdims=True)
        w[ids] -= float(SCHEDULE(tf.constant(t))) * full / (np.sqrt(total[ids]) + 1e-8)
    np.testing.assert_allclose(trained(optimizer), w.reshape(ROWS, -1), atol=1e-6)


@pytest.mark.parametrize("tables", TABLE_OPTIMIZERS)
def test_l2_by_column(tables: str) -> None:
    """Without any other gradient, only the columns of the table that has an L2 move."""
    optimizer = made(tables, l2=tf.constant([0.0] * DIM + [0.1] * DIM))
    before = optimizer.table.numpy()
    for t in range(1, 4):
        state = optimizer.read(tf.constant([0, 1]), tf.constant(t - 1))
        gradient = optimizer.gradient(state, tf.zeros([2, len(TABLES) * DIM]))
        optimizer.apply(gradient, tf.constant(t))
    after = optimizer.table.numpy()
    np.testing.assert_array_equal(after[:, :DIM], before[:, :DIM])
    assert (np.abs(after[:2, DIM:] - before[:2, DIM:]) > 1e-4).all()


def test_reading_writes_nothing_and_catching_up_is_what_is_read() -> None:
    optimizer = made("deferred")
    ids, five = tf.range(ROWS), tf.constant(5)
    gradient = optimizer.gradient(optimizer.read(ids, tf.constant(0)), tf.ones([ROWS, len(TABLES) * DIM]))
    optimizer.apply(gradient, tf.constant(1))
    before = [variable.numpy() for variable in (optimizer.table, *optimizer.slots)]
    read = optimizer.read(ids, five)
    for variable, value in zip((optimizer.table, *optimizer.slots), before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert np.abs(read.w.numpy().reshape(before[0].shape) - before[0]).min() > 1e-3
    optimizer.catch_up(five)
    np.testing.assert_allclose(optimizer.table, read.w.numpy().reshape(before[0].shape), rtol=1e-6)
    np.testing.assert_array_equal(optimizer.slots[-1], [5] * ROWS)
    optimizer.catch_up(five)
    np.testing.assert_allclose(optimizer.table, read.w.numpy().reshape(before[0].shape), rtol=1e-6)


def test_compiled_for_large_batches_as_plain() -> None:
    """The rows are filled up to a number that XLA has seen; what fills them changes nothing."""
    optimizer = made("deferred")
    trained(optimizer)
    ids, step = tf.constant([0, 3, 5]), tf.constant(50)
    plain = optimizer.read(ids, step)
    compiled = tf.function(lambda ids: optimizer.read(ids, step, 1 << 20))(ids)
    np.testing.assert_allclose(compiled.w, plain.w, rtol=1e-5, atol=1e-8)
    assert compiled.w.shape == plain.w.shape


def test_bfloat16_is_rounded_to_the_right_mean() -> None:
    values = tf.fill([20_000], 1.0 + 2**-7 * 0.25)  # a quarter of the way from 1 to the next bfloat16
    rounded = tf.cast(stochastic_bfloat16(values, tf.constant([1, 2])), tf.float32).numpy()
    assert set(np.unique(rounded)) == {1.0, 1.0 + 2**-7}
    assert np.mean(rounded > 1.0) == pytest.approx(0.25, abs=0.02)
    exact = tf.constant([0.0, -1.5, np.inf, 2.0**-100])
    np.testing.assert_array_equal(tf.cast(stochastic_bfloat16(exact, tf.constant([1, 2])), tf.float32), exact)


def test_bytes_per_row_are_those_of_the_schemas_page() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/schema.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\w+)`[^|]* \| `(\w+)` \| `([^`]+)` \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    kinds = [(mode, slots) for mode, optimizer in TABLE_OPTIMIZERS.items() for slots in optimizer.kinds_of_slots]
    assert sorted(kinds) == sorted((mode, slots) for mode, slots, *_ in lines)
    for mode, slots, formula, of_two, of_eight in lines:
        for tasks, dim, said in ((2, 16, of_two), (8, 16, of_eight), (0, 3, None)):
            tables = [*(f"task:{i}" for i in range(tasks)), "shared"]
            packed = PackedTable([Field("user", rows=ROWS)], dim, tables, train_tables=False)
            optimizer = TABLE_OPTIMIZERS[mode](packed, L2, SCHEDULE, slots)
            size = sum(v.shape.num_elements() * v.dtype.size for v in (optimizer.table, *optimizer.slots)) / ROWS
            assert size == eval(formula, {"N": len(tables), "D": dim})
            assert said is None or size == int(said.replace(",", ""))
