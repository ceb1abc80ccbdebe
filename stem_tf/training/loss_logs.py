"""The losses that Keras logs at each step: means over the epoch so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from stem_tf.training.loss_weighting import Weighting

if TYPE_CHECKING:
    from stem_tf.models.ranking_model import RankingModel


def updated(model: RankingModel, weighting: Weighting, losses: tf.Tensor, loss: tf.Tensor) -> dict[str, tf.Tensor]:
    """Updates and returns ``loss`` and ``loss/<task>``, means over the epoch; ``weight/<task>`` where weights change.

    A squared error is logged in the units of its label, standardised or not.

    Args:
      model: holds the means.
      weighting: its weights are logged as they are for the next step.
      losses: the step's losses by task ``[T]``.
      loss: the step's loss, a scalar.
    """
    model.loss_mean.update_state(loss)
    for (name, mean), task_loss in zip(model.loss_means.items(), tf.unstack(losses), strict=True):
        scale = model.scales.get(name)
        mean.update_state(task_loss if scale is None else task_loss * scale.std**2)
    logs = {"loss": model.loss_mean.result()}
    logs |= {f"loss/{name}": mean.result() for name, mean in model.loss_means.items()}
    if weighting.kind != "static":
        weights = tf.unstack(weighting.weights(model.schedule_step, model.epoch))
        logs |= {f"weight/{task.name}": weight for task, weight in zip(model.tasks, weights, strict=True)}
    return logs
