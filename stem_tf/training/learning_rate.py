"""Learning-rate schedules: a warm-up, then constant, cosine or exponential."""

from __future__ import annotations

import copy
import math

import tensorflow as tf


class Schedule:
    """Learning rate by step: a linear warm-up over ``warmup_steps``, then ``kind``.

    - ``constant``: the peak.
    - ``cosine``: from the peak to ``final_fraction`` of it over ``decay_steps``, then flat.
    - ``exponential``: peak * decay_rate ^ (steps since the warm-up / decay_steps).
    """

    def __init__(
        self,
        peak: float,
        kind: str = "constant",
        warmup_steps: int = 0,
        decay_steps: int = 1,
        decay_rate: float = 1.0,
        final_fraction: float = 0.0,
    ) -> None:
        if kind not in ("constant", "cosine", "exponential"):
            raise ValueError(f"schedule should be constant, cosine or exponential; received {kind!r}")
        self.peak, self.kind, self.warmup_steps = peak, kind, warmup_steps
        self.decay_steps, self.decay_rate, self.final_fraction = decay_steps, decay_rate, final_fraction
        self._first: tf.Variable | int = 0

    def counted_from(self, first: tf.Variable | int) -> Schedule:
        """The same schedule, which begins at the step ``first``: an integer, or a variable of one."""
        schedule = copy.copy(self)
        schedule._first = first
        return schedule

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The learning rate of ``step``, which counts from 0; a float32 scalar."""
        done = tf.cast(step, tf.float32) - tf.cast(self._first, tf.float32)
        after = tf.maximum(done - self.warmup_steps, 0.0)
        factor = tf.constant(1.0)
        if self.kind == "cosine":
            progress = tf.minimum(after / self.decay_steps, 1.0)
            factor = self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + tf.cos(math.pi * progress))
        elif self.kind == "exponential":
            factor = tf.pow(self.decay_rate, after / self.decay_steps)
        if self.warmup_steps:
            factor = tf.where(done < self.warmup_steps, (done + 1.0) / self.warmup_steps, factor)
        return self.peak * factor
