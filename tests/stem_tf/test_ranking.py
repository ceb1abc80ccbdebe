"""NDCG@k and mean average precision: by hand, against scikit-learn, and over all orders of tied rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import sklearn.metrics
from numpy.typing import NDArray

from stem_tf.evaluation.ranking import Ranking, ranking


def test_by_hand() -> None:
    # User 1: positives in places 1 and 3; user 2 has one in place 2 of 2; user 3 has no positive, user 4 nothing else.
    labels, scores = [1, 0, 1, 0, 1, 0, 1], [0.9, 0.8, 0.7, 0.4, 0.2, 0.1, 0.1]
    found = ranking(labels, scores, ["1", "1", "1", "2", "2", "3", "4"], k=2)
    ndcg = (1 / (1 + 1 / np.log2(3)) + 1 / np.log2(3)) / 2
    assert (found.groups, found.left_out) == (2, 2)
    assert found.ndcg == pytest.approx(ndcg, abs=1e-15)
    assert found.map == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2, abs=1e-15)


def lists(levels: int | None) -> tuple[NDArray, NDArray, NDArray]:
    rng = np.random.default_rng(5)
    groups = rng.integers(-(2**62), 2**62, 150)[rng.integers(0, 150, 3000)]
    labels = (rng.random(3000) < 0.15).astype(np.float32)
    scores = (rng.random(3000) + 0.2 * labels).astype(np.float32)
    return labels, scores if levels is None else np.round(scores * levels) / np.float32(levels), groups


def by_group(labels: NDArray, groups: NDArray) -> list[NDArray]:
    rows = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    return [at for at in rows if 0 < labels[at].sum() < len(at)]


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("k", [1, 5, 10, 1000])
def test_ndcg_equals_scikit_learn(k: int, levels: int | None) -> None:
    labels, scores, groups = lists(levels)
    expected = [sklearn.metrics.ndcg_score(labels[None, at], scores[None, at], k=k) for at in by_group(labels, groups)]
    found = ranking(labels, scores, groups, k)
    assert found.groups == len(expected) and found.groups + found.left_out == len(np.unique(groups))
    assert found.ndcg == pytest.approx(np.mean(expected), abs=1e-12)


def test_map_equals_scikit_learn_where_nothing_is_tied() -> None:
    labels, scores, groups = lists(None)
    expected = [sklearn.metrics.average_precision_score(labels[at], scores[at]) for at in by_group(labels, groups)]
    assert ranking(labels, scores, groups, 10).map == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ties_count_with_the_mean_over_their_orders(k: int) -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        labels, scores = rng.integers(0, 2, 6), rng.integers(0, 3, 6) / 2
        labels[:2] = 0, 1
        orders = [at for at in itertools.permutations(range(6)) if not np.any(np.diff(scores[list(at)]) > 0)]
        means = np.mean([_of_order(labels[list(at)], k) for at in orders], axis=0)
        found = ranking(labels, scores, np.zeros(6), k)
        assert (found.ndcg, found.map) == pytest.approx(tuple(means), abs=1e-12)


def _of_order(labels: NDArray, k: int) -> tuple[float, float]:
    """NDCG@k and average precision of a list in this order, place by place."""
    gain = sum(y / np.log2(place + 1) for place, y in enumerate(labels[:k], 1))
    best = sum(1 / np.log2(place + 1) for place in range(1, min(k, labels.sum()) + 1))
    precision = sum(y * labels[:place].mean() for place, y in enumerate(labels, 1)) / labels.sum()
    return gain / best, precision


def test_rows_of_weight_0_are_in_no_list_and_others_count_alike() -> None:
    labels, scores, groups = lists(4)
    weights = np.random.default_rng(0).choice([0, 0.5, 3], len(labels))
    inside = weights > 0
    expected = ranking(labels[inside], scores[inside], groups[inside], 10)
    assert ranking(np.where(inside, labels, np.nan), scores, groups, 10, weights) == expected


def test_nothing_to_rank() -> None:
    for labels in ([], [1.0], [0.0, 0.0]):
        found = ranking(labels, [0.5] * len(labels), [1] * len(labels), 10)
        assert np.isnan(found.ndcg) and np.isnan(found.map)
        assert (found.groups, found.left_out) == (0, min(len(labels), 1))
    assert ranking([1, 0], [0.2, 0.1], [1, 1], 3, [1, 1]) == Ranking(1.0, 1.0, 1, 0)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="should all be"):
        ranking([1, 0], [0.5], [1, 1], 10)
    with pytest.raises(ValueError, match="k should be 1 or more, but is 0"):
        ranking([1, 0], [0.5, 0.4], [1, 1], 0)
