"""STEM-Net's equations by hand, and what each task's gradient reaches."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from stem_tf.layers.embedding import SHARED, task_table
from stem_tf.models import precision
from stem_tf.models.stem_net import STEMNet
from tests.stem_tf.by_hand import assert_dropout_follows_its_seed

TASKS = ("a", "b", "c")
TABLES = (*map(task_table, TASKS), SHARED)


def small(tasks: tuple[str, ...] = TASKS, parts: dict[str, Any] | None = None, **options: Any) -> STEMNet:
    """Two experts a task and three shared ones; ``parts`` and ``options`` change what they name."""
    of_parts = {"expert_units": (6, 5), "gate_units": (4,), "tower_units": (4,)} | (parts or {})
    counts = {"task_experts": 2, "shared_experts": 3}
    return STEMNet(tasks, STEMNet.Hyperparameters(**of_parts | counts | options))


def embedded(width: int = 5, batch: int = 7) -> dict[str, tf.Tensor]:
    generator = tf.random.Generator.from_seed(1)
    return {table: generator.normal([batch, width]) for table in TABLES}


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("gate_input", ["task+shared", "task", "shared"])
def test_equations_3_to_6(gate_input: str) -> None:
    """One expert a group, linear gates (Eq. 5 as printed), computed with numpy."""
    linear = {"expert_units": (3,), "gate_units": (), "tower_units": ()}
    net = small(parts=linear, gate_input=gate_input, task_experts=1, shared_experts=1)
    h = embedded()
    outputs = net(h)
    layer = net.stem_layers[0]
    x = {table: h[table].numpy() for table in TABLES}
    experts = []
    for table in TABLES:
        linear = layer.experts[table].linears[0]
        experts.append(relu(x[table] @ linear.kernel.numpy()[0] + linear.bias.numpy()[0, 0]))
    for task in TASKS:
        table = task_table(task)
        seen = {"task+shared": x[table] + x[SHARED], "task": x[table], "shared": x[SHARED]}[gate_input]
        gate = layer.gates[table].mlp.linears[-1]
        weights = softmax(seen @ gate.kernel.numpy() + gate.bias.numpy())
        mixed = sum(weights[:, [k]] * expert for k, expert in enumerate(experts))
        tower = net.towers[task].linears[-1]
        expected = mixed @ tower.kernel.numpy()[:, 0] + tower.bias.numpy()[0]
        np.testing.assert_allclose(outputs[task], expected, rtol=1e-5, atol=1e-6)


def reach(net: STEMNet, task: str) -> tuple[dict[str, float], dict[str, float]]:
    """Largest |gradient| of ``task``'s output on each table's embeddings, and on each table's experts (all layers)."""
    h = embedded()
    net(h)
    experts = {table: [v for layer in net.stem_layers for v in layer.experts[table].variables] for table in TABLES}
    with tf.GradientTape() as tape:
        tape.watch(h)
        loss = tf.reduce_sum(net(h)[task])
    on_tables, on_experts = tape.gradient(loss, [h, experts], unconnected_gradients="zero")

    def largest(x: tf.Tensor) -> float:
        return float(tf.reduce_max(tf.abs(x)))

    return (
        {table: largest(gradient) for table, gradient in on_tables.items()},
        {table: max(map(largest, gradients)) for table, gradients in on_experts.items()},
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("gate_input", ["task+shared", "task", "shared"])
def test_a_task_trains_nothing_of_another(task: str, layers: int, gate_input: str) -> None:
    # Linear towers: a small tower whose ReLUs are all off would let nothing through.
    for by_table in reach(small(parts={"tower_units": ()}, layers=layers, gate_input=gate_input), task):
        for table, gradient in by_table.items():
            if table in (task_table(task), SHARED):
                assert gradient > 0.0, table
            else:
                assert gradient == 0.0, table


def test_released_stacking_leaks() -> None:
    tables, _ = reach(small(layers=2, released_stacking=True), "a")
    assert tables["task:b"] > 0.0


def test_without_stop_gradient_everything_is_reached() -> None:
    for by_table in reach(small(stop_gradient=False), "a"):
        assert all(gradient > 0.0 for gradient in by_table.values())


def test_stop_gradient_changes_no_value() -> None:
    h, nets = embedded(), []
    for stop in (True, False):
        random.seed(3)
        nets.append(small(stop_gradient=stop)(h))
    for task in TASKS:
        np.testing.assert_array_equal(nets[0][task], nets[1][task])


def test_each_expert_enters_a_mixture_once() -> None:
    """With every expert's output at 1, a convex mixture is 1: nothing is counted twice or left out."""
    net = small(parts={"tower_units": ()})
    h = embedded()
    net(h)
    layer = net.stem_layers[0]
    for group in layer.experts.values():
        group.linears[-1].kernel.assign(tf.zeros_like(group.linears[-1].kernel))
        group.linears[-1].bias.assign(tf.ones_like(group.linears[-1].bias))
    for mixed in layer(h).values():
        np.testing.assert_allclose(mixed, np.ones([7, 5]), rtol=1e-6)


def test_no_dead_shared_gate_in_the_last_layer() -> None:
    net = small(layers=2)
    assert SHARED in net.stem_layers[0].gates
    assert SHARED not in net.stem_layers[1].gates


@pytest.mark.parametrize(("k1", "k2"), [(0, 2), (2, 0), (1, 1)])
def test_groups_without_experts(k1: int, k2: int) -> None:
    outputs = small(task_experts=k1, shared_experts=k2, layers=2)(embedded())
    assert all(np.isfinite(output).all() for output in outputs.values())


def test_weight_count() -> None:
    net = small()
    net(embedded(width=8))
    expert = 8 * 6 + 6 + 6 * 5 + 5
    gate = 8 * 4 + 4 + 4 * 9 + 9
    tower = 5 * 4 + 4 + 4 + 1
    assert net.count_params() == (3 * 2 + 3) * expert + 3 * gate + 3 * tower


def test_dropout_depends_on_the_seed_alone() -> None:
    net, h = small(parts={"dropout": 0.5}), embedded()
    plain = net(h)["a"]
    assert_dropout_follows_its_seed(net, h, "a")
    np.testing.assert_array_equal(net(h)["a"], plain)


def test_batch_norm_has_statistics_of_each_expert() -> None:
    net, h = small(parts={"batch_norm": True}), embedded(batch=64)
    net(h, training=True)
    norm = net.stem_layers[0].experts["task:a"].norms[0]
    assert norm.moving_mean.shape == (2, 1, 6)
    assert np.abs(norm.moving_mean.numpy()[0] - norm.moving_mean.numpy()[1]).max() > 0.0


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32() -> None:
    with precision("mixed_bfloat16"):
        net = small()
    outputs = net(embedded())
    assert {v.dtype for v in net.variables} == {tf.float32}
    assert net.stem_layers[0](embedded())["task:a"].dtype == tf.bfloat16
    for output in outputs.values():
        assert output.dtype == tf.float32
    assert tf.keras.mixed_precision.global_policy().name == "float32"
