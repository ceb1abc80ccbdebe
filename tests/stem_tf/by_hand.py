"""What the tests of networks compute with numpy, and whom each weight learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from stem_tf.layers.sides import Sides
from stem_tf.models.network import Network


def embedded(tables: Sequence[str], width: int = 6, batch: int = 16) -> dict[str, tf.Tensor]:
    """Flat embeddings ``[batch, width]`` by table."""
    generator = tf.random.Generator.from_seed(1)
    return {table: generator.normal([batch, width]) for table in tables}


def embedded_sides(tables: Sequence[str], width: int = 6) -> tuple[dict[str, Sides], dict[str, NDArray]]:
    """By table: 4 candidates for each of 3 requests, whose own share are the even columns; and the same joined."""
    generator = tf.random.Generator.from_seed(1)
    once_columns, each_columns = np.arange(0, width, 2), np.arange(1, width, 2)
    apart, joined = {}, {}
    for table in tables:
        once, each = generator.normal([3, len(once_columns)]), generator.normal([12, len(each_columns)])
        apart[table] = Sides(once, each, tf.constant(once_columns), tf.constant(each_columns))
        whole = np.empty([12, width], np.float32)
        whole[:, once_columns], whole[:, each_columns] = np.repeat(once, 4, axis=0), each
        joined[table] = whole
    return apart, joined


def assert_sides_score_as_joined(network: Network, rtol: float = 1e-5) -> None:
    """Candidates of a request, whose own share is kept apart, have the outputs of the rows that they make."""
    apart, joined = embedded_sides(network.tables)
    expected = network(joined)
    for task, output in network(apart).items():
        np.testing.assert_allclose(output, expected[task], rtol=rtol, atol=rtol / 10)


def assert_dropout_follows_its_seed(network: Network, h: Mapping[str, tf.Tensor], task: str) -> None:
    """The same masks from the same seed, others from another one."""
    first, again, other = (network(h, training=True, seed=tf.constant([s, 0]))[task] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.0


def randomise(layer: tf.keras.layers.Layer) -> None:
    """Weights far from their start, biases too."""
    generator = tf.random.Generator.from_seed(2)
    for weight in layer.trainable_variables:
        weight.assign(generator.normal(weight.shape, stddev=0.5))


def mlp(x: NDArray, layers: Any, k: int | None = None) -> NDArray:
    """An MLP, or the k-th of several: ReLU after its hidden layers."""
    for i, linear in enumerate(layers.linears):
        kernel, bias = np.asarray(linear.kernel), np.asarray(linear.bias)
        x = x @ kernel + bias if k is None else x @ kernel[k] + bias[k]
        if i < layers.hidden:
            x = np.maximum(x, 0.0)
    return x


def gated(x: NDArray, gate: Any, experts: Sequence[NDArray]) -> NDArray:
    """``sum_k softmax(gate(x))_k expert_k``."""
    logits = mlp(x, gate.mlp)
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert weights.shape[1] == len(experts)
    return sum(weights[:, [k]] * expert for k, expert in enumerate(experts))


def learns_from(network: Network, h: Mapping[str, tf.Tensor]) -> tuple[dict[str, set[str]], dict[Any, set[str]]]:
    """The tasks whose output has a gradient that is not exactly 0, by table, and by the network's weights."""
    tables: dict[str, set[str]] = {table: set() for table in h}
    weights: dict[Any, set[str]] = {weight.ref(): set() for weight in network.trainable_variables}
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(h)
        sums = {task: tf.reduce_sum(output) for task, output in network(h).items()}
    for task, output in sums.items():
        on_tables, on_weights = tape.gradient(
            output, [dict(h), network.trainable_variables], unconnected_gradients="zero"
        )
        for table, gradient in on_tables.items():
            if np.abs(gradient).max() > 0.0:
                tables[table].add(task)
        for weight, gradient in zip(network.trainable_variables, on_weights, strict=True):
            if np.abs(gradient).max() > 0.0:
                weights[weight.ref()].add(task)
    return tables, weights


def tasks_of(layer: tf.keras.layers.Layer, weights: Mapping[Any, set[str]]) -> set[str]:
    """The tasks that all of a layer's weights learn from; fails where some learn from others."""
    of_each = {frozenset(weights[weight.ref()]) for weight in layer.trainable_variables}
    assert len(of_each) == 1, of_each
    return set(of_each.pop())


def owned(network: Network, weights: Mapping[Any, set[str]]) -> dict[str, bool]:
    """By task, whether its own layers are exactly the weights that learn from it alone."""
    return {
        task: {weight.ref() for layer in network.own_layers(task) for weight in layer.trainable_variables}
        == {weight for weight, tasks in weights.items() if tasks == {task}}
        for task in network.towers
    }


def all_ones(experts: Any) -> None:
    """Makes every expert of a group of MLPs answer 1."""
    last = experts.linears[-1]
    last.kernel.assign(tf.zeros_like(last.kernel))
    last.bias.assign(tf.ones_like(last.bias))
