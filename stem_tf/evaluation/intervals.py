"""How far a metric may be off by chance: intervals over test users, and differences of models over users and seeds.

The rows of one user are not independent, so users are drawn, not rows: each of R resamples draws as many users as the
test set has, with replacement, and a user that is drawn twice counts twice (cluster bootstrap; Davison and Hinkley,
Bootstrap Methods and their Application, 1997). All runs see the same draws, which makes differences paired.

Shapes: N rows, R resamples, S runs of a model (one per seed). Does not import TensorFlow; `compare` and what it returns
need scipy (``stem-tf[compare]``).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

MIN_USERS = 10
"""A number from fewer users (for AUC: with a positive, or with a negative) has no interval: it would be too narrow."""

POWER = 0.8
"""What a comparison needs to decide is said so that it would decide with this probability."""

_BLOCKS = 10_000
_EXACT = 200_000_000  # rows x resamples of one AUC: about 3 s on one core
_MOST = 10_000  # rows or seeds to decide are looked for up to so many times those there are


class Resamples:
    """R draws of the users of a test set, the same for each run that is measured on it.

    With more than 10,000 users, these are dealt at random into 10,000 blocks that are drawn whole. Blocks of
    independent users are independent, so that intervals stay right (their width is off by .7 %, by chance), and the
    draws take 10,000 R bytes however long the log is.

    Args:
      groups: [N], the user of each row, any key; or None, then rows are drawn.
      resamples: R.
      seed: of the draws.
      rows: N, needed where ``groups`` is None.
    """

    def __init__(self, groups: ArrayLike | None, resamples: int, seed: int, *, rows: int | None = None) -> None:
        if groups is None:
            if rows is None:
                raise ValueError("without groups the number of rows should be given")
            units, count = np.arange(rows, dtype=np.int32), rows
        else:
            encoded = pa.array(np.asarray(groups)).dictionary_encode()
            units, count = encoded.indices.to_numpy(), len(encoded.dictionary)
        random = np.random.default_rng(seed)
        if count > _BLOCKS:
            units, count = (random.permutation(count) % _BLOCKS)[units], _BLOCKS
        self._units = units.astype(np.uint16)
        self._counts = np.empty((resamples, count), np.uint8)  # how often each resample holds each unit
        for counts in self._counts:
            counts[:] = np.bincount(random.integers(count, size=count), minlength=count) if count else 0

    def users(self, labels: ArrayLike, weights: ArrayLike, *, binary: bool) -> int:
        """How many independent users (blocks, rows) a metric rests on: for AUC the fewer of those with either class."""
        y, w = np.asarray(labels), np.asarray(weights)
        classes = ((w > 0) & (y > 0.5), (w > 0) & (y < 0.5)) if binary else (w > 0,)
        return min(int(np.count_nonzero(np.bincount(self._units[rows]))) for rows in classes)

    def within(self, rows: NDArray[np.int64]) -> Resamples:
        """The same draws, for the rows at these places."""
        part = copy.copy(self)
        part._units = self._units[rows]
        return part

    def aucs(self, labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
        """The AUC of each resample.

        Scores are sorted once; each resample then takes one pass over the rows (about 15 ms per million). Where that
        would be too long, above 200 million rows x resamples per AUC, each resample's AUC is its first-order expansion
        in how often each user was drawn: the AUC plus the sum over users u of (count_u - 1) influence_u, with

            influence_u = sum over u's positives i of w_i (v_i - AUC) / W+
                        + sum over u's negatives j of w_j (v_j - AUC) / W-

        where v_i is the share of negatives below positive i, v_j the share of positives above negative j, and W+, W-
        are the weights of both classes (Obuchowski, Biometrics 53, 1997, whose variance of a clustered AUC is the sum
        of the squared influences). At a million rows both agree to a correlation of .99998 over the resamples and take
        15 s and .1 s per 1,000 resamples.

        Args:
          labels: [N], 0 or 1; any value, NaN too, where the weight is 0.
          scores: [N].
          weights: [N]; a row of weight 0 is left out.

        Returns:
          [R] float64; NaN where a resample has one class only, and everywhere with fewer than `MIN_USERS` users.
        """
        if self.users(labels, weights, binary=True) < MIN_USERS:
            return np.full(len(self._counts), np.nan)
        positives, negatives = self._sides(labels, scores, weights)
        if (len(positives.scores) + len(negatives.scores)) * len(self._counts) > _EXACT:
            return self._expanded(positives, negatives)[1]
        first = np.searchsorted(negatives.scores, positives.scores, "left")
        last = np.searchsorted(negatives.scores, positives.scores, "right")

        def of_resample(counts: NDArray[np.uint8]) -> float:
            drawn = counts.astype(np.float64)
            below = np.zeros(len(negatives.scores) + 1)
            np.cumsum(drawn[negatives.units] * negatives.weights, out=below[1:])
            held = drawn[positives.units] * positives.weights
            pairs = held.sum() * below[-1]
            return float(held @ (below[first] + below[last])) / (2 * pairs) if pairs else math.nan

        return np.array([of_resample(counts) for counts in self._counts])

    def expansion(self, labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> tuple[float, NDArray[np.float64]]:
        """The AUC, and that of each resample by its first-order expansion however few the rows: for thousands of AUCs.

        Args:
          labels, scores, weights: as of `aucs`; both classes have a row.
        """
        auc, resampled = self._expanded(*self._sides(labels, scores, weights))
        enough = self.users(labels, weights, binary=True) >= MIN_USERS
        return auc, resampled if enough else np.full(len(self._counts), np.nan)

    def _sides(self, labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> tuple[_Side, _Side]:
        """The positives and the negatives."""
        inside = np.asarray(weights) > 0
        y, s = np.asarray(labels)[inside] > 0.5, np.asarray(scores)[inside]
        w, units = np.asarray(weights)[inside].astype(np.float64), self._units[inside]
        up, down = (rows[np.argsort(s[rows])] for rows in (np.flatnonzero(y), np.flatnonzero(~y)))
        return _Side(s[up], w[up], units[up]), _Side(s[down], w[down], units[down])

    def _expanded(self, positives: _Side, negatives: _Side) -> tuple[float, NDArray[np.float64]]:
        below = positives.weight_below(negatives) / negatives.weights.sum()
        above = 1 - negatives.weight_below(positives) / positives.weights.sum()
        auc = float(np.average(below, weights=positives.weights))
        influence = np.zeros(self._counts.shape[1])
        for side, values in ((positives, below), (negatives, above)):
            shares = side.weights * (values - auc) / side.weights.sum()
            influence += np.bincount(side.units, shares, minlength=len(influence))
        return auc, auc + self._sums(influence)

    def means(self, values: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
        """The weighted mean of each resample, of losses or squared errors for example.

        Args:
          values: [N]; any value, NaN too, where the weight is 0.
          weights: [N].

        Returns:
          [R] float64; NaN where a resample has no weight, and everywhere with fewer than `MIN_USERS` users.
        """
        w = np.asarray(weights, np.float64)
        if self.users(w, w, binary=False) < MIN_USERS:
            return np.full(len(self._counts), np.nan)
        v, units = np.where(w > 0, np.asarray(values, np.float64), 0), self._counts.shape[1]
        sums = self._sums(np.bincount(self._units, w * v, minlength=units))
        weight = self._sums(np.bincount(self._units, w, minlength=units))
        return np.divide(sums, weight, out=np.full(len(sums), np.nan), where=weight > 0)

    def _sums(self, of_units: NDArray) -> NDArray[np.float64]:
        """The sum over the drawn units of each resample, [R]; 100 resamples at a time, as they become float64."""
        blocks = range(0, len(self._counts), 100)
        return np.concatenate([self._counts[block : block + 100] @ of_units for block in blocks])


@dataclass(frozen=True)
class _Side:
    """The rows of one class, by ascending score."""

    scores: NDArray
    weights: NDArray[np.float64]
    units: NDArray[np.uint16]

    def weight_below(self, other: _Side) -> NDArray[np.float64]:
        """For each own row, the weight of the other side's rows with a lower score; of equal ones half."""
        below = np.r_[0.0, np.cumsum(other.weights)]
        first, last = (np.searchsorted(other.scores, self.scores, side) for side in ("left", "right"))
        return (below[first] + below[last]) / 2


def interval(values: NDArray[np.float64], level: float = 0.05) -> tuple[float, float]:
    """The interval that holds all but ``level`` of the resampled values, half of it cut off at either end.

    Args:
      values: [R].
      level: .05 for an interval of 95 %.

    Returns:
      Its ends; NaN where more than ``level`` of the values are NaN.
    """
    if not 0 < level < 0.5:
        raise ValueError(f"level should be between 0 and .5, .05 for an interval of 95 %, but is {level}")
    defined = values[~np.isnan(values)]
    if len(defined) < (1 - level) * len(values) or not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [level / 2, 1 - level / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Runs:
    """One metric of the runs of a model, which differ in their seed alone.

    Attributes:
      values: [S], on the test set.
      resampled: [S, R], on its resamples.
      users: how many users the metric rests on, as `Resamples.users` says.
    """

    values: NDArray[np.float64]
    resampled: NDArray[np.float64]
    users: int

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.values))

    @property
    def variance(self) -> float:
        """Of one run, over the seeds; NaN for one seed."""
        return float(np.var(self.values, ddof=1)) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Spread:
    """How much runs of any of several models vary with their seed.

    Attributes:
      variance: of one run, pooled over the models.
      freedom: its degrees of freedom.
    """

    variance: float
    freedom: int


def pooled(models: Sequence[Runs]) -> Spread | None:
    """The variance over seeds, pooled over the models with several seeds; None where no model has."""
    several = [runs for runs in models if not math.isnan(runs.variance)]
    freedom = sum(len(runs.values) - 1 for runs in several)
    if not freedom:
        return None
    return Spread(sum(runs.variance * (len(runs.values) - 1) for runs in several) / freedom, freedom)


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of model A less that of model B, on the same test rows.

    Its standard error has two parts that add as variances: the test users (``sd_rows``, the paired bootstrap of the
    difference) and the seeds (``sd_seeds``, from the spread of each model's runs). What users and seeds do together
    counts in both parts, which errs towards "undecided".

    Attributes:
      estimate: the difference.
      low, high: its interval, for this comparison alone.
      p: probability of a difference at least as large if the models were the same: two-sided t-test with the degrees of
        freedom of Welch and Satterthwaite. NaN where it cannot be said.
      sd_rows, sd_seeds: the two parts of the standard error.
      seeds: how many A and B have.
      users: how many users the metric rests on.
      borrowed: a model has one seed, and its spread over seeds was taken from other models.
      parts: variance and degrees of freedom of the seeds of A and of B, for one run each.
    """

    estimate: float
    low: float
    high: float
    p: float
    sd_rows: float
    sd_seeds: float
    seeds: tuple[int, int]
    users: int
    borrowed: bool
    parts: tuple[tuple[float, float], tuple[float, float]]

    def rows_to_decide(self, level: float) -> float | None:
        """How many times the users of this test set a comparison at ``level`` needs, with the seeds as they are.

        If the true difference is the estimate, it then decides with a probability of `POWER`. None where no number of
        users would do: the seeds alone are too noisy.
        """
        times = np.geomspace(1, _MOST, 2000)
        zero = np.zeros_like(times)
        error, freedom = _welch(
            [
                (self.sd_rows**2 / times, self.users * times - 1),
                *((zero + one / count, free + zero) for (one, free), count in zip(self.parts, self.seeds, strict=True)),
            ]
        )
        return self._first(times, error, freedom, level)

    def seeds_to_decide(self, level: float) -> int | None:
        """How many seeds per model a comparison at ``level`` needs on these test rows; see `rows_to_decide`."""
        seeds = np.arange(max(self.seeds), max(self.seeds) + _MOST)
        same = np.zeros(len(seeds))
        error, freedom = _welch(
            [
                (self.sd_rows**2 + same, self.users - 1 + same),
                *((one / seeds, np.maximum(seeds - 1, free)) for one, free in self.parts),
            ]
        )
        found = self._first(seeds, error, freedom, level)
        return None if found is None else int(found)

    def _first(self, amounts: NDArray, error: NDArray, freedom: NDArray, level: float) -> float | None:
        from scipy import stats

        if math.isnan(self.p):
            return None
        needed = error * (stats.t.ppf(1 - level / 2, freedom) + stats.t.ppf(POWER, freedom))
        enough = np.flatnonzero(abs(self.estimate) > needed)
        return float(amounts[enough[0]]) if len(enough) else None


def compare(a: Runs, b: Runs, level: float = 0.05, spread: Spread | None = None) -> Difference:
    """The difference of two models' metric, with what test users and seeds leave open combined; see `Difference`.

    Args:
      a, b: the models' runs, resampled with the same `Resamples`.
      level: .05 for an interval of 95 %.
      spread: stands in for the spread over seeds of a model with one seed (`pooled`). Without it, p and the interval
        of a model with one seed are NaN: a difference that a second seed could turn over is no finding.
    """
    from scipy import stats

    estimate = a.mean - b.mean
    differences = a.resampled.mean(axis=0) - b.resampled.mean(axis=0)
    defined = differences[~np.isnan(differences)]
    enough = len(defined) > 1 and len(defined) >= (1 - level) * len(differences)
    rows = float(np.std(defined, ddof=1)) if enough else math.nan

    def of_seeds(runs: Runs) -> tuple[float, float]:
        if len(runs.values) > 1:
            return runs.variance, len(runs.values) - 1
        return (spread.variance, spread.freedom) if spread else (math.nan, math.nan)

    users, seeds = min(a.users, b.users), (len(a.values), len(b.values))
    parts = of_seeds(a), of_seeds(b)
    by_seeds = [(variance / count, freedom) for (variance, freedom), count in zip(parts, seeds, strict=True)]
    error, freedom = (float(value) for value in _welch([(rows**2, users - 1), *by_seeds]))
    if error > 0:
        half = float(stats.t.ppf(1 - level / 2, freedom)) * error
        p = float(2 * stats.t.sf(abs(estimate) / error, freedom))
    else:  # the same scores; or NaN
        half = 0 * error
        p = 1.0 if error == 0 and estimate == 0 else math.nan
    return Difference(
        estimate=estimate,
        low=estimate - half,
        high=estimate + half,
        p=p,
        sd_rows=rows,
        sd_seeds=math.sqrt(sum(variance for variance, _ in by_seeds)),
        seeds=seeds,
        users=users,
        borrowed=spread is not None and 1 in seeds,
        parts=parts,
    )


def _welch(parts: Sequence[tuple[ArrayLike, ArrayLike]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standard error and degrees of freedom of a sum, from the variance and degrees of freedom of each part."""
    total = functools.reduce(np.add, (np.asarray(variance, np.float64) for variance, _ in parts))
    below = functools.reduce(np.add, (np.square(variance) / np.maximum(freedom, 1e-9) for variance, freedom in parts))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(total), np.where(np.asarray(below) > 0, np.square(total) / below, np.inf)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of one table, each adjusted for their number: any verdict by chance is then at most ``p`` likely.

    Holm, Scandinavian Journal of Statistics 6, 1979: the smallest of n is multiplied by n, the next by n - 1 and so on,
    and none is less than one before it. A NaN stays NaN and is not counted.
    """
    values = np.asarray(ps, np.float64)
    order = [place for place in np.argsort(values) if not np.isnan(values[place])]
    adjusted, largest = np.full(len(values), np.nan), 0.0
    for before, place in enumerate(order):
        largest = max(largest, min(1.0, float(values[place]) * (len(order) - before)))
        adjusted[place] = largest
    return adjusted.tolist()
