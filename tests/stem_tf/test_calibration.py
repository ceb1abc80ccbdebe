"""Calibration: by hand, against scikit-learn and simulated test sets."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from stem_tf.evaluation.calibration import calibration, equal_frequency


def test_two_buckets_by_hand() -> None:
    labels, scores = [0, 1, 1, 1], [0.1, 0.3, 0.5, 0.9]
    found = calibration("binary", labels, scores, buckets=2)
    assert found.rows.tolist() == [2, 2]
    np.testing.assert_allclose(found.predicted, [0.2, 0.7])
    np.testing.assert_allclose(found.observed, [0.5, 1.0])
    assert found.error == pytest.approx(0.3)
    assert found.ratio == pytest.approx(0.45 / 0.75)
    variances = np.array([0.1 * 0.9 + 0.3 * 0.7, 0.5 * 0.5 + 0.9 * 0.1]) / 4
    assert found.floor == pytest.approx(np.mean(np.sqrt(variances * 2 / np.pi)))
    # Wilson's interval of 2 of 2: from n / (n + z^2) to 1.
    assert found.low[1] == pytest.approx(2 / (2 + 1.959964**2), rel=1e-6)
    assert found.high[1] == pytest.approx(1)


def test_equal_width_is_scikit_learns_curve() -> None:
    random = np.random.default_rng(0)
    scores = random.random(5000) ** 3
    labels = random.random(5000) < scores
    found = calibration("binary", labels, scores, equal="width", buckets=7)
    observed, predicted = calibration_curve(labels, scores, n_bins=7)
    np.testing.assert_allclose(found.observed, observed)
    np.testing.assert_allclose(found.predicted, predicted)


def test_weights_count_rows() -> None:
    """Whole weights give the means of repeated rows; rows of weight 0 do not count, NaN labels included."""
    random = np.random.default_rng(1)
    scores, labels = random.random(300), random.integers(2, size=300).astype(float)
    weights = random.integers(0, 4, 300)
    labels[weights == 0] = np.nan
    weighted = calibration("binary", labels, scores, weights, equal="width")
    repeated = calibration("binary", np.repeat(labels, weights), np.repeat(scores, weights), equal="width")
    np.testing.assert_allclose(weighted.observed, repeated.observed)
    np.testing.assert_allclose(weighted.predicted, repeated.predicted)
    assert weighted.error == pytest.approx(repeated.error)
    assert weighted.rows.sum() == np.count_nonzero(weights)
    assert weighted.floor > repeated.floor  # fewer independent rows


@pytest.mark.parametrize("rate", [0.3, 0.01])
def test_floor_and_limit_are_those_of_simulated_test_sets(rate: float) -> None:
    random = np.random.default_rng(2)
    scores = random.beta(2, 2 / rate - 2, 4000)
    sets = [calibration("binary", random.random(4000) < scores, scores) for _ in range(400)]
    errors = np.array([found.error for found in sets])
    assert errors.mean() == pytest.approx(sets[0].floor, rel=0.05)
    assert np.mean([found.error > found.limit for found in sets]) == pytest.approx(0.05, abs=0.03)


def test_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(3)
    scores = random.uniform(0.01, 0.4, 3000)
    inside = []
    for _ in range(200):
        found = calibration("binary", random.random(3000) < scores, scores)
        inside += list((found.low <= found.predicted) & (found.predicted <= found.high))
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_regression_by_hand() -> None:
    found = calibration("regression", [1.0, 3.0, 10.0, np.nan], [1.0, 2.0, 8.0, 5.0], buckets=2)
    np.testing.assert_allclose(found.observed, [1.0, 6.5])  # the mean rank of the middle row is in the upper half
    np.testing.assert_allclose(found.predicted, [1.0, 5.0])
    assert found.error == pytest.approx(2 / 3 * 1.5)
    np.testing.assert_allclose(found.high - found.low, [0, 2 * 1.959964 * np.sqrt(2 * 3.5**2 / 4)], rtol=1e-6)
    assert np.isnan(calibration("regression", [-1.0, -2.0], [1.0, 2.0]).ratio)


def test_nothing_and_one_row() -> None:
    none = calibration("binary", [np.nan, np.nan], [0.5, 0.5])
    assert none.rows.tolist() == []
    assert np.isnan([none.error, none.floor, none.limit, none.ratio, none.predicted_mean]).all()
    one = calibration("binary", [0], [0.25], equal="width")
    assert (one.rows.tolist(), one.error) == ([1], 0.25)
    assert np.isnan(one.ratio)
    same = calibration("regression", [1.0, 2.0], [3.0, 3.0], equal="width")
    assert same.rows.tolist() == [2]


def test_equal_frequency() -> None:
    scores = np.random.default_rng(4).permutation(20).astype(np.float32)
    np.testing.assert_array_equal(equal_frequency(scores, 10), scores.astype(int) // 2)
    # Ties share the bucket of their mean rank.
    np.testing.assert_array_equal(equal_frequency([0.0] * 8 + [1.0, 2.0], 10), [4] * 8 + [8, 9])
    assert equal_frequency([5.0], 10).tolist() == [5]
    assert equal_frequency([], 10).tolist() == []
