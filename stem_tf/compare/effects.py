"""What arms reach on test, and how far each is above another: the numbers behind the first three sections.

A binary task is judged by AUC and a regression by MSE. ``MEAN`` stands for the mean AUC over binary tasks. Inside,
every metric is a score of which more is better: MSE counts with a minus, so that a difference is positive where an arm
is better, as MTL gain is (PLE Eq. 11). Does not import TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.recipes import truth
from stem_tf.compare.document import Tone
from stem_tf.evaluation import intervals, metrics
from stem_tf.evaluation.intervals import Difference, Resamples, Runs
from stem_util.progress import Progress

if TYPE_CHECKING:
    from stem_tf.compare.comparison import Comparison

MEAN = None
"""In the place of a task's name: the mean AUC over binary tasks."""

Key = str | None
Verdict = Literal["better", "worse", "undecided"]
TONES: Mapping[Verdict, Tone] = {"better": "good", "worse": "bad", "undecided": "unsure"}


@dataclass(frozen=True)
class Effect:
    """An arm against an opponent on one task.

    Attributes:
      arm: its name.
      task: the task, or `MEAN`.
      difference: positive where the arm is better.
      p: ``difference.p``, adjusted for all comparisons with this opponent (Holm).
      verdict: ``undecided`` unless ``p`` is below the level.
      rows: test rows of the task.
      auc: the difference is one of AUC, and not of MSE.
      alone: level that each comparison would have to pass if it were the first of Holm's: level / comparisons.
    """

    arm: str
    task: Key
    difference: Difference
    p: float
    verdict: Verdict
    rows: int
    auc: bool
    alone: float

    @property
    def tone(self) -> Tone:
        """The verdict as a cell's tone."""
        return TONES[self.verdict]

    def shown(self) -> str:
        """The difference, ``+.0031``."""
        return number(self.difference.estimate, auc=self.auc, sign=True)

    def interval(self) -> str:
        """The interval of this difference alone, ``-.0010 to +.0072``; a dash where it has none."""
        ends = (self.difference.low, self.difference.high)
        return "-" if math.isnan(ends[0]) else " to ".join(number(end, auc=self.auc, sign=True) for end in ends)

    def way_out(self) -> str:
        """What it would take to decide: "" where it is decided."""
        found = self.difference
        if self.verdict != "undecided":
            return ""
        if math.isnan(found.users.error):
            return f"more test users: too few of the {self.rows:,} rows' users count here"
        if math.isnan(found.p):
            return "a second seed"
        if found.estimate == 0:
            return "no difference seen"
        times, seeds = found.users_to_decide(self.alone), found.seeds_to_decide(self.alone)
        ways = []
        if times is not None:
            ways.append(f"{_rounded(times * self.rows):,} test rows")
        if seeds is not None:
            ways.append(f"{seeds:,} seeds")
        if not ways:
            both = found.both_to_decide(self.alone)
            ways = [f"{_rounded(both[0] * self.rows):,} test rows with {both[1]:,} seeds" if both else "out of reach"]
        return " or ".join(ways)


@dataclass(frozen=True)
class Measured:
    """What all arms of a comparison reach on test.

    Attributes:
      runs: scores of each arm on each task that it was trained on and whose metric is defined on test.
      rows: test rows of each task.
      binary: the tasks that are judged by AUC, in the schema's order.
      best: what the truth itself reaches, where the data are made by a generator and keep it.
    """

    runs: Mapping[str, Mapping[str, Runs]]
    rows: Mapping[str, int]
    binary: tuple[str, ...]
    best: Mapping[str, float]

    def of(self, arm: str, task: Key, among: Sequence[str] = ()) -> Runs | None:
        """The scores of an arm on a task, or the mean over its binary tasks ``among`` these; None where it has none."""
        if task is not None:
            return self.runs[arm].get(task)
        parts = [self.runs[arm][name] for name in among]
        if len(parts) < 2:
            return None
        return Runs(
            np.mean([part.values for part in parts], axis=0),
            np.mean([part.resampled for part in parts], axis=0),
            min(part.users for part in parts),
        )

    def averaged(self, *arms: str) -> list[str]:
        """The binary tasks that all of these arms have: what their mean AUC is over."""
        return [task for task in self.binary if all(task in self.runs[arm] for arm in arms)]

    def spread(self, task: Key) -> intervals.Spread | None:
        """The variance over seeds, pooled over the arms."""
        found = [self.of(arm, task, self.averaged(arm)) for arm in self.runs]
        return intervals.pooled([runs for runs in found if runs is not None])

    def half_width(self, arm: str, task: Key, level: float) -> float:
        """Half of the interval of what an arm reaches, over test users and seeds; NaN where it has none."""
        runs = self.of(arm, task, self.averaged(arm))
        if runs is None:
            return math.nan
        found = intervals.compare(runs, level=level, spread=self.spread(task))
        return (found.high - found.low) / 2


def measure(comparison: Comparison) -> Measured:
    """Reads the predictions of all runs, one after another, and measures them on the same resamples of test users."""
    settings = comparison.settings
    kinds = {task.name: task.type for task in comparison.tasks}
    truths = truth.load(comparison.manifest, "test") or {}
    resamples = None
    found: dict[str, dict[str, Runs]] = {}
    users: dict[str, int] = {}
    rows: dict[str, int] = {}
    best: dict[str, float] = {}
    runs = sum(len(arm.runs) for arm in comparison.arms.values())
    with Progress(runs, unit="runs", desc="compare with intervals") as progress:
        for arm in comparison.arms.values():
            of_task: dict[str, list[tuple[float, NDArray]]] = {}
            untrained = {task for run in arm.runs for task in run.metrics("test").get("untrained", {})}
            for run in arm.runs:
                predicted = run.predictions("test")
                if resamples is None:
                    size = len(predicted.row_id)
                    resamples = Resamples(predicted.group, settings.resamples, settings.seed, rows=size)
                for task in arm.tasks:
                    kind, labels, weights = kinds[task], predicted.labels[task], predicted.weights_of(task)
                    if task not in rows:
                        rows[task] = int(np.count_nonzero(weights))
                        users[task] = resamples.users(labels, weights, binary=kind == "binary")
                        if len(truths.get(task, ())) == len(labels):
                            best[task] = _score(kind, labels, truths[task], weights)
                    value = _score(kind, labels, predicted.scores[task], weights)
                    if task not in untrained and not math.isnan(value):
                        resampled = _resampled(resamples, kind, labels, predicted.scores[task], weights)
                        of_task.setdefault(task, []).append((value, resampled))
                progress.update(1)
            found[arm.name] = {
                task: Runs(np.array([value for value, _ in pairs]), np.stack([r for _, r in pairs]), users[task])
                for task, pairs in of_task.items()
            }
    binary = tuple(
        task for task, kind in kinds.items() if kind == "binary" and any(task in of for of in found.values())
    )
    return Measured(found, rows, binary, best)


def _score(kind: str, labels: NDArray, scores: NDArray, weights: NDArray) -> float:
    return metrics.auc(labels, scores, weights) if kind == "binary" else -metrics.mse(labels, scores, weights)


def _resampled(resamples: Resamples, kind: str, labels: NDArray, scores: NDArray, weights: NDArray) -> NDArray:
    if kind == "binary":
        return resamples.aucs(labels, scores, weights)
    return -resamples.means((labels.astype(np.float64) - scores) ** 2, weights)


def effects(comparison: Comparison, opponent: str) -> dict[tuple[str, Key], Effect]:
    """Every other arm against ``opponent``, by arm and task, on the tasks that both have."""
    measured, level = comparison.measured, comparison.settings.level
    found: dict[tuple[str, Key], Difference] = {}
    for arm in comparison.arms:
        for task in (*(task.name for task in comparison.tasks), MEAN) if arm != opponent else ():
            among = measured.averaged(arm, opponent)
            one, other = measured.of(arm, task, among), measured.of(opponent, task, among)
            if one is not None and other is not None:
                found[arm, task] = intervals.compare(one, other, level, measured.spread(task))
    adjusted = intervals.holm([difference.p for difference in found.values()])
    tested = sum(not math.isnan(p) for p in adjusted)

    def verdict(difference: Difference, p: float) -> Verdict:
        if not p < level:
            return "undecided"
        return "better" if difference.estimate > 0 else "worse"

    return {
        (arm, task): Effect(
            arm=arm,
            task=task,
            difference=difference,
            p=p,
            verdict=verdict(difference, p),
            rows=max(measured.rows[name] for name in (measured.averaged(arm, opponent) if task is None else [task])),
            auc=task is None or task in measured.binary,
            alone=level / max(1, tested),
        )
        for ((arm, task), difference), p in zip(found.items(), adjusted, strict=True)
    }


def columns(comparison: Comparison, found: Mapping[tuple[str, Key], object]) -> list[Key]:
    """The tasks of effects in the schema's order, and their mean last."""
    present = {task for _, task in found}
    return [task for task in (*(task.name for task in comparison.tasks), MEAN) if task in present]


def heading(comparison: Comparison, task: Key) -> str:
    """A task as the head of a column, with its metric."""
    if task is None:
        return "mean AUC"
    (kind,) = (other.type for other in comparison.tasks if other.name == task)
    return f"{task}, {metrics.MAIN[kind].upper()}"


def number(value: float, *, auc: bool = True, sign: bool = False) -> str:
    """``.7321``, or ``+.0031`` with its sign; an error keeps three digits whatever its scale. A dash for NaN."""
    if math.isnan(value):
        return "-"
    text = (f"{value:+.4f}" if sign else f"{value:.4f}") if auc else (f"{value:+.3g}" if sign else f"{value:.3g}")
    return text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _rounded(number: float) -> int:
    """Up, to two digits: more would say too much."""
    unit = 10 ** max(0, int(math.log10(max(number, 1))) - 1)
    return math.ceil(number / unit) * unit
