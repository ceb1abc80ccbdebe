"""How far a metric may be off by chance: intervals over test users, and differences of models over users and seeds.

The rows of one user are not independent, so users are drawn, not rows: each of R resamples draws as many users as the
test set has, with replacement, and a user that is drawn twice counts twice (cluster bootstrap; Davison and Hinkley,
Bootstrap Methods and their Application, 1997). All runs see the same draws, which makes differences paired.

Shapes: N rows, R resamples, S runs of a model (one per seed). Does not import TensorFlow; `compare` and what it returns
need scipy (``stem-tf[compare]``).
"""

from __future__ import annotations

import copy
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
_MOST = 1000  # how many times the users that there are, or how many seeds, are tried to find what it takes to decide


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

    def aucs(
        self, labels: ArrayLike, scores: ArrayLike, weights: ArrayLike, *, approximate: bool = False
    ) -> NDArray[np.float64]:
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
          approximate: take the expansion however few the rows.

        Returns:
          [R] float64; NaN where a resample has one class only, and everywhere with fewer than `MIN_USERS` users.
        """
        if self.users(labels, weights, binary=True) < MIN_USERS:
            return np.full(len(self._counts), np.nan)
        positives, negatives = self._sides(labels, scores, weights)
        if approximate or (len(positives.scores) + len(negatives.scores)) * len(self._counts) > _EXACT:
            auc, influence = self._influence(positives, negatives)
            return auc + self.moved(influence[np.newaxis])[0]
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

    def auc_influence(
        self, labels: ArrayLike, scores: ArrayLike, weights: ArrayLike
    ) -> tuple[float, NDArray[np.float64]]:
        """The AUC, and the influence of each of the U users (blocks, rows), [U]: see `aucs`.

        Influences of thousands of AUCs, or means of them over seeds, are resampled together by `moved`.

        Args:
          labels, scores, weights: as of `aucs`; both classes have a row.
        """
        return self._influence(*self._sides(labels, scores, weights))

    def mean_influence(self, values: ArrayLike, weights: ArrayLike) -> tuple[float, NDArray[np.float64]]:
        """The weighted mean, and the influence of each user: the sum of its rows' w_i (value_i - mean) / W, [U].

        Args:
          values: [N].
          weights: [N]; one at least is above 0.
        """
        v, w = np.asarray(values, np.float64), np.asarray(weights, np.float64)
        mean = float(np.average(v, weights=w))
        shares = w * (v - mean) / w.sum()
        return mean, np.bincount(self._units, shares, minlength=self._counts.shape[1]).astype(np.float64)

    def moved(self, influences: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far each resample moves each of K numbers, to first order: [K, R] from their influences, [K, U]."""
        return np.atleast_2d(self._sums(influences.T).T)

    def _sides(self, labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> tuple[_Side, _Side]:
        """The positives and the negatives."""
        inside = np.asarray(weights) > 0
        y, s = np.asarray(labels)[inside] > 0.5, np.asarray(scores)[inside]
        w, units = np.asarray(weights)[inside].astype(np.float64), self._units[inside]
        up, down = (rows[np.argsort(s[rows])] for rows in (np.flatnonzero(y), np.flatnonzero(~y)))
        return _Side(s[up], w[up], units[up]), _Side(s[down], w[down], units[down])

    def _influence(self, positives: _Side, negatives: _Side) -> tuple[float, NDArray[np.float64]]:
        below = positives.weight_below(negatives) / negatives.weights.sum()
        above = 1 - negatives.weight_below(positives) / positives.weights.sum()
        auc = float(np.average(below, weights=positives.weights))
        influence = np.zeros(self._counts.shape[1])
        for side, values in ((positives, below), (negatives, above)):
            shares = side.weights * (values - auc) / side.weights.sum()
            influence += np.bincount(side.units, shares, minlength=len(influence))
        return auc, influence

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

    def shares(self, bins: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """The share of each resample's rows that lie in each of K bins.

        Args:
          bins: [N], the bin of each row: 0 to K - 1.
          count: K.

        Returns:
          [R, K] float64; NaN with fewer than `MIN_USERS` users.
        """
        units = self._counts.shape[1]
        if units < MIN_USERS:
            return np.full((len(self._counts), count), np.nan)
        places = self._units.astype(np.int64) * count + bins
        sums = self._sums(np.bincount(places, minlength=units * count).reshape(units, count).astype(np.float64))
        return np.asarray(sums / sums.sum(axis=1, keepdims=True))

    def _sums(self, of_units: NDArray) -> NDArray[np.float64]:
        """The sum over the drawn units of each resample, [R, ...]; 100 resamples at a time, as they become float64."""
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
class Part:
    """One of the independent parts of a standard error.

    Attributes:
      error: its standard error.
      freedom: how well it is known: degrees of freedom.
    """

    error: float
    freedom: float


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of model A less that of model B, on the same test rows.

    Test users and seeds leave it open. With the standard error s and the degrees of freedom f of either part, and the
    quantiles of Student's t, the interval is

        estimate +- sqrt(t(f_users)^2 s_users^2 + t(f_seeds)^2 s_seeds^2)

    which holds the true difference at least as often as it says however the two parts compare (Banerjee, Biometrika 48,
    1961). The degrees of freedom of Welch and Satterthwaite give narrower intervals, but not safe ones: with 2 runs per
    model, p < .0005 came 20 times as often as it should. What users and seeds do together counts in both parts, which
    errs towards "undecided", too.

    Attributes:
      estimate: the difference.
      low, high: its interval, for this comparison alone.
      p: the level at which the interval would end at 0. NaN where it cannot be said.
      users: from the paired bootstrap; one user less than the metric rests on are its degrees of freedom.
      seeds: from the runs of both models, as in Student's t-test.
      count: how many runs A and B have.
      borrowed: a model has one run, and its spread over seeds was taken from other models.
    """

    estimate: float
    low: float
    high: float
    p: float
    users: Part
    seeds: Part
    count: tuple[int, int]
    borrowed: bool

    def users_to_decide(self, level: float) -> float | None:
        """How many times the users of this test set a comparison at ``level`` needs, with the seeds as they are.

        If the true difference is the estimate, it then decides with a probability of about `POWER`. None where no
        number of users up to 1,000 times those there would do, because the seeds alone are too noisy for example.
        """
        times = np.geomspace(1, _MOST, 400)
        return self._first(times, [self._users(times), (self.seeds.error, self.seeds.freedom)], level)

    def seeds_to_decide(self, level: float) -> int | None:
        """How many seeds for each model a comparison at ``level`` needs on these test rows; see `users_to_decide`."""
        seeds = np.arange(max(2, *self.count), _MOST)
        found = self._first(seeds, [(self.users.error, self.users.freedom), self._seeds(seeds)], level)
        return None if found is None else int(found)

    def both_to_decide(self, level: float) -> tuple[float, int] | None:
        """How many times the users, and how many seeds: both grow by the same factor; see `users_to_decide`."""
        times = np.geomspace(1, _MOST, 400)
        seeds = np.ceil(times * max(2, *self.count))
        found = self._first(times, [self._users(times), self._seeds(seeds)], level)
        return None if found is None else (found, math.ceil(found * max(2, *self.count)))

    def _users(self, times: NDArray) -> tuple[NDArray, NDArray]:
        return self.users.error / np.sqrt(times), (self.users.freedom + 1) * times - 1

    def _seeds(self, seeds: NDArray) -> tuple[NDArray, NDArray]:
        of_run = self.seeds.error / math.sqrt(sum(1 / count for count in self.count))
        return of_run * np.sqrt(2 / seeds), 2 * (seeds - 1)

    def _first(self, amounts: NDArray, parts: Sequence[tuple[ArrayLike, ArrayLike]], level: float) -> float | None:
        """The first amount at which the estimate is above the half interval and what power asks for."""
        from scipy import stats

        if math.isnan(self.p):
            return None
        errors = np.sqrt(sum(np.square(error) for error, _ in parts))
        enough = np.flatnonzero(abs(self.estimate) > _half_width(parts, level) + stats.norm.ppf(POWER) * errors)
        return float(amounts[enough[0]]) if len(enough) else None


def compare(a: Runs, b: Runs | None = None, level: float = 0.05, spread: Spread | None = None) -> Difference:
    """The difference of two models' metric, or the metric of one, and what test users and seeds leave open.

    Args:
      a, b: the models' runs, resampled with the same `Resamples`. Without ``b``, the estimate is the metric of ``a``.
      level: .05 for an interval of 95 %.
      spread: stands in for the spread over seeds of a model with one run (`pooled`). Without it, p and the interval of
        a model with one run are NaN: a difference that a second seed could turn over is no finding.
    """
    models = [a] if b is None else [a, b]
    estimate, resampled = a.mean, a.resampled.mean(axis=0)
    if b is not None:
        estimate, resampled = estimate - b.mean, resampled - b.resampled.mean(axis=0)
    defined = resampled[~np.isnan(resampled)]
    enough = len(defined) > 1 and len(defined) >= (1 - level) * len(resampled)
    users = Part(float(np.std(defined, ddof=1)) if enough else math.nan, min(model.users for model in models) - 1)
    borrowed = spread is not None and any(len(model.values) == 1 for model in models)
    seeds = _seeds_part(models, spread)
    half = float(_half_width([(users.error, users.freedom), (seeds.error, seeds.freedom)], level))
    count = len(a.values), len(models[-1].values)
    p = _p(estimate, users, seeds)
    return Difference(estimate, estimate - half, estimate + half, p, users, seeds, count, borrowed)


def _seeds_part(models: Sequence[Runs], spread: Spread | None) -> Part:
    """As in Student's t-test of equally large samples; where they are not, with the freedom of the smaller one."""
    variance, freedom = 0.0, math.inf
    for model in models:
        runs = len(model.values)
        if runs > 1:
            variance, freedom = variance + model.variance / runs, min(freedom, len(models) * (runs - 1))
        elif spread is not None:
            variance, freedom = variance + spread.variance, min(freedom, spread.freedom)
        else:
            variance = math.nan
    return Part(math.sqrt(variance), freedom)


def _half_width(parts: Sequence[tuple[ArrayLike, ArrayLike]], level: float) -> NDArray[np.float64]:
    """Half of the interval of a sum of independent parts, each with an error and its degrees of freedom."""
    from scipy import stats

    squares = [np.square(stats.t.isf(level / 2, freedom) * error) for error, freedom in parts]
    return np.sqrt(np.sum(np.broadcast_arrays(*squares), axis=0))


def _p(estimate: float, *parts: Part) -> float:
    """The level at which an interval around ``estimate`` ends at 0."""
    from scipy import optimize

    error = math.sqrt(sum(part.error**2 for part in parts))
    if not error > 0:  # NaN, or the same scores in all runs
        return 1.0 if error == 0 and estimate == 0 else math.nan
    pairs = [(part.error, part.freedom) for part in parts]

    def beyond(exponent: float) -> float:
        return float(_half_width(pairs, math.exp(exponent))) - abs(estimate)

    least = math.log(1e-15)
    return math.exp(least if beyond(least) < 0 else optimize.brentq(beyond, least, 0.0, xtol=1e-9))


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
