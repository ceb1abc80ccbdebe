"""What a finished run has reached: report.json and the picture of its learning curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stem_tf import report
from stem_tf.training.logger import by_metric
from stem_tf.training.trainer import Trainer
from stem_util.files import write_json
from stem_util.version import versions


@dataclass(frozen=True)
class Outcome:
    """What report.json says, and how it was written.

    Attributes:
      report: what report.json holds: the best epoch and its metrics, the best of each task, calibrators, what the run
        went on from, why it ended, samples per second, the command and the versions that made it, and all validation
        metrics.
      complete: whether metrics.jsonl has the evaluation of every epoch.
      picture: whether learning_curves.png was drawn; it is not where matplotlib is not installed.
    """

    report: dict[str, Any]
    complete: bool
    picture: bool


def write(trainer: Trainer, command: str = "") -> Outcome:
    """Writes report.json and learning_curves.png of a run that is finished.

    Args:
      trainer: has trained the run to its end.
      command: the command line that did; "" where a program did.
    """
    state, workdir = trainer.state, trainer.workdir
    records = workdir.read_metrics()
    curves = [record for record in records if record["kind"] == "validation"]
    by_task = _best_by_task(trainer)
    known: dict[str, Any] = {"epoch": state.best_epoch + 1, "score": state.best_score}
    best = next((record for record in curves if record["epoch"] == known["epoch"]), known)
    if trainer.choice is not None and trainer.choice.assembled:
        of_task = {task: own["epoch"] for task, own in by_task.items()}
        rest = _epoch_of(trainer.choice.rest)
        best = {"kind": "validation", "epoch": of_task, "rest_epoch": rest, "score": trainer.choice.score}
        best |= report.finite(by_metric(trainer.choice.results))
    tree = {
        "experiment": trainer.config.experiment,
        "monitor": trainer.config.train.monitor,
        "best": best,
        "best_by_task": by_task,
        "epochs": state.epoch,
        "steps": trainer.global_step,
        "calibration": (trainer.calibration or {"tasks": {}})["tasks"],
        **({"goes_on_from": state.ancestor} if state.ancestor else {}),
        "stopped": trainer.why_ended(),
        "samples_per_second": round(state.samples / state.seconds, 1) if state.seconds else None,
        "command": command,
        "versions": versions(),
        "learning_curves": curves,
    }
    write_json(workdir.report, tree)
    tasks = trainer.manifest.schema.tasks
    kept = {task.name: state.best_epoch + 1 for task in tasks} | {task: own["epoch"] for task, own in by_task.items()}
    types = {task.name: task.type for task in tasks}
    variances = {task: scale.std**2 for task, scale in trainer.model.scales.items()}
    picture = report.learning_curves(records, types, kept, variances, workdir.learning_curves)
    return Outcome(tree, len(curves) >= state.epoch, picture)


def _best_by_task(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """For each task the epoch of the weights that are kept for it, and their score by the task's own monitor."""
    choice = trainer.choice
    if choice is None:
        of_task = trainer.state.by_task.items()
        return {task: {"epoch": own["best_epoch"] + 1, "score": own["best_score"]} for task, own in of_task}
    return {task: {"epoch": _epoch_of(choice.tasks[task]), "score": score} for task, score in choice.by_task.items()}


def _epoch_of(checkpoint: str) -> int:
    """The epoch in a checkpoint's name: 3 for ``epoch-3`` and for ``epoch-3-2``."""
    return int(checkpoint.split("-")[1])
