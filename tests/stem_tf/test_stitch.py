"""Cross-Stitch and Sluice: their equations by hand, what a task's loss trains, the penalty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines.schema import Feature, Label, Schema, Task
from stem_tf import configs
from stem_tf.layers.mlp import MLP
from stem_tf.models import build_network, precision
from stem_tf.models.network import Network
from stem_tf.models.stitch import CrossStitch, Sluice, Stitch
from stem_util.errors import UserError
from tests.stem_tf.by_hand import assert_dropout_follows_its_seed, assert_sides_score_as_joined

TASKS = ("a", "b", "c")
KINDS = (CrossStitch, Sluice)


def small(
    kind: type[Network], tasks: tuple[str, ...] = TASKS, parts: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Layers 6, 6; linear towers."""
    hyper = kind.Hyperparameters(**{"expert_units": (6, 6), "tower_units": ()} | (parts or {}) | options)
    return kind(tasks, hyper)


def embedded(width: int = 8, batch: int = 7) -> dict[str, tf.Tensor]:
    return {"shared": tf.random.Generator.from_seed(1).normal([batch, width])}


def randomise(weight: tf.Variable) -> np.ndarray:
    weight.assign(tf.random.Generator.from_seed(2).normal(weight.shape))
    return weight.numpy()


def hidden(layer: MLP, t: int, x: np.ndarray) -> np.ndarray:
    """Task t's layer with numpy."""
    (linear,) = layer.linears
    return np.maximum(x @ linear.kernel.numpy()[t] + linear.bias.numpy()[t, 0], 0.0)


def tower(net: Network, task: str, x: np.ndarray) -> np.ndarray:
    (linear,) = net.towers[task].linears
    return x @ linear.kernel.numpy()[:, 0] + linear.bias.numpy()[0]


def gradients(net: Network, task: str) -> dict[Any, np.ndarray]:
    """Of ``task``'s output, on each of the weights."""
    h = embedded()
    net(h)
    with tf.GradientTape() as tape:
        output = tf.reduce_sum(net(h)[task])
    found = tape.gradient(output, net.trainable_variables, unconnected_gradients="zero")
    return {v.ref(): gradient.numpy() for v, gradient in zip(net.trainable_variables, found, strict=True)}


def test_stitch_by_hand() -> None:
    stitch = Stitch(2)
    np.testing.assert_allclose(stitch.matrix, [[0.9, 0.1], [0.1, 0.9]])
    stitch.matrix.assign([[2.0, 3.0], [0.0, -1.0]])
    mixed = stitch(tf.constant([[[1.0, 10.0]], [[5.0, 7.0]]]))
    np.testing.assert_allclose(mixed, [[[17.0, 41.0]], [[-5.0, -7.0]]])


def test_stitch_starts_near_the_identity() -> None:
    matrix = Stitch(5).matrix.numpy()
    np.testing.assert_allclose(np.diag(matrix), np.full(5, 0.9))
    np.testing.assert_allclose(matrix[~np.eye(5, dtype=bool)], np.full(20, 0.025))
    np.testing.assert_array_equal(Stitch(1).matrix, [[1.0]])


def test_cross_stitch_by_hand() -> None:
    """Layers may differ in width."""
    net = small(CrossStitch, parts={"expert_units": (6, 5)})
    h = embedded()
    net(h)
    x = [h["shared"].numpy()] * 3
    for layer, stitch in zip(net.bottoms, net.stitches, strict=True):
        a = randomise(stitch.matrix)
        own = [hidden(layer, t, x[t]) for t in range(3)]
        x = [sum(a[t, s] * own[s] for s in range(3)) for t in range(3)]
    outputs = net(h)
    for t, task in enumerate(TASKS):
        np.testing.assert_allclose(outputs[task], tower(net, task, x[t]), rtol=1e-4, atol=1e-5)


def test_sluice_by_hand() -> None:
    net = small(Sluice)
    h = embedded()
    net(h)
    x, levels = [h["shared"].numpy()] * 3, []
    for layer, stitch in zip(net.bottoms, net.stitches, strict=True):
        a = randomise(stitch.matrix)
        own = [hidden(layer, t, x[t]) for t in range(3)]
        # Half g of task t is path 3 g + t.
        paths = [own[t][:, 3 * g : 3 * g + 3] for g in range(2) for t in range(3)]
        mixed = [sum(a[i, j] * paths[j] for j in range(6)) for i in range(6)]
        x = [np.concatenate([mixed[t], mixed[3 + t]], axis=1) for t in range(3)]
        levels.append(x)
    np.testing.assert_array_equal(net.mixture, np.full([3, 2], 0.5))
    b = randomise(net.mixture)
    outputs = net(h)
    for t, task in enumerate(TASKS):
        read = b[t, 0] * levels[0][t] + b[t, 1] * levels[1][t]
        np.testing.assert_allclose(outputs[task], tower(net, task, read), rtol=1e-4, atol=1e-5)


def test_one_task_is_a_network_of_its_own() -> None:
    net = small(CrossStitch, ("a",))
    h = embedded()
    outputs = net(h)
    x = h["shared"].numpy()
    for layer in net.bottoms:
        x = hidden(layer, 0, x)
    np.testing.assert_allclose(outputs["a"], tower(net, "a", x), rtol=1e-5, atol=1e-6)
    assert np.isfinite(small(Sluice, ("a",))(h)["a"]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_what_a_task_trains(kind: type[Network], task: str) -> None:
    net, t = small(kind), TASKS.index(task)
    gradient = gradients(net, task)
    for layer in net.bottoms:
        for weight in layer.weights:
            assert all(np.any(of_task) for of_task in gradient[weight.ref()]), weight.name
    rows = [t] if kind is CrossStitch else [t, 3 + t]
    first, last = (gradient[stitch.matrix.ref()] for stitch in net.stitches)
    assert np.count_nonzero(first) == first.size
    np.testing.assert_array_equal(np.flatnonzero(np.any(last, axis=1)), rows)
    for other in TASKS:
        for weight in net.towers[other].weights:
            assert np.any(gradient[weight.ref()]) == (other == task)
    if kind is Sluice:
        np.testing.assert_array_equal(np.flatnonzero(np.any(gradient[net.mixture.ref()], axis=1)), [t])
    assert net.own_layers(task) == [net.towers[task]]


def test_weight_count() -> None:
    layers, towers = 3 * (8 * 6 + 6 + 6 * 6 + 6), 3 * (6 + 1)
    net = small(CrossStitch)
    net(embedded())
    assert net.count_params() == layers + 2 * 3**2 + towers
    net = small(Sluice)
    net(embedded())
    assert net.count_params() == layers + 2 * 6**2 + 3 * 2 + towers


def test_orthogonality_penalty_by_hand() -> None:
    net = small(Sluice, orthogonality=0.3)
    outputs = net(embedded())
    expected = 0.0
    for layer in net.bottoms:
        for kernel in layer.linears[0].kernel.numpy():
            expected += ((kernel[:, :3].T @ kernel[:, 3:]) ** 2).sum()
    with tf.GradientTape() as tape:
        penalty = net.penalty(outputs, {}, {}, share=0.5)
    assert float(penalty) == pytest.approx(0.5 * 0.3 * expected, rel=1e-5)
    found = tape.gradient(penalty, net.trainable_variables)
    kernels = {layer.linears[0].kernel.ref() for layer in net.bottoms}
    assert {v.ref() for v, g in zip(net.trainable_variables, found, strict=True) if g is not None} == kernels


def test_no_penalty_unless_asked_for() -> None:
    for kind in KINDS:
        net = small(kind)
        assert float(net.penalty(net(embedded()), {}, {}, share=1.0)) == 0.0


def test_apart_halves_cost_nothing() -> None:
    net = small(Sluice, orthogonality=1.0)
    outputs = net(embedded(width=6))
    for layer in net.bottoms:
        layer.linears[0].kernel.assign(tf.eye(6, batch_shape=[3]))
    assert float(net.penalty(outputs, {}, {}, share=1.0)) == 0.0


@pytest.mark.parametrize("units", [(6, 4), (5, 5)])
def test_layers_that_sluice_cannot_halve_or_mix(units: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"config.model.expert_units should be one even width.* but is \(\d, \d\)"):
        small(Sluice, parts={"expert_units": units})


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_of_a_request_score_as_rows(kind: type[Network]) -> None:
    assert_sides_score_as_joined(small(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_and_batch_norm_are_in_the_layers(kind: type[Network]) -> None:
    net, h = small(kind, parts={"dropout": 0.5, "batch_norm": True}), embedded()
    assert_dropout_follows_its_seed(net, h, "b")
    for layer in net.bottoms:
        assert layer.norms[0].moving_mean.shape == (3, 1, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_answers_in_float32(kind: type[Network]) -> None:
    with precision("mixed_bfloat16"):
        net = small(kind)
    outputs = net(embedded())
    assert {v.dtype for v in net.variables} == {tf.float32}
    assert {output.dtype for output in outputs.values()} == {tf.float32}
    assert net.stitches[0](tf.zeros([net.stitches[0].matrix.shape[0], 1, 3])).dtype == tf.bfloat16


@pytest.mark.parametrize(("name", "settings"), [("cross_stitch", {}), ("sluice", {"model.orthogonality": 0.1})])
def test_built_by_name(name: str, settings: dict[str, Any]) -> None:
    schema = Schema(
        "log", (Feature("id", "categorical", "user", "id", "int64"),), tuple(Task(t, Label(t)) for t in TASKS)
    )
    net: Any = build_network(configs.checked({"model.name": name, **settings}), schema)
    assert [layer.linears[0].units for layer in net.bottoms] == [512, 512, 512]
    assert getattr(net, "orthogonality", 0.1) == 0.1
