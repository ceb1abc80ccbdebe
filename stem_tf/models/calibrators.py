"""Calibrators: increasing functions from a binary task's logit to its probability, of stock TensorFlow operations.

They act on the logit of the task's final score, also where that is a product along a chain of tasks (ESMM). A logit
does not saturate in float32, as a probability does near 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import tensorflow as tf


class Calibrator(Protocol):
    """Logits of any shape, float32, to probabilities of the same shape.

    Attributes:
      steepness: the steepest rise per unit of logit, as a multiple of the sigmoid's (1 / 4): how many times it
        magnifies what rounding does to a logit.
    """

    @property
    def steepness(self) -> float: ...

    def __call__(self, logits: tf.Tensor) -> tf.Tensor: ...


@dataclass(frozen=True)
class Line:
    """``sigmoid(slope * logit + offset)``: Platt's method, a temperature (1 / slope), and corrections of the odds."""

    slope: float
    offset: float

    @property
    def steepness(self) -> float:
        return self.slope

    def __call__(self, logits: tf.Tensor) -> tf.Tensor:
        return tf.sigmoid(self.slope * logits + self.offset)


@dataclass(frozen=True)
class Knots:
    """Linear between K >= 2 knots ``(logits, scores)``, both rising, and constant outside of them."""

    logits: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def _rises(self) -> list[float]:
        x, y = self.logits, self.scores
        return [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]

    @property
    def steepness(self) -> float:
        return 4 * max(self._rises)

    def __call__(self, logits: tf.Tensor) -> tf.Tensor:
        x, y, rises = (tf.constant(values, tf.float32) for values in (self.logits, self.scores, self._rises))
        inside = tf.clip_by_value(tf.reshape(logits, [-1]), x[0], x[-1])
        left = tf.minimum(tf.searchsorted(x, inside, side="right") - 1, len(self.logits) - 2)
        rise = tf.gather(rises, left) * (inside - tf.gather(x, left))
        # Not above the next knot: otherwise rounding could make the function fall there.
        return tf.reshape(tf.minimum(tf.gather(y, left) + rise, tf.gather(y, left + 1)), tf.shape(logits))


UNCALIBRATED = Line(1.0, 0.0)


def calibrator(fitted: Mapping[str, Any]) -> Calibrator:
    """The calibrator of what :func:`stem_tf.training.calibration.fit` returns."""
    if "slope" in fitted:
        return Line(fitted["slope"], fitted["offset"])
    return Knots(tuple(fitted["logits"]), tuple(fitted["scores"]))
