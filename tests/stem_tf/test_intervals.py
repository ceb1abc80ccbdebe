"""Intervals over test users, and differences of models over users and seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from stem_tf.evaluation import intervals, metrics
from stem_tf.evaluation.intervals import Resamples, Runs, compare, holm, interval, pooled

Log = tuple[NDArray, NDArray, NDArray, NDArray, NDArray]


@pytest.fixture
def log() -> Log:
    """Users, labels, two models' scores (coarse: many ties) and weights of 900 rows of 60 users of different sizes."""
    random = np.random.default_rng(1)
    users = np.sort(random.choice(60, 900, p=random.dirichlet(np.ones(60))))
    labels = (random.random(900) < 0.3).astype(np.float32)
    taste = random.normal(size=60)[users]
    a = (labels * 0.8 + taste + random.normal(size=900)).round(1).astype(np.float32)
    b = (labels * 0.5 + taste + random.normal(size=900)).round(1).astype(np.float32)
    return users, labels, a, b, random.integers(0, 4, 900).astype(np.float32)


def drawn_rows(resamples: Resamples, users: NDArray) -> list[NDArray]:
    """The rows of each resample, a row of a user who was drawn twice twice."""
    units = np.unique(users, return_inverse=True)[1]
    return [np.repeat(np.arange(len(users)), counts[units]) for counts in resamples._counts]


def test_aucs_are_those_of_rows_that_were_really_drawn(log: Log) -> None:
    users, labels, a, b, weights = log
    resamples = Resamples(users, 50, 0)
    for scores, w in ((a, np.ones(900)), (b, weights)):
        expected = [
            roc_auc_score(labels[rows], scores[rows], sample_weight=w[rows]) for rows in drawn_rows(resamples, users)
        ]
        np.testing.assert_allclose(resamples.aucs(labels, scores, w), expected, atol=1e-12)


def test_means_are_those_of_rows_that_were_really_drawn(log: Log) -> None:
    users, _, a, _, weights = log
    resamples = Resamples(users, 50, 0)
    expected = [np.average(a[rows].astype(float), weights=weights[rows]) for rows in drawn_rows(resamples, users)]
    np.testing.assert_allclose(resamples.means(a, weights), expected, rtol=1e-9)


def test_users_are_drawn_and_not_rows(log: Log) -> None:
    users, labels, a, _, weights = log
    for groups, count in ((users, len(np.unique(users))), (None, 900)):
        resamples = Resamples(groups, 20, 0, rows=900)
        assert resamples._counts.shape == (20, count)
        assert (resamples._counts.sum(axis=1) == count).all()
    positive, negative = (users[(weights > 0) & (labels == label)] for label in (1, 0))
    assert Resamples(users, 2, 0).users(labels, weights, binary=True) == min(
        len(set(positive.tolist())), len(set(negative.tolist()))
    )


def test_long_logs_take_the_first_order_expansion(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    users, labels, a, _, weights = log
    resamples = Resamples(users, 1000, 0)
    exact = resamples.aucs(labels, a, weights)
    monkeypatch.setattr(intervals, "_EXACT", 0)
    expanded = resamples.aucs(labels, a, weights)
    assert np.corrcoef(exact, expanded)[0, 1] > 0.95
    assert np.std(expanded) == pytest.approx(np.std(exact), rel=0.05)
    # First order: what one user more adds is the derivative of the weighted AUC, here by finite differences.
    auc = metrics.auc(labels, a, weights)
    units = np.unique(users, return_inverse=True)[1]
    resamples._counts = np.ones((1, units.max() + 1), np.uint8)
    assert resamples.aucs(labels, a, weights)[0] == pytest.approx(auc, abs=1e-12)
    resamples._counts[0, 7] = 2
    step = 1e-6
    nudged = metrics.auc(labels, a, weights * np.where(units == 7, 1 + step, 1))
    assert resamples.aucs(labels, a, weights)[0] - auc == pytest.approx((nudged - auc) / step, rel=1e-3)


def test_many_users_are_drawn_in_blocks() -> None:
    random = np.random.default_rng(0)
    users = np.repeat(np.arange(20_000), 2)
    values = np.repeat(random.normal(size=20_000), 2)  # both rows of a user are the same
    resamples = Resamples(users, 400, 0)
    assert resamples._counts.shape == (400, 10_000)
    assert np.std(resamples.means(values, np.ones(40_000))) == pytest.approx(1 / math.sqrt(20_000), rel=0.12)
    assert len(set(zip(users.tolist(), resamples._units.tolist(), strict=True))) == 20_000  # a user is in one block


def test_rows_of_weight_0_do_not_matter(log: Log) -> None:
    users, labels, a, _, weights = log
    resamples = Resamples(users, 30, 0)
    outside = weights == 0
    missing, values = labels.copy(), a.copy()
    missing[outside] = values[outside] = np.nan
    np.testing.assert_array_equal(
        resamples.aucs(missing, a, ~outside), resamples.aucs(labels, a, (~outside).astype(float))
    )
    assert not np.isnan(resamples.aucs(missing, a, weights)).any()
    np.testing.assert_array_equal(resamples.means(values, weights), resamples.means(a, weights))


@pytest.mark.parametrize("positives", [0, 1, 9])
def test_too_few_users_with_a_class_have_no_interval(positives: int) -> None:
    labels = np.zeros(300)
    labels[: 3 * positives : 3] = 1  # of different users
    users, scores = np.arange(300) // 3, np.linspace(0, 1, 300)
    values = Resamples(users, 100, 0).aucs(labels, scores, np.ones(300))
    assert np.isnan(values).all() and np.isnan(interval(values)).all()


def test_one_user_no_rows_and_no_weights_have_no_interval() -> None:
    for users, weights in ((np.zeros(50), np.ones(50)), (np.empty(0), np.empty(0)), (np.arange(50), np.zeros(50))):
        resamples = Resamples(users, 20, 0)
        values = np.arange(len(users)) % 2
        assert np.isnan(interval(resamples.means(values, weights))).all()
        assert np.isnan(interval(resamples.aucs(values, values, weights))).all()
    with pytest.raises(ValueError, match="number of rows"):
        Resamples(None, 20, 0)


def test_interval_is_of_quantiles() -> None:
    assert interval(np.arange(101.0), 0.1) == (5, 95)
    assert interval(np.r_[np.arange(101.0), np.nan], 0.1) == (5, 95)
    assert np.isnan(interval(np.r_[np.arange(90.0), np.full(20, np.nan)], 0.1)).all()
    with pytest.raises(ValueError, match=r"level.*0\.95"):
        interval(np.arange(101.0), 0.95)


def simulated(
    random: np.random.Generator, users: int, gains: tuple[float, ...]
) -> tuple[NDArray, NDArray, list[NDArray]]:
    """Users with 8 rows, whose rate and whose benefit of each model's score differ: rows of a user are correlated."""
    rows = np.repeat(np.arange(users), 8)
    labels = (random.random(len(rows)) < random.beta(1, 2, users)[rows]).astype(float)
    common = random.normal(size=len(rows)) + random.normal(size=users)[rows]
    scores = [
        common + labels * (gain + random.normal(size=users)[rows]) + 0.5 * random.normal(size=len(rows))
        for gain in gains
    ]
    return rows, labels, scores


def test_intervals_of_correlated_users_cover_the_truth() -> None:
    """Of 200 logs about 95 % have an interval that holds the AUC of the population; one over rows alone holds fewer."""
    random = np.random.default_rng(5)
    rows, labels, (scores,) = simulated(random, 100_000, (0.5,))
    truth = metrics.auc(labels, scores)
    covered = {"users": 0, "rows": 0}
    for seed in range(200):
        rows, labels, (scores,) = simulated(random, 80, (0.5,))
        for name, groups in (("users", rows), ("rows", None)):
            values = Resamples(groups, 100, seed, rows=len(rows)).aucs(labels, scores, np.ones(len(rows)))
            low, high = interval(values)
            covered[name] += low <= truth <= high
    assert 0.90 <= covered["users"] / 200 <= 0.985
    assert covered["rows"] < covered["users"] - 10


def runs_of(random: np.random.Generator, seeds: int) -> Runs:
    """Runs of a model of metric 0, off by .2 with the users and by 1 with each seed, and resampled as they are."""
    values = 0.2 * random.normal() + random.normal(size=seeds)
    return Runs(values, values[:, None] + 0.2 * random.normal(size=300), 500)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_models_that_are_the_same_are_rarely_told_apart(seeds: int) -> None:
    """Users and seeds both add noise; at most 5 % of comparisons have a p below .05, and .5 % one below .005."""
    random = np.random.default_rng(seeds)
    ps = np.array([compare(runs_of(random, seeds), runs_of(random, seeds)).p for _ in range(600)])
    assert np.mean(ps < 0.05) <= 0.06 and np.mean(ps < 0.005) <= 0.01


def test_null_models_on_simulated_logs_are_rarely_told_apart() -> None:
    random = np.random.default_rng(11)
    found = 0
    for log in range(120):
        rows, labels, scores = simulated(random, 60, (0.5,) * 6)
        resamples = Resamples(rows, 100, log)
        weights = np.ones(len(rows))
        aucs = [metrics.auc(labels, s) for s in scores]
        values = np.stack([resamples.aucs(labels, s, weights) for s in scores])
        users = resamples.users(labels, weights, binary=True)
        a, b = (Runs(np.array(aucs[part]), values[part], users) for part in (slice(0, 3), slice(3, 6)))
        found += compare(a, b).p < 0.05
    assert found <= 11


def test_without_noise_of_users_it_is_the_test_of_student() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(3, 1, 5), random.normal(0, 3, 5)
    runs = [Runs(values, np.repeat(values[:, None], 100, 1), 50) for values in (a, b)]
    found = compare(runs[0], runs[1])
    expected = stats.ttest_ind(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (found.estimate, found.low, found.high) == pytest.approx((a.mean() - b.mean(), low, high))
    assert found.users.error == pytest.approx(0, abs=1e-12)
    assert compare(runs[0], runs[1], level=found.p).low == pytest.approx(0, abs=1e-6)


def test_without_noise_of_seeds_it_is_the_paired_bootstrap(log: Log) -> None:
    users, labels, a, b, weights = log
    resamples = Resamples(users, 2000, 0)
    count = resamples.users(labels, weights, binary=True)

    def same(scores: NDArray) -> Runs:
        values = resamples.aucs(labels, scores, weights)
        return Runs(np.repeat(metrics.auc(labels, scores, weights), 3), np.stack([values] * 3), count)

    found = compare(same(a), same(b))
    differences = resamples.aucs(labels, a, weights) - resamples.aucs(labels, b, weights)
    assert found.users.error == pytest.approx(np.std(differences, ddof=1))
    assert found.users.error < math.hypot(*(np.std(resamples.aucs(labels, s, weights)) for s in (a, b)))
    assert (found.low, found.high) == pytest.approx(interval(differences), abs=found.users.error / 4)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.estimate) / found.users.error, count - 1))


def constant_rows(values: list[float], users: int = 1000, rows: float = 0.001) -> Runs:
    noise = rows * np.random.default_rng(len(values)).choice([-1.0, 1.0], 1000)
    return Runs(np.array(values), np.array(values)[:, None] + noise, users)


def test_one_seed_borrows_the_spread_of_other_models_or_says_nothing() -> None:
    one, other = constant_rows([0.71]), constant_rows([0.70])
    found = compare(one, other)
    assert math.isnan(found.p) and math.isnan(found.low) and math.isnan(found.seeds.error) and not found.borrowed
    assert found.estimate == pytest.approx(0.01)
    assert found.users_to_decide(0.05) is None and found.seeds_to_decide(0.05) is None
    several = [constant_rows([0.70, 0.72, 0.71]), constant_rows([0.5, 0.5]), one]
    spread = pooled(several)
    assert spread is not None
    assert (spread.variance, spread.freedom) == (pytest.approx((2 * 0.01**2 + 0) / 3), 3)
    found = compare(one, other, spread=spread)
    assert found.borrowed and found.seeds.error == pytest.approx(math.sqrt(2 * spread.variance))
    assert 0 < found.p < 1
    assert pooled([one, other]) is None


def test_equal_scores_do_not_differ() -> None:
    runs = Runs(np.full(3, 0.7), np.full((3, 50), 0.7), 100)
    found = compare(runs, runs)
    assert (found.estimate, found.low, found.high, found.p) == pytest.approx((0, 0, 0, 1), abs=1e-12)
    assert found.users_to_decide(0.05) is None


def test_undefined_resamples_say_nothing() -> None:
    runs = Runs(np.full(3, 0.7), np.full((3, 50), np.nan), 4)
    found = compare(runs, Runs(np.full(2, 0.6), np.full((2, 50), 0.6), 90))
    assert math.isnan(found.p) and math.isnan(found.users.error)


def test_users_and_seeds_to_decide() -> None:
    """At the amounts that are named the test decides with a probability of .8, by simulation."""
    a, b = constant_rows([0.7015, 0.7025, 0.7020], rows=0.002), constant_rows([0.7000, 0.7004, 0.6996], rows=-0.002)
    found = compare(a, b)
    assert found.p > 0.05
    times = found.users_to_decide(0.05)
    assert times is not None and times > 1
    noisy = compare(constant_rows([0.70, 0.71]), constant_rows([0.6999, 0.7099]))
    assert noisy.users_to_decide(0.05) is None  # the seeds alone hide it
    seeds = compare(constant_rows([0.70, 0.71]), constant_rows([0.69, 0.70])).seeds_to_decide(0.05)
    assert seeds is not None
    random = np.random.default_rng(0)
    sd = math.sqrt(0.5) * 0.01
    a_runs, b_runs = (random.normal(mean, sd, (seeds, 2000)) for mean in (0.705, 0.695))
    ps = stats.ttest_ind(a_runs, b_runs).pvalue
    assert np.mean(ps < 0.05) == pytest.approx(0.8, abs=0.08)
    smaller = found.users_to_decide(0.001)
    assert smaller is None or smaller > times


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []
    adjusted = holm([0.01, math.nan, 0.02])
    assert adjusted[0] == pytest.approx(0.02) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.02)
