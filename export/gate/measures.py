"""How much worse a candidate is than what is served, on the same rows, and how far its scores have moved.

Shapes: N rows, R resamples, K buckets. Does not import TensorFlow.

Differences are paired: both models are measured on the same rows of the same draws of users
(`stem_tf.evaluation.intervals`). Both models are as they are, so that an interval is over users alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.schema import Task
from stem_tf.evaluation import metrics
from stem_tf.evaluation.calibration import BUCKETS, calibration, equal_frequency
from stem_tf.evaluation.intervals import Resamples, interval
from stem_tf.evaluation.standing import EXACT_ROWS

_QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
_LEAST_SHARE = 1e-4
"""Stands in for the share of an empty bucket in the population stability index, which would be infinite."""


@dataclass(frozen=True)
class Rows:
    """The held-back rows of one task.

    Attributes:
      task: the task.
      labels, weights: [N]; a row of weight 0 is left out.
      resamples: draws of the N rows' users.
    """

    task: Task
    labels: NDArray
    weights: NDArray
    resamples: Resamples

    def value(self, metric: str, scores: NDArray) -> float:
        """A metric by its rule's name; NaN where it is not defined."""
        if metric in ("auc", "logloss", "mse"):
            return float(getattr(metrics, metric)(self.labels, scores, self.weights))
        found = calibration(self.task.type, self.labels, scores, self.weights)
        return found.error if metric == "calibration_error" else found.ratio

    def drawn(self, metric: str, scores: NDArray) -> NDArray[np.float64]:
        """The metric of each resample, [R]; NaN where it is not defined."""
        y, s, w = self.labels.astype(np.float64), scores.astype(np.float64), self.weights
        if metric == "auc":
            return self.resamples.aucs(y, scores, w, approximate=len(y) > EXACT_ROWS)
        if metric == "logloss":
            return self.resamples.means(metrics.log_losses(y, scores), w)
        if metric == "mse":
            return self.resamples.means((y - s) ** 2, w)
        if metric == "calibration_error":
            return self._calibration_errors(y, s, w)
        predicted, observed = self.resamples.means(s, w), self.resamples.means(y, w)
        defined = (observed > 0) & (predicted >= 0)
        return np.divide(predicted, observed, out=np.full(len(observed), np.nan), where=defined)

    def _calibration_errors(self, y: NDArray, s: NDArray, w: NDArray) -> NDArray[np.float64]:
        """The error over the buckets of all rows: sum over buckets of |sum of w (s - y)| / sum of w, [R]."""
        bucket = np.full(len(s), -1)
        inside = np.asarray(w) > 0
        bucket[inside] = equal_frequency(s[inside], BUCKETS)
        parts = [self.resamples.means(np.where(bucket == k, s - y, 0.0), w) for k in range(BUCKETS)]
        return np.sum(np.abs(parts), axis=0)


def loss(metric: str, candidate: Any, served: Any) -> Any:
    """By how much the candidate is worse, of numbers or arrays [R]; negative where it is better.

    AUC: served - candidate. Calibration error: candidate - served. Logloss and MSE: candidate / served - 1. Predicted
    over observed: |candidate - 1| - |served - 1|.
    """
    if metric == "auc":
        return served - candidate
    if metric == "calibration_error":
        return candidate - served
    if metric == "predicted_over_observed":
        return np.abs(candidate - 1) - np.abs(served - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(candidate == served, 0.0, np.divide(candidate, served) - 1)


@dataclass(frozen=True)
class Loss:
    """By how much a candidate is worse (`loss`), with the ends of its interval; NaN where it has none."""

    estimate: float
    low: float
    high: float


def compare(metric: str, rows: Rows, candidate: NDArray, served: NDArray, level: float) -> Loss:
    """The loss of the candidate's scores [N] against the served ones [N]."""
    estimate = float(loss(metric, rows.value(metric, candidate), rows.value(metric, served)))
    low, high = interval(loss(metric, rows.drawn(metric, candidate), rows.drawn(metric, served)), level)
    return Loss(estimate, low, high)


def drift(candidate: NDArray, served: NDArray) -> dict[str, float]:
    """How far the scores [N] of the candidate are from the served ones [N].

    ``psi``: sum over the tenths k of the served scores of (c_k - s_k) log(c_k / s_k), with the shares c_k and s_k of
    both models' scores in it. ``mean``: |mean of c - mean of s| / standard deviation of s. ``quantiles``: the same for
    the quantile that has moved furthest. The last two are NaN where all served scores are equal.
    """
    c, s = np.asarray(candidate, np.float64), np.asarray(served, np.float64)
    edges = np.unique(np.quantile(s, np.arange(1, 10) / 10))

    def shares(scores: NDArray) -> NDArray[np.float64]:
        counts = np.bincount(np.searchsorted(edges, scores, "left"), minlength=len(edges) + 1)
        return np.maximum(counts / len(scores), _LEAST_SHARE)

    ours, theirs = shares(c), shares(s)
    width = float(np.std(s)) or math.nan
    moved = np.abs(np.quantile(c, _QUANTILES) - np.quantile(s, _QUANTILES))
    return {
        "psi": float(np.sum((ours - theirs) * np.log(ours / theirs))),
        "mean": float(abs(c.mean() - s.mean())) / width,
        "quantiles": float(moved.max()) / width,
    }
