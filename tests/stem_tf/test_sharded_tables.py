"""Tables by rows over several devices against the same tables on one, here on devices of one process."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines.schema import Feature, Label, Task
from stem_tf.layers.embedding import Embeddings, Field
from stem_tf.layers.transforms import InputTransform
from stem_tf.models.ranking_model import RankingModel
from stem_tf.models.stem_net import STEMNet
from stem_tf.training import preparation
from stem_tf.training.learning_rate import Schedule
from stem_tf.training.preparation import Training
from stem_tf.training.sharded_tables import served

FEATURES = tuple(Feature(name, "categorical", "user", name, "int64") for name in ("user", "item"))
TASKS = (Task("click", Label("click")), Task("buy", Label("buy")))
CPU = "/job:localhost/replica:0/task:0/device:CPU:0"


def model(tables: str, slots: str = "float32") -> RankingModel:
    random.seed(0)
    network = STEMNet(["click", "buy"], STEMNet.Hyperparameters(expert_units=(8,), gate_units=(4,), tower_units=(4,)))
    fields = [Field("user", rows=20), Field("item", rows=31)]
    # Two groups of tables, of 20 and of 31 rows: neither divides by 3.
    embeddings = Embeddings(fields, 3, network.tables, ["user"], init_std=0.1, train_tables=False)
    made = RankingModel(TASKS, InputTransform(FEATURES, {}), embeddings, network)
    made.build_weights()
    preparation.prepare(made, Training(Schedule(0.01), tables, {"task": 1e-2}, clip_norm=0.05, slots=slots))
    return made


def on_servers(count: int, *arguments: Any) -> RankingModel:
    with served([CPU] * count):
        return model(*arguments)


def batch(number: int, rows: int = 16) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    labels = {task.name: tf.constant(rng.integers(0, 2, rows), tf.float32) for task in TASKS}
    ids = {name: tf.constant(rng.integers(0, most, rows), tf.int32) for name, most in (("user", 20), ("item", 31))}
    return {"features": ids, "labels": labels, "weights": {task.name: tf.ones(rows) for task in TASKS}}


def trained(made: RankingModel, steps: int) -> list[float]:
    take = tf.function(made.training_step.take, autograph=False)
    return [float(take(batch(number), tf.constant(number, tf.int64)).loss) for number in range(steps)]


def checkpoint(made: RankingModel) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(model=made)


@pytest.mark.parametrize(("tables", "slots"), [("lazy", "float32"), ("lazy", "bfloat16"), ("adagrad", "float32")])
def test_shards_train_as_one_table_and_checkpoints_move(tmp_path: Path, tables: str, slots: str) -> None:
    one = model(tables, slots)
    start = checkpoint(one).write(str(tmp_path / "start"))
    expected = trained(one, 6)
    three = on_servers(3, tables, slots)
    checkpoint(three).read(start).assert_existing_objects_matched()
    tolerance = 1e-3 if slots == "bfloat16" else 1e-6  # rounded at random, rows of other shards by other numbers
    np.testing.assert_allclose(trained(three, 6), expected, rtol=tolerance)

    end = checkpoint(three).write(str(tmp_path / "end"))
    back, two = model(tables, slots), on_servers(2, tables, slots)
    for restored in (back, two):
        checkpoint(restored).read(end).assert_existing_objects_matched()
    rows = [tf.concat(group.table.variables, axis=0) for group in three.embeddings.groups]
    for group, values in zip(back.embeddings.groups, rows, strict=True):
        np.testing.assert_array_equal(group.table, values)
    inputs = batch(7)["features"]
    for task, output in back(inputs).items():
        np.testing.assert_allclose(two(inputs)[task], output, rtol=1e-6)
    for slot, shards in zip(back.table_optimizers[1].slots, two.table_optimizers[1].slots, strict=True):
        assert [shard.shape[0] for shard in shards.variables] == [15, 16]
        np.testing.assert_array_equal(tf.concat(shards.variables, axis=0), slot)


def test_shards_start_from_values_of_their_own() -> None:
    shards = on_servers(3, "lazy").embeddings.groups[1].table.variables
    assert [shard.shape[0] for shard in shards] == [10, 10, 11]
    values = np.concatenate(shards)
    assert len(np.unique(values)) == values.size
    assert values.std() == pytest.approx(0.1, rel=0.3)


def test_a_table_with_fewer_rows_than_servers() -> None:
    with served([CPU] * 5):
        (group,) = Embeddings([Field("user", rows=2)], 3, train_tables=False).groups
    assert [shard.shape for shard in group.table.variables] == [(1, 3), (1, 3)]


def test_no_update_of_two_workers_that_move_the_same_rows_is_lost() -> None:
    """Row-wise Adagrad adds the mean square of each gradient to a row's slot: with equal gradients the sum counts."""
    optimizer, times = on_servers(2, "adagrad").table_optimizers[1], 300
    ids = tf.range(31)

    @tf.function(autograph=False)
    def step() -> None:
        state = optimizer.read(ids, tf.constant(0, tf.int64))
        gradient = optimizer.gradient(state._replace(w=tf.zeros_like(state.w)), tf.fill([31, 3], 2.0))
        optimizer.apply(gradient, tf.constant(1, tf.int64))

    step()

    def work() -> None:
        for _ in range(times):
            step()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (total,) = optimizer.slots
    np.testing.assert_array_equal(tf.concat(total.variables, axis=0), np.full([31, 1], 4.0 * (1 + 4 * times)))
