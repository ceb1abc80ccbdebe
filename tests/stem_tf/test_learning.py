"""Options of learning in the whole model: they act, and go on after a resume to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines import manifest as manifests
from pipelines.batches.dataset import read_batches
from stem_tf import configs, models
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training.checkpoints import Checkpoints, RunState
from stem_util.errors import UserError

OPTIONS: dict[str, dict[str, Any]] = {
    "uncertainty": {"loss.weighting": "uncertainty", "model.batch_norm": True},
    "decaying by step": {
        "loss.weighting": "decaying",
        "loss.gamma": {"click": 0.5, "watched": 1.1},
        "loss.gamma_per": "step",
    },
    "smoothing": {"loss.label_smoothing": {"click": 0.1}, "loss.positive_weight": 2.0, "loss.weights": {"click": 3.0}},
    "l2": {"optimizer.l2": {"shared": 0.1, "task": 0.2, "task:click": 0.3}, "optimizer.network_l2": 0.1},
    "schedule": {"optimizer.schedule": "cosine", "optimizer.decay_steps": 5, "optimizer.warmup_steps": 2},
    "tables' own": {
        "optimizer.tables_learning_rate": 0.1,
        "optimizer.tables_beta_1": 0.8,
        "optimizer.tables_beta_2": 0.99,
    },
    "dropout": {"model.embedding_dropout": 0.5, "model.dropout": 0.3},
}


def build(settings: dict[str, Any]) -> tuple[RankingModel, list[Any]]:
    config = configs.checked(settings)
    manifest = manifests.load(config.data.dir)
    reading: dict[str, Any] = {"batch_size": config.data.batch_size, "input_format": "blocks"}
    dataset = read_batches(manifest, "train", training=True, seed=0, epoch=0, start_step=0, device=None, **reading)
    return models.build(config, manifest), list(dataset.take(4))


def state(model: RankingModel) -> list[np.ndarray]:
    """Weights, slots and counters."""
    optimizers: list[tf.Module] = [model.network_optimizer, *model.table_optimizers]
    slots = [slot for optimizer in optimizers for slot in optimizer.variables]
    return [variable.numpy() for variable in [*model.variables, *slots]]


CASES = {
    f"{name}, {tables}": (options, tables) for name, options in OPTIONS.items() for tables in ("dense", "deferred")
}
CASES |= {f"{slots}, deferred": ({"optimizer.slots": slots}, "deferred") for slots in ("bfloat16", "rowwise")}
CASES |= {"compiled, deferred": ({"train.xla": "step", "model.dropout": 0.3}, "deferred")}


@pytest.mark.parametrize(("options", "tables"), CASES.values(), ids=CASES)
def test_an_option_acts_and_resumes(
    tiny_settings: dict[str, Any], tmp_path: Path, options: dict[str, Any], tables: str
) -> None:
    settings = tiny_settings | options | {"optimizer.tables": tables}
    model, batches = build(settings)
    plain, _ = build(tiny_settings | {"optimizer.tables": tables})
    for batch in batches[:2]:
        model.train_step(batch)
        plain.train_step(batch)
    Checkpoints(tmp_path, model, RunState()).save()
    resumed, _ = build(settings)
    assert Checkpoints(tmp_path, resumed, RunState()).restore()
    for batch in batches[2:]:
        for each in (model, plain, resumed):
            each.train_step(batch)
    for one, two in zip(state(model), state(resumed), strict=True):
        np.testing.assert_array_equal(one, two)
    features = batches[0]["features"]
    assert np.abs(model(features)["click"] - plain(features)["click"]).max() > 0.0


def test_tables_have_a_learning_rate_of_their_own(tiny_settings: dict[str, Any]) -> None:
    """Adam's first step is the learning rate, whatever the gradient; the network's stays."""
    moved = []
    for rate in (0.0, 0.05):
        settings = {"optimizer.tables": "lazy", "optimizer.l2": 0.0, "optimizer.clip_norm": 0.0}
        model, batches = build(tiny_settings | settings | {"optimizer.tables_learning_rate": rate})
        parts = [model.embeddings.groups[0].table, model.network.towers["click"].trainable_variables[-1]]
        before = [variable.numpy() for variable in parts]
        model.train_step(batches[0])
        moved.append([np.abs(variable - value).max() for variable, value in zip(parts, before, strict=True)])
    np.testing.assert_allclose(moved, [[0.02, 0.02], [0.05, 0.02]], rtol=1e-3)


@pytest.mark.parametrize("key", ["tables_beta_1", "tables_beta_2"])
def test_adagrad_has_no_betas(tiny_settings: dict[str, Any], key: str) -> None:
    settings = {"optimizer.tables": "adagrad", f"optimizer.{key}": 0.8}
    with pytest.raises(
        UserError, match=f"config.optimizer.{key}=0.8 would do nothing with config.optimizer.tables=adagrad"
    ):
        configs.checked(tiny_settings | settings)


def test_a_compiled_step_is_that_of_one_replica(tiny_settings: dict[str, Any]) -> None:
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope(), pytest.raises(UserError) as error:
        build(tiny_settings | {"train.xla": "step"})
    assert "config.train.xla=step compiles the step of one replica, not of 2; set it to network" in str(error.value)


def test_l2_by_table(tiny_settings: dict[str, Any]) -> None:
    model, _ = build(tiny_settings | OPTIONS["l2"] | {"optimizer.tables": "dense"})
    (optimizer,), (group,) = model.table_optimizers, model.embeddings.groups
    none = optimizer.read(tf.zeros([0], group.index_dtype), model.global_step), tf.zeros([0, group.width])
    expected = group.table.numpy() * np.repeat([0.3, 0.2, 0.1], group.dim)  # task:click, task:watched, shared
    values = tf.reshape(optimizer.gradient(*none).values, expected.shape)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_weights_that_change_are_logged(tiny_settings: dict[str, Any]) -> None:
    options = OPTIONS["decaying by step"]
    model, batches = build(tiny_settings | options)
    logs = [model.train_step(batch) for batch in batches[:2]]
    # The schema gives watched a weight of .5; the weights are those of the next step.
    assert [float(log["weight/click"]) for log in logs] == pytest.approx([0.5, 0.25])
    assert [float(log["weight/watched"]) for log in logs] == pytest.approx([0.5 * 1.1, 0.5 * 1.1**2])


def test_weights_by_epoch_follow_the_epoch(tiny_settings: dict[str, Any]) -> None:
    model, batches = build(tiny_settings | OPTIONS["decaying by step"] | {"loss.gamma_per": "epoch"})
    model.epoch.assign(3)
    assert float(model.train_step(batches[0])["weight/click"]) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer.l2": {"tsk": 0.1}}, "config.optimizer.l2: stem_net has no table 'tsk'; did you mean 'task'?"),
        ({"loss.positive_weight": {"watched": 2.0}}, "would do nothing for 'watched', a regression: leave it out"),
        (
            {"loss.gamma": {"clck": 0.5}, "loss.weighting": "decaying"},
            "config.loss.gamma: no task 'clck'; did you mean",
        ),
        ({"model.task_experts": {"click": 2}}, "config.model.task_experts has no value for the task 'watched'"),
        ({"model.task_features": "user,itm"}, "config.model.task_features: no feature 'itm'; did you mean 'item'?"),
    ],
)
def test_names_that_the_data_has_not(tiny_settings: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(tiny_settings | settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("chosen", "widths"), [("none", [4]), ("item", [12, 4]), ("user", [12, 4]), ("user,item", [12, 4]), ("all", [12])]
)
def test_stem_net_f(tiny_settings: dict[str, Any], chosen: str, widths: list[int]) -> None:
    """Packed tables: three of width 4 for features in F, one for the others."""
    model, _ = build(tiny_settings | {"model.task_features": chosen})
    assert sorted((group.width for group in model.embeddings.groups), reverse=True) == widths
