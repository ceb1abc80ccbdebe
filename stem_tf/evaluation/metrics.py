"""Exact metrics of a whole split, in numpy: no thresholds, no sampling, float64 sums.

Shapes: N rows. Labels of binary metrics are 0 or 1. ``weights`` (default 1 for every row) multiply rows; a row of
weight 0 is ignored, so rows outside a task's sample space and padding rows may be passed as they are.
A metric without a value (no rows, or one class only) is NaN. Every function raises ValueError for arrays of unequal
lengths, NaN scores, labels outside their range and negative weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

Result = TypeVar("Result")

_BLOCK_ROWS = 1 << 20  # rows worked on at a time, so that temporary arrays stay small

Results = dict[str, dict[str, float]]
"""What :func:`evaluate` returns: ``{task: {metric: value}}``."""


def auc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative) + P(equal) / 2.

    Without weights it sorts one integer per row on all cores, and its counts are exact. Beside its arguments it then
    holds one array: 4 bytes per row for float32 scores of one sign, otherwise 8.

    Args:
      labels: [N], 0 or 1.
      scores: [N], any real scale.
      weights: [N], or None.
    """
    y, s, w = _rows(labels, scores, weights)
    _check_binary(y)
    if w is not None:
        positive = y > 0.5
        return _weighted_auc(s[positive], w[positive], s[~positive], w[~positive])
    positives = negatives = wins = 0  # a win counts two, a tie one
    for block_positives, block_negatives, block_wins in _map_sorted(_wins, _keys(y, s, room=64)[0], together=1):
        wins += block_wins + 2 * block_positives * negatives
        positives, negatives = positives + block_positives, negatives + block_negatives
    return wins / (2 * positives * negatives) if positives and negatives else float("nan")


def grouped_auc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean over groups of the AUC inside the group, each weighted by its rows; groups with one class are left out.

    Args:
      labels: [N], 0 or 1.
      scores: [N].
      groups: [N], any sortable key, e.g. the int64 ``group`` of a batch.
      weights: [N], or None; a group then counts with the sum of its weights.
    """
    groups = np.asarray(groups)
    if groups.shape != np.shape(labels):
        raise ValueError(f"groups should have the shape of labels, {np.shape(labels)}, but have {groups.shape}")
    return _grouped_auc(labels, scores, _numbered(groups), weights)


def _numbered(groups: NDArray) -> NDArray[np.int32]:
    """A number from 0 for every distinct group, [N]."""
    return pa.array(groups).dictionary_encode().indices.to_numpy()


def _grouped_auc(
    labels: ArrayLike, scores: ArrayLike, groups: NDArray[np.int32], weights: ArrayLike | None = None
) -> float:
    """`grouped_auc` of groups numbered from 0; without weights it holds 8 bytes per row beside its arguments."""
    y, s, w = _rows(labels, scores, weights)
    _check_binary(y)
    if weights is not None and len(y) < len(groups):
        groups = groups[np.asarray(weights) != 0]
    if not len(y):
        return float("nan")
    if w is not None:
        return _weighted_grouped_auc(y, s, groups, w)
    low, width = _keys(y, s, room=64 - int(groups.max()).bit_length())
    keys = groups.astype(np.uint64)
    keys <<= np.uint64(width)
    keys |= low
    del low
    parts = _map_sorted(lambda block: _group_aucs(block, width), keys, together=width)
    total, rows = (sum(part[i] for part in parts) for i in range(2))
    return total / rows if rows else float("nan")


def logloss(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean of -y log p - (1 - y) log(1 - p), with p clipped to [eps, 1 - eps].

    eps is the machine epsilon of the scores' own type (1.2e-7 for float32): a float32 sigmoid that saturated at
    exactly 0 or 1 costs at most 15.9, as far as its precision can tell, instead of infinity.

    Args:
      labels: [N], in [0, 1].
      scores: [N], probabilities.
      weights: [N], or None.
    """
    y, s, w = _rows(labels, scores, weights)
    for name, values in (("labels", y), ("scores", s)):
        outside = np.count_nonzero(~((values >= 0) & (values <= 1)))
        if outside:
            raise ValueError(f"{name} of a logloss should be in [0, 1], but {outside:,} of {len(values):,} are not")

    return _mean(lambda rows: log_losses(y[rows], s[rows]), len(y), w)


def log_losses(labels: NDArray, scores: NDArray) -> NDArray[np.float64]:
    """What :func:`logloss` is the mean of, ``[N]``."""
    eps = float(np.finfo(scores.dtype if scores.dtype.kind == "f" else np.float64).eps)
    p, y = np.clip(scores.astype(np.float64), eps, 1 - eps), labels.astype(np.float64)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def mse(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean of (label - score)^2; labels and scores [N] of any scale."""
    y, s, w = _rows(labels, scores, weights)
    return _mean(lambda rows: (y[rows].astype(np.float64) - s[rows]) ** 2, len(y), w)


def smoothed_means(
    keys_train: ArrayLike,
    labels_train: ArrayLike,
    keys: ArrayLike,
    prior_rows: float = 5,
    weights_train: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """The trivial answer: the train mean of the label per key, pulled towards the train mean m.

    score(k) = (sum of labels of k + prior_rows * m) / (rows of k + prior_rows); an unseen key scores m.

    Args:
      keys_train: [M], e.g. the ``group`` or ``item`` of train rows inside the task's space.
      labels_train: [M].
      keys: [N], the keys to score.
      prior_rows: how many rows at the train mean are added to every key.
      weights_train: [M], or None; rows then count with their weights, and those at the train mean with the mean weight.

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
    weights = np.ones(len(labels_train)) if weights_train is None else np.asarray(weights_train, np.float64)
    mean = np.average(labels_train, weights=weights)
    prior = prior_rows * weights.mean()
    encoded = pa.array(keys_train).dictionary_encode()
    known, inverse = encoded.dictionary.to_numpy(), encoded.indices.to_numpy()
    sums = np.bincount(inverse, labels_train * weights)
    rows = np.bincount(inverse, weights)
    order = np.argsort(known)
    known, means = known[order], ((sums + prior * mean) / (rows + prior))[order]
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
    numbered = None if groups is None else _numbered(np.asarray(groups))  # once for all tasks
    for task, kind in task_types.items():
        try:
            y, s, w = labels[task], scores[task], weights[task]
            results[task] = {"rows": int(np.count_nonzero(np.asarray(w))), "rate": _rate(y, w)}
            if kind == "binary":
                results[task] |= {"auc": auc(y, s, w), "logloss": logloss(y, s, w)}
                if numbered is not None:
                    results[task]["grouped_auc"] = _grouped_auc(y, s, numbered, w)
            elif kind == "regression":
                results[task]["mse"] = mse(y, s, w)
            else:
                raise ValueError(f"the type should be 'binary' or 'regression', but is '{kind}'")
        except ValueError as error:
            raise ValueError(f"task '{task}': {error}") from error
    return results


MAIN = {"binary": "auc", "regression": "mse"}
"""The metric that a task of each type is judged by."""


def main(kind: str, labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The metric that a task of this type is judged by: `auc` or `mse`."""
    return (auc if kind == "binary" else mse)(labels, scores, weights)


def mean_auc(results: Mapping[str, Mapping[str, float]]) -> float:
    """The mean AUC over the tasks that have one: binary ones with both classes. NaN where none has."""
    values = [of_task["auc"] for of_task in results.values() if not np.isnan(of_task.get("auc", np.nan))]
    return float(np.mean(values)) if values else float("nan")


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


def _keys(labels: NDArray, scores: NDArray, room: int) -> tuple[NDArray, int]:
    """Integers that sort as (score, label) do, [N] uint32 or uint64, and how many bits they take, at most ``room``.

    The label is the lowest bit, so that rows of one score have keys that differ in nothing else.
    """
    if scores.dtype in (np.float32, np.float64):
        kind = np.uint32 if scores.dtype == np.float32 else np.uint64
        bits = (scores + scores.dtype.type(0)).view(kind)  # -0.0 + 0.0 is 0.0
        if len(bits) and scores.min() < 0:  # as integers, negative floats are above all others, in falling order
            sign = bits >> kind(bits.itemsize * 8 - 1)
            bits ^= np.negative(sign, out=sign) | kind(1 << (bits.itemsize * 8 - 1))
        bits -= bits.min(initial=np.iinfo(kind).max)
        width = int(bits.max(initial=0)).bit_length() + 1
    if scores.dtype not in (np.float32, np.float64) or width > room:
        bits = np.unique(scores, return_inverse=True)[1]
        width = int(bits.max(initial=0)).bit_length() + 1
    keys = bits.astype(np.uint32 if width <= 32 else np.uint64, copy=False)
    keys <<= keys.dtype.type(1)
    keys |= labels > 0.5
    return keys, width


def _map_sorted(function: Callable[[NDArray], Result], keys: NDArray, together: int) -> list[Result]:
    """Sorts keys [N], in place, and calls ``function`` on one block of them after another; both on all cores.

    Keys that differ only in the lowest ``together`` bits are in one block.
    """
    parts = max(1, min(len(os.sched_getaffinity(0)), len(keys) // _BLOCK_ROWS))
    ends = [len(keys) * part // parts for part in range(1, parts)]
    if ends:
        keys.partition(ends)

    def blocks() -> Iterator[NDArray]:
        start = 0
        mask = keys.dtype.type((1 << together) - 1)
        while start < len(keys):
            last = keys[min(start + _BLOCK_ROWS, len(keys)) - 1]
            end = int(np.searchsorted(keys, last | mask, "right"))
            yield keys[start:end]
            start = end

    with ThreadPoolExecutor(parts) as pool:  # numpy holds no lock while it sorts and counts
        list(pool.map(np.ndarray.sort, np.split(keys, ends)))
        return list(pool.map(function, blocks()))


def _positives(keys: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """From sorted `_keys`: places of the positives; of the first one per score of both classes; its tied pairs."""
    places = np.flatnonzero(keys & keys.dtype.type(1))
    first = places[keys[places] ^ keys[np.maximum(places, 1) - 1] == 1]  # behind a negative of the same score
    score = keys[first]
    negatives = first - np.searchsorted(keys, score ^ score.dtype.type(1))
    return places, first, negatives * (np.searchsorted(keys, score, "right") - first)


def _wins(keys: NDArray) -> tuple[int, int, int]:
    """Positives, negatives, and wins among them, a win counting two and a tie one."""
    places, _, ties = _positives(keys)
    count = len(places)
    below = int(places.sum()) - count * (count - 1) // 2  # negatives before each positive, ties included
    return count, len(keys) - count, 2 * below - int(ties.sum())


def _group_aucs(keys: NDArray, width: int) -> tuple[float, int]:
    """(AUC times rows, rows), summed over the groups with both classes; a key holds its group above ``width`` bits."""
    group = (keys >> np.uint64(width)).astype(np.int64)
    group -= group[0]
    places, first, ties = _positives(keys)
    rows = np.bincount(group)

    def by_group(places: NDArray, values: NDArray | None = None) -> NDArray:
        return np.bincount(group[places], values, minlength=len(rows))

    positives = by_group(places)
    start = np.cumsum(rows) - rows
    # Negatives before each positive, ties included, less half of the ties.
    wins = by_group(places, places - start[group[places]]) - positives * (positives - 1) / 2 - by_group(first, ties) / 2
    both = (positives > 0) & (positives < rows)
    pairs = positives[both] * (rows - positives)[both]
    return float(np.sum(rows[both] * (wins[both] / pairs))), int(rows[both].sum())


def _weighted_grouped_auc(y: NDArray, s: NDArray, groups: NDArray, w: NDArray[np.float64]) -> float:
    order = np.lexsort((s, groups))
    y, s, g, w = y[order], s[order], groups[order], w[order]

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


def _weighted_auc(positives: NDArray, wp: NDArray, negatives: NDArray, wn: NDArray) -> float:
    """AUC where each pair counts with the product of its weights."""
    if not len(positives) or not len(negatives):
        return float("nan")
    order = np.argsort(negatives)
    negatives = negatives[order]
    below = np.r_[0.0, np.cumsum(wn[order])]
    wins = below[np.searchsorted(negatives, positives, "left")] + below[np.searchsorted(negatives, positives, "right")]
    return float(np.sum(wp * wins) / (2 * wp.sum() * below[-1]))


def _rate(labels: ArrayLike, weights: ArrayLike) -> float:
    y, _, w = _rows(labels, labels, weights)
    return _mean(lambda rows: y[rows].astype(np.float64), len(y), w)


def _mean(values: Callable[[slice], NDArray], count: int, weights: NDArray[np.float64] | None) -> float:
    """The mean of ``count`` float64 values, made block by block."""
    total = weight = 0.0
    for start in range(0, count, _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        block = values(rows)
        total += float((block if weights is None else block * weights[rows]).sum())
        weight += len(block) if weights is None else float(weights[rows].sum())
    return total / weight if count else float("nan")
