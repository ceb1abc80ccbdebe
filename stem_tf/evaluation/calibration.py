"""Do scores mean what they say? Predicted against observed means by bucket, and the expected calibration error.

Shapes: N rows, K buckets. Labels are 0 or 1 (binary tasks) or any number (regressions). ``weights`` (default 1 for
every row) multiply rows; a row of weight 0 is ignored, whatever its label. Rows count as independent of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stem_tf.evaluation import metrics

BUCKETS = 10
"""How many buckets a calibration has unless it is told otherwise."""


@dataclass(frozen=True)
class Calibration:
    """Predicted and observed means of K buckets, lowest scores first. Without any row, K is 0 and numbers are NaN.

    Attributes:
      rows: int64 [K], rows of non-zero weight; at least 1 each.
      predicted, observed: float64 [K], weighted means of scores and labels.
      low, high: float64 [K], an interval that holds the mean that is observed in the long run (Wilson 1927 for binary
        tasks, with (sum of w)^2 / (sum of w^2) as the number of rows; mean -+ z standard errors for regressions).
      predicted_mean, observed_mean: over all rows.
      error: expected calibration error (Naeini et al. 2015): the mean over rows of |predicted - observed| of their
        bucket.
      floor: the error that a perfectly calibrated model has on average, because labels are random.
      limit: the error that a perfectly calibrated model exceeds in one test set of 20.
    """

    rows: NDArray[np.int64]
    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    predicted_mean: float
    observed_mean: float
    error: float
    floor: float
    limit: float

    @property
    def ratio(self) -> float:
        """Predicted over observed mean; NaN where nothing was observed, or a mean is negative."""
        positive = self.predicted_mean >= 0 and self.observed_mean > 0
        return self.predicted_mean / self.observed_mean if positive else float("nan")


def calibration(
    kind: Literal["binary", "regression"],
    labels: ArrayLike,
    scores: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    buckets: int = BUCKETS,
    equal: Literal["frequency", "width"] = "frequency",
    level: float = 0.05,
) -> Calibration:
    """Compares the mean score of each bucket with its mean label.

    Args:
      kind: the task's type.
      labels: [N].
      scores: [N]: probabilities of binary tasks, values of regressions.
      weights: [N], or None.
      buckets: how many at most; buckets without rows are left out.
      equal: ``frequency``: as many rows in each, as :func:`equal_frequency` divides them; ``width``: equal ranges of
        scores, of [0, 1] for binary tasks and of the scores' own range for regressions.
      level: an interval misses the long-run mean with this probability.
    """
    y, s = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    w = (~np.isnan(y)).astype(np.float64) if weights is None else np.asarray(weights, np.float64)
    inside = w != 0
    y, s, w = y[inside], s[inside], w[inside]
    if not len(y):
        empty = np.zeros(0)
        return Calibration(np.zeros(0, np.int64), empty, empty, empty, empty, *[float("nan")] * 5)
    if equal == "frequency":
        bucket = equal_frequency(s, buckets)
    else:
        low, high = (0.0, 1.0) if kind == "binary" else (s.min(), s.max())
        bucket = np.clip((s - low) / ((high - low) or 1.0) * buckets, 0, buckets - 1).astype(np.int64)
    filled, bucket = np.unique(bucket, return_inverse=True)

    def sums(values: NDArray) -> NDArray[np.float64]:
        return np.bincount(bucket, values, len(filled)).astype(np.float64)

    weight = sums(w)
    predicted, observed = sums(w * s) / weight, sums(w * y) / weight
    # Variances of the observed mean of each bucket: as it is, and as it would be if the scores were right.
    if kind == "binary":
        right = sums(w**2 * s * (1 - s)) / weight**2
        bounds = _wilson(observed, weight**2 / sums(w**2), level)
    else:
        right = sums(w**2 * (y - s - (observed - predicted)[bucket]) ** 2) / weight**2
        margin = _z(level) * np.sqrt(sums(w**2 * (y - observed[bucket]) ** 2) / weight**2)
        bounds = observed - margin, observed + margin
    share = weight / weight.sum()
    # |x| of a normal x with standard deviation d has the mean d sqrt(2 / pi) and the variance d^2 (1 - 2 / pi).
    floor = float(np.sum(share * np.sqrt(right * 2 / np.pi)))
    spread = float(np.sqrt(np.sum(share**2 * right) * (1 - 2 / np.pi)))
    return Calibration(
        rows=np.bincount(bucket),
        predicted=predicted,
        observed=observed,
        low=bounds[0],
        high=bounds[1],
        predicted_mean=float(np.sum(share * predicted)),
        observed_mean=float(np.sum(share * observed)),
        error=float(np.sum(share * np.abs(predicted - observed))),
        floor=floor,
        limit=floor + NormalDist().inv_cdf(0.95) * spread,
    )


def measures(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> dict[str, float]:
    """What a calibrator changes of a binary task: AUC (by ties), logloss, predicted over observed, calibration error.

    Args:
      labels: [N].
      scores: [N], probabilities.
      weights: [N], or None.
    """
    meaning = calibration("binary", labels, scores, weights)
    return {
        "auc": metrics.auc(labels, scores, weights),
        "logloss": metrics.logloss(labels, scores, weights),
        "predicted_over_observed": meaning.ratio,
        "calibration_error": meaning.error,
    }


def equal_frequency(scores: ArrayLike, buckets: int) -> NDArray[np.int64]:
    """The bucket of each row, from 0 (the lowest scores) to ``buckets`` - 1, [N]: as many rows in each as ties allow.

    Rows of equal scores share a bucket: the one of their mean rank.
    """
    return ranks(scores) * buckets // (2 * np.size(scores) or 1)


def ranks(scores: ArrayLike) -> NDArray[np.int64]:
    """Twice the rank of each row among N, less 1: odd numbers from 1 to 2 N - 1, [N]; equal scores have their mean."""
    scores = np.asarray(scores)
    if not len(scores):
        return np.zeros(0, np.int64)
    order = np.argsort(scores)
    ranked = scores[order]
    first = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # the first row of each distinct score
    length = np.diff(np.r_[first, len(scores)])
    rank = np.empty(len(scores), np.int64)
    rank[order] = np.repeat(2 * first + length, length)
    return rank


def _z(level: float) -> float:
    return NormalDist().inv_cdf(1 - level / 2)


def _wilson(rate: NDArray, rows: NDArray, level: float) -> tuple[NDArray, NDArray]:
    """Wilson's interval for a rate that was seen on (effectively) so many rows."""
    z = _z(level)
    middle = (rate + z**2 / (2 * rows)) / (1 + z**2 / rows)
    margin = z / (1 + z**2 / rows) * np.sqrt(rate * (1 - rate) / rows + z**2 / (4 * rows**2))
    return np.maximum(middle - margin, 0.0), np.minimum(middle + margin, 1.0)
