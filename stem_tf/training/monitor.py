"""What "better" means on validation: the score that early stopping and the best checkpoint follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.manifest import Manifest
from stem_tf.evaluation.metrics import mean_auc
from stem_tf.training import learning
from stem_util.errors import UserError, did_you_mean

Results = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Monitor:
    """A score of one epoch's metrics.

    Attributes:
      kind: ``auc`` (higher is better) or ``loss`` (lower is better).
      weights: the weight of each task that counts. The score is the mean of their AUCs, or the weighted sum of their
        losses.
      warning: one sentence for the user, or "".
    """

    kind: str
    weights: Mapping[str, float]
    warning: str = ""

    def value(self, results: Results) -> float:
        """The score of the metrics that :func:`stem_tf.evaluation.metrics.evaluate` returns."""
        if self.kind == "auc":
            return mean_auc({task: results[task] for task in self.weights})
        return float(sum(weight * task_loss(results[task]) for task, weight in self.weights.items()))

    def better(self, new: float, old: float | None) -> bool:
        return old is None or (new > old if self.kind == "auc" else new < old)


def of_tasks(config: Any, manifest: Manifest) -> dict[str, Monitor]:
    """The monitor of each task by itself: its AUC (``train.monitor`` auc) where it has one, else its loss.

    A task without validation rows, or one that is not trained, follows the monitor of all tasks.

    Raises:
      UserError: ``train.monitor`` names one task.
    """
    name = config.train.monitor
    kind, _, only = name.partition(":")
    if only:
        raise UserError(
            f"config.train.monitor={name} names one task, but best weights are kept for each: set it to {kind}"
        )
    together, untrained = monitor(config, manifest), learning.untrained(config, manifest)
    result = {}
    for task in manifest.schema.task_names:
        if kind == "auc" and together.kind == "auc" and task in together.weights:
            result[task] = Monitor("auc", {task: 1.0})
        else:
            alone = manifest.task_rows("validation", task) and task not in untrained
            result[task] = Monitor("loss", {task: 1.0}) if alone else together
    return result


def _per_error(task: str, manifest: Manifest) -> float:
    """The training loss over :func:`task_loss`: training measures the error of a standardised label."""
    scale = manifest.label_scales.get(task)
    return 1.0 if scale is None else scale.std**-2


def task_loss(metrics: Mapping[str, float]) -> float:
    """A task's mean loss: logloss, or MSE of a regression."""
    return metrics["logloss"] if "logloss" in metrics else metrics["mse"]


def monitor(config: Any, manifest: Manifest) -> Monitor:
    """The monitor that ``config.train.monitor`` names, for the tasks that are trained and have validation rows.

    ``auc`` is the mean over the binary tasks that have both classes in validation, or the loss where there is none.
    ``loss`` is the sum that training minimises; weights that change count as they are at the start.

    Raises:
      UserError: an unknown task, or one that has no such score.
    """
    name = config.train.monitor
    kind, _, only = name.partition(":")
    tasks, untrained = manifest.schema.tasks, learning.untrained(config, manifest)
    rows = {task.name: manifest.task_rows("validation", task.name) for task in tasks}
    has_auc = [
        task.name
        for task in tasks
        if task.type == "binary" and rows[task.name] and 0 < manifest.task_rate("validation", task.name) < 1
    ]
    if only:
        if only not in rows:
            raise UserError(
                f"config.train.monitor: no task '{only}'{did_you_mean(only, rows) or '.'} Tasks: {', '.join(rows)}"
            )
        if only in untrained:
            raise UserError(f"config.train.monitor={name}: the task is not trained: {untrained[only]}")
        if only not in has_auc if kind == "auc" else not rows[only]:
            why = "rows of both classes" if kind == "auc" else "rows"
            raise UserError(f"config.train.monitor={name}: the task has no {why} in the validation split")
        return Monitor(kind, {only: 1.0})
    # A task without rows has a loss of NaN.
    losses = {
        task: weight * _per_error(task, manifest)
        for task, weight in learning.task_weights(config, manifest.schema).items()
        if rows[task] and task not in untrained
    }
    trained = [task for task in has_auc if task not in untrained]
    missing = [t.name for t in tasks if t.type == "binary" and t.name not in has_auc and t.name not in untrained]
    warning = f"without both classes in validation, so without an AUC: {', '.join(missing)}" if missing else ""
    if kind == "auc" and trained:
        return Monitor("auc", dict.fromkeys(trained, 1.0), warning)
    if not losses:
        raise UserError(f"no task that is trained has rows in the validation split of {manifest.data_dir}")
    if kind == "auc":
        warning = "; ".join(filter(None, [warning, "no task has a validation AUC: the loss decides"]))
    return Monitor("loss", losses, warning)
