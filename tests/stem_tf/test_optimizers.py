"""Adam for network and tables against plain numpy, schedules, clipping, and two replicas against one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines.manifest import LabelScale
from pipelines.schema import Feature, Label, Task
from stem_tf.layers.embedding import Embeddings, Field, gather_rows
from stem_tf.layers.transforms import InputTransform
from stem_tf.models.ranking_model import RankingModel
from stem_tf.models.stem_net import STEMNet
from stem_tf.training import preparation
from stem_tf.training.learning_rate import Schedule
from stem_tf.training.preparation import Training

FEATURES = tuple(Feature(name, "categorical", "user", name, "int64") for name in ("user", "item"))
TASKS = (Task("click", Label("click")), Task("time", Label("time"), type="regression", weight=0.5))


def test_schedules() -> None:
    steps = tf.constant([0, 1, 3, 4, 9, 14, 100])

    def rates(**options: Any) -> list[float]:
        schedule = Schedule(2.0, warmup_steps=4, **options)
        return [float(schedule(step)) for step in steps]

    assert rates() == pytest.approx([0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert rates(kind="cosine", decay_steps=10, final_fraction=0.1) == pytest.approx([0.5, 1, 2, 2, 1.1, 0.2, 0.2])
    assert rates(kind="exponential", decay_steps=5, decay_rate=0.5)[:6] == pytest.approx([0.5, 1, 2, 2, 1, 0.5])


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="received 'cosin'"):
        Schedule(1.0, "cosin")


def model(
    tables: str, clip_norm: float = 0.0, l2: float = 1e-3, schedule: Schedule | None = None, xla: str = "off"
) -> RankingModel:
    random.seed(0)
    network = STEMNet(["click", "time"], STEMNet.Hyperparameters(expert_units=(8,), gate_units=(4,), tower_units=(4,)))
    fields = [Field("user", rows=20), Field("item", rows=30)]
    embeddings = Embeddings(fields, 3, network.tables, ["user"], init_std=0.1, train_tables=False)
    made = RankingModel(TASKS, InputTransform(FEATURES, {}), embeddings, network)
    made.build_weights()
    preparation.prepare(made, Training(schedule or Schedule(0.01), tables, l2, clip_norm=clip_norm, xla=xla))
    return made


def batches(count: int, size: int) -> dict[str, Any]:
    """Rows outside a task's space in uneven numbers, and row weights: replicas hold different parts of their sum."""
    rng = np.random.default_rng(0)
    rows = count * size
    inside = (rng.random(rows) < np.linspace(0.1, 0.9, rows)).astype(np.float32)
    return {
        "features": {
            "user": rng.integers(1, 20, rows).astype(np.int32),
            "item": rng.integers(1, 30, rows).astype(np.int32),
        },
        "labels": {
            "click": rng.integers(0, 2, rows).astype(np.float32),
            "time": rng.random(rows).astype(np.float32) * inside,
        },
        "weights": {"click": rng.choice(np.array([0, 0.5, 3], np.float32), rows), "time": inside},
    }


def train(strategy: tf.distribute.Strategy, tables: str, steps_per_execution: int) -> tuple[list[float], list]:
    with strategy.scope():
        made = model(tables, clip_norm=0.05)
        made.compile(optimizer=[], steps_per_execution=steps_per_execution)
    history = made.fit(tf.data.Dataset.from_tensor_slices(batches(8, 16)).batch(16, drop_remainder=True), verbose=0)
    losses = [history.history[f"loss/{task.name}"][0] for task in TASKS]
    made.catch_up()
    weights = [v.numpy() for part in made.weight_parts.values() for v in part.weights]
    assert int(made.global_step.numpy()) == 8
    assert int(made.first_bad_step.numpy()) == -1
    return losses, weights


@pytest.mark.parametrize(
    ("tables", "steps_per_execution"), [("dense", 1), ("deferred", 4), ("lazy", 1), ("adagrad", 1)]
)
def test_two_replicas_train_as_one(tables: str, steps_per_execution: int) -> None:
    losses, weights = train(tf.distribute.get_strategy(), tables, 1)
    # Not the default collectives, which test_trainer has: a process keeps the shapes of the first model that used them.
    one_device = tf.distribute.ReductionToOneDevice()
    mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=one_device)
    assert mirrored.num_replicas_in_sync == 2
    mirrored_losses, mirrored_weights = train(mirrored, tables, steps_per_execution)
    np.testing.assert_allclose(mirrored_losses, losses, rtol=1e-5)
    for one, two in zip(weights, mirrored_weights, strict=True):
        np.testing.assert_allclose(two, one, atol=2e-5)


def test_replicas_read_rows_of_their_own_copy_and_never_a_whole_table() -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        table = tf.Variable(tf.reshape(tf.range(12.0), [4, 3]))

    @tf.function
    def rows() -> tf.Tensor:
        return strategy.run(lambda: gather_rows(table, tf.constant([3, 0, 3])))

    operations = [operation.type for operation in rows.get_concrete_function().graph.get_operations()]
    assert operations.count("ResourceGather") == 2
    assert "ReadVariableOp" not in operations
    for of_replica in strategy.experimental_local_results(rows()):
        np.testing.assert_array_equal(of_replica, [[9, 10, 11], [0, 1, 2], [9, 10, 11]])
    np.testing.assert_array_equal(gather_rows(table, tf.constant([2])), [[6, 7, 8]])


def test_a_standardised_label_trains_as_if_it_had_been_divided() -> None:
    """Labels in milliseconds, standardised, give the weights that labels so scaled give; losses are in milliseconds."""
    plain, scaled = model("dense"), model("dense")
    scale = LabelScale(mean=20_000.0, std=4_000.0)
    scaled.scales = {"time": scale}
    preparation.prepare(scaled, Training(Schedule(0.01), "dense", 1e-3))
    batch = tf.nest.map_structure(tf.constant, batches(1, 16))
    inside = batch["weights"]["time"]
    labels = batch["labels"] | {"time": inside * (batch["labels"]["time"] * scale.std + scale.mean)}
    logs = [made.train_step(given) for made, given in ((plain, batch), (scaled, batch | {"labels": labels}))]
    assert float(logs[1]["loss/time"]) == pytest.approx(float(logs[0]["loss/time"]) * scale.std**2, rel=1e-4)
    assert float(logs[1]["loss"]) == pytest.approx(float(logs[0]["loss"]), rel=1e-4)
    for one, other in zip(plain.network.weights, scaled.network.weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    outputs = scaled(batch["features"])["time"]
    np.testing.assert_allclose(
        scaled.predict_step(batch)["scores"]["time"], outputs * scale.std + scale.mean, rtol=1e-6
    )


def test_the_scale_of_row_weights_does_not_matter_and_0_is_no_loss() -> None:
    def losses(weights: np.ndarray) -> list[float]:
        made, batch = model("dense"), batches(1, 16)
        batch["weights"]["click"] = weights.astype(np.float32)
        logs = made.train_step(tf.nest.map_structure(tf.constant, batch))
        assert int(made.first_bad_step) == -1
        return [float(logs[f"loss/{task.name}"]) for task in TASKS]

    counts = np.array([0, 1, 2, 3] * 4)
    assert losses(counts * 7.0) == pytest.approx(losses(counts), rel=1e-5)
    assert losses(counts * 0)[0] == 0


@pytest.mark.parametrize("tables", ["dense", "deferred", "lazy"])
def test_clipping_scales_network_and_tables_together(tables: str) -> None:
    """Adam does not see a common scale, so the slots are looked at: m after one step is .1 of the clipped gradient."""
    norms = []
    for clip in (0.0, 0.01):
        made = model(tables, clip_norm=clip)
        made.train_step(tf.nest.map_structure(tf.constant, batches(1, 16)))
        slots = [made.network_optimizer.m, *(optimizer.slots[0] for optimizer in made.table_optimizers)]
        norms.append(float(tf.linalg.global_norm([tf.convert_to_tensor(m) for m in slots])) / 0.1)
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(0.01, rel=1e-5)


def test_repeated_rows_count_once_in_the_norm() -> None:
    """The norm is of the summed gradient of a row: n copies of one example weigh like one."""
    one = {"user": [3], "item": [4]}
    norms = []
    for copies in (1, 6):
        made = model("lazy", clip_norm=1e9, l2=0.0)
        tf.nest.map_structure(lambda v: v.assign(tf.ones_like(v) * 0.1), list(made.network.trainable_variables))
        batch = {
            "features": {name: tf.constant(ids * copies) for name, ids in one.items()},
            "labels": {"click": tf.ones(copies), "time": tf.ones(copies)},
            "weights": {"click": tf.ones(copies), "time": tf.ones(copies)},
        }
        made.train_step(batch)
        norms.append([optimizer.slots[0].numpy().copy() for optimizer in made.table_optimizers])
    for single, repeated in zip(*norms, strict=True):
        assert np.abs(single).max() > 0.0
        np.testing.assert_allclose(repeated, single, atol=1e-6)


def test_a_task_without_rows_has_loss_0() -> None:
    made = model("lazy")
    batch = tf.nest.map_structure(tf.constant, batches(1, 16))
    batch["weights"]["time"] = tf.zeros(16)
    logs = made.train_step(batch)
    assert float(logs["loss/time"]) == 0.0
    assert int(made.first_bad_step) == -1


def test_each_loss_is_the_mean_over_its_own_space() -> None:
    made = model("lazy")
    batch = tf.nest.map_structure(tf.constant, batches(1, 16))
    outputs = made(batch["features"])
    logs = made.train_step(batch)
    y, p = batch["labels"]["click"].numpy(), tf.sigmoid(outputs["click"]).numpy()
    click = -np.average(y * np.log(p) + (1 - y) * np.log(1 - p), weights=batch["weights"]["click"].numpy())
    inside = batch["weights"]["time"].numpy() == 1.0
    time = np.mean((batch["labels"]["time"].numpy() - outputs["time"].numpy())[inside] ** 2)
    assert 0 < inside.sum() < 16
    assert float(logs["loss/click"]) == pytest.approx(click, rel=1e-5)
    assert float(logs["loss/time"]) == pytest.approx(time, rel=1e-5)
    assert float(logs["loss"]) == pytest.approx(click + 0.5 * time, rel=1e-5)


def test_the_first_bad_step_and_its_task_are_kept() -> None:
    made = model("lazy")
    batch = tf.nest.map_structure(tf.constant, batches(1, 16))
    made.train_step(batch)
    good, batch["labels"]["time"] = batch["labels"]["time"], tf.fill([16], np.float32(np.nan))
    made.train_step(batch)
    batch["labels"]["time"] = good
    made.train_step(batch)
    assert (int(made.first_bad_step), int(made.first_bad_task)) == (1, 1)


@pytest.mark.parametrize(
    ("tables", "xla"), [("deferred", "network"), ("deferred", "step"), ("adagrad", "step"), ("dense", "step")]
)
def test_compiled_steps_are_the_plain_ones(tables: str, xla: str) -> None:
    def weights(xla: str) -> list[np.ndarray]:
        made = model(tables, clip_norm=0.05, xla=xla)
        step = tf.function(made.train_step)
        for i in range(4):
            part = slice(16 * i, 16 * i + 16)
            step(tf.nest.map_structure(lambda x, part=part: tf.constant(x[part]), batches(4, 16)))
        made.catch_up()
        return [v.numpy() for part in made.weight_parts.values() for v in part.weights]

    for plain, compiled in zip(weights("off"), weights(xla), strict=True):
        np.testing.assert_allclose(compiled, plain, atol=2e-5)


def test_scores_are_those_of_tables_that_are_up_to_date() -> None:
    """Rows that the batch did not read are behind; reading them for scores makes up for it and writes nothing."""
    made = model("deferred", l2=1e-2)
    data = tf.nest.map_structure(tf.constant, batches(1, 16))
    few = tf.nest.map_structure(lambda x: x[:4], data)
    for _ in range(3):
        made.train_step(few)
    before = [group.table.numpy() for group in made.embeddings.groups]
    scores = made(data["features"])
    for group, value in zip(made.embeddings.groups, before, strict=True):
        np.testing.assert_array_equal(group.table, value)
    made.catch_up()
    assert max(np.abs(g.table - value).max() for g, value in zip(made.embeddings.groups, before, strict=True)) > 1e-3
    inputs = made.inputs(data["features"])
    plain = made.forward(inputs, made.embeddings.look_up(inputs), training=False)
    for task, score in scores.items():
        np.testing.assert_allclose(score, plain[task], rtol=1e-5)
