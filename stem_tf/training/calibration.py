"""Fits calibrators of binary tasks on validation, and keeps them beside the weights that they are for.

``best/calibration.json`` says which weights it was fitted for, by the checksums of their checkpoints; it is used with
no others. Does not import TensorFlow; :mod:`stem_tf.models.calibrators` computes scores.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.schema import Schema
from stem_tf import configs, report
from stem_tf.evaluation.calibration import measures
from stem_util import files
from stem_util.errors import UserError

_LEAST_ROWS = {"temperature": 10, "platt": 20, "isotonic": 100}
"""Rows of each class that a fit needs: ten for each number that is fitted; isotonic regression fits many."""
_STEEPEST = 8.0
"""How steeply a calibrator rises at most, as a multiple of the sigmoid's rise of 1 / 4 per unit of logit. Without a
bound two logits that differ by rounding could have scores that are far apart."""
_FALLS = "scores do not rise with the label on validation"
_LEVEL = "scores hardly differ on validation, so that what calibration makes of them would be rounding"

Asked = list[Any]
"""A task's method, and the share of its negatives that the log kept."""
Rows = dict[str, tuple[NDArray, NDArray, NDArray]]
"""Logits, labels and weights ``[N]`` of validation, by task."""


class Unfit(Exception):
    """A task cannot be calibrated; the message says why."""


def methods(config: Any, schema: Schema) -> dict[str, str]:
    """How each task is calibrated (``config.train.calibration``), without tasks that are not.

    Raises:
      UserError: a regression is named, or ``config.train.negatives_kept`` is missing, or given for nothing.
    """
    given, kept = configs.plain(config.train.calibration), configs.plain(config.train.negatives_kept)
    found = {}
    for task in schema.tasks:
        method = configs.of_task(given, task.name, "none")
        if task.type != "binary" and isinstance(given, dict) and method != "none":
            raise UserError(
                f"config.train.calibration={task.name}:{method}: the task '{task.name}' is a regression, and only "
                "probabilities are calibrated; leave it out"
            )
        if task.type == "binary" and method != "none":
            found[task.name] = method
        by_kept = found.get(task.name) == "undersampling"
        if by_kept and configs.of_task(kept, task.name, 1.0) == 1.0:
            raise UserError(
                f"config.train.calibration=undersampling needs the share of the negatives of '{task.name}' that the "
                f"log has kept: --config.train.negatives_kept={task.name}:0.1, if that was one in ten"
            )
        if not by_kept and isinstance(kept, dict) and task.name in kept:
            raise UserError(
                f"config.train.negatives_kept names the task '{task.name}', whose config.train.calibration is not "
                "undersampling, so it would do nothing; leave the task out"
            )
    return found


def asked(config: Any, schema: Schema) -> dict[str, Asked]:
    """What a config asks for, by task that is calibrated; raises as :func:`methods`."""
    kept = configs.plain(config.train.negatives_kept)
    return {task: [method, configs.of_task(kept, task, 1.0)] for task, method in methods(config, schema).items()}


def fit(method: str, logits: NDArray, labels: NDArray, weights: NDArray, kept: float = 1.0) -> dict[str, Any]:
    """Fits a calibrator.

    ::

        platt           sigmoid(slope * logit + offset), of the least logloss (Platt 1999, without his smoothed labels)
        temperature     the same without the offset (Guo et al. 2017; slope is 1 / temperature)
        isotonic        the increasing function of the least squares (Zadrozny and Elkan 2002), linear between the
                        means of its blocks (Oron and Flournoy 2017)
        undersampling   p / (p + (1 - p) / kept), as sigmoid(logit + log kept)

    An isotonic block at either end counts half a row of each class at least, so that no score is 0 or 1.

    Args:
      method: one of those above.
      logits: [N], of a task's scores.
      labels: [N], 0 or 1; a row of weight 0 may have NaN.
      weights: [N].
      kept: for undersampling: the share of negatives that the log kept.

    Returns:
      ``slope`` and ``offset``, or the knots ``logits`` and ``scores``, as :func:`stem_tf.models.calibrators.calibrator`
      takes them.

    Raises:
      Unfit: too few rows of a class, scores that do not differ, do not rise with the label, or separate the classes.
    """
    if method == "undersampling":
        return {"slope": 1.0, "offset": math.log(kept)}
    inside = weights > 0
    z, y, w = (np.asarray(values, np.float64)[inside] for values in (logits, labels, weights))
    positives, least = int(np.count_nonzero(y)), _LEAST_ROWS[method]
    if min(positives, len(y) - positives) < least:
        raise Unfit(
            f"validation has {positives:,} positive and {len(y) - positives:,} negative rows, and {method} needs "
            f"{least} of each"
        )
    if not np.isfinite(z).all():
        raise Unfit("some validation rows have a score of exactly 0 or 1: training has diverged")
    if z.min() == z.max():
        raise Unfit("all validation rows have the same score")
    w = w / w.mean()
    return _isotonic(z, y, w) if method == "isotonic" else _line(z, y, w, method == "platt")


def _line(z: NDArray, y: NDArray, w: NDArray, with_offset: bool) -> dict[str, Any]:
    """A logistic regression on the logit, without a penalty."""
    from sklearn.linear_model import LogisticRegression

    if z[y > 0].min() > z[y == 0].max():
        raise Unfit("scores separate the classes of validation, so that no slope is steep enough")
    model = LogisticRegression(
        C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=1000, fit_intercept=with_offset
    ).fit(z[:, np.newaxis], y, w)
    slope = float(model.coef_[0, 0])
    if not slope > 0:
        raise Unfit(_FALLS)
    if slope > _STEEPEST:
        raise Unfit(_LEVEL)
    return {"slope": slope, "offset": float(model.intercept_[0]) if with_offset else 0.0}


def _isotonic(z: NDArray, y: NDArray, w: NDArray) -> dict[str, Any]:
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(increasing=True).fit(z, y, sample_weight=w).predict(z)
    rates, block = np.unique(fitted, return_inverse=True)
    if len(rates) == 1:
        raise Unfit(_FALLS)
    weight = np.bincount(block, w)
    rates[0] = min(max(rates[0], 0.5 / (weight[0] + 1)), rates[1])
    rates[-1] = max(min(rates[-1], 1 - 0.5 / (weight[-1] + 1)), rates[-2])
    knots: list[tuple[float, float, float]] = []  # weight, logit, rate
    for new in zip(weight, np.bincount(block, w * z) / weight, rates, strict=True):
        while knots and new[2] - knots[-1][2] > _STEEPEST / 4 * (new[1] - knots[-1][1]):
            new = _pooled(knots.pop(), new)
        knots.append(new)
    if len(knots) == 1:
        raise Unfit(_LEVEL)
    return {"logits": [float(logit) for _, logit, _ in knots], "scores": [float(rate) for *_, rate in knots]}


def _pooled(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    weight = a[0] + b[0]
    return weight, (a[0] * a[1] + b[0] * b[1]) / weight, (a[0] * a[2] + b[0] * b[2]) / weight


def identity(names: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """Which weights a model has: SHA-256 of its checkpoints' indices, which hold the checksums of all tensors.

    Args:
      names: as `stem_tf.training.best_weights.names` returns them.
      paths: where each of these checkpoints can be read.
    """
    digests = {name: hashlib.sha256(Path(f"{path}.index").read_bytes()).hexdigest() for name, path in paths.items()}
    rest = names["rest"]
    return {
        "tasks": {task: digests[name] for task, name in names["tasks"].items()},
        "rest": None if rest is None else digests[rest],
    }


def fit_tasks(asked: Mapping[str, Asked], rows: Rows, untrained: Mapping[str, str]) -> dict[str, Any]:
    """Fits all calibrators.

    Args:
      asked: of :func:`asked`.
      rows: by task.
      untrained: tasks that were not trained, with the reasons.

    Returns:
      By task ``method``, what :func:`fit` returns, and the metrics on validation ``before`` and ``after``; ``method``
      and ``why`` of a task that cannot be calibrated.
    """
    from stem_tf.models.calibrators import UNCALIBRATED, calibrator

    found: dict[str, Any] = {}
    for task, (method, kept) in asked.items():
        logits, labels, weights = rows[task]
        try:
            if task in untrained:
                raise Unfit(f"the task is not trained: {untrained[task]}")
            fitted = fit(method, logits, labels, weights, kept)
        except Unfit as error:
            found[task] = {"method": method, "why": str(error)}
            continue
        by = {"before": UNCALIBRATED, "after": calibrator(fitted)}
        of_task = {name: measures(labels, by[name](logits).numpy(), weights) for name in by}
        found[task] = {"method": method, **fitted, "rows": int(np.count_nonzero(weights)), **of_task}
    return found


def write(
    path: Path, weights: Mapping[str, Any], asked: Mapping[str, Asked], tasks: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes what was fitted, for which weights, and what had been asked for, whole or not at all; returns it."""
    tree: dict[str, Any] = report.finite({"weights": weights, "asked": asked, "split": "validation", "tasks": tasks})
    files.write_json(path, tree)
    return tree


def read(path: Path, weights: Mapping[str, Any], asked: Mapping[str, Asked]) -> dict[str, Any] | None:
    """What :func:`write` wrote for these weights, as it is asked for now; None where there is no such file.

    Raises:
      UserError: the file is damaged.
    """
    if not path.exists():
        return None
    way_out = "remove it and run stem-train again, which fits the calibrators anew"
    found = files.read_json(path, way_out)
    if found.get("weights") != weights or found.get("asked") != dict(asked):
        return None
    tasks = found.get("tasks")
    if not isinstance(tasks, dict) or set(tasks) != set(asked) or not all(map(_is_whole, tasks.values())):
        raise UserError(f"{path} is damaged (it should hold a calibrator for each of {', '.join(asked)}); {way_out}")
    return found


def fitted_before(path: Path, weights: Mapping[str, Any], asked: Mapping[str, Asked]) -> dict[str, Any] | None:
    """As :func:`read`; None where the file is damaged, too."""
    try:
        return read(path, weights, asked)
    except UserError:
        return None


HEAD = ("task", "by", "logloss", "predicted/observed", "calibration error", "AUC", "")


def lines(tasks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The lines of a table under :data:`HEAD`: each calibrated task's metrics, before -> after."""
    names = ("logloss", "predicted_over_observed", "calibration_error", "auc")
    return [
        [
            task,
            of_task["method"],
            *(" -> ".join(report.number(of_task[when][name]) for when in ("before", "after")) for name in names),
            "",
        ]
        for task, of_task in tasks.items()
        if "why" not in of_task
    ]


def _is_whole(fitted: Any) -> bool:
    """Whether a task's entry says why it is not calibrated, or holds a calibrator that rises."""
    if not isinstance(fitted, dict):
        return False
    if "why" in fitted:
        return isinstance(fitted["why"], str)
    try:
        if "slope" in fitted:
            return fitted["slope"] > 0 and math.isfinite(fitted["slope"]) and math.isfinite(fitted["offset"])
        knots = np.asarray([fitted["logits"], fitted["scores"]], np.float64)
        rises = knots.shape[1] > 1 and (np.diff(knots[0]) > 0).all() and (np.diff(knots[1]) >= 0).all()
        return bool(rises and np.isfinite(knots).all())
    except (KeyError, TypeError, ValueError, IndexError):
        return False
