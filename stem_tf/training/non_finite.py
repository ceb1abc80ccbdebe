"""The first step whose loss or gradient is not finite: noted in the step, reported to the user outside of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from stem_util.errors import JobError

if TYPE_CHECKING:
    from stem_tf.models.ranking_model import RankingModel


def note(model: RankingModel, step: tf.Tensor, losses: tf.Tensor, norm: tf.Tensor) -> None:
    """Keeps the first step that is not finite in ``model.first_bad_step``, and the task in ``first_bad_task``.

    Args:
      model: its two counters are -1 until then.
      step: steps done before this one.
      losses: by task ``[T]``. Where all of them are finite, and only the gradient is not, the task is -1.
      norm: norm of the gradient, a scalar.
    """
    bad = tf.logical_not(tf.math.is_finite(losses))
    first = (model.first_bad_step < 0) & (tf.reduce_any(bad) | tf.logical_not(tf.math.is_finite(norm)))
    task = tf.where(tf.reduce_any(bad), tf.argmax(bad, output_type=tf.int32), -1)
    model.first_bad_task.assign(tf.where(first, task, model.first_bad_task))
    model.first_bad_step.assign(tf.where(first, step, model.first_bad_step))


def check_finite(model: RankingModel) -> None:
    """Raises JobError naming step and task of the first loss or gradient that was not finite."""
    step = int(model.first_bad_step.numpy())
    if step < 0:
        return
    task = int(model.first_bad_task.numpy())
    what = "the gradient" if task < 0 else f"the loss of task '{model.tasks[task].name}'"
    raise JobError(
        f"{what} is not finite at step {step + 1:,}: the last checkpoint is from before that. Lower "
        "config.optimizer.learning_rate, warm up, or clip (config.optimizer.clip_norm), in a new --workdir"
    )
