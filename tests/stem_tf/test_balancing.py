"""PCGrad and GradNorm: by hand, against implementations in numpy, and in every model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from pipelines import manifest as manifests
from pipelines.batches.dataset import read_batches
from pipelines.schema import Label, Task
from stem_tf import configs, models
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training.balancing import Balancing
from stem_tf.training.gradnorm import GradNorm
from stem_tf.training.loss_weighting import Weighting
from stem_tf.training.reach import Reach, reach
from stem_tf.training.train_step import sizes
from stem_util.errors import UserError
from tests.stem_tf.by_hand import learns_from, randomise

SEED = tf.constant([5, 7])


def weights(model: RankingModel) -> list[tf.Variable]:
    """Of the tables and the network, without those of the losses."""
    return [*model.embeddings.weights, *model.network.weights]


def copy_weights(source: RankingModel, target: RankingModel) -> None:
    for one, two in zip(weights(source), weights(target), strict=True):
        two.assign(one)


def build(settings: dict[str, Any]) -> tuple[RankingModel, list[Any]]:
    config = configs.checked(settings)
    manifest = manifests.load(config.data.dir)
    reading: dict[str, Any] = {"batch_size": config.data.batch_size, "input_format": "blocks"}
    dataset = read_batches(manifest, "train", training=True, seed=0, epoch=0, start_step=0, device=None, **reading)
    return models.build(config, manifest), list(dataset.take(3))


def pcgrad(gradients: NDArray, reached: NDArray, orders: NDArray) -> NDArray:
    """Algorithm 1 on ``[T, N]``, where ``reached`` ``[T, N]`` says which weights each task trains; the sum ``[N]``."""
    several = reached.sum(axis=0) > 1
    total = np.where(several, 0.0, gradients.sum(axis=0))
    for i, order in enumerate(orders):
        projected = np.where(several, gradients[i], 0.0)
        for j in order:
            both = several & reached[i] & reached[j]
            along = projected[both] @ gradients[j][both]
            if j != i and along < 0:
                projected[both] -= along / (gradients[j][both] @ gradients[j][both]) * gradients[j][both]
        total += projected
    return total


def orders(tasks: int, seed: tf.Tensor = SEED) -> NDArray:
    return np.argsort(tf.random.stateless_uniform([tasks, tasks], seed).numpy(), axis=1)


def balancing(reached: list[tuple[int, set[int]]], tasks: int, kind: Any = "static") -> Balancing:
    """Of one variable with these columns."""
    columns = tuple((width, frozenset(trains)) for width, trains in reached)
    weighting = Weighting([Task(f"t{t}", Label("y")) for t in range(tasks)], [1.0] * tasks, kind, alpha=1.0)
    shape = tf.TensorShape([sum(width for width, _ in columns)])
    return Balancing(Reach((columns,), ()), [shape], weighting, "pcgrad", seed=0)


def test_two_gradients_that_conflict_by_hand() -> None:
    """(1, 0) and (-1, 1) become (.5, .5) and (0, 1). The third weight is one task's own, the fourth no task's."""
    both = balancing([(2, {0, 1}), (1, {0}), (1, set())], tasks=2)
    gradients = tf.constant([[1.0, 0.0, 3.0, 0.0], [-1.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    summed = both(gradients, [], tf.ones(2), tf.constant(0, tf.int64)).network
    np.testing.assert_allclose(summed, [0.5 + 0.1, 1.5 + 0.2, 3.0 + 0.3, 0.4], rtol=1e-6)


def test_gradients_that_agree_are_added_up() -> None:
    both = balancing([(2, {0, 1})], tasks=2)
    gradients = tf.constant([[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_array_equal(both(gradients, [], tf.ones(2), tf.constant(0, tf.int64)).network, [2.0, 1.0])


@pytest.mark.parametrize(
    "reached",
    [[(40, {0, 1, 2, 3})], [(10, {0, 1, 2, 3}), (10, {0, 1}), (10, {1, 2, 3}), (6, {3}), (4, {0, 2})]],
    ids=["all share all", "some share some"],
)
def test_projections_against_algorithm_1(reached: list[tuple[int, set[int]]]) -> None:
    random = np.random.default_rng(0)
    trains = np.concatenate([[[t in tasks for t in range(4)]] * width for width, tasks in reached]).T
    gradients = np.where(trains, random.normal(size=(4, 40)) + 0.3 * random.normal(size=40), 0.0)
    gradients[2] -= gradients[0] * trains[2]  # conflicts
    several = balancing(reached, tasks=4)
    pieces = tf.split(tf.constant(gradients, tf.float32), [width for width, _ in reached], axis=1)
    products = several._products([(g, frozenset(t)) for g, (_, t) in zip(pieces, reached, strict=True)])
    mixed = several.projections(products, SEED).numpy()
    together = np.where(trains.sum(axis=0) > 1, (trains * (mixed @ gradients)).sum(axis=0), gradients.sum(axis=0))
    np.testing.assert_allclose(together, pcgrad(gradients, trains, orders(4)), rtol=1e-4, atol=1e-5)
    assert np.abs(together - gradients.sum(axis=0)).max() > 0.1


def test_a_task_without_a_gradient_projects_nothing() -> None:
    both = balancing([(2, {0, 1})], tasks=2)
    gradients = tf.constant([[1.0, -2.0], [0.0, 0.0]])
    np.testing.assert_array_equal(both(gradients, [], tf.ones(2), tf.constant(0, tf.int64)).network, [1.0, -2.0])


def test_gradnorm_by_hand() -> None:
    """G = (3, 1), both losses as at the first step: the goal is 2 for both, and L_grad pulls by sign * G / w."""
    learned = GradNorm([2.0, 1.0], alpha=1.5, learning_rate=0.1)
    learned.learn(tf.constant([3.0, 1.0]), tf.constant([0.5, 4.0]), tf.constant(1))
    np.testing.assert_array_equal(learned.first, [0.5, 4.0])
    # Adam's first step is the learning rate: (1.9, 1.1), whose sum is 3 already.
    np.testing.assert_allclose(learned.weights, [1.9, 1.1], rtol=1e-5)
    # The first task's loss has halved: r = (2/3, 4/3), the goals are 2 * r^1.5.
    gradient = learned.gradient(tf.constant([1.5, 2.5]), tf.constant([0.25, 4.0]), learned.first)
    goals = 2.0 * np.array([2 / 3, 4 / 3]) ** 1.5
    assert goals[0] < 1.5 and goals[1] > 2.5
    np.testing.assert_allclose(gradient, [1.5 / 1.9, -2.5 / 1.1], rtol=1e-5)


def test_gradnorm_is_the_gradient_of_its_loss() -> None:
    """L_grad differentiated by a tape, its goals held constant."""
    random = np.random.default_rng(1)
    unweighted, losses, first = (tf.constant(random.uniform(0.1, 3, 5), tf.float32) for _ in range(3))
    learned = GradNorm(random.uniform(0.5, 2, 5).tolist(), alpha=0.7, learning_rate=0.1)
    with tf.GradientTape() as tape:
        tape.watch(learned.weights)
        norms = learned.weights * unweighted
        ratios = losses / first
        goals = tf.stop_gradient(tf.reduce_mean(norms) * (ratios / tf.reduce_mean(ratios)) ** 0.7)
        loss = tf.reduce_sum(tf.abs(norms - goals))
    np.testing.assert_allclose(learned.gradient(norms, losses, first), tape.gradient(loss, learned.weights), rtol=1e-5)


def test_gradnorm_evens_out_the_norms_and_keeps_the_sum() -> None:
    """Losses that stay as they are: G_k = w_k g_k becomes the same for all; a task of weight 0 stays out."""
    unweighted, losses = np.array([4.0, 1.0, 0.5, 9.0]), tf.ones(4)
    learned = GradNorm([1.0, 1.0, 1.0, 0.0], alpha=1.5, learning_rate=0.01)
    for step in range(1, 600):
        learned.learn(tf.constant(learned.weights * unweighted, tf.float32), losses, tf.constant(step))
    w = learned.weights.numpy()
    assert w.sum() == pytest.approx(3.0, rel=1e-5) and w[3] == 0.0
    pulls = w[:3] * unweighted[:3]
    assert pulls.max() / pulls.min() < 1.15
    assert np.isfinite(w).all()


def test_gradnorm_waits_for_a_task_without_rows() -> None:
    learned = GradNorm([1.0, 1.0, 1.0], alpha=1.0, learning_rate=0.1)
    learned.learn(tf.constant([2.0, 0.0, 2.0]), tf.constant([0.7, 0.0, 0.7]), tf.constant(1))
    np.testing.assert_allclose(learned.weights, 1.0)  # the other two pull alike
    learned.learn(tf.constant([2.0, 2.0, 2.0]), tf.constant([0.7, 5.0, 0.7]), tf.constant(2))
    np.testing.assert_allclose(learned.first, [0.7, 5.0, 0.7])
    np.testing.assert_allclose(learned.weights, 1.0)


def test_a_weight_never_falls_to_0() -> None:
    learned = GradNorm([1.0, 1.0], alpha=0.0, learning_rate=0.5)
    for step in range(1, 20):
        learned.learn(learned.weights * tf.constant([1e6, 1.0]), tf.ones(2), tf.constant(step))
        assert (learned.weights.numpy() > 0.005).all()


def test_each_task_reaches_the_weights_that_learn_from_it(zoo_settings: dict[str, Any]) -> None:
    model, _ = build(zoo_settings)
    found, network = reach(model), model.network
    randomise(network)
    h = {table: tf.random.normal([64, model.embeddings.flat_width], seed=1) for table in network.tables}
    tables, by_weight = learns_from(network, h)
    names = [task.name for task in model.tasks]

    def named(tasks: frozenset[int]) -> set[str]:
        return {names[task] for task in tasks}

    own = found.variables[-len(network.trainable_variables) :]
    for weight, ((width, tasks),) in zip(network.trainable_variables, own, strict=True):
        assert named(tasks) >= by_weight[weight.ref()] and width == weight.shape[-1]
    assert sum(
        named(t) == by_weight[w.ref()] for w, ((_, t),) in zip(network.trainable_variables, own, strict=True)
    ) > (0.8 * len(own))  # all but where a ReLU answers 0 for all rows
    for group, columns in zip(model.embeddings.groups, found.tables, strict=True):
        for table, (_, tasks) in zip(group.tables, columns, strict=True):
            # In stem_net-(F) fields without a task's table stand in every task's embedding.
            assert named(tasks) == (tables[table] if set(group.tables) == set(network.tables) else set(names))


@pytest.mark.parametrize(
    "zoo_settings", ["single_task", "aitm", "esmm", "sluice", "ple", "me_ple", "stem_net, two layers"], indirect=True
)
def test_the_gradients_one_by_one_add_up_to_that_of_the_loss(zoo_settings: dict[str, Any]) -> None:
    if zoo_settings["model.name"] == "single_task":
        with pytest.raises(UserError, match=r"^config\.optimizer\.conflicts=pcgrad would do nothing: no two tasks "):
            build(zoo_settings | {"optimizer.conflicts": "pcgrad"})
        with pytest.raises(UserError, match=r"^config\.loss\.weighting=gradnorm .*; leave it at static$"):
            build(zoo_settings | {"loss.weighting": "gradnorm"})
        return
    model, (batch, *_) = build(zoo_settings | {"optimizer.conflicts": "pcgrad"})
    step, inputs, spaces = model.training_step, model.inputs(batch["features"]), sizes(batch["weights"])
    rows, batch = step.read(inputs, model.global_step), {**batch, "inputs": inputs}
    several = step.differentiate(batch, step.looked_up(rows), spaces, SEED)
    balancing, step.balancing = step.balancing, None
    one = step.differentiate(batch, step.looked_up(rows), spaces, SEED)
    np.testing.assert_allclose(tf.reduce_sum(several.network, axis=0), one.network, rtol=1e-4, atol=1e-6)
    for whole, of_all in zip(one.looked_up, several.looked_up, strict=True):
        by_loss = tf.reshape(of_all, [whole.shape[0], -1, whole.shape[1]])
        np.testing.assert_allclose(tf.reduce_sum(by_loss, axis=1), whole, rtol=1e-4, atol=1e-6)
    assert balancing is not None
    of_rows = [read.summed(gradient) for read, gradient in zip(rows, several.looked_up, strict=True)]
    together = balancing(several.network, of_rows, several.losses, model.global_step)
    assert together.network.shape == one.network.shape
    assert [g.shape for g in together.tables] == [r.summed(g).shape for r, g in zip(rows, one.looked_up, strict=True)]


@pytest.mark.parametrize("tables", ["dense", "deferred"])
def test_a_step_against_an_implementation_of_its_own(tiny_settings: dict[str, Any], tables: str) -> None:
    """Shared-Bottom: the gradients of its table, numeric vectors and bottom are projected, the towers' are not."""
    settings = configs.applying(tiny_settings, "shared_bottom") | {
        "model.name": "shared_bottom",
        "model.init_std": 0.3,
        "optimizer.tables": tables,
        "optimizer.conflicts": "pcgrad",
        "loss.weights": {"click": 2.0, "watched": 3.0},
    }
    model, (batch, *_) = build(settings)
    step, inputs = model.training_step, model.inputs(batch["features"])
    (packed,), spaces = model.embeddings.groups, sizes(batch["weights"])
    shared = [*packed.trainable_variables, *model.network.bottom.trainable_variables]
    towers = [v for tower in model.network.towers.values() for v in tower.trainable_variables]
    ids = packed.ids(inputs)
    assert ids is not None and step.balancing is not None
    rows = packed.look_up(ids)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(rows)
        losses = step.losses(batch, model.forward(inputs, [rows], training=True, seed=SEED), spaces)
        weighted = [2.0 * losses[0], 1.5 * losses[1]]  # the schema gives watched a weight of .5
    by_task, own = [], []
    for loss in weighted:
        on_rows, *others = tape.gradient(loss, [rows, *shared])
        table = np.zeros((packed.rows, packed.width))
        np.add.at(table, ids.numpy(), on_rows.numpy())
        by_task.append(np.concatenate([np.ravel(g) for g in (table, *others)]))
        own.append(tape.gradient(loss, towers, unconnected_gradients="zero"))
    one, two = by_task
    assert one @ two < 0, "no conflict to resolve"
    expected = one + two - (one @ two) * (two / (two @ two) + one / (one @ one))

    read = step.read(inputs, model.global_step)
    found = step.differentiate({**batch, "inputs": inputs}, step.looked_up(read), spaces, SEED)
    summed = step.balancing(found.network, [read[0].summed(found.looked_up[0])], losses, model.global_step)
    table = np.zeros((packed.rows, packed.width))
    table[read[0].state.ids.numpy()] = summed.tables[0]
    sizes_ = [v.shape.num_elements() for v in (*shared, *towers)]
    *of_shared, of_towers = np.split(summed.network.numpy(), [sum(sizes_[: len(shared)])])
    np.testing.assert_allclose(np.concatenate([table.ravel(), *of_shared]), expected, rtol=1e-3, atol=1e-6)
    plain = np.concatenate([np.ravel(a + b) for a, b in zip(*own, strict=True)])
    np.testing.assert_allclose(of_towers, plain, rtol=1e-4, atol=1e-7)


def test_weights_that_hardly_move_train_as_fixed_ones(tiny_settings: dict[str, Any]) -> None:
    fixed, batches = build(tiny_settings)
    learned, _ = build(tiny_settings | {"loss.weighting": "gradnorm", "loss.gradnorm_learning_rate": 1e-9})
    copy_weights(fixed, learned)
    for batch in batches:
        fixed.train_step(batch)
        learned.train_step(batch)
    for one, two in zip(weights(fixed), weights(learned), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


OPTIONS = {"optimizer.conflicts": "pcgrad", "loss.weighting": "gradnorm", "train.epochs": 1}


def test_a_run_is_the_same_on_replicas(
    tiny_settings: dict[str, Any], tmp_path: Path, train: Callable[[Path, dict[str, Any]], Any]
) -> None:
    one = train(tmp_path / "one", tiny_settings | OPTIONS)
    two = train(tmp_path / "two", tiny_settings | OPTIONS | {"train.strategy": "mirrored"})
    for a, b in zip(weights(one.model), weights(two.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-4)
    of_losses = [trainer.model.weighting.grad_norm.weights.numpy() for trainer in (one, two)]
    np.testing.assert_allclose(of_losses[0], of_losses[1], rtol=1e-3)
    assert np.abs(of_losses[0] - [1.0, 0.5]).max() > 0.01


@pytest.mark.parametrize("compiled", ["step", "network"])
def test_compiled_steps_are_the_same(tiny_settings: dict[str, Any], compiled: str) -> None:
    settings = tiny_settings | OPTIONS | {"optimizer.tables": "dense"}
    (plain, batches), (fused, _) = build(settings), build(settings | {"train.xla": compiled})
    copy_weights(plain, fused)
    for batch in batches[:2]:
        plain.train_step(batch)
        fused.train_step(batch)
    for a, b in zip(plain.get_weights(), fused.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_bfloat16_has_finite_gradients(tiny_settings: dict[str, Any]) -> None:
    model, batches = build(tiny_settings | OPTIONS | {"train.precision": "mixed_bfloat16", "model.batch_norm": True})
    for batch in batches:
        logs = model.train_step(batch)
    assert all(np.isfinite(value) for value in logs.values())
