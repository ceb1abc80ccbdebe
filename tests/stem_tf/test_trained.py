"""Best weights of each task: kept, found again, and scored as one model."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipelines import manifest as manifests
from stem_tf import configs, models, trained
from stem_tf.evaluation import predictions, scoring
from stem_tf.models.snapshots import Snapshots
from stem_tf.peers import Interrupted
from stem_tf.training import assembly, checkpoints, monitor
from stem_tf.training.checkpoints import Checkpoints, RunState
from stem_tf.training.monitor import Monitor, Results
from stem_tf.training.trainer import Trainer
from stem_tf.workdir import Workdir
from stem_util.errors import UserError
from stem_util.files import write_json

Train = Callable[[Path, dict[str, Any]], Trainer]


def scores(trainer: Trainer, found: trained.Trained) -> dict[str, np.ndarray]:
    data = trainer.config.data
    return scoring.predict(found.model, trainer.manifest, "test", data, desc="test").scores


class Scripted(Monitor):
    """Scores that are said in advance, epoch by epoch; after these each one is better than the one before."""

    def __init__(self, *scores: float) -> None:
        super().__init__("auc", {})
        object.__setattr__(self, "scores", itertools.chain(scores, itertools.count(2)))

    def value(self, results: Results) -> float:
        return float(next(self.scores))  # type: ignore[attr-defined]


def weights_of(trainer: Trainer) -> list[tf.Variable]:
    return [weight for part in trainer.model.weight_parts.values() for weight in part.weights]


@pytest.mark.parametrize(("model", "best"), [("stem_net", "by_task"), ("stem_net", "own"), ("single_task", "auto")])
def test_each_task_has_the_weights_of_its_own_best_epoch(
    tmp_path: Path, tiny_settings: dict[str, Any], model: str, best: str
) -> None:
    settings = configs.applying(tiny_settings, model) | {
        "model.name": model,
        "train.best": best,
        "train.epochs": 4,
        "train.patience": 3,
    }
    config = configs.checked(settings)
    manifest, workdir = manifests.load(config.data.dir), Workdir(tmp_path / "run")
    weights: list[list[np.ndarray]] = []
    with workdir.locked():
        workdir.prepare(config, manifest)
        trainer = Trainer(config, manifest, workdir, say=lambda line: None)
        trainer.monitor = Scripted(0.8, 0.9, 0.7, 0.6)
        trainer.monitors = {"click": Scripted(0.9, 0.8, 0.7, 0.6), "watched": Scripted(0.9, 0.8, 0.95, 0.8)}
        save = trainer.checkpoints.save

        def save_and_note() -> str:
            weights.append([weight.numpy() for weight in weights_of(trainer)])
            return save()

        trainer.checkpoints.save = save_and_note  # type: ignore[method-assign]
        trainer.run()
    assert {task: best["best_epoch"] for task, best in trainer.state.by_task.items()} == {"click": 0, "watched": 2}
    kept = {"epoch-1", "epoch-3"} | ({"epoch-2"} if best != "by_task" else set())
    assert {path.stem for path in workdir.best.glob("*.index")} == kept

    found = trained.load(workdir, config, manifest, "best")
    assert found.epoch == {"click": 1, "watched": 3} and found.step == 0
    assert isinstance(found.model, Snapshots) == (best == "by_task")
    if (model, best) == ("stem_net", "own"):
        assert trainer.choice is not None and trainer.choice.rest == "epoch-3"  # the last one that was tried
        trained_weights(found.model, trainer, weights)
        return
    together = scores(trainer, found)
    trainer.model.catch_up()  # the weights of an earlier epoch have nothing to make up for
    for epoch, task in ((0, "click"), (2, "watched")):
        for weight, value in zip(weights_of(trainer), weights[epoch], strict=True):
            weight.assign(value)
        alone = scoring.predict(trainer.model, manifest, "test", config.data, desc="test").scores
        np.testing.assert_array_equal(together[task], alone[task])
        if epoch == 0:
            assert np.abs(together["watched"] - alone["watched"]).max() > 0.0


def trained_weights(model: Any, trainer: Trainer, weights: list[list[np.ndarray]]) -> None:
    """click's own weights are the first epoch's, watched's and all others the third's."""
    owner = {
        weight.name: epoch
        for epoch, task in ((0, "click"), (2, "watched"))
        for layer in model.network.own_layers(task)
        for weight in layer.weights
    }
    found = [weight for part in model.weight_parts.values() for weight in part.weights]
    for i, weight in enumerate(found):
        if weight.name.endswith(("table:0", "numeric:0")):
            width = weight.shape[1] // 3
            for place, epoch in enumerate((0, 2, 2)):  # task:click, task:watched, shared
                columns = slice(place * width, (place + 1) * width)
                np.testing.assert_array_equal(weight[:, columns], weights[epoch][i][:, columns])
        else:
            np.testing.assert_array_equal(weight, weights[owner.get(weight.name, 2)][i])


def test_a_task_whose_patience_has_ended_keeps_its_weights_while_others_go_on(
    tmp_path: Path, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    scripted = {"click": Scripted(0.9, 0.8, 0.95), "watched": Scripted(0.5, 0.6, 0.7, 0.65)}
    monkeypatch.setattr(monitor, "of_tasks", lambda config, manifest: scripted)
    settings = tiny_settings | {"train.best": "by_task", "train.epochs": 6, "train.patience": 1}
    trainer = train(tmp_path / "run", settings)
    # Click's third epoch, its best, comes when its patience has ended.
    click, watched = ({"best_epoch": e, "best_score": score, "without_gain": 1} for e, score in ((0, 0.9), (2, 0.7)))
    assert trainer.state.by_task == {"click": click, "watched": watched}
    assert (trainer.state.epoch, trainer.state.stopped) == (4, "1 epoch without a better score for any task")
    assert {path.stem for path in trainer.workdir.best.glob("*.index")} == {"epoch-1", "epoch-3"}
    finished = Trainer(trainer.config, trainer.manifest, trainer.workdir)
    assert finished.state.by_task == trainer.state.by_task and finished.state.stopped == trainer.state.stopped


def validation_results(trainer: Trainer, found: trained.Trained) -> Results:
    data = trainer.config.data
    return predictions.evaluate(
        scoring.predict(found.model, trainer.manifest, "validation", data, desc="validation"), trainer.manifest
    )


def test_what_is_kept_is_what_was_evaluated_and_interrupted_choices_are_made_again(
    tmp_path: Path, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    settings = tiny_settings | {"train.best": "own", "train.epochs": 5}
    evaluate = scoring.predict

    def interrupted(*args: Any, desc: str, **named: Any) -> Any:
        if desc.startswith("best weights"):
            raise Interrupted(signal.SIGTERM)
        return evaluate(*args, desc=desc, **named)

    monkeypatch.setattr(scoring, "predict", interrupted)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", settings)
    workdir, config = Workdir(tmp_path / "run"), configs.checked(settings)
    manifest = manifests.load(config.data.dir)
    before = trained.load(workdir, config, manifest, "best")  # until the choice is made: the best epoch as it was
    assert isinstance(before.epoch, int)
    monkeypatch.undo()

    trainer = train(tmp_path / "run", settings)
    choice = trainer.choice
    assert choice is not None
    best = {task: own["best_epoch"] + 1 for task, own in trainer.state.by_task.items()}
    assert len(set(best.values())) == 2, "a run whose tasks have different best epochs"
    found = trained.load(workdir, config, manifest, "best")
    assert found.epoch == (best if choice.assembled else trainer.state.best_epoch + 1)
    assert validation_results(trainer, found) == choice.results
    assert choice.score == trainer.monitor.value(choice.results) and choice.score >= choice.whole
    assert choice.whole == trainer.state.best_score

    monkeypatch.setattr(scoring, "predict", interrupted)
    again = train(tmp_path / "run", settings)  # nothing is evaluated twice
    assert again.choice == choice
    monkeypatch.undo()
    longer = train(tmp_path / "run", settings | {"train.epochs": 6})
    assert longer.choice is not None
    assert validation_results(longer, trained.load(workdir, config, manifest, "best")) == longer.choice.results


AUCS = {"whole": 0.70, "epoch-2": 0.69, "epoch-1": 0.72, "epoch-3": 0.71}


@pytest.mark.parametrize(
    ("changed", "rest", "tried"),
    [
        ({"epoch-1": (0.72, 0.201)}, "epoch-1", 0.72),
        ({"epoch-1": 0.70, "epoch-3": 0.65}, None, 0.70),  # no better than the best epoch as it was
        ({"epoch-1": (0.72, 0.3)}, "epoch-3", 0.72),  # the regression, which the mean does not count, would lose
    ],
)
def test_the_rest_that_is_best_is_taken_or_none(
    tmp_path: Path, tiny_settings: dict[str, Any], changed: dict[str, Any], rest: str | None, tried: float
) -> None:
    config = configs.checked(tiny_settings)
    manifest, workdir = manifests.load(config.data.dir), Workdir(tmp_path / "run")
    model = models.build(config, manifest)
    state = RunState()
    checkpoints = Checkpoints(workdir.best, model, state, weights_only=True)
    for state.epoch in (1, 2, 3):
        model.embeddings.groups[0].table.assign_add(tf.ones_like(model.embeddings.groups[0].table))
        checkpoints.save_as(f"epoch-{state.epoch}")
    scripted = iter([(v if isinstance(v, tuple) else (v, 0.2)) for v in (AUCS | changed).values()])

    def evaluate() -> Results:
        auc, mse = next(scripted)
        return {"click": {"auc": auc}, "watched": {"mse": mse}}

    tasks = {"click": "epoch-1", "watched": "epoch-3"}
    watched = {"click": Monitor("auc", {"click": 1.0}), "watched": Monitor("loss", {"watched": 1.0})}
    choice = assembly.choose(model, workdir.best, tasks, "epoch-2", evaluate, Monitor("auc", {"click": 1.0}), watched)
    assert (choice.whole, choice.tried) == (0.70, tried)
    if rest is None:
        assert choice.tasks == dict.fromkeys(tasks, "epoch-2") and choice.rest == "epoch-2" and not choice.assembled
        assert choice.score == choice.by_task["click"] == 0.70
    else:
        assert choice.tasks == tasks and choice.rest == rest and choice.assembled
        assert choice.score == choice.by_task["click"] == {"epoch-1": 0.72, "epoch-3": 0.71}[rest]
        assert choice.by_task["watched"] == {"epoch-1": 0.201, "epoch-3": 0.2}[rest]


def test_one_task_cannot_watch_over_all(tmp_path: Path, tiny_settings: dict[str, Any], train: Train) -> None:
    with pytest.raises(UserError, match="config.train.monitor=auc:click names one task, .*: set it to auc"):
        train(tmp_path / "run", tiny_settings | {"train.best": "by_task", "train.monitor": "auc:click"})


def test_a_choice_that_is_replaced_meanwhile_and_a_damaged_one(
    tmp_path: Path, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    trainer = train(tmp_path / "run", tiny_settings | {"train.best": "by_task", "train.epochs": 1})
    path = trainer.workdir.best_epochs
    assert json.loads(path.read_text()) == {"tasks": {"click": "epoch-1", "watched": "epoch-1"}, "rest": None}

    def late(checkpoint: str) -> Any:
        """Between the look for names and the opening of files a job that trains replaces both."""
        monkeypatch.setattr(trained, "hold", checkpoints.hold)
        name = trainer._best.save_as("epoch-1")
        write_json(path, {"tasks": {"click": name, "watched": name}, "rest": None})
        trainer._best.keep_only({name})
        return checkpoints.hold(checkpoint)

    monkeypatch.setattr(trained, "hold", late)
    assert trained.load(trainer.workdir, trainer.config, trainer.manifest, "best").epoch == {"click": 1, "watched": 1}
    assert not (trainer.workdir.best / "epoch-1.index").exists()

    path.write_text('{"tasks": {"click": "epoch-1"}, "rest": null}')
    with pytest.raises(UserError, match=r"epochs.json is damaged \(it should name .*\); take --checkpoint=latest"):
        trained.load(trainer.workdir, trainer.config, trainer.manifest, "best")
    latest = trained.load(trainer.workdir, trainer.config, trainer.manifest, "latest")
    assert latest.epoch == 1
    with pytest.raises(UserError, match="there is no such checkpoint"):
        trained.load(trainer.workdir, trainer.config, trainer.manifest, str(tmp_path / "none"))
    assert isinstance(latest.model, tf.keras.Model)
