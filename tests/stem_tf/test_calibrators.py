"""Calibrators: fits against independent ones, scores in float32, and the file that ties them to weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from stem_tf import configs, trained
from stem_tf.evaluation import evaluator
from stem_tf.evaluation.calibration import measures
from stem_tf.evaluation.metrics import auc
from stem_tf.models.calibrators import Knots, Line, calibrator
from stem_tf.training import calibration
from stem_tf.training.trainer import Trainer
from stem_util.errors import UserError

Rows = tuple[NDArray, NDArray, NDArray]
Train = Callable[[Path, dict[str, Any]], Trainer]


def rows(count: int = 2000, seed: int = 0) -> Rows:
    """Logits that are twice as large as they should be and 1 too low, labels, and weights, some 0."""
    random = np.random.default_rng(seed)
    z = random.normal(-1, 1.5, count)
    return 2 * z - 1, (random.random(count) < expit(z)).astype(float), random.integers(0, 4, count).astype(float)


@pytest.mark.parametrize("method", ["platt", "temperature"])
def test_lines_are_of_the_least_logloss(method: str) -> None:
    z, y, w = rows()
    fitted = calibration.fit(method, z, np.where(w > 0, y, np.nan), w)
    free = [True, method == "platt"]

    def loss(line: NDArray) -> float:
        outputs = line[0] * z + (line[1] if free[1] else 0)
        return float(np.sum(w * (np.logaddexp(0, outputs) - y * outputs)))

    best = minimize(loss, [1.0, 0.0], tol=1e-12).x
    np.testing.assert_allclose([fitted["slope"], fitted["offset"]], best * free, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a deprecated spelling of C=inf
        peer = LogisticRegression(penalty=None, fit_intercept=free[1], tol=1e-9).fit(z[:, None], y, w)
    np.testing.assert_allclose(fitted["slope"], peer.coef_[0, 0], rtol=1e-5)
    if method == "platt":  # the mean is right after a fit with an offset
        assert np.average(expit(fitted["slope"] * z + fitted["offset"]), weights=w) == pytest.approx(
            np.average(y, weights=w), abs=1e-8
        )


def test_undersampling_gives_the_odds_of_the_whole_log() -> None:
    p = np.array([1e-9, 0.1, 0.5, 0.9])
    scores = calibrator(calibration.fit("undersampling", p, p, p, kept=0.25))(tf.constant(logit(p), tf.float32))
    np.testing.assert_allclose(scores, p / (p + (1 - p) / 0.25), rtol=1e-5)


def brute_force(z: NDArray, y: NDArray, w: NDArray) -> NDArray:
    """Isotonic regression by its min-max formula: max over i <= k of min over j >= k of the mean of rows i to j."""
    order = np.argsort(z)
    y, w = y[order], w[order]
    sums, weights = np.r_[0, np.cumsum(w * y)], np.r_[0, np.cumsum(w)]
    count = len(z)
    means = np.array([[(sums[j + 1] - sums[i]) / (weights[j + 1] - weights[i]) if j >= i else np.nan
                       for j in range(count)] for i in range(count)])  # fmt: skip
    fitted = np.empty(count)
    fitted[order] = [max(np.nanmin(means[i, k:]) for i in range(k + 1)) for k in range(count)]
    return fitted


def test_isotonic_knots_are_the_means_of_the_blocks() -> None:
    z, y, w = (values[np.argsort(rows(600)[2] == 0, kind="stable")][:430] for values in rows(600))
    assert (w > 0).all()
    fitted = calibration.fit("isotonic", z, y, w)
    expected = np.round(brute_force(z, y, w), 12)
    scale = len(w) / w.sum()
    knots = []
    for rate in np.unique(expected):
        block = expected == rate
        knots.append([w[block].sum(), np.average(z[block], weights=w[block]), rate])
    assert knots[0][2] == 0 and knots[-1][2] == 1
    knots[0][2] = 0.5 / (scale * knots[0][0] + 1)
    knots[-1][2] = 1 - 0.5 / (scale * knots[-1][0] + 1)
    while (
        True
    ):  # the steepest neighbours first: another order than that of the fit, to the same end where few are steep
        steep = [
            i for i in range(len(knots) - 1) if knots[i + 1][2] - knots[i][2] > 2 * (knots[i + 1][1] - knots[i][1])
        ]
        if not steep:
            break
        a, b = knots[steep[0]], knots.pop(steep[0] + 1)
        total = a[0] + b[0]
        knots[steep[0]] = [total, *((a[0] * a[i] + b[0] * b[i]) / total for i in (1, 2))]
    np.testing.assert_allclose(fitted["logits"], [knot[1] for knot in knots])
    np.testing.assert_allclose(fitted["scores"], [knot[2] for knot in knots])
    assert 0 < fitted["scores"][0] < fitted["scores"][-1] < 1


def test_knots_in_float32_are_linear_between_and_constant_outside() -> None:
    z, y, w = rows(20_000)
    found = calibrator(calibration.fit("isotonic", z, y, w))
    assert isinstance(found, Knots) and found.steepness <= 8 and len(found.logits) > 20
    inputs = np.r_[-1e30, np.linspace(-15, 15, 50_001), 1e30, found.logits].astype(np.float32)
    expected = np.interp(inputs.astype(np.float64), found.logits, found.scores)
    np.testing.assert_allclose(found(tf.constant(inputs)), expected, atol=3e-6)
    ordered = found(tf.constant(np.sort(inputs).reshape(1, -1)))
    assert ordered.shape == (1, len(inputs)) and (np.diff(ordered) >= -1e-7).all()
    after = found(tf.constant(z, tf.float32)).numpy()
    before = measures(y, expit(z).astype(np.float32), w)
    assert measures(y, after, w)["calibration_error"] < before["calibration_error"] / 4
    assert abs(auc(y, after, w) - before["auc"]) < 2e-3


z0, y0, w0 = rows()


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        ("platt", (z0, np.where(np.cumsum(y0) > 19, 0, y0), w0 * 0 + 1), "19 positive and 1,981 negative rows, and"),
        ("isotonic", (z0, np.ones(len(y0)), w0), "0 negative rows, and isotonic needs 100 of each"),
        ("platt", (z0, y0 * np.nan, w0 * 0), "0 positive and 0 negative"),
        ("isotonic", (z0 * 0, y0, w0), "the same score"),
        ("platt", (np.where(y0 > 0, np.inf, z0), y0, w0), "exactly 0 or 1"),
        ("temperature", (y0 - 0.5, y0, w0), "separate the classes"),
        ("platt", (-z0, y0, w0), "do not rise with the label"),
        ("temperature", (-z0, y0, w0), "do not rise with the label"),
        ("isotonic", (np.where(y0 > 0, -1.0, 1.0), y0, w0), "do not rise with the label"),
        ("isotonic", (z0 * 1e-3, y0, w0), "hardly differ"),
        ("temperature", ((z0 + 1) * 0.05, y0, w0), "hardly differ"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted(method: str, changed: Rows, message: str) -> None:
    with pytest.raises(calibration.Unfit, match=message):
        calibration.fit(method, *changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.calibration": "plat"}, "should be one of none, platt, .* did you mean 'platt'"),
        ({"train.calibration": {"click": "plat"}}, "should be one of none, platt, .* but is 'plat'"),
        ({"train.calibration": {"clik": "platt"}}, "no task 'clik'"),
        ({"train.calibration": {"watched": "platt"}}, "'watched' is a regression"),
        ({"train.calibration": "undersampling"}, "share of the negatives of 'click'.*negatives_kept=click:0.1"),
        ({"train.negatives_kept": 0.5}, "would do nothing with config.train.calibration=none"),
        ({"train.calibration": {"click": "undersampling"}, "train.negatives_kept": {"click": 0.0}}, "more than 0"),
        (
            {"train.calibration": {"click": "undersampling"}, "train.negatives_kept": {"click": 0.1, "watched": 0.1}},
            "names the task 'watched'",
        ),
    ],
)
def test_keys_that_are_wrong(tiny_settings: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config = configs.checked(tiny_settings | settings)
        manifest = configs.data(config)
        configs.check_names(config, manifest.schema.task_names, [])
        calibration.methods(config, manifest.schema)


def test_calibrators_belong_to_the_weights_that_they_were_fitted_for(
    tmp_path: Path, tiny_settings: dict[str, Any], train: Train
) -> None:
    """Trained without, calibrated afterwards, evaluated, then trained on: each step finds what it may use."""
    settings = tiny_settings | {"train.epochs": 1, "train.patience": 0}
    plain = train(tmp_path, settings)
    assert plain.calibration is None and not plain.workdir.calibration.exists()
    weights = plain.workdir.best / "ckpt-1.index"
    before = weights.read_bytes(), evaluator.evaluate_run(plain.workdir, "test").metrics

    settings |= {"train.calibration": "platt"}
    trainer = train(tmp_path, settings)
    assert trainer.calibration is not None and weights.read_bytes() == before[0]
    click = trainer.calibration["tasks"]["click"]
    assert [*trainer.calibration["tasks"]] == ["click"] and click["after"]["logloss"] < click["before"]["logloss"]
    written = trainer.workdir.calibration.read_bytes()
    assert train(tmp_path, settings).calibration == trainer.calibration  # fitted already
    assert trainer.workdir.calibration.read_bytes() == written

    of_test = evaluator.evaluate_run(trainer.workdir, "test")
    click, old = of_test.metrics["tasks"]["click"], before[1]["tasks"]["click"]
    assert click["auc"] == pytest.approx(old["auc"], abs=1e-6) and click["logloss"] != old["logloss"]
    assert click["uncalibrated"]["logloss"] == pytest.approx(old["logloss"], rel=1e-6)
    assert click["calibration"] == {"method": "platt"}
    assert "before calibration" in of_test.table and "scores of click are calibrated" in of_test.table
    assert of_test.metrics["weights"] != before[1]["weights"]
    without = evaluator.evaluate_run(trainer.workdir, "test", calibrated=False).metrics
    assert without["weights"] == before[1]["weights"]
    assert without["tasks"]["click"]["logloss"] == pytest.approx(old["logloss"], rel=1e-6)

    config = trainer.workdir.config()
    with pytest.raises(UserError, match=r"no calibrators were fitted for .*checkpoints/ckpt-\d+ .*--nocalibrated"):
        trained.load(trainer.workdir, config, trainer.manifest, "latest")
    trainer.workdir.calibration.write_text(written.decode().replace('"slope": ', '"slope": -'))
    with pytest.raises(UserError, match="damaged .*run stem-train again"):
        trained.load(trainer.workdir, config, trainer.manifest, "best")
    # Epochs are added, and one of them is better: what was fitted is of no use before the end.
    more = configs.checked(settings | {"train.epochs": 3})
    with trainer.workdir.locked():
        trainer.workdir.prepare(more, trainer.manifest)
        longer = Trainer(more, trainer.manifest, trainer.workdir, say=lambda line: None)
        longer._calibrate = lambda signals: None  # type: ignore[method-assign]  # killed before it
        longer.run()
    assert longer.state.best_epoch > 0
    with pytest.raises(UserError, match="no calibrators were fitted for .*best/ckpt-"):
        trained.load(longer.workdir, more, longer.manifest, "best")
    fitted = train(tmp_path, settings | {"train.epochs": 3}).calibration
    assert fitted is not None and fitted["weights"] != trainer.calibration["weights"]
    line = trained.load(longer.workdir, more, longer.manifest, "best").model.calibrators["click"]
    assert line == Line(fitted["tasks"]["click"]["slope"], fitted["tasks"]["click"]["offset"])


@pytest.mark.parametrize("best", ["own", "by_task"])
def test_weights_of_several_epochs(
    tmp_path: Path, chain_data: Path, tiny_settings: dict[str, Any], train: Train, best: str
) -> None:
    asked = {"click": "platt", "cart": "temperature", "buy": "isotonic"}
    settings = tiny_settings | {
        "optimizer.tables": "lazy",  # compiled faster
        "data.dir": str(chain_data),
        "train.best": best,
        "train.epochs": 2,
        "train.patience": 2,
        "train.calibration": asked,
    }
    trainer = train(tmp_path, settings)
    assert trainer.calibration is not None
    tasks = trainer.calibration["tasks"]
    assert {task: of_task["method"] for task, of_task in tasks.items()} == asked
    measured = evaluator.evaluate_run(trainer.workdir, "validation").metrics["tasks"]
    for task, of_task in tasks.items():  # measured on the same rows, so with the same weights
        if "why" in of_task:
            assert measured[task]["calibration"] == of_task and "uncalibrated" not in measured[task]
        else:
            assert measured[task]["uncalibrated"] == pytest.approx(of_task["before"], rel=1e-5)
            assert measured[task]["logloss"] == pytest.approx(of_task["after"]["logloss"], rel=1e-5)
    assert [task for task, of_task in tasks.items() if "why" in of_task] == ["buy"]
