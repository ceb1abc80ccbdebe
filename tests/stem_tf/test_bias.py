"""The additive model of a bias per user and per item: by hand, and against scikit-learn and least squares."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.linear_model
from numpy.typing import NDArray

from stem_tf.evaluation import bias
from stem_tf.evaluation.bias import Biases


def log(rate: float, rows: int = 3000) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """users, items, logits, weights"""
    rng = np.random.default_rng(0)
    users = np.unique(rng.geometric(0.03, rows), return_inverse=True)[1]
    items = np.unique(rng.geometric(0.1, rows), return_inverse=True)[1]
    logits = np.log(rate / (1 - rate)) + rng.normal(size=400)[users] + rng.normal(size=400)[items]
    return users, items, logits, rng.choice([0.5, 1, 4], rows)


def columns(users: NDArray, items: NDArray) -> NDArray:
    return np.concatenate([np.eye(users.max() + 1)[users], np.eye(items.max() + 1)[items]], axis=1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rate", [0.003, 0.05, 0.5, 0.98])
def test_logistic_model_equals_scikit_learn(rate: float, weighted: bool) -> None:
    users, items, logits, weights = log(rate)
    labels = (np.random.default_rng(1).random(len(users)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    assert 0 < labels.sum() < len(labels)
    w = weights if weighted else np.ones(len(labels))
    mean = np.average(labels, weights=w)
    penalty = 5 * w.mean() * mean * (1 - mean)
    model = sklearn.linear_model.LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=1e-10, max_iter=500)
    model.fit(columns(users, items), labels, sample_weight=w)
    found = bias.fit(users, items, labels, weights if weighted else None, 5, "binary")
    assert found.intercept == pytest.approx(model.intercept_[0], abs=1e-4)
    np.testing.assert_allclose(np.r_[found.users, found.items], model.coef_[0], atol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_additive_model_of_a_regression_is_ridge(scale: float) -> None:
    users, items, logits, weights = log(0.5)
    labels = scale * (7 + logits)
    model = sklearn.linear_model.Ridge(alpha=5 * weights.mean(), solver="cholesky")
    model.fit(columns(users, items), labels, sample_weight=weights)
    found = bias.fit(users, items, labels, weights, 5, "regression")
    assert found.intercept == pytest.approx(model.intercept_, abs=1e-4 * scale)
    np.testing.assert_allclose(np.r_[found.users, found.items], model.coef_, atol=1e-4 * scale)


def test_users_alone_get_their_smoothed_means() -> None:
    # One item: its bias takes part of the level, and what is left to each user is its smoothed distance from it.
    users, labels = np.array([0, 0, 0, 1, 2]), np.array([1.0, 2, 3, 8, 0])
    found = bias.fit(users, np.zeros(5, int), labels, None, 2, "regression")
    level = found.intercept + found.items[0]
    sums, rows = np.array([6.0, 8, 0]), np.array([3, 1, 1])
    np.testing.assert_allclose(found.users, (sums - rows * level) / (rows + 2), atol=1e-4)
    assert found.items[0] == pytest.approx(0, abs=1e-4)


def test_one_class_one_value_one_row_and_none() -> None:
    none = np.zeros(0, int)
    assert np.isnan(bias.fit(none, none, [], None, 5, "binary").intercept)
    two, same = np.array([0, 1]), np.array([0, 0])
    for labels, kind, intercept in (
        ([1, 1], "binary", np.inf),
        ([0, 0], "binary", -np.inf),
        ([3.0, 3.0], "regression", 3.0),
    ):
        found = bias.fit(two, same, labels, None, 5, kind)
        assert found.intercept == intercept and not found.users.any() and not found.items.any()
    found = bias.fit(two, same, [0, 1], None, 5, "binary")
    assert found.users[0] == pytest.approx(-found.users[1], abs=1e-6) and found.users[1] > 0
    assert isinstance(bias.fit(same[:1], same[:1], [2.5], None, 5, "regression"), Biases)
