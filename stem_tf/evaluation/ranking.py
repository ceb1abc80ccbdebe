"""How well each group's list is ordered: NDCG@k and mean average precision, exact, with ties at their expected value.

A list is the rows of one group (a user) by falling score. Rows of one score have no order: what they add is its mean
over all of their orders, so that ties favour nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Ranking:
    """Means over the groups with both classes; every order of another group's list is equally good.

    Attributes:
      ndcg: of the first k places; NaN where no group has both classes.
      map: mean average precision of the whole lists; NaN likewise.
      groups: how many groups have both classes.
      left_out: how many have one class only.
    """

    ndcg: float
    map: float
    groups: int
    left_out: int


def ranking(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int, weights: ArrayLike | None = None
) -> Ranking:
    """NDCG@k and average precision of each group's list, and their means; each group counts once.

    With the label y_i of the row in place i, and P positives in the list:

        NDCG@k = sum_{i <= k} y_i / log2(i + 1)  /  sum_{i <= min(k, P)} 1 / log2(i + 1)
        average precision = 1/P sum_i y_i (y_1 + ... + y_i) / i

    Among n rows of one score, p of them positive, behind b rows with q positives, each place from b + 1 to b + n holds
    a positive with probability p / n, and before it q + (i - b - 1) (p - 1) / (n - 1) others are expected (McSherry and
    Najork, Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores, ECIR 2008).

    Args:
      labels: [N], 0 or 1; any value, NaN too, where the weight is 0.
      scores: [N], without NaN.
      groups: [N], any sortable key.
      k: how many places of a list are looked at, 1 or more.
      weights: [N]; a row of weight 0 is in no list. All others count alike: a place is a place, whatever a row weighs.

    Raises:
      ValueError: arrays of unequal lengths, or k below 1.
    """
    y, s, g = np.asarray(labels), np.asarray(scores), np.asarray(groups)
    if not y.shape == s.shape == g.shape:
        raise ValueError(f"labels, scores and groups should all be [N], but are {y.shape}, {s.shape} and {g.shape}")
    if k < 1:
        raise ValueError(f"k should be 1 or more, but is {k}")
    if weights is not None and not (inside := np.asarray(weights) > 0).all():
        y, s, g = y[inside], s[inside], g[inside]
    if not len(y):
        return Ranking(float("nan"), float("nan"), 0, 0)
    order = np.lexsort((-s, g))
    y, s, g = (y[order] > 0.5).astype(np.float64), s[order], g[order]

    new_group = np.r_[True, g[1:] != g[:-1]]
    of_group = np.cumsum(new_group) - 1
    group_starts = np.flatnonzero(new_group)
    positives, rows = np.add.reduceat(y, group_starts), np.diff(group_starts, append=len(y))
    place = np.arange(1, len(y) + 1) - group_starts[of_group]

    tie_starts = np.flatnonzero(new_group | np.r_[True, s[1:] != s[:-1]])
    n, p = np.diff(tie_starts, append=len(y)), np.add.reduceat(y, tie_starts)
    above = np.cumsum(p) - p  # positives before each tie, first of all groups
    above -= (np.cumsum(positives) - positives)[of_group[tie_starts]]
    others = np.repeat((p - 1) / np.maximum(n - 1, 1), n)  # share of positives among the rows tied with a positive
    chance, n_before, p_before = np.repeat(p / n, n), np.repeat(place[tie_starts] - 1, n), np.repeat(above, n)

    both = (positives > 0) & (positives < rows)
    gains = np.where(place <= k, chance / np.log2(place + 1), 0)
    best = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(2, min(k, int(rows.max())) + 2)))]
    ndcg = _divided(np.add.reduceat(gains, group_starts), best[np.minimum(positives, len(best) - 1).astype(int)], both)
    precisions = chance * (p_before + 1 + (place - n_before - 1) * others) / place
    average = _divided(np.add.reduceat(precisions, group_starts), positives, both)
    return Ranking(ndcg, average, int(both.sum()), int((~both).sum()))


def _divided(sums: NDArray, by: NDArray, chosen: NDArray[np.bool_]) -> float:
    """The mean of ``sums / by`` over the chosen groups."""
    return float(np.mean(sums[chosen] / by[chosen])) if chosen.any() else float("nan")
