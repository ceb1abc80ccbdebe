import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines import manifest as manifests
from pipelines.errors import JobError, UserError
from stem_tf import configs, trained
from stem_tf.callbacks import Interrupted
from stem_tf.checkpoints import latest
from stem_tf.trainer import Trainer
from stem_tf.workdir import Workdir

Make = Callable[..., Trainer]


@pytest.fixture
def make(tmp_path: Path, tiny_settings: dict[str, Any]) -> Make:
    """``make(directory, **{"model.dim": 8})``: a trainer of the tiny run, silent."""

    def trainer(directory: str = "run", say: Callable[[str], None] = lambda line: None, **settings: Any) -> Trainer:
        config = configs.checked(tiny_settings | settings)
        workdir, manifest = Workdir(tmp_path / directory), manifests.load(config.data.dir)
        with workdir.locked():
            workdir.prepare(config, manifest)
        return Trainer(config, manifest, workdir, say)

    return trainer


def losses(trainer: Trainer) -> np.ndarray:
    """[steps, 3]: the losses of metrics.jsonl, means over the epoch so far."""
    records = [r for r in trainer.workdir.read_metrics() if r["kind"] == "train"]
    return np.array([[r["loss"], r["loss/click"], r["loss/watched"]] for r in records])


def test_two_replicas_reach_the_losses_of_one(make: Make) -> None:
    settings = {"train.epochs": 1, "train.log_every": 4}
    single = make("single", **settings)
    single.run()
    expected = losses(single)
    assert expected.shape == (5, 3)  # steps 4, 8, 12, 16 and the last, 18
    assert (expected[-1] < 0.98 * expected[0]).all()
    for per_execution in (1, 4):
        replicas = make(
            f"replicas_{per_execution}",
            **settings,
            **{"train.strategy": "mirrored", "train.steps_per_execution": per_execution},
        )
        assert replicas.model.distribute_strategy.num_replicas_in_sync == 2
        replicas.run()
        np.testing.assert_allclose(losses(replicas), expected, rtol=1e-5)
        assert replicas.state.best_score == pytest.approx(single.state.best_score, abs=1e-3)


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
    assert said[1].split() == ["epoch", "seconds", "mean", "AUC", "click", "watched", "MSE"]
    assert len(said) == 4 and said[2].split()[0] == "1/2" and said[2].endswith("best")

    records = trainer.workdir.read_metrics()
    # 18 steps in executions of 7, 7 and 4.
    assert [(r["epoch"], r["step"]) for r in records if r["kind"] == "train"] == [
        (1, 7), (1, 14), (1, 18), (2, 25), (2, 32), (2, 36),
    ]  # fmt: skip
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


def test_patience_ends_a_run_that_does_not_get_better(make: Make) -> None:
    trainer = make(**{"optimizer.learning_rate": 1e-30, "train.epochs": 5, "train.patience": 2})
    trainer.run()
    assert trainer.state.epoch == 3 and trainer.state.best_epoch == 0
    assert trainer.state.stopped == "2 epochs without a better score"
    again = make(**{"optimizer.learning_rate": 1e-30, "train.epochs": 6, "train.patience": 2})
    again.run()
    assert again.state.epoch == 3


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

    from stem_tf import predictions

    trainer = make()
    evaluate = predictions.predict

    def signalled(*args: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **named)

    monkeypatch.setattr(predictions, "predict", signalled)
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


def test_damaged_checkpoints(make: Make) -> None:
    trainer = make(**{"train.epochs": 1, "train.checkpoint_every": 9})
    trainer.run()
    last = latest(trainer.workdir.checkpoints)
    assert last is not None
    os.truncate(f"{last}.data-00000-of-00001", 1000)
    resumed = make(**{"train.epochs": 1, "train.checkpoint_every": 9})
    assert resumed.global_step == 18 and resumed.state.step == 18 and resumed.checkpoints.damaged == [last]
    for path in trainer.workdir.checkpoints.glob("*.index"):
        path.write_bytes(b"")
    with pytest.raises(JobError, match="none of the checkpoints in .* is whole: .*the checkpoint is damaged"):
        make(**{"train.epochs": 1, "train.checkpoint_every": 9})


def test_checkpoints_hold_the_state_as_json(make: Make) -> None:
    trainer = make(**{"train.epochs": 1})
    trainer.run()
    reader = tf.train.load_checkpoint(latest(trainer.workdir.best))
    state = json.loads(reader.get_tensor("state/.ATTRIBUTES/py_state"))
    assert (state["epoch"], state["best_epoch"]) == (1, 0)
    names = set(reader.get_variable_to_shape_map())
    assert not any("optimizer" in name for name in names)  # the best weights alone
