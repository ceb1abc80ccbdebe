from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import sklearn.metrics
from numpy.typing import NDArray

from stem_tf.evaluation import metrics


def random_rows(seed: int, n: int = 5000, levels: int | None = None) -> tuple[NDArray, NDArray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.1).astype(np.float32)
    scores = np.clip(rng.normal(0.3, 0.1, n) + 0.1 * labels, 1e-3, 1 - 1e-3).astype(np.float32)
    if levels:
        scores = np.round(scores * levels) / np.float32(levels)
    return labels, scores, rng


def test_auc_by_hand() -> None:
    # Pairs (positive, negative): .8 > .1, .8 > .4, .4 > .1, .4 = .4: (3 + 1/2) / 4.
    assert metrics.auc([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8]) == 3.5 / 4
    assert metrics.auc([1, 1, 1, 0], [0.1, 0.2, 0.3, 0.25]) == 1 / 3  # more positives than negatives
    assert metrics.auc([0, 1], [0.5, 0.5]) == 0.5
    # Weights 2 and 1 on the positives: (2 * 1 + 1 * 0) / 3.
    assert metrics.auc([0, 1, 1], [0.5, 0.9, 0.1], [1, 2, 1]) == pytest.approx(2 / 3, abs=1e-15)


@pytest.mark.parametrize("levels", [None, 20])
@pytest.mark.parametrize("flip", [False, True])
def test_auc_equals_scikit_learn(levels: int | None, flip: bool) -> None:
    labels, scores, rng = random_rows(0, levels=levels)
    labels = 1 - labels if flip else labels
    assert metrics.auc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)
    for weights in (rng.random(len(labels)), (rng.random(len(labels)) < 0.7).astype(np.float32)):
        # scikit-learn sums in the type of the weights.
        expected = sklearn.metrics.roc_auc_score(labels, scores, sample_weight=weights.astype(np.float64))
        assert metrics.auc(labels, scores, weights) == pytest.approx(expected, abs=1e-12)


def pairwise(labels: NDArray, scores: NDArray) -> float:
    """The definition: every positive against every negative."""
    positive, negative = scores[labels == 1][:, None], scores[labels == 0]
    return float((positive > negative).mean() + (positive == negative).mean() / 2)


@pytest.fixture(params=[64, None], ids=["small_blocks", "one_block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small blocks the rows are sorted in parts and counted in many pieces."""
    if request.param:
        monkeypatch.setattr(metrics, "_BLOCK_ROWS", request.param)


AWKWARD = {
    "signs": [-1.5, -0.0, 0.0, 2.0, -np.inf, np.inf, -1e-45, 1e-45, 3.4e38, -3.4e38],
    "probabilities": [0.0, -0.0, 1.0, 0.5, 0.25, 1e-45, 1 - 2**-24],
    "one": [0.5],
    "negative": [-1.0, -2.0, -0.5, -np.inf],
}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("values", AWKWARD)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64])
def test_auc_is_the_pairwise_definition(values: str, dtype: type) -> None:
    rng = np.random.default_rng(3)
    with np.errstate(over="ignore", invalid="ignore"):
        scores = np.array(AWKWARD[values])[rng.integers(0, len(AWKWARD[values]), 500)].astype(dtype)
    for rate in (0.002, 0.3, 0.998):
        labels = (rng.random(500) < rate).astype(np.float32)
        labels[:2] = 0, 1
        assert metrics.auc(labels, scores) == pytest.approx(pairwise(labels, scores), abs=1e-12)
        assert metrics.auc(labels == 1, scores, labels >= 0) == metrics.auc(labels, scores)
        groups = rng.integers(0, 9, 500)
        both = [g for g in range(9) if len(set(labels[groups == g])) == 2]
        sizes = [np.count_nonzero(groups == g) for g in both]
        aucs = [pairwise(labels[groups == g], scores[groups == g]) for g in both]
        assert metrics.grouped_auc(labels, scores, groups) == pytest.approx(np.average(aucs, weights=sizes), abs=1e-12)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rate", [0.0005, 0.1, 0.9995])
@pytest.mark.parametrize("levels", [None, 3, 1000])
def test_auc_equals_scikit_learn_at_any_rate(rate: float, dtype: type, levels: int | None) -> None:
    rng = np.random.default_rng(4)
    labels = rng.random(20_000) < rate
    scores: NDArray = (rng.normal(size=20_000) + labels).astype(dtype)
    if levels:
        scores = np.round(scores * levels) / dtype(levels)
    expected = sklearn.metrics.roc_auc_score(labels, scores)
    assert metrics.auc(labels, scores) == pytest.approx(expected, abs=1e-9)
    assert metrics.auc(labels, 1 / (1 + np.exp(-scores))) == pytest.approx(expected, abs=1e-4)  # rounds to new ties


def test_rows_of_weight_zero_are_ignored_whatever_they_hold() -> None:
    labels, scores, weights = [0, 1, 1, 7], [0.2, 0.9, 0.1, np.nan], [1, 1, 1, 0]
    assert metrics.auc(labels, scores, weights) == 0.5
    assert metrics.grouped_auc(labels, scores, [1, 1, 1, 1], weights) == 0.5
    assert metrics.mse(labels, scores, weights) == pytest.approx((0.04 + 0.01 + 0.81) / 3)


def test_one_class_or_no_rows_is_nan() -> None:
    for labels in ([1, 1], [0, 0], []):
        assert np.isnan(metrics.auc(labels, [0.5] * len(labels)))
        assert np.isnan(metrics.auc(labels, [0.5] * len(labels), [2.0] * len(labels)))
        assert np.isnan(metrics.grouped_auc(labels, [0.5] * len(labels), [1] * len(labels)))
    assert np.isnan(metrics.logloss([], []))
    assert np.isnan(metrics.mse([1.0], [1.0], [0.0]))


@pytest.mark.usefixtures("blocks")
def test_logloss_equals_scikit_learn() -> None:
    labels, scores, rng = random_rows(1)
    scores = scores.astype(np.float64)
    weights = rng.random(len(labels))
    assert metrics.logloss(labels, scores) == pytest.approx(sklearn.metrics.log_loss(labels, scores), abs=1e-12)
    expected = sklearn.metrics.log_loss(labels, scores, sample_weight=weights)
    assert metrics.logloss(labels, scores, weights) == pytest.approx(expected, abs=1e-12)
    expected = sklearn.metrics.mean_squared_error(labels, scores, sample_weight=weights)
    assert metrics.mse(labels, scores, weights) == pytest.approx(expected, abs=1e-12)


def test_logloss_of_saturated_scores_is_finite() -> None:
    worst = metrics.logloss([0, 1], np.array([1, 0], np.float32))
    assert worst == pytest.approx(-np.log(np.finfo(np.float32).eps))
    assert metrics.logloss([1, 0], np.array([1, 0], np.float32)) < 2e-7


def test_grouped_auc_by_hand() -> None:
    # Group 1 (3 rows): AUC 1/2; group 2 (2 rows): AUC 1; group 3 has one class.
    labels = [0, 1, 1, 1, 0, 1]
    scores = [0.5, 0.9, 0.1, 0.3, 0.2, 0.4]
    groups = [1, 1, 1, 2, 2, 3]
    assert metrics.grouped_auc(labels, scores, groups) == pytest.approx((3 * 0.5 + 2 * 1) / 5, abs=1e-15)
    # Group 2's weights are 1/2 each, so it counts as one row.
    weights = [1, 1, 1, 0.5, 0.5, 1]
    assert metrics.grouped_auc(labels, scores, groups, weights) == pytest.approx((3 * 0.5 + 1 * 1) / 4, abs=1e-15)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("weighted", [False, True])
def test_grouped_auc_equals_a_loop_over_scikit_learn(weighted: bool) -> None:
    labels, scores, rng = random_rows(2, levels=30)
    groups = rng.integers(-(2**62), 2**62, 200)[rng.integers(0, 200, len(labels))]
    weights = rng.random(len(labels)) if weighted else np.ones(len(labels))
    total = rows = 0.0
    for group in np.unique(groups):
        inside = groups == group
        if len(set(labels[inside])) == 2:
            value = sklearn.metrics.roc_auc_score(labels[inside], scores[inside], sample_weight=weights[inside])
            total += value * weights[inside].sum()
            rows += weights[inside].sum()
    assert metrics.grouped_auc(labels, scores, groups, weights) == pytest.approx(total / rows, abs=1e-12)


def test_smoothed_means_by_hand() -> None:
    # The train mean is 1/2; key 7: (2 + 5/2) / 7, key 9: (0 + 5/2) / 7, unseen keys 1/2.
    got = metrics.smoothed_means([7, 9, 7, 9], [1, 0, 1, 0], [9, 8, 7, 100])
    np.testing.assert_allclose(got, [2.5 / 7, 0.5, 4.5 / 7, 0.5], rtol=1e-15)
    np.testing.assert_allclose(metrics.smoothed_means([7, 9], [1, 0], [7], prior_rows=0), [1])
    assert np.isnan(metrics.smoothed_means([], [], [1, 2])).all()
    # A row of weight 2 is two rows; the scale of weights does not matter.
    once = metrics.smoothed_means([7, 7, 7, 9, 9], [1, 1, 0, 0, 1], [7, 9, 8], prior_rows=0)
    for scale in (1, 10):
        weighted = metrics.smoothed_means([7, 7, 9, 9], [1, 0, 0, 1], [7, 9, 8], 0, scale * np.array([2, 1, 1, 1]))
        np.testing.assert_allclose(weighted, once, rtol=1e-15)
    got = metrics.smoothed_means([7, 9], [1, 0], [7], 4, [3, 1])  # the mean is 3/4, the mean weight 2
    np.testing.assert_allclose(got, [(3 + 8 * 0.75) / (3 + 8)], rtol=1e-15)


def test_evaluate_and_mean_auc() -> None:
    types = {"click": "binary", "like": "binary", "completion": "regression"}
    labels: dict[str, list[float]] = {"click": [0, 1, 0], "like": [0, 0, 0], "completion": [0.5, 0.0, 1.0]}
    scores = {"click": [0.2, 0.7, 0.9], "like": [0.1, 0.1, 0.1], "completion": [0.5, 9.0, 0.5]}
    weights = {"click": [1, 1, 1], "like": [1, 1, 1], "completion": [1, 0, 1]}
    results = metrics.evaluate(types, labels, scores, weights, groups=[1, 1, 2])
    assert results["click"]["rows"] == 3
    assert results["click"]["rate"] == pytest.approx(1 / 3)
    assert results["click"]["auc"] == 0.5
    assert results["click"]["grouped_auc"] == 1.0
    assert np.isnan(results["like"]["auc"])
    assert results["like"]["logloss"] == pytest.approx(-np.log(0.9))
    assert results["completion"] == {"rows": 2, "rate": 0.75, "mse": 0.125}
    assert metrics.mean_auc(results) == 0.5
    assert metrics.mean_auc({"a": {"auc": 0.5}, "b": {"auc": 1.0}, "c": {"auc": float("nan")}}) == 0.75
    assert np.isnan(metrics.mean_auc({"completion": results["completion"]}))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_weighted_metrics_equal_scikit_learn(kind: type) -> None:
    labels, scores, rng = random_rows(4, levels=20)  # with ties
    weights = rng.choice(np.array([0, 0.5, 1, 7.25], kind), len(labels))
    types: dict[str, str] = {"y": "binary", "z": "regression"}
    by_task = [dict.fromkeys(types, values) for values in (labels, scores, weights)]
    results = metrics.evaluate(types, by_task[0], by_task[1], by_task[2])
    wide = {"sample_weight": weights.astype(np.float64)}
    assert results["y"]["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores, **wide), abs=1e-12)
    logloss = sklearn.metrics.log_loss(labels, scores.astype(np.float64), **wide)
    assert results["y"]["logloss"] == pytest.approx(logloss, abs=1e-9)
    assert results["z"]["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(labels, scores, **wide), abs=1e-9)
    assert results["y"]["rate"] == pytest.approx(np.average(labels, weights=wide["sample_weight"]), abs=1e-9)
    assert results["y"]["rows"] == np.count_nonzero(weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc([0, 1, 1], [0.1, np.nan, np.nan]), "2 of 3 scores are NaN"),
        (lambda: metrics.auc([0, 2], [0.1, 0.2]), "0 or 1, but 1 of 2"),
        (lambda: metrics.auc([0, 1], [0.1]), "both be"),
        (lambda: metrics.auc([0, 1], [0.1, 0.2], [1, -1]), "0 or more, but 1"),
        (lambda: metrics.auc([0, 1], [0.1, 0.2], [1]), "weights should have the shape"),
        (lambda: metrics.logloss([0, 1], [0.1, 1.5]), "scores of a logloss"),
        (lambda: metrics.mse([np.nan], [0.1]), "1 of 1 labels are NaN"),
        (lambda: metrics.grouped_auc([0, 1], [0.1, 0.2], [1]), "groups should have"),
        (lambda: metrics.smoothed_means([1], [0, 1], [1]), "keys_train should have"),
        (
            lambda: metrics.evaluate({"like": "rank"}, {"like": [0]}, {"like": [0]}, {"like": [1]}),
            "task 'like'.*'rank'",
        ),
        (lambda: metrics.evaluate({"like": "binary"}, {"like": [0]}, {"like": [np.nan]}, {"like": [1]}), "task 'like'"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
