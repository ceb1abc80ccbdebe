"""OMoE, MMoE, ML-MMoE and ME-MMoE: equations by hand, and what each task's gradient reaches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from stem_tf.layers.embedding import SHARED
from stem_tf.layers.gate import observe
from stem_tf.models import precision
from stem_tf.models.mmoe import MEMMoE, MLMMoE, MMoE, OMoE
from stem_tf.models.network import Network
from tests.stem_tf.by_hand import (
    all_ones,
    assert_dropout_follows_its_seed,
    assert_sides_score_as_joined,
    embedded,
    gated,
    learns_from,
    mlp,
    owned,
    randomise,
    tasks_of,
)

TASKS = ("a", "b", "c")
FAMILY = {"omoe": OMoE, "mmoe": MMoE, "ml_mmoe": MLMMoE, "me_mmoe": MEMMoE}


def small(name: str, parts: dict[str, Any] | None = None, **options: Any) -> Any:
    """Three experts (a level); ``parts`` and ``options`` change what they name."""
    of_parts = {"expert_units": (6, 5), "gate_units": (4,), "tower_units": (4,)} | (parts or {})
    network: Any = FAMILY[name]
    return network(TASKS, network.Hyperparameters(**of_parts | {"experts": 3} | options))


def groups(network: Any) -> list[Any]:
    """The experts of each level."""
    return list(network.levels) if isinstance(network, MLMMoE) else [network.experts]


def run(network: Network) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Embeddings, and what the network with weights far from their start answers."""
    h = embedded(network.tables)
    network(h)
    randomise(network)
    return {table: x.numpy() for table, x in h.items()}, {task: y.numpy() for task, y in network(h).items()}


@pytest.mark.parametrize("gate_units", [(), (4,)])
def test_omoe(gate_units: tuple[int, ...]) -> None:
    net = small("omoe", {"gate_units": gate_units})
    h, outputs = run(net)
    x = h[SHARED]
    mixed = gated(x, net.gate, [mlp(x, net.experts, k) for k in range(3)])
    for task in TASKS:
        np.testing.assert_allclose(outputs[task], mlp(mixed, net.towers[task])[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate_units", [(), (4,)])
def test_mmoe(gate_units: tuple[int, ...]) -> None:
    net = small("mmoe", {"gate_units": gate_units})
    h, outputs = run(net)
    x = h[SHARED]
    for task in TASKS:
        mixed = gated(x, net.gates[task], [mlp(x, net.experts, k) for k in range(3)])
        np.testing.assert_allclose(outputs[task], mlp(mixed, net.towers[task])[:, 0], rtol=1e-4, atol=1e-5)


def test_ml_mmoe() -> None:
    """Three levels of 2, 3 and 2 experts of different widths; all gates read x."""
    net = small("ml_mmoe", {"expert_units": ((4, 3), (5,), (2,))}, experts=(2, 3, 2), layers=3)
    h, outputs = run(net)
    x = h[SHARED]
    first = [mlp(x, net.levels[0], k) for k in range(2)]
    second = [mlp(gated(x, net.between[0][k], first), net.levels[1], k) for k in range(3)]
    third = [mlp(gated(x, net.between[1][k], second), net.levels[2], k) for k in range(2)]
    for task in TASKS:
        mixed = gated(x, net.gates[task], third)
        np.testing.assert_allclose(outputs[task], mlp(mixed, net.towers[task])[:, 0], rtol=1e-4, atol=1e-5)


def test_me_mmoe() -> None:
    net = small("me_mmoe")
    assert net.tables == ("expert:0", "expert:1", "expert:2")
    h, outputs = run(net)
    x = (h["expert:0"] + h["expert:1"] + h["expert:2"]) / 3
    for task in TASKS:
        mixed = gated(x, net.gates[task], [mlp(h[f"expert:{k}"], net.experts, k) for k in range(3)])
        np.testing.assert_allclose(outputs[task], mlp(mixed, net.towers[task])[:, 0], rtol=1e-4, atol=1e-5)


def test_ml_mmoe_of_one_level_is_mmoe() -> None:
    one, other = small("ml_mmoe", layers=1), small("mmoe")
    h = embedded((SHARED,))
    one(h), other(h)
    other.set_weights(one.get_weights())
    for task in TASKS:
        np.testing.assert_array_equal(one(h)[task], other(h)[task])


@pytest.mark.parametrize("name", FAMILY)
def test_what_a_task_trains(name: str) -> None:
    # Linear gates and towers: a small MLP whose ReLUs are all off would let nothing through.
    net = small(name, {"gate_units": (), "tower_units": ()})
    h = embedded(net.tables)
    net(h)
    randomise(net)
    tables, weights = learns_from(net, h)
    everyone = set(TASKS)
    assert tables == dict.fromkeys(net.tables, everyone)
    for experts in groups(net):
        assert tasks_of(experts, weights) == everyone
    for task in TASKS:
        assert tasks_of(net.towers[task], weights) == {task}
        if name != "omoe":
            assert tasks_of(net.gates[task], weights) == {task}
    for gate in [net.gate] if name == "omoe" else sum(getattr(net, "between", []), []):
        assert tasks_of(gate, weights) == everyone
    assert owned(net, weights) == dict.fromkeys(TASKS, True)


@pytest.mark.parametrize("name", FAMILY)
def test_each_expert_enters_a_mixture_once(name: str) -> None:
    """With every expert's output at 1, a convex mixture is 1: nothing is counted twice or left out."""
    net = small(name, {"tower_units": ()})
    h = embedded(net.tables)
    net(h)
    for experts in groups(net):
        all_ones(experts)
    for task, output in net(h).items():
        ones = np.ones([16, 5], np.float32)
        np.testing.assert_allclose(output, mlp(ones, net.towers[task])[:, 0], rtol=1e-5)


def test_weight_count() -> None:
    expert = 6 * 6 + 6 + 6 * 5 + 5
    gate = 6 * 4 + 4 + 4 * 3 + 3
    tower = 5 * 4 + 4 + 4 + 1
    expected = {
        "omoe": 3 * expert + gate + 3 * tower,
        "mmoe": 3 * expert + 3 * gate + 3 * tower,
        "ml_mmoe": 3 * expert + 3 * gate + 3 * (5 * 6 + 6 + 6 * 5 + 5) + 3 * gate + 3 * tower,
        "me_mmoe": 3 * expert + 3 * gate + 3 * tower,
    }
    for name, count in expected.items():
        net = small(name)
        net(embedded(net.tables))
        assert net.count_params() == count, name


@pytest.mark.parametrize("name", FAMILY)
def test_linear_gates_without_bias(name: str) -> None:
    net = small(name, {"gate_units": (), "gate_bias": False})
    net(embedded(net.tables))
    gates = [net.gate] if name == "omoe" else [*net.gates.values(), *sum(getattr(net, "between", []), [])]
    for gate in gates:
        assert [weight.shape for weight in gate.weights] == [(6, 3)]


@pytest.mark.parametrize("name", FAMILY)
def test_one_expert_is_a_shared_bottom(name: str) -> None:
    net = small(name, {"expert_units": (5,)}, experts=1, **({"layers": 1} if name == "ml_mmoe" else {}))
    h, outputs = run(net)
    bottom = mlp(next(iter(h.values())), groups(net)[0], 0)
    for task in TASKS:
        np.testing.assert_allclose(outputs[task], mlp(bottom, net.towers[task])[:, 0], rtol=1e-4, atol=1e-5)


def test_gates_say_who_reads_what() -> None:
    seen = {}
    for name in FAMILY:
        net = small(name, experts=2)
        with observe(net) as observed:
            net(embedded(net.tables))
        seen[name] = [(gate.reader, gate.level) for gate, _ in observed]
        assert {gate.experts for gate, _ in observed} == {("expert 1", "expert 2")}
    assert seen == {
        "omoe": [("all tasks", 0)],
        "mmoe": [("a", 0), ("b", 0), ("c", 0)],
        "ml_mmoe": [("expert 1", 0), ("expert 2", 0), ("a", 1), ("b", 1), ("c", 1)],
        "me_mmoe": [("a", 0), ("b", 0), ("c", 0)],
    }


@pytest.mark.parametrize("expert", ["mlp", "fwfm", "nfwfm", "dcn"])
@pytest.mark.parametrize("name", FAMILY)
def test_sides_are_the_joined_input(name: str, expert: str) -> None:
    net = small(name, {"expert": expert, "expert_units": (5,), "fields": 3})
    assert_sides_score_as_joined(net)


@pytest.mark.parametrize("name", FAMILY)
def test_dropout_depends_on_the_seed_alone(name: str) -> None:
    net = small(name, {"dropout": 0.5})
    h = embedded(net.tables)
    assert_dropout_follows_its_seed(net, h, "a")


@pytest.mark.parametrize("expert", ["mlp", "fwfm", "nfwfm", "dcn"])
@pytest.mark.parametrize("name", FAMILY)
def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(name: str, expert: str) -> None:
    parts = {"expert": expert, "expert_units": (5,), "fields": 3}
    with precision("mixed_bfloat16"):
        net = small(name, parts)
    h = embedded(net.tables)
    assert {output.dtype for output in net(h).values()} == {tf.float32}
    assert {weight.dtype for weight in net.weights} == {tf.float32}
    assert groups(net)[0](next(iter(h.values()))).dtype == tf.bfloat16
    exact = small(name, parts)
    exact(h)
    exact.set_weights(net.get_weights())
    for task, output in exact(h).items():
        np.testing.assert_allclose(net(h)[task], output, atol=0.05 * np.abs(output).max())
