"""Single-Task, Shared-Bottom, Asymmetric and Customized Sharing: their equations by hand, what a task's loss trains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines.schema import Feature, Label, Schema, Task
from stem_tf import configs
from stem_tf.layers.mlp import MLP
from stem_tf.layers.sides import Sides
from stem_tf.models import build_network, precision, registry
from stem_tf.models.network import Network
from stem_tf.models.sharing import AsymmetricSharing, CustomizedSharing, SharedBottom, SingleTask
from stem_util.errors import UserError
from tests.stem_tf.by_hand import assert_dropout_follows_its_seed

TASKS = ("a", "b", "c")
GIVES = {"b": "a"}
OPTIONS: dict[type[Network], dict[str, Any]] = {
    SingleTask: {},
    SharedBottom: {},
    AsymmetricSharing: {"gives": GIVES},
    CustomizedSharing: {},
}


def small(kind: type[Network], parts: dict[str, Any] | None = None, **options: Any) -> Any:
    """Bottoms 6, 5; towers are linear: a small one whose ReLUs are all off would let no gradient through."""
    of_parts = {"expert_units": (6, 5), "tower_units": ()} | (parts or {})
    return kind(TASKS, kind.Hyperparameters(**of_parts | OPTIONS[kind] | options))


def embedded(net: Network, width: int = 8, batch: int = 7) -> dict[str, tf.Tensor]:
    generator = tf.random.Generator.from_seed(1)
    return {table: generator.normal([batch, width]) for table in net.tables}


def forward(mlp: MLP, x: np.ndarray) -> np.ndarray:
    """An MLP, or the only one of its group, with numpy."""
    for i, linear in enumerate(mlp.linears):
        x = x @ linear.kernel.numpy().reshape(x.shape[1], -1) + linear.bias.numpy().reshape(-1)
        x = np.maximum(x, 0.0) if i < mlp.hidden else x
    return x


def reached(net: Network, task: str) -> tuple[set[str], set[Any]]:
    """Tables and weights on which ``task``'s output has a gradient that is not exactly 0."""
    h = embedded(net)
    net(h)
    with tf.GradientTape() as tape:
        tape.watch(h)
        output = tf.reduce_sum(net(h)[task])
    tables, weights = tape.gradient(output, [h, net.trainable_variables], unconnected_gradients="zero")
    return (
        {table for table, gradient in tables.items() if np.any(gradient)},
        {v.ref() for v, gradient in zip(net.trainable_variables, weights, strict=True) if np.any(gradient)},
    )


def weights_of(*layers: tf.keras.layers.Layer) -> set[Any]:
    return {weight.ref() for layer in layers for weight in layer.weights}


def test_single_task_by_hand() -> None:
    net = small(SingleTask)
    h = embedded(net)
    outputs = net(h)
    for task in TASKS:
        expected = forward(net.towers[task], forward(net.bottoms[task], h[f"task:{task}"].numpy()))[:, 0]
        np.testing.assert_allclose(outputs[task], expected, rtol=1e-5, atol=1e-6)


def test_shared_bottom_by_hand() -> None:
    net = small(SharedBottom)
    h = embedded(net)
    outputs = net(h)
    for task in TASKS:
        expected = forward(net.towers[task], forward(net.bottom, h["shared"].numpy()))[:, 0]
        np.testing.assert_allclose(outputs[task], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fusion", ["concat", "sum", "mean"])
def test_asymmetric_sharing_by_hand(fusion: str) -> None:
    """b reads a's bottom, c reads b's: what b gives is its bottom alone, without what it got of a."""
    net = small(AsymmetricSharing, gives={"b": "a", "c": "b"}, fusion=fusion)
    h = embedded(net)
    outputs = net(h)
    f = {task: forward(net.bottoms[task], h["shared"].numpy()) for task in TASKS}
    fuse = {
        "concat": lambda own, given: np.concatenate([own, given], axis=1),
        "sum": lambda own, given: own + given,
        "mean": lambda own, given: (own + given) / 2,
    }[fusion]
    for task, read in {"a": f["a"], "b": fuse(f["b"], f["a"]), "c": fuse(f["c"], f["b"])}.items():
        np.testing.assert_allclose(outputs[task], forward(net.towers[task], read)[:, 0], rtol=1e-5, atol=1e-6)


def test_customized_sharing_by_hand() -> None:
    net = small(CustomizedSharing)
    h = embedded(net)
    outputs, x = net(h), h["shared"].numpy()
    shared = forward(net.shared_bottom, x)
    for task in TASKS:
        both = np.concatenate([forward(net.bottoms[task], x), shared], axis=1)
        np.testing.assert_allclose(outputs[task], forward(net.towers[task], both)[:, 0], rtol=1e-5, atol=1e-6)


def test_what_a_task_trains() -> None:
    net = small(SingleTask)
    for task in TASKS:
        assert reached(net, task) == ({f"task:{task}"}, weights_of(net.bottoms[task], net.towers[task]))

    net = small(SharedBottom)
    for task in TASKS:
        assert reached(net, task) == ({"shared"}, weights_of(net.bottom, net.towers[task]))

    net = small(AsymmetricSharing)
    for task in TASKS:
        read = [net.bottoms[task], *([net.bottoms["a"]] if task == "b" else [])]
        assert reached(net, task) == ({"shared"}, weights_of(*read, net.towers[task]))

    net = small(CustomizedSharing)
    for task in TASKS:
        assert reached(net, task) == ({"shared"}, weights_of(net.shared_bottom, net.bottoms[task], net.towers[task]))


@pytest.mark.parametrize("kind", OPTIONS)
def test_own_layers_are_what_no_other_task_trains(kind: type[Network]) -> None:
    net = small(kind)
    trained = {task: reached(net, task)[1] for task in TASKS}
    for task in TASKS:
        others = set().union(*(trained[other] for other in TASKS if other != task))
        assert weights_of(*net.own_layers(task)) == trained[task] - others


@pytest.mark.parametrize(
    ("kind", "bottoms", "tower_inputs"),
    [(SingleTask, 3, 15), (SharedBottom, 1, 15), (AsymmetricSharing, 3, 20), (CustomizedSharing, 4, 30)],
)
def test_weight_count(kind: type[Network], bottoms: int, tower_inputs: int) -> None:
    net = small(kind)
    net(embedded(net))
    assert net.count_params() == bottoms * (8 * 6 + 6 + 6 * 5 + 5) + tower_inputs + 3


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ({}, "is empty"),
        ("", "is empty"),
        ({"b": "aa"}, "'aa' is none of the tasks a, b, c; did you mean 'a'?"),
        ({"like": "a"}, "'like' is none of the tasks a, b, c$"),
        ({"b": "b"}, "b is its own giver"),
    ],
)
def test_bad_gives(gives: Any, message: str) -> None:
    with pytest.raises(
        UserError, match=rf"config.model.gives .*whose bottom the receiver's tower also reads.* {message}"
    ):
        small(AsymmetricSharing, gives=gives)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("expert", ["mlp", "dcn"])
def test_candidates_of_a_request_score_as_rows(kind: type[Network], expert: str) -> None:
    net = small(kind, {"expert": expert})
    columns = [tf.constant([0, 3, 4]), tf.constant([1, 2, 5, 6, 7])]
    h = {
        table: Sides(tf.gather(e[::3], columns[0], axis=1), tf.gather(e, columns[1], axis=1), *columns)
        for table, e in embedded(net, batch=6).items()
    }
    rows = net({table: sides.joined() for table, sides in h.items()})
    outputs = net(h)
    for task in TASKS:
        np.testing.assert_allclose(outputs[task], rows[task], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIONS)
def test_dropout_depends_on_the_seed_alone(kind: type[Network]) -> None:
    net = small(kind, {"dropout": 0.5})
    h = embedded(net)
    assert_dropout_follows_its_seed(net, h, "b")


@pytest.mark.parametrize("kind", OPTIONS)
def test_bfloat16_answers_in_float32(kind: type[Network]) -> None:
    with precision("mixed_bfloat16"):
        net = small(kind)
    outputs = net(embedded(net))
    assert {v.dtype for v in net.variables} == {tf.float32}
    assert {output.dtype for output in outputs.values()} == {tf.float32}


@pytest.mark.parametrize("kind", OPTIONS)
def test_built_by_name(kind: type[Network]) -> None:
    name = next(name for name, model in registry.models().items() if model.network is kind)
    schema = Schema(
        "log", (Feature("id", "categorical", "user", "id", "int64"),), tuple(Task(t, Label(t)) for t in TASKS)
    )
    settings = {"model.gives": GIVES, "model.fusion": "sum"} if kind is AsymmetricSharing else {}
    net = build_network(configs.checked({"model.name": name, **settings}), schema)
    assert type(net) is kind and list(net.towers) == list(TASKS)
    if isinstance(net, AsymmetricSharing):
        assert (net.gives, net.fusion) == (GIVES, "sum")
