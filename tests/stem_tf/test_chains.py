"""ESMM and AITM: the chain's order, their equations by hand, what a task's loss trains, the calibrator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines.schema import Feature, Label, Schema, Task
from stem_tf import configs
from stem_tf.layers.mlp import MLP, Linear
from stem_tf.models import build_network, precision
from stem_tf.models.chains import AITM, ESMM, chain_of, logit_of_product
from stem_tf.models.network import Network
from stem_util.errors import UserError
from tests.stem_tf.by_hand import assert_dropout_follows_its_seed, assert_sides_score_as_joined

TASKS = ("buy", "click", "cart")
CHAIN = ("click", "cart", "buy")
FOLLOWS = {"buy": "cart", "cart": "click"}
KINDS = (ESMM, AITM)


def small(kind: type[Network], parts: dict[str, Any] | None = None, **options: Any) -> Any:
    """Bottoms 6, 5; linear towers."""
    bottoms = {} if kind is ESMM else {"expert_units": (6, 5)}
    hyper = kind.Hyperparameters(**bottoms | {"tower_units": (), "follows": FOLLOWS} | (parts or {}) | options)
    return kind(TASKS, hyper)


def embedded(width: int = 8, batch: int = 7) -> dict[str, tf.Tensor]:
    return {"shared": tf.random.Generator.from_seed(1).normal([batch, width])}


def linear(layer: Linear, x: np.ndarray) -> np.ndarray:
    return x @ layer.kernel.numpy().reshape(x.shape[1], -1) + layer.bias.numpy().reshape(-1)


def forward(mlp: MLP, x: np.ndarray) -> np.ndarray:
    """An MLP, or the only one of its group, with numpy."""
    for i, layer in enumerate(mlp.linears):
        x = np.maximum(linear(layer, x), 0.0) if i < mlp.hidden else linear(layer, x)
    return x


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def reached(net: Network, task: str) -> set[Any]:
    """Weights on which ``task``'s output has a gradient that is not exactly 0."""
    h = embedded()
    net(h)
    with tf.GradientTape() as tape:
        output = tf.reduce_sum(net(h)[task])
    found = tape.gradient(output, net.trainable_variables, unconnected_gradients="zero")
    return {v.ref() for v, gradient in zip(net.trainable_variables, found, strict=True) if np.any(gradient)}


def weights_of(*layers: tf.keras.layers.Layer) -> set[Any]:
    return {weight.ref() for layer in layers for weight in layer.weights}


def test_order_of_a_chain() -> None:
    assert chain_of(FOLLOWS, TASKS) == CHAIN
    assert chain_of({"b": "a"}, ("a", "b")) == ("a", "b")


@pytest.mark.parametrize(
    ("follows", "message"),
    [
        ({}, "is empty"),
        ("", "is empty"),
        ({"cart": "click"}, "buy and click follow none: only one task can be the first"),
        ({"buy": "click", "cart": "click"}, "buy and cart follow the same one, click"),
        ({"buy": "cart", "cart": "buy"}, "buy and cart make a circle"),
        ({"buy": "cart", "cart": "click", "click": "buy"}, "buy and click and cart make a circle"),
        ({"buy": "buy", "cart": "click"}, "buy make a circle"),
        ({"buy": "cart", "cart": "clik"}, "'clik' is none of the tasks buy, click, cart; did you mean 'click'?"),
    ],
)
def test_bad_chains(follows: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        chain_of(follows, TASKS)
    assert str(error.value).startswith(
        "config.model.follows should name each task but the first with the one it follows"
    )
    assert "as in buy:cart,cart:click" in str(error.value)
    assert str(error.value).endswith(message)


def test_esmm_by_hand() -> None:
    net = small(ESMM)
    h = embedded()
    outputs = net(h)
    o = {task: forward(net.towers[task], h["shared"].numpy())[:, 0] for task in TASKS}
    np.testing.assert_allclose(outputs["click"], o["click"], rtol=1e-5, atol=1e-6)
    p = np.ones(7)
    for task in CHAIN:
        p = p * sigmoid(o[task])
        np.testing.assert_allclose(sigmoid(outputs[task].numpy()), p, rtol=1e-5)


def test_logit_of_a_product_is_exact() -> None:
    """Against float64, from products near 0 to products as near 1 as float64 can tell."""
    values = np.array([-30.0, -3.0, -0.5, 0.0, 0.5, 3.0, 12.0, 30.0])
    a, b = (grid.reshape(-1) for grid in np.meshgrid(values, values))
    odds_against = np.exp(-a) + np.exp(-b) + np.exp(-a - b)
    np.testing.assert_allclose(1 / (1 + odds_against), sigmoid(a) * sigmoid(b), rtol=1e-12)
    found = logit_of_product(tf.constant(a, tf.float32), tf.constant(b, tf.float32))
    np.testing.assert_allclose(found, -np.log(odds_against), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("a", [-1e4, -90.0, 0.0, 17.0, 90.0, 1e4])
@pytest.mark.parametrize("b", [-1e4, -90.0, 0.0, 17.0, 90.0, 1e4])
def test_logit_of_a_product_and_its_gradient_are_finite(a: float, b: float) -> None:
    x = tf.constant([a, b])
    with tf.GradientTape() as tape:
        tape.watch(x)
        logit = logit_of_product(x[0], x[1])
    gradient = tape.gradient(logit, x).numpy()
    assert np.isfinite(logit) and np.isfinite(gradient).all()
    # They add up to 1 and the share of e^-(a + b).
    assert ((gradient >= 0.0) & (gradient <= 1.0)).all() and 1.0 <= gradient.sum() * (1 + 1e-6)


def test_what_a_task_trains_in_esmm() -> None:
    net = small(ESMM)
    for k, task in enumerate(CHAIN):
        assert reached(net, task) == weights_of(*(net.towers[before] for before in CHAIN[: k + 1]))


def test_aitm_by_hand() -> None:
    net = small(AITM)
    h = embedded()
    outputs, x = net(h), h["shared"].numpy()
    z = forward(net.bottoms["click"], x)
    np.testing.assert_allclose(outputs["click"], forward(net.towers["click"], z)[:, 0], rtol=1e-5, atol=1e-6)
    for task in CHAIN[1:]:
        pair = linear(net.infos[task], z), forward(net.bottoms[task], x)
        scores = [(linear(net.h2, u) * linear(net.h3, u)).sum(axis=1) / np.sqrt(5) for u in pair]
        w = np.exp(scores) / np.exp(scores).sum(axis=0)
        z = sum(w[i][:, np.newaxis] * linear(net.h1, u) for i, u in enumerate(pair))
        np.testing.assert_allclose(outputs[task], forward(net.towers[task], z)[:, 0], rtol=1e-5, atol=1e-6)


def test_what_a_task_trains_in_aitm() -> None:
    net = small(AITM)
    shared = [net.h1, net.h2, net.h3]
    assert reached(net, "click") == weights_of(net.bottoms["click"], net.towers["click"])
    up_to_cart = [net.bottoms["click"], net.bottoms["cart"], net.infos["cart"], *shared]
    assert reached(net, "cart") == weights_of(*up_to_cart, net.towers["cart"])
    assert reached(net, "buy") == weights_of(*up_to_cart, net.bottoms["buy"], net.infos["buy"], net.towers["buy"])


@pytest.mark.parametrize("kind", KINDS)
def test_own_layers_are_what_no_other_task_trains(kind: type[Network]) -> None:
    net = small(kind)
    trained = {task: reached(net, task) for task in TASKS}
    for task in TASKS:
        others = set().union(*(trained[other] for other in TASKS if other != task))
        assert weights_of(*net.own_layers(task)) == trained[task] - others


def test_weight_count() -> None:
    net = small(ESMM)
    net(embedded())
    assert net.count_params() == 3 * (8 + 1)
    net = small(AITM)
    net(embedded())
    assert net.count_params() == 3 * (8 * 6 + 6 + 6 * 5 + 5) + (2 + 3) * (5 * 5 + 5) + 3 * (5 + 1)


def test_calibrator_by_hand() -> None:
    net = small(AITM, calibrator=0.6)
    p = {"click": [0.5, 0.2, 0.9], "cart": [0.7, 0.1, 0.95], "buy": [0.6, 0.4, 0.99]}
    outputs = {task: tf.constant(np.log(np.divide(v, np.subtract(1, v))), tf.float32) for task, v in p.items()}
    weights = {"click": [1.0, 1.0, 1.0], "cart": [1.0, 1.0, 0.0], "buy": [0.0, 1.0, 0.0]}
    weights = {task: tf.constant(v) for task, v in weights.items()}
    # Over all replicas; this one has part of the rows, and takes its part of the mean.
    spaces = {"click": tf.constant(6.0), "cart": tf.constant(4.0), "buy": tf.constant(2.0)}
    expected = 0.6 * ((0.7 - 0.5) / 4 + (0.4 - 0.1) / 2)
    for share in (1.0, 0.5):
        assert float(net.penalty(outputs, weights, spaces, share)) == pytest.approx(expected, rel=1e-5)
    empty = {task: tf.zeros(3) for task in TASKS}
    nothing = {task: tf.constant(0.0) for task in TASKS}
    assert float(net.penalty(outputs, empty, nothing, 1.0)) == 0.0
    assert float(small(AITM).penalty(outputs, weights, spaces, 1.0)) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_of_a_request_score_as_rows(kind: type[Network]) -> None:
    assert_sides_score_as_joined(small(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_depends_on_the_seed_alone(kind: type[Network]) -> None:
    net, h = small(kind, {"dropout": 0.5, "tower_units": (32,)}), embedded()
    assert_dropout_follows_its_seed(net, h, "buy")


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_answers_in_float32(kind: type[Network]) -> None:
    with precision("mixed_bfloat16"):
        net = small(kind)
    outputs = net(embedded())
    assert {v.dtype for v in net.variables} == {tf.float32}
    assert {output.dtype for output in outputs.values()} == {tf.float32}


def schema(*regressions: str) -> Schema:
    tasks = tuple(Task(t, Label(t), "regression" if t in regressions else "binary") for t in TASKS)
    return Schema("log", (Feature("id", "categorical", "user", "id", "int64"),), tasks)


def test_built_by_name() -> None:
    given: dict[str, Any] = {"model.follows": FOLLOWS}
    net: Any = build_network(configs.checked({"model.name": "esmm", **given}), schema())
    assert type(net) is ESMM and net.chain == CHAIN
    net = build_network(configs.checked({"model.name": "aitm", "model.calibrator": 0.6, **given}), schema())
    assert type(net) is AITM and net.chain == CHAIN and net.calibrator == 0.6


def test_products_and_comparisons_are_of_probabilities() -> None:
    given: dict[str, Any] = {"model.follows": FOLLOWS}
    for settings, cause in (
        ({"model.name": "esmm"}, "config.model.name=esmm"),
        ({"model.name": "aitm", "model.calibrator": 0.6}, "config.model.calibrator=0.6"),
    ):
        config = configs.checked({**settings, **given})
        with pytest.raises(
            UserError, match=f"{cause} .* all tasks should be binary, but buy, cart should be predicted"
        ):
            build_network(config, schema("buy", "cart"))
    build_network(configs.checked({"model.name": "aitm", **given}), schema("buy"))
