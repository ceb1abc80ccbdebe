import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines import manifest as manifests
from pipelines.batches.dataset import read_batches
from stem_tf import configs, trained
from stem_tf.evaluation import scoring
from stem_tf.peers import Interrupted
from stem_tf.training import callbacks
from stem_tf.training.checkpoints import RunState, latest
from stem_tf.training.gradient_shares import shared_gradients
from stem_tf.training.trainer import Trainer
from stem_tf.workdir import Workdir
from stem_util.errors import JobError, UserError

Make = Callable[..., Trainer]


@pytest.fixture
def make(tmp_path: Path, tiny_settings: dict[str, Any]) -> Make:
    """``make(directory, **{"model.dim": 8})``: a trainer of the tiny run, silent; ``warned`` collects its warnings."""

    def trainer(
        directory: str = "run",
        say: Callable[[str], None] = lambda line: None,
        warned: list[str] | None = None,
        manifest: manifests.Manifest | None = None,
        **settings: Any,
    ) -> Trainer:
        config = configs.checked(tiny_settings | settings)
        workdir, manifest = Workdir(tmp_path / directory), manifest or manifests.load(config.data.dir)
        with workdir.locked():
            workdir.prepare(config, manifest)
        return Trainer(config, manifest, workdir, say, (warned if warned is not None else []).append)

    return trainer


ONE_EPOCH: dict[str, Any] = {"train.epochs": 1, "train.log_every": 4, "train.checkpoint_every": 9}


@pytest.fixture(scope="module")
def one_epoch(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any], train: Callable[..., Trainer]
) -> Trainer:
    """A finished run of ``ONE_EPOCH``; its directory is to be copied before it is changed."""
    random.seed(0)  # the initial weights of the tests' own runs
    return train(tmp_path_factory.mktemp("one_epoch") / "run", tiny_settings | ONE_EPOCH)


def losses(trainer: Trainer) -> np.ndarray:
    """[steps, 3]: the losses of metrics.jsonl, means over the epoch so far."""
    records = [r for r in trainer.workdir.read_metrics() if r["kind"] == "train"]
    return np.array([[r["loss"], r["loss/click"], r["loss/watched"]] for r in records])


def test_two_replicas_reach_the_losses_of_one(make: Make, one_epoch: Trainer) -> None:
    expected = losses(one_epoch)
    assert expected.shape == (5, 3)  # steps 4, 8, 12, 16 and the last, 18
    assert (expected[-1] < 0.98 * expected[0]).all()
    for per_execution in (1, 4):
        replicas = make(
            f"replicas_{per_execution}",
            **ONE_EPOCH,
            **{"train.strategy": "mirrored", "train.steps_per_execution": per_execution},
        )
        assert replicas.model.distribute_strategy.num_replicas_in_sync == 2
        replicas.run()
        np.testing.assert_allclose(losses(replicas), expected, rtol=1e-5)
        assert replicas.state.best_score == pytest.approx(one_epoch.state.best_score, abs=1e-3)


def test_a_process_trains_models_of_different_sizes_on_replicas(make: Make) -> None:
    for dim in (4, 8):  # the sums of the second have other shapes
        make(f"dim_{dim}", **{"train.strategy": "mirrored", "train.epochs": 1, "model.dim": dim}).run()


def test_replicas_share_the_batch_evenly(make: Make) -> None:
    with pytest.raises(UserError, match="data.batch_size=63 does not divide by the 2 replicas"):
        make(**{"train.strategy": "mirrored", "data.batch_size": 63})


def test_a_run_from_start_to_end_and_on(make: Make) -> None:
    said: list[str] = []
    directory = "lr[0.1] *"  # a pattern, to TensorFlow
    trainer = make(directory, said.append, **{"train.steps_per_execution": 7, "train.checkpoint_every": 5})
    trainer.run()
    assert trainer.state.epoch == 2 and trainer.global_step == 36 and not trainer.state.stopped
    assert int(trainer.model.global_step) == 36
    assert re.fullmatch(r"gradient on what the tasks share, after 18 steps: click \d+ %, watched \d+ %", said[0])
    assert said[2].split() == ["epoch", "seconds", "mean", "AUC", "click", "watched", "MSE"]
    assert len(said) == 5 and said[3].split()[0] == "1/2" and said[3].endswith("best")

    records = trainer.workdir.read_metrics()
    # 18 steps in executions of 7, 7 and 4.
    assert [(r["epoch"], r["step"]) for r in records if r["kind"] == "train"] == [
        (1, 7), (1, 14), (1, 18), (2, 25), (2, 32), (2, 36),
    ]  # fmt: skip
    rows = trainer.config.data.batch_size
    assert [(r["rows"], r["progress"]) for r in records if r["kind"] == "train"] == [
        (step * rows, round(step / 36, 6)) for step in (7, 14, 18, 25, 32, 36)
    ]
    validation = [r for r in records if r["kind"] == "validation"]
    assert [r["epoch"] for r in validation] == [1, 2]
    assert {"score", "auc/click", "grouped_auc/click", "logloss/click", "mse/watched"} <= set(validation[0])
    assert validation[0]["score"] == validation[0]["auc/click"] > 0.6
    assert list(trainer.workdir.tensorboard.glob("train/events*")) and list(trainer.workdir.best.glob("*.index"))

    finished = make(directory, **{"train.steps_per_execution": 7, "train.checkpoint_every": 5})
    assert finished.resumed_from == latest(trainer.workdir.checkpoints)
    finished.run()
    assert finished.global_step == 36 and finished.workdir.read_metrics() == records

    raised = make(directory, **{"train.steps_per_execution": 7, "train.checkpoint_every": 5, "train.epochs": 3})
    raised.run()
    assert raised.state.epoch == 3 and int(raised.model.global_step) == 54
    assert raised.workdir.read_metrics()[: len(records)] == records
    assert trained.load(raised.workdir, raised.config, raised.manifest, "best").epoch == raised.state.best_epoch + 1


def test_away_from_a_terminal_a_line_per_minute_says_how_it_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 0.0, 59.0, 61.0, 119.0, 122.0])  # at the start, and after each of 4 executions of 5 steps
    monkeypatch.setattr("stem_util.progress.time", SimpleNamespace(monotonic=lambda: next(times)))
    state = RunState(epoch=1)
    display = callbacks.Display("epoch 2/20", state, steps=60, batch_size=1000)
    for batch in range(4):
        state.step += 5
        losses = {"loss": tf.constant(0.75), "loss/click": tf.constant(0.5), "loss/like": tf.constant(0.25)}
        display.on_train_batch_end(5 * batch + 4, losses)
    display.close()
    assert capsys.readouterr().err.splitlines() == [
        "epoch 2/20: 10,000 of 60,000 rows, 164/s, step 10 of 60, loss click 0.5000 like 0.2500, 5 min left",
        "epoch 2/20: 20,000 of 60,000 rows, 164/s, step 20 of 60, loss click 0.5000 like 0.2500, 4 min left",
    ]


def test_patience_ends_a_run_that_does_not_get_better(make: Make) -> None:
    """It learns for two epochs; from then on its learning rate is too small to change a weight."""
    learning = {"optimizer.schedule": "cosine", "optimizer.decay_steps": 36, "optimizer.final_fraction": 1e-30}
    trainer = make(**learning, **{"train.epochs": 6, "train.patience": 2})
    trainer.run()
    first, best, *later = [r["score"] for r in trainer.workdir.read_metrics() if r["kind"] == "validation"]
    assert first < best == trainer.state.best_score and later == [best, best]
    assert trainer.state.epoch == 4 and trainer.state.best_epoch == 1
    assert trainer.state.stopped == "2 epochs without a better score"
    again = make(**learning, **{"train.epochs": 7, "train.patience": 2})
    again.run()
    assert again.state.epoch == 4
    patient = make(**learning, **{"train.epochs": 7, "train.patience": 3})
    assert not patient.state.stopped
    patient.run()
    assert patient.state.epoch == 5 and patient.state.stopped == "3 epochs without a better score"
    impatient = make(**learning, **{"train.epochs": 7, "train.patience": 1})
    assert impatient.state.stopped == impatient.why_ended() == "3 epochs without a better score"


def test_training_ends_where_a_cosine_has_ended(make: Make) -> None:
    cosine = {"optimizer.schedule": "cosine", "optimizer.decay_steps": 20}
    warned: list[str] = []
    make(warned=warned, **cosine, **{"train.epochs": 2}).run()
    assert warned == []
    raised = make(warned=warned, **cosine, **{"train.epochs": 4})
    weights = raised.model.get_weights()
    raised.run()
    assert raised.state.epoch == 2 and raised.why_ended() == "the learning rate is 0 from step 20 on"
    assert [w.startswith("the learning rate is 0 from step 20 on ") for w in warned] == [True]
    for before, after in zip(weights, raised.model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model.name": "mmoe", "model.experts": 2, "optimizer.tables": "lazy", "model.batch_norm": True},
        {"model.name": "shared_bottom", "train.xla": "step", "optimizer.tables": "dense"},
        {"train.strategy": "mirrored", "train.steps_per_execution": 7},
        {"loss.weighting": "uncertainty", "train.xla": "network"},
    ],
)
def test_a_task_that_drowns_the_others_is_told(make: Make, settings: dict[str, Any]) -> None:
    said: list[str] = []
    warned: list[str] = []
    if settings.get("model.name", "stem_net") != "stem_net":
        settings = {"model.gate_units": (128, 64)} | settings  # the default, where there may be no gates
    trainer = make(say=said.append, warned=warned, **settings, **{"loss.weights": {"watched": 1e5}, "train.epochs": 1})
    trainer.run()
    assert said[0] in [
        f"gradient on what the tasks share, after {steps} steps: click <.1 %, watched >99.9 %" for steps in (18, 21)
    ]
    (warning,) = warned
    assert warning.startswith(
        "the task 'watched' has >99.9 % of the gradient on what the tasks share: the others will "
    )
    assert re.search(r"--config.loss.weights=watched:[\de.-]+ would leave it as much as the others", warning)
    assert "label: {standardise: true}" in warning and "divide_by" in warning


def test_a_binary_task_that_drowns_the_others_has_no_scale(make: Make) -> None:
    warned: list[str] = []
    make(warned=warned, **{"loss.weights": {"click": 1e5}, "train.epochs": 1}).run()
    assert len(warned) == 1 and "standardise" not in warned[0] and "loss.weights=click:" in warned[0]


def test_gradients_on_what_is_shared_by_hand(make: Make) -> None:
    """Of Shared-Bottom: its table, its numeric vectors and its bottom; not the towers."""
    trainer = make(
        **{"model.name": "shared_bottom", "model.gate_units": (128, 64), "loss.weights": {"click": 2.0, "watched": 0.0}}
    )
    model = trainer.model
    batch = next(iter(read_batches(trainer.manifest, "train", training=True, seed=0, epoch=0, start_step=0,
                                     **configs.reading(trainer.config.data))))  # fmt: skip
    assert shared_gradients(model.training_step, batch) == {}  # click alone trains what both could
    model.weighting.initial = tf.constant([2.0, 3.0])
    norms = shared_gradients(model.training_step, batch)
    before = [variable.numpy() for variable in model.trainable_variables]
    (packed,) = model.embeddings.groups
    ids = packed.ids(model.inputs(batch["features"]))
    bottom = model.network.bottom.trainable_variables
    for number, (task, weight) in enumerate((("click", 2.0), ("watched", 3.0))):
        rows = packed.look_up(ids)
        with tf.GradientTape() as tape:
            tape.watch(rows)
            outputs = model.forward(model.inputs(batch["features"]), [rows], training=False)
            spaces = {name: tf.reduce_sum(w) for name, w in batch["weights"].items()}
            loss = weight * model.training_step.losses(batch, outputs, spaces)[number]
        gradients = tape.gradient(loss, [rows, *packed.trainable_variables, *bottom])
        assert norms[task] == pytest.approx(float(tf.linalg.global_norm(gradients)), rel=1e-5)
    for variable, value in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_models_that_share_nothing_say_nothing(make: Make) -> None:
    said: list[str] = []
    make(say=said.append, **{"model.name": "single_task", "model.gate_units": (128, 64), "train.epochs": 1}).run()
    assert not [line for line in said if "gradient" in line]


def test_a_model_that_tells_no_rows_apart_is_told_once(make: Make) -> None:
    warned: list[str] = []
    trainer = make(warned=warned)
    kernel = trainer.model.network.towers["click"].trainable_variables[-2]
    evaluate = trainer._evaluate_epoch

    def spoil_and_evaluate(signals: Any) -> None:
        kernel.assign(tf.zeros_like(kernel))
        evaluate(signals)

    trainer._evaluate_epoch = spoil_and_evaluate  # type: ignore[method-assign]
    trainer.run()
    assert len(warned) == 1
    assert warned[0].startswith("after epoch 1 all validation rows have the same score for click: the model does not ")
    assert "config.model.init_std" in warned[0]


def test_a_loss_that_is_not_finite_names_step_and_task_and_leaves_the_last_good_checkpoint(make: Make) -> None:
    trainer = make(**{"train.checkpoint_every": 4, "train.log_every": 100})
    bias = trainer.model.network.towers["watched"].trainable_variables[-1]
    save = trainer.checkpoints.save

    def save_and_spoil() -> str:
        """The first step after the second checkpoint, step 9, meets a weight that is not a number."""
        path = save()
        if trainer.state.step == 8:
            bias.assign(tf.fill(bias.shape, float("nan")))
        return path

    trainer.checkpoints.save = save_and_spoil  # type: ignore[method-assign]
    with pytest.raises(JobError, match="the loss of task 'watched' is not finite at step 9: "):
        trainer.run()
    resumed = make(**{"train.checkpoint_every": 4, "train.log_every": 100})
    assert resumed.global_step == 8
    assert all(np.isfinite(weight).all() for weight in resumed.model.get_weights())


def test_interrupted_inside_an_evaluation(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    trainer = make()
    evaluate = scoring.predict

    def signalled(*args: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **named)

    monkeypatch.setattr(scoring, "predict", signalled)
    with pytest.raises(Interrupted) as stopped:
        trainer.run()
    monkeypatch.undo()
    assert stopped.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert (trainer.state.epoch, trainer.state.step) == (0, 18)

    resumed = make()
    assert (resumed.state.epoch, resumed.state.step) == (0, 18)
    resumed.run()
    assert [r["epoch"] for r in resumed.workdir.read_metrics() if r["kind"] == "validation"] == [1, 2]
    assert len(losses(resumed)) == 36


def test_damaged_checkpoints(make: Make, one_epoch: Trainer, tmp_path: Path) -> None:
    shutil.copytree(one_epoch.workdir.path, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    last = latest(checkpoints)
    assert last is not None
    os.truncate(f"{last}.data-00000-of-00001", 1000)
    resumed = make(**ONE_EPOCH)
    assert resumed.global_step == 18 and resumed.state.step == 18 and resumed.checkpoints.damaged == [last]
    for path in checkpoints.glob("*.index"):
        path.write_bytes(b"")
    with pytest.raises(JobError, match="none of the checkpoints in .* is whole: .*the checkpoint is damaged"):
        make(**ONE_EPOCH)


def test_checkpoints_hold_the_state_as_json(one_epoch: Trainer) -> None:
    reader = tf.train.load_checkpoint(latest(one_epoch.workdir.best))
    state = json.loads(reader.get_tensor("state/.ATTRIBUTES/py_state"))
    assert (state["epoch"], state["best_epoch"]) == (1, 0)
    names = set(reader.get_variable_to_shape_map())
    assert not any("optimizer" in name for name in names)  # the best weights alone
