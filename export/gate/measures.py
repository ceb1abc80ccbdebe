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
_FINE = 200
"""Bins of equal weight, between whose edges quantiles are interpolated."""
_LEAST_SHARE = 1e-4


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
class Estimate:
    """A number, and the ends of its interval; NaN where it has none."""

    estimate: float
    low: float
    high: float


def compare(metric: str, rows: Rows, candidate: NDArray, served: NDArray, level: float) -> Estimate:
    """The `loss` of the candidate's scores [N] against the served ones [N]."""
    estimate = float(loss(metric, rows.value(metric, candidate), rows.value(metric, served)))
    low, high = interval(loss(metric, rows.drawn(metric, candidate), rows.drawn(metric, served)), level)
    return Estimate(estimate, low, high)


def drift(candidate: NDArray, served: NDArray, resamples: Resamples, level: float) -> dict[str, Estimate]:
    """How far the scores [N] of the candidate are from the served ones [N] of the same rows.

    ``psi``: the population stability index, the sum over the tenths k of the served scores of
    (c_k - s_k) log(c_k / s_k), with the shares c_k and s_k of both models' scores in it; an empty tenth counts as half
    a row, and as 1e-4 at least. ``mean``: |mean of c - mean of s| / standard deviation of s. ``quantiles``: the same
    for seven quantiles, of which the largest counts. The last two are NaN where all served scores are equal.

    None of the three can be below 0, so chance alone makes them larger: the index of two samples of one distribution is
    about (K - 1) (1 / N + 1 / N), and more where the rows of a user are alike. Resamples of the users are off by as
    much again, so an interval is mirrored at the estimate e, [2e - high, 2e - low], which takes both off (the basic
    bootstrap of Davison and Hinkley, section 5.2).
    """
    c, s = np.asarray(candidate, np.float64), np.asarray(served, np.float64)
    tenths = np.unique(np.quantile(s, np.arange(1, 10) / 10))
    edges = np.unique(np.quantile(np.r_[c, s], np.linspace(0, 1, _FINE + 1)))
    width = float(np.std(s)) or math.nan

    def psi(ours: NDArray, theirs: NDArray) -> NDArray:
        least = max(_LEAST_SHARE, 0.5 / len(s))
        ours, theirs = np.maximum(ours, least), np.maximum(theirs, least)
        return np.asarray(np.sum((ours - theirs) * np.log(ours / theirs), axis=1))

    def quantiles(ours: NDArray, theirs: NDArray) -> NDArray:
        c_at, s_at = (
            np.array([np.interp(_QUANTILES, np.r_[0, np.cumsum(row)], edges) for row in shares])
            for shares in (ours, theirs)
        )
        return np.asarray(np.max(np.abs(c_at - s_at), axis=1) / width)

    def over_bins(measured: Any, inner: NDArray) -> Estimate:
        """A measure of both models' shares [R, K] of the bins that the edges ``inner`` part."""
        bins, count = [np.searchsorted(inner, scores, "left") for scores in (c, s)], len(inner) + 1
        whole = measured(*(np.bincount(of, minlength=count)[np.newaxis] / len(s) for of in bins))
        return _mirrored(float(whole[0]), measured(*(resamples.shares(of, count) for of in bins)), level)

    weights = np.ones(len(s))
    means = np.abs(resamples.means(c, weights) - resamples.means(s, weights)) / width
    return {
        "psi": over_bins(psi, tenths),
        "mean": _mirrored(float(abs(c.mean() - s.mean())) / width, means, level),
        "quantiles": over_bins(quantiles, edges[1:-1]),
    }


def _mirrored(estimate: float, drawn: NDArray[np.float64], level: float) -> Estimate:
    """A number that is not below 0, with its interval mirrored at the estimate."""
    low, high = np.maximum(0.0, 2 * estimate - np.array(interval(drawn, level))[::-1])
    return Estimate(estimate, float(low), float(high))
