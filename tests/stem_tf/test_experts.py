"""Factorisation machines and the cross network as experts, against hand-computed values."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines.schema import Feature, Label, Schema, Task
from stem_tf import configs
from stem_tf.layers.experts import DCN, FwFM, NFwFM
from stem_tf.layers.parts import Parts
from stem_tf.layers.sides import Sides
from stem_tf.models import build_network, precision
from stem_util.errors import UserError
from tests.stem_tf.by_hand import assert_sides_score_as_joined, mlp, randomise

FIELDS, WIDTH, BATCH, COUNT = 4, 3, 6, 2
KINDS = ("fwfm", "nfwfm", "dcn")


def made(kind: str, count: int = COUNT) -> Any:
    """Experts of a kind, as the models make them: H = 5."""
    units = (5,) if kind == "fwfm" else (6, 5)
    return Parts(expert=kind, expert_units=units, cross_layers=2, fields=FIELDS).experts(count)  # type: ignore[arg-type]


def flat(count: int | None = None, batch: int = BATCH) -> tf.Tensor:
    shape = [batch, FIELDS * WIDTH]
    return tf.random.Generator.from_seed(1).normal(shape if count is None else [count, *shape])


def sides(requests: int = 2) -> tuple[Sides, np.ndarray]:
    """Fields 0 and 2 once a request, the others of each candidate; and the same as one array."""
    generator = tf.random.Generator.from_seed(1)
    columns = np.arange(FIELDS * WIDTH).reshape(FIELDS, WIDTH)
    once_columns, each_columns = columns[[0, 2]].reshape(-1), columns[[1, 3]].reshape(-1)
    once = generator.normal([requests, 2 * WIDTH])
    each = generator.normal([requests * BATCH, 2 * WIDTH])
    whole = np.empty([requests * BATCH, FIELDS * WIDTH], np.float32)
    whole[:, once_columns], whole[:, each_columns] = np.repeat(once, BATCH, axis=0), each
    return Sides(once, each, tf.constant(once_columns), tf.constant(each_columns)), whole


def by_hand(kind: str, group: Any, x: np.ndarray, k: int) -> np.ndarray:
    """The docstrings' equations for expert k, ``[B, D]`` -> ``[B, H]``."""
    v = x.reshape(-1, FIELDS, WIDTH)
    pairs = list(combinations(range(FIELDS), 2))
    if kind == "fwfm":
        y = x @ group.linear.kernel.numpy()[k] + group.linear.bias.numpy()[k]
        for p, (i, j) in enumerate(pairs):
            y += group.kernel.numpy()[k, p] * np.sum(v[:, i] * v[:, j], axis=1, keepdims=True)
        return y
    if kind == "nfwfm":
        return mlp(sum(group.kernel.numpy()[k, p] * v[:, i] * v[:, j] for p, (i, j) in enumerate(pairs)), group.mlp, k)
    x_l = x
    for cross in group.crosses[k]:
        w, b = (weight.numpy() for weight in cross.weights)
        x_l = x * (x_l @ w + b) + x_l
    return mlp(x_l, group.mlp, k)


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equations(kind: str, own_inputs: bool, batch: int) -> None:
    group, x = made(kind), flat(COUNT if own_inputs else None, batch)
    group(x)
    randomise(group)
    y = group(x)
    assert y.shape == (COUNT, batch, 5)
    for k in range(COUNT):
        expected = by_hand(kind, group, (x[k] if own_inputs else x).numpy(), k)
        np.testing.assert_allclose(y[k], expected, rtol=1e-4, atol=1e-4)


def test_a_factorisation_machine_of_two_fields() -> None:
    """y = 1 + 2 * 3 + 4 * 5 + 10 * (3 * 5), with D = 2 and d = 1."""
    group = FwFM(fields=2, units=1, count=1)
    x = tf.constant([[3.0, 5.0]])
    group(x)
    group.linear.bias.assign([[[1.0]]])
    group.linear.kernel.assign([[[2.0], [4.0]]])
    group.kernel.assign([[[10.0]]])
    np.testing.assert_allclose(group(x), [[[177.0]]])


def test_a_neural_factorisation_machine_of_two_fields() -> None:
    """relu(2 * [3, -1] * [5, 7]) through an identity."""
    group = NFwFM(fields=2, units=[2], count=1)
    x = tf.constant([[3.0, -1.0, 5.0, 7.0]])
    group(x)
    group.kernel.assign([[2.0]])
    group.mlp.linears[0].kernel.assign([[[1.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(group(x), [[[30.0, 0.0]]])


def test_a_cross_layer() -> None:
    """x_0 * (W x_0 + b) + x_0 = [2, 3] * ([3, 2] + [1, 0]) + [2, 3] through an identity, W swapping the two."""
    group = DCN(layers=1, units=[2], count=1)
    x = tf.constant([[2.0, 3.0]])
    group(x)
    kernel, bias = group.crosses[0][0].weights
    kernel.assign([[0.0, 1.0], [1.0, 0.0]])
    bias.assign([1.0, 0.0])
    group.mlp.linears[0].kernel.assign([[[1.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(group(x), [[[10.0, 9.0]]])


@pytest.mark.parametrize(
    ("kind", "one"),
    [
        ("fwfm", 12 * 5 + 5 + 6 * 5),
        ("nfwfm", 6 + 3 * 6 + 6 + 6 * 5 + 5),
        ("dcn", 2 * (12 * 12 + 12) + 12 * 6 + 6 + 6 * 5 + 5),
    ],
)
def test_weight_count(kind: str, one: int) -> None:
    group = made(kind, count=3)
    group(flat())
    assert group.count_params() == 3 * one


@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_side_by_side_are_the_experts_alone(kind: str, own_inputs: bool) -> None:
    group, x = made(kind), flat(COUNT if own_inputs else None)
    together = group(x)
    for k in range(COUNT):
        alone, mine = made(kind, count=1), x[k] if own_inputs else x
        alone(mine)
        if kind == "dcn":
            for one, many in zip(alone.crosses[0], group.crosses[k], strict=True):
                one.set_weights(many.get_weights())
        batched = [w for w in group.weights if "cross" not in w.name]
        for one, many in zip([w for w in alone.weights if "cross" not in w.name], batched, strict=True):
            one.assign(many[k : k + 1])
        np.testing.assert_allclose(alone(mine)[0], together[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_and_every_field_is_trained(kind: str) -> None:
    group, x = made(kind), flat()
    group(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(group(x) ** 2)
    gradients = tape.gradient(loss, [x, *group.trainable_variables])
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0.0
    assert (np.abs(gradients[0].numpy().reshape(BATCH, FIELDS, WIDTH)).max(axis=(0, 2)) > 0.0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sides_are_the_joined_input(kind: str) -> None:
    group = made(kind)
    parts, whole = sides()
    np.testing.assert_allclose(group(whole), group(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_known_in_a_graph_that_does_not_know_the_batch(kind: str) -> None:
    group = made(kind)
    group(flat())
    parts, _ = sides()

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, FIELDS * WIDTH]),
            tf.TensorSpec([COUNT, None, FIELDS * WIDTH]),
            tf.TensorSpec([None, 2 * WIDTH]),
            tf.TensorSpec([None, 2 * WIDTH]),
        ]
    )
    def call(shared: tf.Tensor, own: tf.Tensor, once: tf.Tensor, each: tf.Tensor) -> list[tf.Tensor]:
        outputs = [group(x) for x in (shared, own, parts._replace(once=once, each=each))]
        assert [(y.shape[0], y.shape[2]) for y in outputs] == [(COUNT, 5)] * 3
        return outputs

    outputs = call(flat(), flat(COUNT), parts.once, parts.each)
    for y, x in zip(outputs, (flat(), flat(COUNT), parts), strict=True):
        np.testing.assert_allclose(y, group(x), rtol=1e-5, atol=1e-5)
    assert call(flat()[:0], flat(COUNT)[:, :0], parts.once[:0], parts.each[:0])[0].shape == (COUNT, 0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_computes_in_bfloat16_on_float32_weights(kind: str) -> None:
    exact, x = made(kind), flat()
    exact(x)
    with precision("mixed_bfloat16"):
        group = made(kind)
    assert group(x).dtype == tf.bfloat16
    assert {weight.dtype for weight in group.weights} == {tf.float32}
    group.set_weights(exact.get_weights())
    y = tf.cast(group(x), tf.float32)
    np.testing.assert_allclose(y, exact(x), atol=0.03 * np.abs(exact(x)).max())
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.cast(group(x), tf.float32))
    assert all(np.isfinite(gradient).all() for gradient in tape.gradient(loss, group.trainable_variables))


def test_one_field_has_no_pairs() -> None:
    group = FwFM(fields=1, units=2, count=1)
    x = tf.constant([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(group(x), group.linear(x))


@pytest.mark.parametrize("kind", ["nfwfm", "dcn"])
def test_dropout_depends_on_the_seed_alone(kind: str) -> None:
    units: Any = (16, 16)
    group = Parts(expert=kind, expert_units=units, dropout=0.5, fields=FIELDS).experts(COUNT)  # type: ignore[arg-type]
    first, again, other = (group(flat(), training=True, seed=tf.constant([s, 0])) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.0


@pytest.mark.parametrize("name", ["mmoe", "cgc", "stem_net"])
@pytest.mark.parametrize("kind", ["fwfm", "nfwfm"])
def test_pairs_need_features_of_one_width(kind: str, name: str) -> None:
    config = configs.checked({"model.name": name, "model.expert": kind, "model.expert_units": (5,), "model.dim": WIDTH})
    narrow = Feature("user", "categorical", "user", "user", "int64")
    wide = Feature("item", "categorical", "item", "item", "int64", dim=WIDTH + 1)
    tasks = (Task("click", Label("click")), Task("like", Label("like")))
    with pytest.raises(UserError, match=rf"config\.model\.expert={kind} .* one width, but the schema's are 3, 4$"):
        build_network(config, Schema("log", (narrow, wide), tasks))
    same = Feature("item", "categorical", "item", "item", "int64", dim=WIDTH)
    network = build_network(config, Schema("log", (narrow, same), tasks))
    outputs = network({table: tf.ones([BATCH, 2 * WIDTH]) for table in network.tables})
    assert {task: tuple(output.shape) for task, output in outputs.items()} == {"click": (BATCH,), "like": (BATCH,)}


def test_the_cross_network_takes_features_of_several_widths() -> None:
    config = configs.checked({"model.name": "mmoe", "model.expert": "dcn", "model.expert_units": (5,)})
    features = (
        Feature("user", "categorical", "user", "user", "int64"),
        Feature("item", "categorical", "item", "item", "int64", dim=7),
    )
    network = build_network(config, Schema("log", features, (Task("click", Label("click")),)))
    assert network({"shared": tf.ones([BATCH, 16 + 7])})["click"].shape == (BATCH,)


def normalised(kind: str, **more: Any) -> Any:
    units: Any = (5,) if kind == "fwfm" else (6, 5)
    return Parts(expert=kind, expert_units=units, fields=FIELDS, expert_norm="batch", **more).experts(COUNT)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mlp", *KINDS])
def test_normalised_experts_by_hand(kind: str) -> None:
    """swish((y - mean) / sqrt(variance + .001) * scale + offset) of what the expert answers without its last ReLU."""
    group, x = normalised(kind), flat(batch=40)
    group(x)
    randomise(group)
    y = group.experts(x).numpy()
    assert (y < 0).any()
    scale, offset = (group.norm.get_weights()[i] for i in (0, 1))
    assert scale.shape == (COUNT, 1, 5)

    def expected(mean: Any, variance: Any) -> np.ndarray:
        z = (y - mean) / np.sqrt(variance + 1e-3) * scale + offset
        return z / (1 + np.exp(-z))

    np.testing.assert_allclose(group(x), expected(0.0, 1.0), rtol=1e-4, atol=1e-4)
    trained = group(x, training=True)
    of_batch = (statistic(y, axis=1, keepdims=True) for statistic in (np.mean, np.var))
    np.testing.assert_allclose(trained, expected(*of_batch), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(group.norm.moving_mean, 0.01 * y.mean(axis=1, keepdims=True), rtol=1e-3, atol=1e-5)


def test_the_last_layer_of_an_expert_is_normalised_the_others_have_their_relu() -> None:
    group = normalised("mlp", dropout=0.5, batch_norm=True)
    first, again, other = (group(flat(), training=True, seed=tf.constant([s, 0])) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.0 and np.mean(first == 0) > 0.2
    assert group.experts.hidden == len(group.experts.norms) == 1
    assert [linear.units for linear in group.experts.linears] == [6, 5]


def test_normalised_experts_of_all_levels_score_candidates_apart_as_joined() -> None:
    network = build_network(
        configs.checked({"model.name": "ple", "model.expert_units": ((8,), (6, 5)), "model.expert_norm": "batch"}),
        Schema(
            "log",
            tuple(Feature(n, "categorical", "user", n, "int64", dim=3) for n in ("a", "b")),
            (Task("click", Label("click")), Task("like", Label("like"))),
        ),
    )
    h = {table: tf.random.Generator.from_seed(3).normal([32, 6]) for table in network.tables}
    network(h, training=True)
    levels = [group for level in network.levels for group in level.experts.values()]
    assert len(levels) == 6 and all(type(group).__name__ == "NormalisedExperts" for group in levels)
    assert_sides_score_as_joined(network)
