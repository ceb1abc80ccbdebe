"""Each task's share of the gradient on what the tasks share, which shows whether one task drowns the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from stem_tf import configs, report
from stem_tf.training.train_step import TrainStep, sizes

if TYPE_CHECKING:
    from stem_tf.models.predictor import Batch
    from stem_tf.models.ranking_model import RankingModel

_DROWNED = 0.95
"""A task with more than this share leaves too little for the others. On real logs, one of two tasks has up to .75."""


def shared_gradients(step: TrainStep, batch: Batch) -> dict[str, float]:
    """Norm of the gradient of each task's weighted loss on the tables and layers that several tasks train.

    Taken on one batch, without dropout and L2; ``{}`` where tasks share nothing. Called outside of any step: it makes a
    backward pass per task, and writes nothing.
    """

    def compute(batch: Batch) -> tf.Tensor:
        return _squared_gradients(step, batch)

    strategy = step.model.distribute_strategy
    if strategy.num_replicas_in_sync > 1:  # each replica is given the whole batch
        compute = tf.function(compute, autograph=False)
    squares = strategy.experimental_local_results(strategy.run(compute, [batch]))[0].numpy()
    shared = squares[:, np.count_nonzero(squares, axis=0) > 1]
    if not shared.size:
        return {}
    return {task.name: float(norm) for task, norm in zip(step.model.tasks, np.sqrt(shared.sum(axis=1)), strict=True)}


def _squared_gradients(step: TrainStep, batch: Batch) -> tf.Tensor:
    """Squared gradients of the weighted losses, summed over each table and network variable: ``[T, parts]``."""
    model, groups = step.model, step.model.embeddings.groups
    inputs, spaces = model.inputs(batch["features"]), sizes(batch["weights"])
    looked_up = step.looked_up(step.read(inputs, model.global_step))
    rows = [(looked, len(g.tables)) for looked, g in zip(looked_up, groups, strict=True) if looked is not None]
    kernels = [(weight, len(group.tables)) for group in groups for weight in group.trainable_variables]
    parts = [*rows, *kernels, *((weight, 1) for weight in model.network.trainable_variables)]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([looked for looked, _ in rows])
        losses = step.losses(batch, model.forward(inputs, looked_up, training=False), spaces)
        losses = tf.unstack(step.weighting.weights(model.schedule_step, model.epoch) * losses)
    squares = []
    for loss in losses:
        gradients = tape.gradient(loss, [part for part, _ in parts], unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # Tables stand side by side in the last axis.
        by_table = [tf.reshape(g, [-1, n, g.shape[-1] // n]) for g, (_, n) in zip(gradients, parts, strict=True)]
        squares.append(tf.concat([tf.reduce_sum(tf.square(g), axis=[0, 2]) for g in by_table], axis=0))
    return tf.stack(squares)


def drowning(shares: Mapping[str, float], untrained: Collection[str]) -> str | None:
    """The task that drowns the others; None where there is none.

    Args:
      shares: each task's share of the gradient; they sum to 1.
      untrained: tasks that are not trained and have no share.
    """
    task = max(shares, key=lambda name: shares[name])
    return task if shares[task] > _DROWNED and len(shares) > len(untrained) + 1 else None


def warning(
    model: RankingModel, config: Any, task: str, shares: Mapping[str, float], untrained: Collection[str]
) -> str:
    """What to do about a task that drowns the others, for the user."""
    others = [share for name, share in shares.items() if name != task and name not in untrained]
    weight = configs.of_task(config.loss.weights, task, 1.0) * np.mean(others) / shares[task]
    ways = f"--config.loss.weights={task}:{weight:.1g} would leave it as much as the others"
    regression = next(t.type for t in model.tasks if t.name == task) == "regression"
    if regression and task not in model.scales:
        ways += (
            "; or bring its label to a scale of 1 in the schema, with 'label: {standardise: true}' (undone in what "
            "is served) or divide_by"
        )
    return (
        f"the task '{task}' has {report.percent(shares[task])} of the gradient on what the tasks share: the others "
        f"will hardly learn. {ways}"
    )
