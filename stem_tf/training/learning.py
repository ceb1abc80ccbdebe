"""What is known of a run before it starts: which tasks it trains, and up to which step."""

from __future__ import annotations

from typing import Any

from pipelines.manifest import Manifest
from pipelines.schema import Schema
from stem_tf import configs
from stem_util.errors import UserError


def task_weights(config: Any, schema: Schema) -> dict[str, float]:
    """The factor on each task's loss, at the start where factors change: ``loss.weights`` times the schema's weight.

    Raises:
      UserError: all are 0.
    """
    given = config.loss.weights
    weights = {task.name: task.weight * configs.of_task(given, task.name, 1.0) for task in schema.tasks}
    if not any(weights.values()):
        raise UserError(
            f"config.loss.weights={configs.plain(given)} times the schema's weights is 0 for every task: nothing would "
            "be learned"
        )
    return weights


def untrained(config: Any, manifest: Manifest) -> dict[str, str]:
    """The tasks that are not trained, each with the reason: their scores mean nothing.

    Raises:
      UserError: no task is trained.
    """
    reasons = {}
    for task, weight in task_weights(config, manifest.schema).items():
        rows, rate = manifest.task_rows("train", task), manifest.task_rate("train", task)
        binary = next(t.type for t in manifest.schema.tasks if t.name == task) == "binary"
        if not weight:
            reasons[task] = "its weight is 0"
        elif not rows:
            reasons[task] = "it has no rows in train"
        elif binary and rate in (0.0, 1.0):
            reasons[task] = f"its labels in train are all {rate:.0f}"
    also_trains = configs.model_of(config).hyperparameters(configs.flat(config)).also_trains
    for task in manifest.schema.task_names:
        while task not in reasons and task in also_trains:
            reasons.pop(also_trains[task], None)
            task = also_trains[task]
    if len(reasons) == len(manifest.schema.tasks):
        listed = "; ".join(f"{task}, {why}" for task, why in reasons.items())
        raise UserError(f"no task of {manifest.data_dir} can be learned ({listed})")
    return reasons


def last_step(config: Any) -> int | None:
    """Steps after which the learning rate is 0 for good; None where it never is."""
    optimizer = config.optimizer
    if optimizer.schedule == "cosine" and optimizer.final_fraction == 0.0:
        return int(optimizer.warmup_steps + optimizer.decay_steps)
    return None


def warnings(config: Any, manifest: Manifest, steps: int, before: int = 0) -> list[str]:
    """Warnings for the user about a run with ``steps`` steps per epoch, whose schedules have ``before`` behind them."""
    found = [
        f"the task '{task}' is not trained: {why}. It does not count for stopping or for the best weights, and its "
        "scores mean nothing"
        for task, why in untrained(config, manifest).items()
    ]
    end = last_step(config)
    if end is not None and end - before <= steps * (config.train.epochs - 1):
        found.append(
            f"the learning rate is 0 from step {end:,} on (config.optimizer.schedule=cosine, decay_steps="
            f"{config.optimizer.decay_steps:,}), which is in epoch {max(-(-(end - before) // steps), 1):,} of "
            f"{config.train.epochs:,}: training ends there. To learn for longer, give more decay_steps, or a "
            "config.optimizer.final_fraction above 0, in a new --workdir"
        )
    return found
