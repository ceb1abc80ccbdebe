"""Zones of test rows by how much feedback two tasks expect, and what arms win or lose in each (STEM Fig. 1 and 5).

Ten buckets of equally many test rows divide the predictions of each task, b(f(x)). For tasks A and B the "measurement
of relative feedback" of row x is MRF = b(f_A(x)) - b(f_B(x)), from -9 to 9. The paper takes f from the single-task
models. That favours their rivals: where rows are selected by a model's own scores, its scores differ less inside a zone
than those of another model, and its AUC falls more ("range restriction"; Thorndike, Personnel Selection, 1949). Two
equally good models with independent errors then seem to differ by +.02 to +.03 in the overwhelming zones and, where
the tasks are correlated, by -.01 in the comparable zone. So each arm is also compared in zones that both models draw
alike: f is the sum of Single-Task's and the arm's ranks. If both are equally good, neither is then ahead in any zone;
where one is better, the overwhelming zones exaggerate it. `tests/stem_tf/test_zones.py` has the simulation.
No TensorFlow.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stem_tf.compare.comparison import Arm, Comparison, Settings
from stem_tf.evaluation import calibration, intervals, slices
from stem_tf.evaluation.intervals import Difference, Resamples, Runs
from stem_tf.evaluation.predictions import Predictions

BUCKETS = 10
SPLIT = "test"

Pair = tuple[str, str]


@dataclass(frozen=True)
class Cells:
    """A division of rows by their MRF.

    Attributes:
      count: C, how many cells there are.
      of: the cell of each row, from 0 to C - 1, or -1 for none: int8 [N] from int8 [N].
    """

    count: int
    of: Callable[[NDArray[np.int8]], NDArray[np.int8]]


@dataclass(frozen=True)
class Lift:
    """The AUC of an arm on one task less Single-Task's, among some of the test rows.

    Attributes:
      pair: the two tasks whose buckets select the rows.
      task: the one of them whose AUC is compared.
      arm: name of the arm.
      alike: whether Single-Task and the arm draw the zones alike; else Single-Task alone.
      cell: number of the zone or bucket.
      rows, positives, negatives: how many test rows, inside the task's space.
      single, auc: the two AUCs, means over seeds; NaN where there are too few rows.
      difference: with its interval; None where there are too few rows.
      p: that of the difference, by Holm over all lifts that are drawn the same way; NaN where it cannot be said.
    """

    pair: Pair
    task: str
    arm: str
    alike: bool
    cell: int
    rows: int
    positives: int
    negatives: int
    single: float
    auc: float
    difference: Difference | None
    p: float

    @property
    def too_few(self) -> str:
        """Why there is no AUC, as ``7 positives``; "" where there is one."""
        return slices.too_few(self.positives, self.negatives)


def zones(settings: Settings) -> Cells:
    """Cells of the three zones: 0 where A overwhelms B, 1 where both are comparable, 2 where B overwhelms A."""

    def cells(mrf: NDArray[np.int8]) -> NDArray[np.int8]:
        chosen = [mrf >= settings.overwhelming, np.abs(mrf) <= settings.comparable, mrf <= -settings.overwhelming]
        return np.select(chosen, [np.int8(0), np.int8(1), np.int8(2)], np.int8(-1))

    return Cells(3, cells)


EVERY_MRF = Cells(2 * BUCKETS - 1, lambda mrf: mrf + np.int8(BUCKETS - 1))
"""A cell for each MRF: 0 for -9 to 18 for 9."""


class Zones:
    """The buckets of a comparison's test rows.

    Args:
      comparison: with a Single-Task arm.
    """

    def __init__(self, comparison: Comparison) -> None:
        assert comparison.single is not None
        self._comparison, self._single = comparison, comparison.arms[comparison.single]
        types = {task.name: task.type for task in comparison.tasks}
        self._binary = {task for task, kind in types.items() if kind == "binary"}
        self.pairs: tuple[Pair, ...] = tuple(
            pair for pair in itertools.combinations(self._single.tasks, 2) if self._binary & set(pair)
        )
        """The pairs of Single-Task's tasks of which one at least has an AUC."""
        ranks = {name: _ranks(arm, self._single.tasks) for name, arm in comparison.arms.items()}
        own = ranks.pop(comparison.single)
        # By the arm that draws them together with Single-Task; "" for Single-Task alone.
        self._buckets = {"": {task: _bucket(rank) for task, rank in own.items()}}
        for name, theirs in ranks.items():
            self._buckets[name] = self._buckets[""] | {task: _bucket(own[task] + rank) for task, rank in theirs.items()}

    def rows(self, pair: Pair, cells: Cells) -> NDArray[np.int64]:
        """How many test rows are in each cell that Single-Task draws, and last those that are in none."""
        found = cells.of(self._mrf("", pair))
        return np.bincount(np.where(found < 0, cells.count, found), minlength=cells.count + 1)

    def lifts(self, pairs: Sequence[Pair], cells: Cells) -> list[Lift]:
        """All lifts over Single-Task in the cells of these pairs, drawn by Single-Task alone and drawn alike."""
        settings = self._comparison.settings
        aucs: dict[tuple[str, Pair, str, int], dict[str, _Measured]] = defaultdict(dict)
        resamples: Resamples | None = None
        for name, arm in self._comparison.arms.items():
            frames = list(self._buckets) if name == self._single.name else ["", name]
            for run in arm.runs:
                predicted = run.predictions(SPLIT)
                if resamples is None:  # the same rows for all runs
                    rows = len(predicted.row_id)
                    resamples = Resamples(predicted.group, settings.resamples, settings.seed, rows=rows)
                wanted = [
                    (frame, pair, task)
                    for frame in frames
                    for pair in pairs
                    for task in pair
                    if task in self._binary and task in predicted.labels
                ]
                for (frame, pair, task), by_cell in self._measure(wanted, predicted, cells, resamples):
                    for cell, measured in enumerate(by_cell):
                        of_cell = aucs[frame, pair, task, cell]
                        of_cell[name] = of_cell[name].joined(measured) if name in of_cell else measured
        assert resamples is not None
        found: list[Lift] = []
        for key, by_arm in aucs.items():
            found += _lifts(key, by_arm, resamples, self._single.name, settings)
        return _adjusted(found)

    def _mrf(self, frame: str, pair: Pair) -> NDArray[np.int8]:
        a, b = (self._buckets[frame][task] for task in pair)
        return a - b

    def _measure(
        self, wanted: list[tuple[str, Pair, str]], predicted: Predictions, cells: Cells, resamples: Resamples
    ) -> Iterator[tuple[tuple[str, Pair, str], list[_Measured]]]:
        def measure(key: tuple[str, Pair, str]) -> list[_Measured]:
            frame, pair, task = key
            cell = cells.of(self._mrf(frame, pair))
            cell[predicted.weights_of(task) == 0] = -1
            order = np.argsort(cell, kind="stable")  # a radix sort
            ends = np.searchsorted(cell[order], np.arange(-1, cells.count), side="right")
            return [
                _measured(predicted, task, np.sort(order[start:end]), resamples)
                for start, end in itertools.pairwise(ends)
            ]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from zip(wanted, pool.map(measure, wanted), strict=True)


@dataclass(frozen=True)
class _Measured:
    """The AUCs of an arm's runs in one cell, [S], and their mean influences, [U]; empty for too few rows."""

    positives: int
    negatives: int
    users: int
    aucs: NDArray[np.float64]
    influence: NDArray[np.float64]

    def joined(self, other: _Measured) -> _Measured:
        aucs = np.concatenate([self.aucs, other.aucs])
        share = len(other.aucs) / max(len(aucs), 1)
        return replace(self, aucs=aucs, influence=(1 - share) * self.influence + share * other.influence)


def _measured(predicted: Predictions, task: str, rows: NDArray[np.int64], resamples: Resamples) -> _Measured:
    y, s, w = predicted.labels[task][rows], predicted.scores[task][rows], predicted.weights_of(task)[rows]
    positives = int(np.count_nonzero(y > 0.5))
    negatives = len(y) - positives
    if slices.too_few(positives, negatives):
        return _Measured(positives, negatives, 0, np.zeros(0), np.zeros(0))
    within = resamples.within(rows)
    auc, influence = within.auc_influence(y, s, w)
    return _Measured(positives, negatives, within.users(y, w, binary=True), np.array([auc]), influence)


def _lifts(
    key: tuple[str, Pair, str, int],
    by_arm: Mapping[str, _Measured],
    resamples: Resamples,
    single: str,
    settings: Settings,
) -> Iterator[Lift]:
    frame, pair, task, cell = key
    one = by_arm[single]  # labels are the same for all
    runs: dict[str, Runs] = {}
    spread = None
    if len(one.aucs):
        moved = resamples.moved(np.stack([of.influence for of in by_arm.values()]))
        if one.users < intervals.MIN_USERS:
            moved[:] = np.nan
        runs = {
            name: Runs(of.aucs, (of.aucs.mean() + by)[np.newaxis], one.users)
            for (name, of), by in zip(by_arm.items(), moved, strict=True)
        }
        spread = intervals.pooled(list(runs.values()))
    for name in (name for name in by_arm if name != single):
        difference = intervals.compare(runs[name], runs[single], settings.level, spread) if runs else None
        yield Lift(
            pair=pair,
            task=task,
            arm=name,
            alike=bool(frame),
            cell=cell,
            rows=one.positives + one.negatives,
            positives=one.positives,
            negatives=one.negatives,
            single=runs[single].mean if runs else float("nan"),
            auc=runs[name].mean if runs else float("nan"),
            difference=difference,
            p=float("nan") if difference is None else difference.p,
        )


def _adjusted(lifts: list[Lift]) -> list[Lift]:
    """The lifts with their p by Holm, over those that are drawn alike and over the others."""
    found = []
    for alike in (True, False):
        of = [lift for lift in lifts if lift.alike == alike]
        ps = intervals.holm([lift.p for lift in of])
        found += [replace(lift, p=p) for lift, p in zip(of, ps, strict=True)]
    return found


def _ranks(arm: Arm, tasks: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Ranks of the arm's mean scores over its seeds, [N] by task."""
    sums: dict[str, NDArray[np.float64]] = {}
    for run in arm.runs:
        scores = run.predictions(SPLIT).scores
        for task in (task for task in tasks if task in scores):
            sums[task] = sums.get(task, 0.0) + scores[task].astype(np.float64)
    return {task: calibration.ranks(values) for task, values in sums.items()}


def _bucket(values: NDArray) -> NDArray[np.int8]:
    return calibration.equal_frequency(values, BUCKETS).astype(np.int8)
