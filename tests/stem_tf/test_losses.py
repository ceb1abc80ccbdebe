"""Losses of tasks and the weights that add them up, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from pipelines.manifest import LabelScale
from pipelines.schema import Label, Task
from stem_tf.training.loss_weighting import Weighting
from stem_tf.training.losses import TaskLoss, score

CLICK = Task("click", Label("click"))
TIME = Task("time", Label("time"), type="regression")
SHARE = Task("share", Label("share"), type="regression", output="sigmoid")
LABELS, OUTPUTS = np.array([1.0, 0.0, 1.0], np.float32), np.array([0.3, -0.7, 2.0], np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def entropy(y: np.ndarray) -> np.ndarray:
    p = sigmoid(OUTPUTS)
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


def test_rows_outside_the_space_count_nothing() -> None:
    weights = tf.constant([1.0, 0.0, 1.0])
    assert float(TaskLoss(CLICK)(LABELS, OUTPUTS, weights)) == pytest.approx(entropy(LABELS)[[0, 2]].sum(), rel=1e-6)
    assert float(TaskLoss(TIME)(LABELS, OUTPUTS, weights)) == pytest.approx(0.49 + 1.0, rel=1e-6)


def test_a_sigmoid_regression_is_scored_and_trained_through_its_sigmoid() -> None:
    np.testing.assert_allclose(score(SHARE, tf.constant(OUTPUTS)), sigmoid(OUTPUTS), rtol=1e-6)
    np.testing.assert_array_equal(score(TIME, tf.constant(OUTPUTS)), OUTPUTS)
    expected = ((LABELS - sigmoid(OUTPUTS)) ** 2).sum()
    assert float(TaskLoss(SHARE)(LABELS, OUTPUTS, tf.ones(3))) == pytest.approx(expected, rel=1e-6)


def test_a_standardised_label_is_learned_in_its_scale_and_scored_in_its_units() -> None:
    scale = LabelScale(mean=30_000.0, std=500.0)
    labels = 30_000 + 500 * LABELS
    loss = TaskLoss(TIME, scale=scale)(labels, OUTPUTS, tf.constant([1.0, 0.5, 1.0]))
    assert float(loss) == pytest.approx(0.49 + 0.5 * 0.49 + 1.0, rel=1e-5)
    np.testing.assert_allclose(score(TIME, tf.constant(OUTPUTS), scale), 30_000 + 500 * OUTPUTS, rtol=1e-6)


def test_label_smoothing_and_the_weight_of_positives() -> None:
    smoothed = TaskLoss(CLICK, label_smoothing=0.2)(LABELS, OUTPUTS, tf.ones(3))
    assert float(smoothed) == pytest.approx(entropy(LABELS * 0.8 + 0.1).sum(), rel=1e-6)
    weighted = TaskLoss(CLICK, positive_weight=3.0)(LABELS, OUTPUTS, tf.constant([1.0, 1.0, 0.0]))
    assert float(weighted) == pytest.approx(3 * entropy(LABELS)[0] + entropy(LABELS)[1], rel=1e-6)
    # Neither means anything for a regression.
    plain, both = (TaskLoss(TIME, *options)(LABELS, OUTPUTS, tf.ones(3)) for options in ((), (0.2, 3.0)))
    assert float(plain) == float(both)


LOSSES = tf.constant([0.5, 2.0])


def total(weighting: Weighting, step: int = 0, epoch: int = 0, share: float = 1.0) -> float:
    return float(weighting(LOSSES, tf.constant(step, tf.int64), tf.constant(epoch, tf.int64), share))


def test_static_weights() -> None:
    assert total(Weighting([CLICK, TIME], [1.0, 0.25])) == pytest.approx(1.0)


@pytest.mark.parametrize(("per", "step", "epoch"), [("step", 3, 0), ("epoch", 100, 3)])
def test_decaying_weights_are_ple_equation_10(per: str, step: int, epoch: int) -> None:
    weighting = Weighting([CLICK, TIME], [1.0, 0.25], "decaying", [0.9, 1.1], per)  # type: ignore[arg-type]
    expected = 1.0 * 0.9**3 * 0.5 + 0.25 * 1.1**3 * 2.0
    assert total(weighting, step, epoch) == pytest.approx(expected, rel=1e-6)


def test_uncertainty_by_hand_and_where_it_leads() -> None:
    weighting = Weighting([CLICK, TIME], [1.0, 1.0], "uncertainty")
    (s,) = weighting.log_variances
    assert total(weighting) == pytest.approx(0.5 + 0.5 * 2.0)
    s.assign([0.4, -0.2])
    expected = np.exp(-0.4) * 0.5 + 0.4 / 2 + 0.5 * np.exp(0.2) * 2.0 - 0.2 / 2
    assert total(weighting) == pytest.approx(expected, rel=1e-6)
    # Two replicas: each has half of the losses and half of what no row has a part in.
    half = float(weighting(LOSSES / 2, tf.constant(0), tf.constant(0), 0.5))
    assert 2 * half == pytest.approx(expected, rel=1e-6)
    # The minimum over s: sigma^2 = 2 L for a cross-entropy, L for a squared error.
    s.assign(np.log([2 * 0.5, 2.0]))
    with tf.GradientTape() as tape:
        loss = weighting(LOSSES, tf.constant(0), tf.constant(0), 1.0)
    np.testing.assert_allclose(tape.gradient(loss, s), [0.0, 0.0], atol=1e-6)
