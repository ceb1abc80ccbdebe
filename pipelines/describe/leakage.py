"""Measures how well one column alone predicts a label: a column that predicts it too well is itself an outcome."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

_BINS = 64
_PRIOR_ROWS = 5.0
_MIN_EACH = 10  # an AUC needs at least so many positives and negatives in each half
_BY_CHANCE = 20  # columns are implied only where so many exceptions would be expected by chance


def codes(values: pa.Array) -> np.ndarray:
    """Codes a column as categories, int64 [N]: 0 for missing values, each distinct value from 1 on."""
    indices = values.dictionary_encode().indices
    return indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1


def codings(values: pa.Array) -> list[np.ndarray]:
    """Codes a column as categories in one or two ways, int64 [N] from 0 each; missing values are a category.

    Args:
      values: [N], numbers or texts; missing ones are null.

    Returns:
      A coding with one category per value; for numbers also one with 64 bins of equal frequency.
    """
    exact = codes(values)
    if pa.types.is_string(values.type) or not exact.any():
        return [exact]
    numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
    edges = np.nanquantile(numbers, np.linspace(0, 1, _BINS + 1)[1:-1])
    return [exact, np.where(exact == 0, 0, np.searchsorted(edges, numbers, "right") + 1)]


def implies(part: np.ndarray, whole: np.ndarray) -> bool:
    """Whether ``part``, bool [N], is true only where ``whole`` is, in more rows than by chance."""
    by_chance = np.count_nonzero(part) * (1 - np.count_nonzero(whole) / max(len(whole), 1))
    return by_chance >= _BY_CHANCE and np.count_nonzero(part & ~whole) == 0


def alone_auc(codings: Sequence[np.ndarray], labels: np.ndarray, seed: int = 0) -> float:
    """AUC of the mean label per category, fitted on one half of the rows and scored on the other.

    The mean is smoothed with 5 rows at the mean of the half, so that values seen once do not get extreme scores. Both
    halves are scored, and their AUCs averaged. The result is that of the best coding.

    Args:
      codings: from :func:`codings`, [N] each.
      labels: [N], 0 or 1; NaN for rows to leave out.

    Returns:
      The AUC, or -1 if a half has fewer than 10 rows of a class.
    """
    inside = np.isfinite(labels)
    positive = labels[inside] > 0.5
    half = np.random.default_rng(seed).random(len(positive)) < 0.5
    cells = 2 * half + positive
    if np.bincount(cells, minlength=4).min() < _MIN_EACH:
        return -1.0
    scores = []
    for codes in codings:
        counts = np.bincount(4 * codes[inside] + cells)
        first, second = np.pad(counts, (0, -len(counts) % 4)).reshape(-1, 2, 2).swapaxes(0, 1)
        scores.append((_score(first, second) + _score(second, first)) / 2)
    return max(scores)


def _score(fit: np.ndarray, other: np.ndarray) -> float:
    """AUC on the half ``other`` of the smoothed mean label per category in ``fit``; both are counts [categories, 2]."""
    means = (fit[:, 1] + _PRIOR_ROWS * fit[:, 1].sum() / fit.sum()) / (fit.sum(1) + _PRIOR_ROWS)
    # Rows with equal means are tied, and are one step of the ROC curve, whose area is a sum over steps.
    step = np.unique(means, return_inverse=True)[1]
    misses, hits = np.bincount(step, other[:, 0]), np.bincount(step, other[:, 1])
    below = np.cumsum(misses) - misses
    return float((hits * (below + misses / 2)).sum() / (hits.sum() * misses.sum()))
