"""CGC, PLE and ME-PLE: equations by hand, and what each task's gradient reaches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from stem_tf.layers.embedding import SHARED, task_table
from stem_tf.layers.gate import observe
from stem_tf.layers.parts import count_of
from stem_tf.models import precision
from stem_tf.models.ple import CGC, MEPLE, PLE
from stem_util.errors import UserError
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
PATHS = (*map(task_table, TASKS), SHARED)
FAMILY = {"cgc": CGC, "ple": PLE, "me_ple": MEPLE}
OPEN: dict[str, Any] = {"gate_units": (), "tower_units": ()}
"""Parts for tests of gradients: a small MLP whose ReLUs are all off would let nothing through."""


def small(name: str, parts: dict[str, Any] | None = None, **options: Any) -> Any:
    """Two experts a task and three shared ones (a level); ``parts`` and ``options`` change what they name."""
    of_parts = {"expert_units": (6, 5), "gate_units": (4,), "tower_units": (4,)} | (parts or {})
    network: Any = FAMILY[name]
    return network(TASKS, network.Hyperparameters(**of_parts | {"task_experts": 2, "shared_experts": 3} | options))


def by_hand(net: Any, h: dict[str, np.ndarray], counts: dict[str, list[int]], released: bool) -> dict[str, np.ndarray]:
    """Eq. 2 to 7 of networks whose path p has ``counts[p][j]`` experts on level j."""
    g = {path: h[path] if len(h) > 1 else h[SHARED] for path in PATHS}
    for j, level in enumerate(net.levels):
        experts = {path: [mlp(g[path], level.experts[path], i) for i in range(counts[path][j])] for path in PATHS}
        selected = {path: experts[path] + experts[SHARED] for path in PATHS[:-1]}
        selected[SHARED] = experts[SHARED] if released else sum(experts.values(), [])
        g = {path: gated(g[path], level.gates[path], selected[path]) for path in level.gates}
    return {task: mlp(g[task_table(task)], net.towers[task])[:, 0] for task in TASKS}


@pytest.mark.parametrize("gate_units", [(), (4,)])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", ["ple", "me_ple"])
def test_equations_2_to_7(name: str, released: bool, gate_units: tuple[int, ...]) -> None:
    """Two levels of different widths; numbers of experts differ by task and by level."""
    net = small(
        name,
        {"expert_units": ((4, 3), (2,)), "gate_units": gate_units},
        task_experts={"a": 1, "b": (2, 3), "c": (3, 1)},
        shared_experts=(2, 1),
        layers=2,
        released_stacking=released,
    )
    h = embedded(net.tables)
    net(h)
    randomise(net)
    counts = {"task:a": [1, 1], "task:b": [2, 3], "task:c": [3, 1], SHARED: [2, 1]}
    expected = by_hand(net, {table: x.numpy() for table, x in h.items()}, counts, released)
    for task, output in net(h).items():
        np.testing.assert_allclose(output, expected[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate_units", [(), (4,)])
def test_cgc(gate_units: tuple[int, ...]) -> None:
    net = small("cgc", {"gate_units": gate_units}, task_experts={"a": 1, "b": 2, "c": 3})
    h = embedded((SHARED,))
    net(h)
    randomise(net)
    counts = {"task:a": [1], "task:b": [2], "task:c": [3], SHARED: [3]}
    expected = by_hand(net, {SHARED: h[SHARED].numpy()}, counts, released=False)
    for task, output in net(h).items():
        np.testing.assert_allclose(output, expected[task], rtol=1e-4, atol=1e-5)


def test_me_ple_with_one_table_everywhere_is_ple() -> None:
    one, other = small("me_ple", layers=2), small("ple", layers=2)
    x = embedded((SHARED,))[SHARED]
    one(dict.fromkeys(PATHS, x)), other({SHARED: x})
    other.set_weights(one.get_weights())
    for task in TASKS:
        np.testing.assert_array_equal(one(dict.fromkeys(PATHS, x))[task], other({SHARED: x})[task])


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("name", ["ple", "me_ple"])
def test_what_a_task_trains_on_each_level(name: str, layers: int, released: bool) -> None:
    """The last level's task experts are one task's; below, a shared gate over all experts opens them to every task."""
    net = small(name, OPEN, layers=layers, released_stacking=released)
    h = embedded(net.tables)
    net(h)
    randomise(net)
    tables, weights = learns_from(net, h)
    everyone = set(TASKS)
    apart = layers == 1 or released
    for j, level in enumerate(net.levels):
        assert tasks_of(level.experts[SHARED], weights) == everyone
        for task in TASKS:
            path = task_table(task)
            separated = apart or j == layers - 1
            assert tasks_of(level.experts[path], weights) == ({task} if separated else everyone)
            # A gate feeds the next level's experts.
            separated = apart or j >= layers - 2
            assert tasks_of(level.gates[path], weights) == ({task} if separated else everyone)
        if j < layers - 1:
            assert tasks_of(level.gates[SHARED], weights) == everyone
    for task in TASKS:
        assert tasks_of(net.towers[task], weights) == {task}
        if name == "me_ple":
            assert tables[task_table(task)] == ({task} if apart else everyone)
    assert tables[SHARED] == everyone
    assert owned(net, weights) == dict.fromkeys(TASKS, True)


def test_what_a_task_trains_in_cgc() -> None:
    net = small("cgc", OPEN)
    h = embedded((SHARED,))
    net(h)
    randomise(net)
    tables, weights = learns_from(net, h)
    (level,) = net.levels
    assert tables == {SHARED: set(TASKS)}
    assert tasks_of(level.experts[SHARED], weights) == set(TASKS)
    for task in TASKS:
        for layer in (level.experts[task_table(task)], level.gates[task_table(task)], net.towers[task]):
            assert tasks_of(layer, weights) == {task}
    assert owned(net, weights) == dict.fromkeys(TASKS, True)


@pytest.mark.parametrize(
    ("task_experts", "shared_experts", "layers", "released"),
    [
        ({"a": (0, 2), "b": (2, 0), "c": 2}, 2, 2, False),  # a task without experts of its own on a level
        (2, (2, 0), 2, False),  # nothing shared above: no shared gate
        (2, (0, 2), 2, False),  # shared experts that read task experts only
        (2, 0, 3, False),  # nothing shared but the input
        (2, (2, 0, 2), 3, False),
        (2, (2, 2, 0), 3, False),
        ({"a": (2, 0, 2), "b": (2, 2, 0), "c": (0, 2, 2)}, 2, 3, False),
        ({"a": (2, 0, 2), "b": (2, 2, 0), "c": (0, 2, 2)}, 2, 3, True),
    ],
)
def test_own_layers_where_groups_are_empty(task_experts: Any, shared_experts: Any, layers: int, released: bool) -> None:
    options = {"task_experts": task_experts, "shared_experts": shared_experts, "layers": layers}
    net = small("ple", OPEN, **options, released_stacking=released)
    h = embedded((SHARED,))
    net(h)
    randomise(net)
    _, weights = learns_from(net, h)
    assert owned(net, weights) == dict.fromkeys(TASKS, True)
    # There is no weight that nothing trains.
    assert all(weights.values())


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", ["ple", "me_ple"])
def test_each_expert_enters_a_mixture_once(name: str, released: bool) -> None:
    """With every expert's output at 1, a convex mixture is 1: nothing is counted twice or left out."""
    net = small(name, {"tower_units": ()}, layers=2, released_stacking=released)
    h = embedded(net.tables)
    net(h)
    for level in net.levels:
        for experts in level.experts.values():
            all_ones(experts)
    for level, width in zip(net.levels, (6, 5), strict=True):
        for mixed in level(embedded(PATHS, width)).values():
            np.testing.assert_allclose(mixed, np.ones([16, 5]), rtol=1e-6)
    ones = np.ones([16, 5], np.float32)
    for task, output in net(h).items():
        np.testing.assert_allclose(output, mlp(ones, net.towers[task])[:, 0], rtol=1e-5)


def test_only_a_shared_gate_that_is_read_is_built() -> None:
    def levels_with_one(**options: Any) -> list[bool]:
        return [SHARED in level.gates for level in small("ple", **options).levels]

    assert levels_with_one(layers=1) == [False]
    assert levels_with_one(layers=3) == [True, True, False]
    assert levels_with_one(layers=3, shared_experts=(1, 1, 0)) == [True, False, False]
    assert levels_with_one(layers=3, shared_experts=(1, 0, 1)) == [True, True, False]
    assert levels_with_one(layers=2, shared_experts=0) == [False, False]


def test_gates_say_who_mixes_what() -> None:
    net = small("ple", task_experts={"a": 1, "b": 2, "c": 0}, shared_experts=(2, 1))
    with observe(net) as observed:
        net(embedded((SHARED,)))
    assert [(gate.reader, gate.level, gate.experts) for gate, _ in observed] == [
        ("a", 0, ("a", "shared 1", "shared 2")),
        ("b", 0, ("b 1", "b 2", "shared 1", "shared 2")),
        ("c", 0, ("shared 1", "shared 2")),
        ("shared", 0, ("a", "b 1", "b 2", "shared 1", "shared 2")),
        ("a", 1, ("a", "shared")),
        ("b", 1, ("b 1", "b 2", "shared")),
        ("c", 1, ("shared",)),
    ]


def test_a_task_without_any_expert_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"config\.model\.task_experts should be at least 1 for the task 'b' on level 1"
    ):
        small("cgc", task_experts={"a": 1, "b": 0, "c": 1}, shared_experts=0)
    with pytest.raises(
        UserError, match=r"config\.model\.task_experts should be at least 1 for the task 'a' on level 2"
    ):
        small("ple", task_experts=(1, 0), shared_experts=(1, 0))


def test_a_shared_gate_over_no_experts_is_refused() -> None:
    with pytest.raises(UserError, match=r"config\.model\.shared_experts should be at least 1 on level 1, .* but is 0$"):
        small("ple", shared_experts=(0, 1), released_stacking=True)


@pytest.mark.parametrize("released", [False, True])
def test_weight_count(released: bool) -> None:
    counts: dict[str, Any] = {"a": 1, "b": (2, 3), "c": (3, 1)}
    net = small(
        "ple",
        {"expert_units": ((4, 3), (2,))},
        task_experts=counts,
        shared_experts=(2, 1),
        released_stacking=released,
    )
    net(embedded((SHARED,)))
    of_level = [[count_of(counts, j, task) for task in TASKS] for j in range(2)]
    assert of_level == [[1, 2, 3], [1, 3, 1]]
    experts = (6 + 2) * (6 * 4 + 4 + 4 * 3 + 3) + (5 + 1) * (3 * 2 + 2)

    def gate(width: int, mixed: int) -> int:
        return width * 4 + 4 + 4 * mixed + mixed

    gates = sum(gate(6, own + 2) for own in of_level[0]) + sum(gate(3, own + 1) for own in of_level[1])
    shared_gate = gate(6, 2 if released else 6 + 2)
    towers = 3 * (2 * 4 + 4 + 4 + 1)
    assert net.count_params() == experts + gates + shared_gate + towers


def test_linear_gates_without_bias() -> None:
    """The W_g^k of Eq. 3, [m_k + m_s, d], transposed."""
    net = small("ple", {"gate_units": (), "gate_bias": False})
    net(embedded((SHARED,)))
    shapes = [{path: [w.shape for w in gate.weights] for path, gate in level.gates.items()} for level in net.levels]
    assert shapes == [
        {path: [(6, 9 if path == SHARED else 5)] for path in PATHS},
        {path: [(5, 5)] for path in PATHS[:-1]},
    ]


@pytest.mark.parametrize("expert", ["mlp", "nfwfm"])
@pytest.mark.parametrize("name", FAMILY)
def test_sides_are_the_joined_input(name: str, expert: str) -> None:
    net = small(name, {"expert": expert, "expert_units": (5,), "fields": 3})
    assert_sides_score_as_joined(net)


@pytest.mark.parametrize("name", FAMILY)
def test_dropout_depends_on_the_seed_alone(name: str) -> None:
    net = small(name, {"dropout": 0.5})
    h = embedded(net.tables)
    assert_dropout_follows_its_seed(net, h, "a")


@pytest.mark.parametrize("name", FAMILY)
def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(name: str) -> None:
    with precision("mixed_bfloat16"):
        net = small(name)
    h = embedded(net.tables)
    assert {output.dtype for output in net(h).values()} == {tf.float32}
    assert {weight.dtype for weight in net.weights} == {tf.float32}
    assert net.levels[0](dict.fromkeys(PATHS, h[SHARED]))["task:a"].dtype == tf.bfloat16
    exact = small(name)
    exact(h)
    exact.set_weights(net.get_weights())
    for task, output in exact(h).items():
        np.testing.assert_allclose(net(h)[task], output, atol=0.05 * np.abs(output).max())
