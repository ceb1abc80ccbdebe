"""How well each group's list is ordered: NDCG@k, mean average precision and AUC, exact, with ties at their mean.

A list is the rows of one group (a user) by falling score. Rows of one score have no order: what they add is its mean
over all of their orders, so that ties favour nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Lists:
    """The lists of G groups, sorted once, to be measured by several gains or labels ``[N]``.

    Among n rows of one score, p of them relevant, behind b rows with q relevant ones, each place from b + 1 to b + n
    holds a relevant row with probability p / n, and before it q + (i - b - 1) (p - 1) / (n - 1) others are expected
    (McSherry and Najork, Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied
    Scores, ECIR 2008).

    Args:
      scores: [N], without NaN; N is 1 or more.
      groups: [N], any sortable key.

    Attributes:
      first: [G] int64, one row of each group, by which it is known outside.
      rows: [G] int64, how many rows each group has.
    """

    def __init__(self, scores: ArrayLike, groups: ArrayLike) -> None:
        s, g = np.asarray(scores), np.asarray(groups)
        self._order = np.lexsort((-s, g))
        s, g = s[self._order], g[self._order]
        new_group = np.r_[True, g[1:] != g[:-1]]
        self._of_group = np.cumsum(new_group) - 1
        self._starts = np.flatnonzero(new_group)
        self.first, self.rows = self._order[self._starts], np.diff(self._starts, append=len(s))
        self._place = np.arange(1, len(s) + 1) - self._starts[self._of_group]
        self._ties = np.flatnonzero(new_group | np.r_[True, s[1:] != s[:-1]])
        self._tied = np.diff(self._ties, append=len(s))

    def ndcg(self, gains: ArrayLike, k: int) -> NDArray[np.float64]:
        """NDCG@k of each list, [G]; NaN where all gains are equal, as every order is then equally good.

        With the gain g_i >= 0 of the row in place i, and the same gains sorted, h_1 >= h_2 >= ...:

            NDCG@k = sum_{i <= k} g_i / log2(i + 1)  /  sum_{i <= k} h_i / log2(i + 1)
        """
        g = np.asarray(gains, np.float64)[self._order]
        discount = np.where(self._place <= k, 1 / np.log2(self._place + 1), 0)
        best = g[np.lexsort((-g, self._of_group))]
        found, ideal = (self._sums(values * discount) for values in (self._mean_of_ties(g), best))
        apart = np.maximum.reduceat(g, self._starts) > np.minimum.reduceat(g, self._starts)
        return np.divide(found, ideal, out=np.full(len(self.rows), np.nan), where=apart)

    def precision(self, relevant: ArrayLike) -> NDArray[np.float64]:
        """Average precision of each list, [G]; NaN where all rows are relevant, or none is.

        With P relevant rows, r_i = 1 where the row in place i is one: 1/P sum_i r_i (r_1 + ... + r_i) / i.
        """
        r = np.asarray(relevant)[self._order] > 0.5
        p, above, positives = self._counts(r)
        others = np.repeat((p - 1) / np.maximum(self._tied - 1, 1), self._tied)
        n_before, p_before = np.repeat(self._place[self._ties] - 1, self._tied), np.repeat(above, self._tied)
        chance = np.repeat(p / self._tied, self._tied)
        precisions = chance * (p_before + 1 + (self._place - n_before - 1) * others) / self._place
        return self._of_both(self._sums(precisions), positives, positives)

    def auc(self, relevant: ArrayLike) -> NDArray[np.float64]:
        """The AUC inside each list, [G]; NaN where all rows are relevant, or none is."""
        r = np.asarray(relevant)[self._order] > 0.5
        p, above, positives = self._counts(r)
        starts = np.searchsorted(self._ties, self._starts)
        wins = np.add.reduceat((self._tied - p) * (above + p / 2), starts)
        return self._of_both(wins, positives * (self.rows - positives), positives)

    def _sums(self, values: NDArray) -> NDArray[np.float64]:
        return np.add.reduceat(values, self._starts)

    def _mean_of_ties(self, values: NDArray) -> NDArray[np.float64]:
        return np.repeat(np.add.reduceat(values, self._ties) / self._tied, self._tied)

    def _counts(self, r: NDArray[np.bool_]) -> tuple[NDArray, NDArray, NDArray]:
        """Relevant rows of each tie, above each tie in its list, and in each list."""
        y = r.astype(np.float64)
        p, positives = np.add.reduceat(y, self._ties), self._sums(y)
        before = (np.cumsum(positives) - positives)[self._of_group[self._ties]]
        return p, np.cumsum(p) - p - before, positives

    def _of_both(self, sums: NDArray, by: NDArray, positives: NDArray) -> NDArray[np.float64]:
        both = (positives > 0) & (positives < self.rows)
        return np.divide(sums, by, out=np.full(len(self.rows), np.nan), where=both)


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
    lists = Lists(s, g)
    ndcg, precision = lists.ndcg(y > 0.5, k), lists.precision(y)
    both = ~np.isnan(precision)
    if not both.any():
        return Ranking(float("nan"), float("nan"), 0, len(both))
    return Ranking(float(np.mean(ndcg[both])), float(np.mean(precision[both])), int(both.sum()), int((~both).sum()))
