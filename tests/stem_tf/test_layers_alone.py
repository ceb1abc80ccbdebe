"""Layers alone, in plain Keras models: examples of docstrings and docs, training, saving, and what they refuse."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from stem_tf import layers
from stem_tf.layers import (
    DCN,
    MLP,
    Embeddings,
    ExtractionNetwork,
    Field,
    FwFM,
    Gate,
    Linear,
    NFwFM,
    PackedTable,
    Parts,
    STEMLayer,
    mixture,
)
from stem_tf.layers.embedding import SHARED, task_table
from stem_util.errors import UserError

TASKS = ("a", "b")
TABLES = (*map(task_table, TASKS), SHARED)
PARTS = Parts(expert_units=(6, 5), gate_units=(4,))
FIELDS = (
    Field("user", rows=9),
    Field("tags", "multivalent", rows=5, pooling="sum"),
    Field("age", "numeric"),
    Field("image", "dense", length=2),
)
INPUTS = {
    "user": tf.constant([3, 8, 0]),
    "tags": tf.constant([[1, 2], [4, 0], [0, 0]]),
    "age": tf.constant([0.5, -1.0, 2.0]),
    "image": tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
}
FLAT = tf.random.Generator.from_seed(1).normal([3, 12])
H = {table: tf.random.Generator.from_seed(seed).normal([3, 12]) for seed, table in enumerate(TABLES)}

LAYERS: dict[str, tuple[Callable[[], Any], Any]] = {
    "PackedTable": (lambda: PackedTable(FIELDS, 2, TABLES, 0.1), INPUTS),
    "Embeddings": (lambda: Embeddings(FIELDS, 2, TABLES, ["user", "age"], train_tables=False), INPUTS),
    "Linear": (lambda: Linear(4, count=2), FLAT),
    "MLP": (lambda: MLP([6, 5], out=2, count=3, dropout=0.1, batch_norm=True), FLAT),
    "Gate": (lambda: Gate("a", ["a 1", "a 2", "shared"], units=[4]), FLAT),
    "FwFM": (lambda: FwFM(fields=3, units=5, count=2), FLAT),
    "NFwFM": (lambda: NFwFM(fields=3, units=[6, 5], count=2), FLAT),
    "DCN": (lambda: DCN(layers=2, units=[6, 5], count=2), FLAT),
    "STEMLayer": (lambda: STEMLayer(TASKS, PARTS, 0, False, {"a": 2, "b": 0}, 1, gate_input="task"), H),
    "ExtractionNetwork": (lambda: ExtractionNetwork(TASKS, PARTS, 1, True, (1, 2), 1), H),
}


def keras_model(layer: Any, inputs: Any) -> tf.keras.Model:
    """``layer`` on Keras inputs of the shapes of ``inputs``."""
    symbolic = tf.nest.map_structure(lambda x: tf.keras.Input(x.shape[1:], dtype=x.dtype), inputs)
    return tf.keras.Model(symbolic, layer(symbolic))


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(layers.__path__)])
def test_examples_of_docstrings(module: str) -> None:
    found = importlib.import_module(f"stem_tf.layers.{module}")
    assert not doctest.testmod(found).failed


def test_every_public_layer_is_tried_and_has_an_example() -> None:
    public = {name for name in layers.__all__ if isinstance(getattr(layers, name), type)} - {"Field", "Parts"}
    assert public == set(LAYERS)
    assert all(">>>" in getattr(layers, name).__doc__ for name in public - {"PackedTable"})


def test_the_page_about_layers_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 3
    tf.config.run_functions_eagerly(True)  # tracing would take longest
    try:
        for block in blocks:
            names: dict[str, Any] = {}
            exec(compile(block, "docs/layers.md", "exec"), names)
            assert names["model"].count_params() > 0
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("kind", LAYERS)
def test_config_makes_the_same_layer(kind: str) -> None:
    make, inputs = LAYERS[kind]
    layer = make()
    layer(inputs)
    again = tf.keras.layers.deserialize(tf.keras.layers.serialize(layer))
    assert type(again) is type(layer) and again.get_config() == layer.get_config()
    again(inputs)
    assert [(w.shape, w.trainable) for w in again.weights] == [(w.shape, w.trainable) for w in layer.weights]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_saved_keras_model_answers_the_same(kind: str, tmp_path: Path) -> None:
    make, inputs = LAYERS[kind]
    model = keras_model(make(), inputs)
    for weight in model.weights:  # some start at zero
        weight.assign(np.random.default_rng(weight.shape.num_elements()).uniform(0.1, 1.0, weight.shape))
    model.save(tmp_path / "model.keras")
    loaded = tf.keras.models.load_model(tmp_path / "model.keras")
    tf.nest.map_structure(np.testing.assert_array_equal, loaded(inputs), model(inputs))


def test_keras_trains_tables() -> None:
    """A task's label is a coin toss by user, which only the tables can know."""
    rng = np.random.default_rng(0)
    users = rng.integers(40, size=400)
    y = {task: rng.integers(2, size=40)[users].astype(np.float32) for task in TASKS}
    embeddings = Embeddings([Field("user", rows=50)], 8, TABLES, init_std=0.1)
    inputs = {"user": tf.keras.Input([], dtype=tf.int32, name="user")}
    mixed = STEMLayer(TASKS, Parts(expert_units=(16,), gate_units=()))(embeddings(inputs))
    outputs = {task: tf.keras.layers.Dense(1, "sigmoid", name=task)(mixed[task_table(task)]) for task in TASKS}
    model = tf.keras.Model(inputs, outputs)
    (table,) = (group.table for group in embeddings.groups)
    before = table.numpy()
    # Eagerly: tracing would take longest.
    model.compile(tf.keras.optimizers.Adam(0.05), dict.fromkeys(TASKS, "binary_crossentropy"), run_eagerly=True)
    losses = model.fit({"user": users}, y, batch_size=100, epochs=10, verbose=0).history["loss"]
    assert losses[0] > 1.2 and losses[-1] < 0.1
    moved = np.abs(table.numpy() - before).max(axis=1)
    assert (moved[:40] > 0).all() and not moved[40:].any()


def test_tables_that_another_optimizer_writes_are_not_trainable() -> None:
    embeddings = Embeddings(FIELDS, 2, TABLES, train_tables=False)
    (group,) = embeddings.groups
    assert [w.name for w in embeddings.non_trainable_variables] == ["table:0"]
    assert [w.name for w in embeddings.trainable_variables] == ["numeric:0", "dense_image:0"]
    assert group.table.shape == (9 + 5, 3 * 2)


def test_dropout_without_a_seed_follows_tensorflows() -> None:
    mlp = MLP([64], dropout=0.5)
    tf.random.set_seed(1)
    first, other = mlp(FLAT, training=True), mlp(FLAT, training=True)
    tf.random.set_seed(1)
    np.testing.assert_array_equal(mlp(FLAT, training=True), first)
    assert np.abs(first - other).max() > 0


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("Embeddings", 14 * 6 - 5 * 4 + 1 * 6 + 2 * 2),  # tags and image have the shared table only
        ("MLP", 3 * (12 * 6 + 6 + 6 * 5 + 5 + 5 * 2 + 2 + 4 * (6 + 5))),
        ("Gate", 12 * 4 + 4 + 4 * 3 + 3),
        ("STEMLayer", 3 * (12 * 6 + 6 + 6 * 5 + 5) + 3 * (12 * 4 + 4 + 4 * 3 + 3)),
        ("ExtractionNetwork", 5 * (12 * 6 + 6 + 6 * 5 + 5) + 2 * (52 + 4 * 3 + 3) + (52 + 4 * 5 + 5)),
    ],
)
def test_weight_count(kind: str, count: int) -> None:
    make, inputs = LAYERS[kind]
    layer = make()
    layer(inputs)
    assert layer.count_params() == count


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Field("user"), "field user: rows of a categorical field should be at least 1; received 0"),
        (lambda: Field("x", "dense"), "field x: length of a dense field should be at least 1; received 0"),
        (
            lambda: Field("x", kind="bag"),  # type: ignore[arg-type]
            "kind should be one of categorical, multivalent, numeric, dense; received 'bag'",
        ),
        (
            lambda: Field("x", rows=3, pooling="max"),  # type: ignore[arg-type]
            "field x: pooling should be mean or sum; received 'max'",
        ),
        (lambda: Embeddings(FIELDS, 2)({"users": FLAT}), "at least one of user, tags, age, image; received users"),
        (
            lambda: Embeddings(FIELDS, 2)({"user": tf.constant([[1], [2]])}),
            r"input 'user' is categorical and should be \[B\]; received shape \(2, 1\)",
        ),
        (
            lambda: Embeddings(FIELDS, 2)({"tags": tf.constant([1, 2])}),
            r"input 'tags' is multivalent and should be \[B, L\]; received shape \(2,\)",
        ),
        (lambda: MLP([4], dropout=1.5), "dropout should be at least 0 and less than 1; received 1.5"),
        (lambda: Gate("a", []), r"a gate needs at least one expert; received experts=\[\]"),
        (lambda: mixture(FLAT, [FLAT[tf.newaxis]]), "a mixture of 1 experts needs as many weights; received 12"),
        (lambda: FwFM(5, 2, 1)(FLAT), "5 fields of one width should be 5 times as wide; received width 12"),
        (lambda: NFwFM(1, [2], 1), "at least 2 fields; received 1"),
        (lambda: STEMLayer([], PARTS), r"at least one task; received tasks=\[\]"),
        (lambda: STEMLayer(TASKS, PARTS, task_experts=0, shared_experts=0), "a STEMLayer needs experts"),
        (
            lambda: STEMLayer(TASKS, PARTS, gate_input="both"),  # type: ignore[arg-type]
            r"gate_input should be one of task\+shared, task, shared; received 'both'",
        ),
        (
            lambda: STEMLayer(TASKS, PARTS)({"task:a": FLAT, "item": FLAT}),
            "should hold the tables task:b, shared too; received task:a, item",
        ),
        (lambda: ExtractionNetwork(TASKS, PARTS)({SHARED: FLAT}), "the tables task:a, task:b too; received shared"),
        (lambda: ExtractionNetwork([], PARTS), r"at least one task; received tasks=\[\]"),
        (
            lambda: ExtractionNetwork(TASKS, PARTS, task_experts=0, shared_experts=0),
            "task_experts should be at least 1 for the task 'a'",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message):
        call()
