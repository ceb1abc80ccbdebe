"""Exact metrics of a whole split, in numpy: no thresholds, no sampling, float64 sums.

Shapes: N rows. Labels of binary metrics are 0 or 1. ``weights`` (default 1 for every row) multiply rows; a row of
weight 0 is ignored, so rows outside a task's sample space and padding rows may be passed as they are.
A metric without a value (no rows, or one class only) is NaN. Every function raises ValueError for arrays of unequal
lengths, NaN scores, labels outside their range and negative weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

Results = dict[str, dict[str, float]]
"""What :func:`evaluate` returns: metric by name, by task."""


def auc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative) + P(equal) / 2.

    Costs one sort per class and a binary search of the smaller class in the larger; unweighted counts are exact.

    Args:
      labels: [N], 0 or 1.
      scores: [N], any real scale.
      weights: [N], or None.
    """
    y, s, w = _rows(labels, scores, weights)
    _check_binary(y)
    positive = y > 0.5
    if w is not None:
        return _weighted_auc(s[positive], w[positive], s[~positive], w[~positive])
    few, many = np.sort(s[positive]), np.sort(s[~positive])
    swapped = len(few) > len(many)
    if swapped:
        few, many = many, few
    if not len(few):
        return float("nan")
    # For each of `few`: twice the number of `many` below it, ties counting one.
    wins = int(np.searchsorted(many, few, "left").sum()) + int(np.searchsorted(many, few, "right").sum())
    pairs = 2 * len(few) * len(many)
    return (pairs - wins if swapped else wins) / pairs


def grouped_auc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean over groups of the AUC inside the group, each weighted by its rows; groups with one class are left out.

    Args:
      labels: [N], 0 or 1.
      scores: [N].
      groups: [N], any sortable key, e.g. the int64 ``group`` of a batch.
      weights: [N], or None; a group then counts with the sum of its weights.
    """
    keys = np.asarray(groups)
    if keys.shape != np.shape(labels):
        raise ValueError(f"groups should have the shape of labels, {np.shape(labels)}, but have {keys.shape}")
    if weights is not None:
        keys = keys[np.asarray(weights) != 0]
    y, s, w = _rows(labels, scores, weights)
    _check_binary(y)
    if not len(y):
        return float("nan")
    order = np.lexsort((s, keys))
    y, s, g = y[order], s[order], keys[order]
    w = np.ones(len(y)) if w is None else w[order]

    # Runs are rows of one group with one score; their starts include every start of a group.
    group_start = np.r_[True, g[1:] != g[:-1]]
    run_start = np.flatnonzero(group_start | np.r_[True, s[1:] != s[:-1]])
    group_of_run = np.cumsum(group_start)[run_start] - 1
    groups_first_run = np.flatnonzero(group_start[run_start])

    positives = np.add.reduceat(w * (y > 0.5), run_start)
    negatives = np.add.reduceat(w * (y < 0.5), run_start)
    negatives_before = np.cumsum(negatives) - negatives
    negatives_before -= negatives_before[groups_first_run][group_of_run]
    wins = np.add.reduceat(positives * (negatives_before + negatives / 2), groups_first_run)

    group_positives = np.add.reduceat(positives, groups_first_run)
    group_negatives = np.add.reduceat(negatives, groups_first_run)
    both = (group_positives > 0) & (group_negatives > 0)
    if not both.any():
        return float("nan")
    pairs = group_positives[both] * group_negatives[both]
    size = (group_positives + group_negatives)[both]
    return float(np.sum(size * (wins[both] / pairs)) / np.sum(size))


def logloss(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean of -y log p - (1 - y) log(1 - p), with p clipped to [eps, 1 - eps].

    eps is the machine epsilon of the scores' own type (1.2e-7 for float32): a float32 sigmoid that saturated at
    exactly 0 or 1 costs at most 15.9, as far as its precision can tell, instead of infinity.

    Args:
      labels: [N], in [0, 1].
      scores: [N], probabilities.
      weights: [N], or None.
    """
    scores = np.asarray(scores)
    eps = float(np.finfo(scores.dtype if scores.dtype.kind == "f" else np.float64).eps)
    y, s, w = _rows(labels, scores, weights)
    for name, values in (("labels", y), ("scores", s)):
        outside = np.count_nonzero(~((values >= 0) & (values <= 1)))
        if outside:
            raise ValueError(f"{name} of a logloss should be in [0, 1], but {outside:,} of {len(values):,} are not")
    p = np.clip(s.astype(np.float64), eps, 1 - eps)
    y = y.astype(np.float64)
    return _mean(-(y * np.log(p) + (1 - y) * np.log1p(-p)), w)


def mse(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean of (label - score)^2; labels and scores [N] of any scale."""
    y, s, w = _rows(labels, scores, weights)
    return _mean((y.astype(np.float64) - s) ** 2, w)


def smoothed_means(
    keys_train: ArrayLike, labels_train: ArrayLike, keys: ArrayLike, prior_rows: float = 5
) -> NDArray[np.float64]:
    """The trivial answer: the train mean of the label per key, pulled towards the train mean m.

    score(k) = (sum of labels of k + prior_rows * m) / (rows of k + prior_rows); an unseen key scores m.

    Args:
      keys_train: [M], e.g. the ``group`` or ``item`` of train rows inside the task's space.
      labels_train: [M].
      keys: [N], the keys to score.
      prior_rows: how many rows at the train mean are added to every key.

    Returns:
      [N] float64; NaN when there are no train rows.
    """
    labels_train = np.asarray(labels_train, np.float64)
    keys_train, keys = np.asarray(keys_train), np.asarray(keys)
    if keys_train.shape != labels_train.shape:
        raise ValueError(
            f"keys_train should have the shape of labels_train, {labels_train.shape}, but have {keys_train.shape}"
        )
    if not len(labels_train):
        return np.full(len(keys), np.nan)
    mean = labels_train.mean()
    known, inverse = np.unique(keys_train, return_inverse=True)
    sums = np.bincount(inverse, labels_train)
    rows = np.bincount(inverse)
    means = (sums + prior_rows * mean) / (rows + prior_rows)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, means[place], mean)


def evaluate(
    task_types: Mapping[str, str],
    labels: Mapping[str, ArrayLike],
    scores: Mapping[str, ArrayLike],
    weights: Mapping[str, ArrayLike],
    groups: ArrayLike | None = None,
) -> Results:
    """All metrics of a split, by task.

    Args:
      task_types: ``binary`` or ``regression`` by task.
      labels: [N] by task.
      scores: [N] by task: probabilities of binary tasks, values of regressions.
      weights: [N] by task, 0 for rows outside the task's space.
      groups: [N] group keys, or None.

    Returns:
      By task: ``rows`` (of non-zero weight), ``rate`` (mean label), then ``auc``, ``logloss`` and, given groups,
      ``grouped_auc`` of a binary task, or ``mse`` of a regression.

    Raises:
      ValueError: naming the task.
    """
    results: Results = {}
    for task, kind in task_types.items():
        try:
            y, s, w = labels[task], scores[task], weights[task]
            results[task] = {"rows": int(np.count_nonzero(np.asarray(w))), "rate": _mean(*_rows(y, y, w)[1:])}
            if kind == "binary":
                results[task] |= {"auc": auc(y, s, w), "logloss": logloss(y, s, w)}
                if groups is not None:
                    results[task]["grouped_auc"] = grouped_auc(y, s, groups, w)
            elif kind == "regression":
                results[task]["mse"] = mse(y, s, w)
            else:
                raise ValueError(f"the type should be 'binary' or 'regression', but is '{kind}'")
        except ValueError as error:
            raise ValueError(f"task '{task}': {error}") from error
    return results


def mean_auc(results: Results) -> tuple[float, tuple[str, ...]]:
    """The mean AUC over binary tasks that have both classes, and the names of all other tasks.

    NaN when no task has an AUC.
    """
    values = {task: r["auc"] for task, r in results.items() if not np.isnan(r.get("auc", np.nan))}
    others = tuple(task for task in results if task not in values)
    return (float(np.mean(list(values.values()))) if values else float("nan")), others


def _rows(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None
) -> tuple[NDArray, NDArray, NDArray[np.float64] | None]:
    """The three arrays, checked, without rows of weight 0; weights None when every remaining one is 1."""
    y, s = np.asarray(labels), np.asarray(scores)
    if y.ndim != 1 or y.shape != s.shape:
        raise ValueError(f"labels and scores should both be [N], but have the shapes {y.shape} and {s.shape}")
    w = None
    if weights is not None:
        w = np.asarray(weights)
        if w.shape != y.shape:
            raise ValueError(f"weights should have the shape of labels, {y.shape}, but have {w.shape}")
        if not (w >= 0).all():
            raise ValueError(f"weights should be 0 or more, but {np.count_nonzero(~(w >= 0)):,} are not")
        inside = w != 0
        if not inside.all():
            y, s, w = y[inside], s[inside], w[inside]
        w = None if (w == 1).all() else w.astype(np.float64)
    for name, values in (("scores", s), ("labels", y)):
        missing = np.count_nonzero(np.isnan(values))
        if missing:
            raise ValueError(f"{missing:,} of {len(values):,} {name} are NaN")
    return y, s, w


def _check_binary(y: NDArray) -> None:
    other = np.count_nonzero((y != 0) & (y != 1))
    if other:
        raise ValueError(f"binary labels should be 0 or 1, but {other:,} of {len(y):,} are not")


def _weighted_auc(positives: NDArray, wp: NDArray, negatives: NDArray, wn: NDArray) -> float:
    """AUC where each pair counts with the product of its weights."""
    if not len(positives) or not len(negatives):
        return float("nan")
    order = np.argsort(negatives)
    negatives = negatives[order]
    below = np.r_[0.0, np.cumsum(wn[order])]
    wins = below[np.searchsorted(negatives, positives, "left")] + below[np.searchsorted(negatives, positives, "right")]
    return float(np.sum(wp * wins) / (2 * wp.sum() * below[-1]))


def _mean(values: NDArray, weights: NDArray[np.float64] | None) -> float:
    if not len(values):
        return float("nan")
    return float(np.average(values.astype(np.float64), weights=weights))
