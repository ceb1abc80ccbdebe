"""Where a model is off: its mean score against the mean label, and its AUC in a slice against that of all rows.

Means and AUCs are compared as arms are (`stem_tf.evaluation.intervals.compare`), with test users and seeds as the
two sources of chance. Where no arm has several seeds, users alone count: what is found is then true of these very
models, and maybe not of others trained in the same way. No TensorFlow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stem_tf.compare.comparison import Arm, Comparison
from stem_tf.evaluation import intervals, slices
from stem_tf.evaluation.intervals import Difference, Resamples, Runs, Spread
from stem_tf.evaluation.predictions import Predictions
from stem_tf.evaluation.slices import Slice

SPLIT = "test"

Metric = Literal["calibration", "auc"]


@dataclass(frozen=True)
class Deviation:
    """A number of an arm on some of the test rows, and the number that it should be.

    Attributes:
      metric: ``calibration``: the mean score against the mean label; ``auc``: the AUC against the one on all rows.
      arm, task: names.
      slice: the rows; None for all rows of the task's space.
      rows, positives: how many; positives of a regression are its rows.
      value, reference: means over seeds, weighted by the task's row weights.
      difference: ``value`` less ``reference``.
      p: that of the difference, by Holm over all deviations that were found with it.
    """

    metric: Metric
    arm: str
    task: str
    slice: Slice | None
    rows: int
    positives: int
    value: float
    reference: float
    difference: Difference
    p: float

    @property
    def certain(self) -> float:
        """How large the difference is at least, by its interval: 0 where that holds 0."""
        low, high = self.difference.low, self.difference.high
        return max(low, -high, 0.0)


def deviations(comparison: Comparison, metric: Metric, arms: Sequence[Arm], parts: Sequence[Slice]) -> list[Deviation]:
    """The deviations in each of these slices; for ``calibration``, first those on all rows.

    Slices are left out where they have fewer than `slices.FEWEST` positives or negatives, and tasks that are no
    classification have no AUC.

    Args:
      comparison: whose settings and tasks count.
      metric: what is compared.
      arms: some of its arms.
      parts: slices of the test rows.
    """
    settings = comparison.settings
    wanted: list[Slice | None] = [None, *parts] if metric == "calibration" else list(parts)
    binary = {task.name for task in comparison.tasks if task.type == "binary"}
    found: dict[tuple[int, str], dict[str, list[_Apart]]] = defaultdict(lambda: defaultdict(list))
    resamples: Resamples | None = None
    for arm in arms:
        for run in arm.runs:
            predicted = run.predictions(SPLIT)
            if resamples is None:  # the same rows for all runs
                rows = len(predicted.row_id)
                resamples = Resamples(predicted.group, settings.resamples, settings.seed, rows=rows)
            for task in arm.tasks:
                if metric == "calibration":
                    new = [_calibration(predicted, task, task in binary, part, resamples) for part in wanted]
                else:
                    new = _aucs(predicted, task, parts, resamples) if task in binary else []
                for place, apart in enumerate(new):
                    if apart is not None:
                        found[place, task][arm.name].append(apart)
    made = []
    assert resamples is not None
    for (place, task), by_arm in found.items():
        users = next(iter(by_arm.values()))[0].users
        moved = resamples.moved(
            np.stack([np.mean([one.influence for one in seeds], axis=0) for seeds in by_arm.values()])
        )
        if users < intervals.MIN_USERS:
            moved[:] = np.nan
        by_seed = {name: np.array([one.value - one.reference for one in seeds]) for name, seeds in by_arm.items()}
        runs = {
            name: Runs(values, (values.mean() + by)[np.newaxis], users)
            for (name, values), by in zip(by_seed.items(), moved, strict=True)
        }
        spread = intervals.pooled(list(runs.values())) or Spread(0.0, 1)
        for name, seeds in by_arm.items():
            difference = intervals.compare(runs[name], level=settings.level, spread=spread)
            value, reference = (
                float(np.mean([getattr(one, which) for one in seeds])) for which in ("value", "reference")
            )
            rows, positives = seeds[0].rows, seeds[0].positives
            made.append(
                Deviation(
                    metric, name, task, wanted[place], rows, positives, value, reference, difference, difference.p
                )
            )
    ps = intervals.holm([one.p for one in made])
    return [replace(one, p=p) for one, p in zip(made, ps, strict=True)]


@dataclass(frozen=True)
class _Apart:
    """One run's number on some rows, the one it should be, and the influence of each user on their difference, [U]."""

    rows: int
    positives: int
    users: int
    value: float
    reference: float
    influence: NDArray[np.float64]


def _calibration(
    predicted: Predictions, task: str, binary: bool, part: Slice | None, resamples: Resamples
) -> _Apart | None:
    rows = _rows(predicted, task, part)
    y, s, w = (
        values[rows].astype(np.float64)
        for values in (predicted.labels[task], predicted.scores[task], predicted.weights_of(task))
    )
    positives = int(np.count_nonzero(y > 0.5)) if binary else len(y)
    if slices.too_few(positives, len(y) - positives if binary else len(y)):
        return None
    within = resamples.within(rows)
    influence = within.mean_influence(s - y, w)[1]
    if binary:
        # Their variance comes from the positives that there are. Where these are few because labels happened to be 0,
        # it is too small, and the more so the larger the deviation. Labels vary at least as if the scores were right.
        found, right = np.sqrt(np.sum(influence**2)), np.sqrt(np.sum(w**2 * s * (1 - s))) / w.sum()
        if 0 < found < right:
            influence *= right / found
    value, reference = (float(np.average(of, weights=w)) for of in (s, y))
    return _Apart(len(y), positives, within.users(y, w, binary=binary), value, reference, influence)


def _aucs(predicted: Predictions, task: str, parts: Sequence[Slice], resamples: Resamples) -> list[_Apart | None]:
    everywhere = _auc(predicted, task, None, resamples)
    of_parts = [_auc(predicted, task, part, resamples) for part in parts]
    return [
        one and everywhere and replace(one, reference=everywhere.value, influence=one.influence - everywhere.influence)
        for one in of_parts
    ]


def _auc(predicted: Predictions, task: str, part: Slice | None, resamples: Resamples) -> _Apart | None:
    """The AUC, which is compared with nothing yet."""
    rows = _rows(predicted, task, part)
    y, s, w = predicted.labels[task][rows], predicted.scores[task][rows], predicted.weights_of(task)[rows]
    positives = int(np.count_nonzero(y > 0.5))
    if slices.too_few(positives, len(y) - positives):
        return None
    within = resamples.within(rows)
    auc, influence = within.auc_influence(y, s, w)
    return _Apart(len(y), positives, within.users(y, w, binary=True), auc, 0.0, influence)


def _rows(predicted: Predictions, task: str, part: Slice | None) -> NDArray[np.int64]:
    inside = predicted.weights_of(task) != 0
    return np.flatnonzero(inside if part is None else inside & part.rows)
