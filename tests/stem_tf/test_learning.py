"""Options of learning in the whole model: what each one does to a step, and that a resumed run has the same bits."""

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
    "normalised experts": {"model.expert_norm": "batch", "model.dropout": 0.3},
    "gradnorm": {"loss.weighting": "gradnorm", "loss.gradnorm_learning_rate": 0.1},
    "pcgrad": {"optimizer.conflicts": "pcgrad", "model.dropout": 0.3},
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
CASES |= {"balanced, compiled": (OPTIONS["gradnorm"] | OPTIONS["pcgrad"] | {"train.xla": "step"}, "dense")}
CASES |= {"compiled, deferred": ({"train.xla": "step", "model.dropout": 0.3}, "deferred")}


@pytest.mark.parametrize(("options", "tables"), CASES.values(), ids=CASES)
def test_an_option_goes_on_after_a_resume_to_the_bit(
    tiny_settings: dict[str, Any], tmp_path: Path, options: dict[str, Any], tables: str
) -> None:
    settings = tiny_settings | options | {"optimizer.tables": tables}
    model, batches = build(settings)
    for batch in batches[:2]:
        model.train_step(batch)
    Checkpoints(tmp_path, model, RunState()).save()
    resumed, _ = build(settings)
    assert Checkpoints(tmp_path, resumed, RunState()).restore()
    for batch in batches[2:]:
        model.train_step(batch)
        resumed.train_step(batch)
    for one, two in zip(state(model), state(resumed), strict=True):
        np.testing.assert_array_equal(one, two)


def test_uncertainty_moves_the_weights_of_the_losses(tiny_settings: dict[str, Any]) -> None:
    """d loss / d s_k = w_k (1/2 - a_k L_k) at s = 0: click, L > 1/2, loses weight, watched, L / 2 < 1/2, gains some."""
    model, batches = build(tiny_settings | {"loss.weighting": "uncertainty"})
    logs = {name: float(value) for name, value in model.train_step(batches[0]).items()}
    click, watched = logs["loss/click"], logs["loss/watched"]
    assert click > 0.5 > watched / 2
    # The schema gives watched a weight of .5; a_k is 1 for click, 1/2 for watched.
    assert logs["loss"] == pytest.approx(click + 0.25 * watched, rel=1e-6)
    # Adam's first step is the learning rate, .02.
    np.testing.assert_allclose(model.weighting.log_variances[0], [0.02, -0.02], rtol=1e-3)
    assert logs["weight/click"] == pytest.approx(np.exp(-0.02), rel=1e-4)
    assert logs["weight/watched"] == pytest.approx(0.25 * np.exp(0.02), rel=1e-4)


def test_smoothing_positive_weights_and_weights_by_hand(tiny_settings: dict[str, Any]) -> None:
    model, batches = build(tiny_settings | OPTIONS["smoothing"])
    batch = batches[0]
    scores = {task: score.numpy() for task, score in model(batch["features"]).items()}
    label = batch["labels"]["click"].numpy()
    smooth, output = 0.9 * label + 0.05, scores["click"]
    entropy = np.log1p(np.exp(output)) - smooth * output
    click = (entropy * np.where(label == 1, 2.0, 1.0)).mean()
    inside = batch["weights"]["watched"].numpy()
    watched = (inside * (batch["labels"]["watched"].numpy() - scores["watched"]) ** 2).sum() / inside.sum()
    assert 0 < label.sum() < 64 and 0 < inside.sum() < 64
    logs = model.train_step(batch)
    assert float(logs["loss/click"]) == pytest.approx(click, rel=1e-5)
    assert float(logs["loss/watched"]) == pytest.approx(watched, rel=1e-5)
    assert float(logs["loss"]) == pytest.approx(3.0 * click + 0.5 * watched, rel=1e-5)


@pytest.mark.parametrize("tables", ["dense", "deferred"])
def test_a_schedule_warms_up_and_ends(tiny_settings: dict[str, Any], tables: str) -> None:
    """Rates of .01 and .02, then a cosine to 0 over 5 steps: the eighth step moves nothing."""
    model, batches = build(tiny_settings | OPTIONS["schedule"] | {"optimizer.tables": tables})
    parts = [model.embeddings.groups[0].table, model.network.towers["click"].trainable_variables[-1]]
    moves = []
    for batch in [*batches, *batches]:
        before = [variable.numpy() for variable in parts]
        model.train_step(batch)
        model.catch_up()
        moves.append([np.abs(variable - value).max() for variable, value in zip(parts, before, strict=True)])
    np.testing.assert_allclose(moves[0], 0.01, rtol=1e-3)
    assert moves[1][0] == pytest.approx(0.02, rel=5e-3)  # of rows whose gradient is the same again
    assert min(moves[6]) > 0.0
    np.testing.assert_array_equal(moves[7], 0.0)


@pytest.mark.parametrize("tables", ["dense", "deferred"])
def test_tables_have_betas_of_their_own(tiny_settings: dict[str, Any], tables: str) -> None:
    """m = (1 - b1) g and v = (1 - b2) g^2 after a step: v / m^2 is .01 / .2^2, of the network .001 / .1^2."""
    model, batches = build(tiny_settings | OPTIONS["tables' own"] | {"optimizer.tables": tables})
    model.train_step(batches[0])
    (of_tables,), of_network = model.table_optimizers, model.network_optimizer
    for m, v, ratio in ((*of_tables.slots[:2], 0.25), (of_network.m, of_network.v, 0.1)):
        assert np.abs(m).max() > 0.0
        np.testing.assert_allclose(v, ratio * m.numpy() ** 2, rtol=1e-4, atol=1e-20)


def test_slots_of_half_the_memory_hold_the_same_moments(tiny_settings: dict[str, Any]) -> None:
    moments = {}
    for slots in ("float32", "bfloat16", "rowwise"):
        model, batches = build(tiny_settings | {"optimizer.tables": "deferred", "optimizer.slots": slots})
        model.train_step(batches[0])
        moments[slots] = model.table_optimizers[0].slots[:2]
    (m, v), (group,) = (slot.numpy() for slot in moments["float32"]), model.embeddings.groups
    assert [slot.dtype for slot in moments["bfloat16"]] == [tf.bfloat16] * 2
    for exact, rounded in zip((m, v), moments["bfloat16"], strict=True):
        np.testing.assert_allclose(tf.cast(rounded, tf.float32), exact, rtol=2**-7)
    # One second moment per embedding: the mean of its elements'.
    of_rows = v.reshape(group.rows, 3, group.dim).mean(axis=-1)
    np.testing.assert_array_equal(moments["rowwise"][0], m)
    np.testing.assert_allclose(moments["rowwise"][1], of_rows, rtol=1e-5)


def test_dropout_is_of_embeddings_and_of_the_network(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = build(tiny_settings | {"model.embedding_dropout": 0.5, "model.init_std": 0.3})
    inputs = model.inputs(batches[0]["features"])
    looked_up = model.embeddings.look_up(inputs, model.read_rows)
    whole = model.embeddings(inputs, looked_up)
    with monkeypatch.context() as patched:
        patched.setattr(type(model.network), "__call__", lambda self, embedded, **settings: embedded)
        dropped = model.forward(inputs, looked_up, training=True, seed=tf.constant([1, 2]))
    for table, values in whole.items():
        kept = dropped[table].numpy() != 0.0
        assert kept.mean() == pytest.approx(0.5, abs=0.05)
        np.testing.assert_allclose(dropped[table], np.where(kept, 2.0 * values.numpy(), 0.0), rtol=1e-6)

    model, _ = build(tiny_settings | {"model.dropout": 0.3, "model.init_std": 0.3})
    looked_up = model.embeddings.look_up(inputs, model.read_rows)
    one, again, other = (
        model.forward(inputs, looked_up, training=True, seed=tf.constant([1, step]))["click"] for step in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert (one.numpy() != other.numpy()).mean() > 0.9
    np.testing.assert_array_equal(
        model.forward(inputs, looked_up, training=False)["click"], model(batches[0]["features"])["click"]
    )


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


@pytest.mark.parametrize("tables", ["dense", "deferred"])
def test_l2_by_table_and_of_the_network(tiny_settings: dict[str, Any], tables: str) -> None:
    """What L2 adds to a gradient of zeros: l2 w."""
    model, _ = build(tiny_settings | OPTIONS["l2"] | {"optimizer.tables": tables})
    (optimizer,), (group,) = model.table_optimizers, model.embeddings.groups
    by_column = np.repeat([0.3, 0.2, 0.1], group.dim)  # task:click, task:watched, shared
    rows = optimizer.read(tf.range(group.rows, dtype=group.index_dtype), model.global_step)
    added = optimizer.gradient(rows, tf.zeros([group.rows, group.width])).values
    np.testing.assert_allclose(tf.reshape(added, group.table.shape), group.table.numpy() * by_column, rtol=1e-6)

    network = model.network_optimizer
    numeric = group.trainable_variables
    expected = [variable * tf.constant(by_column, tf.float32) for variable in numeric]
    expected += [0.1 * variable for variable in model.network.trainable_variables]
    added = network.regularised(tf.zeros_like(network.m))
    np.testing.assert_allclose(added, network.flatten(expected), rtol=1e-6)
    assert numeric and float(tf.norm(added)) > 0.0


def test_weights_that_change_are_logged(tiny_settings: dict[str, Any]) -> None:
    options = OPTIONS["decaying by step"]
    model, batches = build(tiny_settings | options)
    logs = [model.train_step(batch) for batch in batches[:2]]
    # The schema gives watched a weight of .5; the weights are those of the next step.
    assert [float(log["weight/click"]) for log in logs] == pytest.approx([0.5, 0.25])
    assert [float(log["weight/watched"]) for log in logs] == pytest.approx([0.5 * 1.1, 0.5 * 1.1**2])
    # Losses are means over the steps so far: twice the second mean less the first is the second step's.
    first, second = ({name: float(value) for name, value in log.items()} for log in logs)
    assert first["loss"] == pytest.approx(first["loss/click"] + 0.5 * first["loss/watched"], rel=1e-5)
    loss, click, watched = (2 * second[name] - first[name] for name in ("loss", "loss/click", "loss/watched"))
    assert loss == pytest.approx(0.5 * click + 0.55 * watched, rel=1e-5)


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
    ("chosen", "widths"),
    [("none", [4]), ("item", [12, 4]), ("user", [12, 4]), ("user,item", [12, 4]), ("ids", [12, 4]), ("all", [12])],
)
def test_stem_net_f(tiny_settings: dict[str, Any], chosen: str, widths: list[int]) -> None:
    """Packed tables: three of width 4 for features in F, one for the others."""
    model, _ = build(tiny_settings | {"model.task_features": chosen})
    assert sorted((group.width for group in model.embeddings.groups), reverse=True) == widths
