"""Calibration: do scores mean what they say, and the slices of the log in which they do not or rank badly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.schema import Task
from stem_tf import report
from stem_tf.compare import deviations, figures
from stem_tf.compare.comparison import Arm, Comparison
from stem_tf.compare.deviations import SPLIT, Deviation
from stem_tf.compare.document import Block, Cell, Figure, Section, Table
from stem_tf.evaluation import calibration, slices
from stem_tf.evaluation.calibration import Calibration
from stem_tf.evaluation.slices import Slice, Slicer
from stem_util.errors import UserError

SHOWN = 12
"""How many slices a table shows at most."""

Found = dict[tuple[str, str], list[Calibration]]
"""The calibrations of an arm's runs, by arm and task."""


def section(comparison: Comparison) -> Section:
    """Predicted over observed by arm, task and bucket, and the slices that stand out."""
    found, row_ids = _calibrations(comparison)
    overall = deviations.deviations(comparison, "calibration", list(comparison.arms.values()), [])
    blocks: list[Block] = [*_overall(comparison, overall), _errors(comparison, found), _figure(comparison, found)]
    blocks += _calibrated(comparison)
    arms = _judged(comparison)
    try:
        parts, unread = _slices(comparison, row_ids)
    except UserError as error:
        worst: list[Deviation] = []
        blocks.append(f"There are no slices: {error}.")
    else:
        worst = [one for one in deviations.deviations(comparison, "auc", arms, parts) if one.difference.estimate < 0]
        worst = [*worst, *(d for d in deviations.deviations(comparison, "calibration", arms, parts) if d.slice)]
        worst = [one for one in worst if one.p < comparison.settings.level]
        blocks += _worst(comparison, worst, arms, len(parts), unread)
    return Section(
        key="calibration",
        title="Calibration, and slices that stand out",
        lead=_lead(comparison, overall, found, worst, arms),
        blocks=tuple(blocks),
        data={
            "overall": [_json(one) for one in overall],
            "errors": [
                {"arm": arm, "task": task} | {name: _mean(of, name) for name in ("error", "floor", "limit")}
                for (arm, task), of in found.items()
            ],
            "buckets": [
                {"arm": arm, "task": task}
                | {name: _by_bucket(of, name).tolist() for name in ("rows", "predicted", "observed", "low", "high")}
                for (arm, task), of in found.items()
            ],
            "slices": [_json(one) for one in worst],
        },
    )


def _calibrated(comparison: Comparison) -> list[Block]:
    """Which scores went through a calibrator (``config.train.calibration``) before all that this report measures."""
    blocks: list[Block] = []
    for arm in comparison.arms.values():
        tasks = arm.runs[0].metrics(SPLIT)["tasks"]
        of_task = {task: tasks[task].get("calibration", {}) for task in arm.tasks}
        by = ", ".join(f"{task} by {one['method']}" for task, one in of_task.items() if one and "why" not in one)
        if by:
            blocks.append(f"Scores of {arm.name} are calibrated, by what was fitted on validation: {by}.")
    return blocks


def _calibrations(comparison: Comparison) -> tuple[Found, NDArray[np.int64]]:
    """Of every run on test; and the row_ids of test."""
    types = {task.name: task.type for task in comparison.tasks}
    found: Found = {}
    for arm in comparison.arms.values():
        for run in arm.runs:
            predicted = run.predictions(SPLIT)
            for task in arm.tasks:
                weights = predicted.weights_of(task)
                one = calibration.calibration(types[task], predicted.labels[task], predicted.scores[task], weights)
                found.setdefault((arm.name, task), []).append(one)
    return found, predicted.row_id


def _mean(of: Sequence[Calibration], name: str) -> float:
    return float(np.mean([getattr(one, name) for one in of]))


def _by_bucket(of: Sequence[Calibration], name: str) -> NDArray[np.float64]:
    """The mean over seeds in each bucket, of the runs that have as many buckets as the first."""
    alike = [getattr(one, name) for one in of if len(one.rows) == len(of[0].rows)]
    return np.asarray(np.mean(alike, axis=0))


def _judged(comparison: Comparison) -> list[Arm]:
    """The arms whose slices are looked at: the best on validation, and Single-Task."""

    def score(arm: Arm) -> float:
        means = [run.metrics("validation")["mean_auc"] for run in arm.runs]
        return float(np.mean([-1.0 if mean is None else mean for mean in means]))

    others = [arm for arm in comparison.arms.values() if arm.name != comparison.single]
    best = [max(others, key=score)] if others else []
    return best + ([comparison.arms[comparison.single]] if comparison.single else [])


def _slices(comparison: Comparison, row_ids: NDArray[np.int64]) -> tuple[list[Slice], list[str]]:
    """Slices by every feature, and by the columns of the raw log that make neither feature nor label; these columns."""
    schema = comparison.manifest.schema
    slicer = Slicer(comparison.manifest, SPLIT, row_ids)
    spelled = [feature.name for feature in schema.features if feature.kind != "dense"]
    for name in comparison.manifest.vocabularies:
        spelled += [f"{name}:new", f"{name}:rare"]
    found = [one for spelling in spelled for one in slicer(spelling)]
    read = {column for feature in schema.features for column in (feature.name, feature.column)}
    unread = [c for c in slicer.columns if c not in read.union(*(task.columns for task in schema.tasks))]
    for column in list(unread):
        try:
            found += slicer(column)
        except UserError:  # lists
            unread.remove(column)
    return [one for one in found if not one.rows.all()], unread


def _lead(
    comparison: Comparison,
    overall: Sequence[Deviation],
    found: Found,
    worst: Sequence[Deviation],
    arms: Sequence[Arm],
) -> str:
    off = [one for one in overall if one.p < comparison.settings.level]
    if off:
        most = max(off, key=lambda one: _factor(one))
        first = (
            f"{len(off)} of {len(overall)} mean predictions, by arm and task, are further from what was observed than "
            f"chance allows; the furthest: `{most.arm}` predicts {_ratio(most)} times the observed `{most.task}`"
        )
    else:
        first = "No mean prediction of an arm for a task is off by more than chance allows"
    stand_out = {(one.task, one.slice.name) for one in worst if one.slice}
    names = " and ".join(f"`{arm.name}`" for arm in arms)
    second = (
        f"In {len(stand_out)} pairs of a slice and a task, {names} predict too much or too little, or rank worse than "
        "elsewhere."
        if stand_out
        else f"No slice of the log stands out for {names}."
    )
    return f"{first}{_in_buckets(found, bool(off))}. {second}"


def _in_buckets(found: Found, means_are_off: bool) -> str:
    """What the calibration errors say: scores can be wrong although their mean is right."""
    known = [of for of in found.values() if not np.isnan(of[0].error)]
    off = [of for of in known if _is_off(of)]
    if not off:
        return "" if means_are_off else ", nor is that of low, middle or high scores"
    too_sure = all(_slope(one) < 1 for of in off for one in of)
    how = (
        "high scores are too high and low ones too low"
        if too_sure
        else "scores are too high or too low in some buckets"
    )
    joint = ". By buckets of rows with similar scores" if means_are_off else ", but single scores are"
    return f"{joint}: for {len(off)} of {len(known)} pairs of arm and task, {how}"


def _is_off(of: Sequence[Calibration]) -> bool:
    """Whether the calibration error is larger than perfect scores show in 19 of 20 test sets."""
    return _mean(of, "error") > _mean(of, "limit")


def _slope(of: Calibration) -> float:
    """How much observed means rise with predicted ones, by least squares over buckets: below 1, scores are too sure."""
    predicted = of.predicted - np.average(of.predicted, weights=of.rows)
    spread = float(np.sum(of.rows * predicted**2))
    return float(np.sum(of.rows * predicted * of.observed)) / spread if spread else 1.0


def _factor(one: Deviation) -> float:
    """How many times too much or too little."""
    if one.value > 0 and one.reference > 0:
        return max(one.value / one.reference, one.reference / one.value)
    return float("inf")


def _ratio(one: Deviation) -> str:
    return f"{one.value / one.reference:.2f}" if one.reference > 0 else "-"


def _overall(comparison: Comparison, overall: Sequence[Deviation]) -> list[Block]:
    tasks = [task.name for task in comparison.tasks]
    by_place = {(one.arm, one.task): one for one in overall}

    def cell(arm: str, task: str) -> Cell:
        one = by_place.get((arm, task))
        if one is None:
            return Cell("-", "muted", hint="not a task of this arm, or too few rows of a class")
        difference = one.difference
        if not one.reference > 0:
            return Cell(
                f"{difference.estimate:+.3g}", "muted", hint="predicted less observed: the observed mean is not above 0"
            )
        low, high = (1 + end / one.reference for end in (difference.low, difference.high))
        interval = "" if np.isnan(difference.p) else f" ({low:.2f} to {high:.2f})"
        hint = f"predicted {report.number(one.value)}, observed {report.number(one.reference)}, p {one.p:.2g}"
        return Cell(_ratio(one) + interval, "bad" if one.p < comparison.settings.level else "", hint=hint)

    return [
        Table(
            ("predicted / observed", *tasks),
            tuple((arm, *(cell(arm, task) for task in tasks)) for arm in comparison.arms),
            "Mean prediction over mean label on test, mean over the seeds, with intervals over users and seeds: 1 is "
            "right. Marked where it differs from 1 by more than chance.",
        )
    ]


def _errors(comparison: Comparison, found: Found) -> Table:
    tasks = [task.name for task in comparison.tasks]

    def cell(arm: str, task: str) -> Cell:
        of = found.get((arm, task))
        if of is None or np.isnan(of[0].error):
            return Cell("-", "muted")
        error, floor, limit = (_mean(of, name) for name in ("error", "floor", "limit"))
        text = f"{report.number(error)} ({report.number(floor)})"
        return Cell(
            text, "bad" if _is_off(of) else "", hint=f"a calibrated model is above {report.number(limit)} once in 20"
        )

    return Table(
        ("calibration error", *tasks),
        tuple((arm, *(cell(arm, task) for task in tasks)) for arm in comparison.arms),
        "Expected calibration error: how far predicted and observed means are apart in ten buckets of equally many "
        "rows, mean over buckets and seeds. In brackets: what perfect scores show by chance on so many rows. Marked "
        "where perfect scores would show less in 19 of 20 test sets, if rows were independent.",
    )


def _figure(comparison: Comparison, found: Found) -> Figure:
    """Reliability: observed against predicted mean of each bucket, one panel per task."""
    tasks: Sequence[Task] = comparison.tasks
    columns = min(len(tasks), 3)
    lines = -(-len(tasks) // columns)
    figure, axes = figures.pyplot().subplots(
        lines, columns, figsize=(3.1 * columns, 2.9 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    handles: dict[str, Any] = {}
    for axis, task in zip(axes.flat, tasks, strict=False):
        for arm, (colour, marker) in figures.styles(comparison.arms).items():
            of = found.get((arm, task.name))
            if of is None or not len(of[0].rows):
                continue
            x, y, low, high = (_by_bucket(of, name) for name in ("predicted", "observed", "low", "high"))
            handles[arm] = axis.errorbar(
                x,
                y,
                yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)],
                color=colour,
                marker=marker,
                markersize=3,
                linewidth=1.1,
                elinewidth=0.5,
            )
        low, high = axis.get_xlim()
        axis.plot([low, high], [low, high], color="0.4", linewidth=0.8, linestyle="--", zorder=0)
        axis.set_xlim(low, high)
        axis.set_title(task.name, fontsize="medium")
        axis.locator_params(nbins=5)
    for axis in axes[-1]:
        axis.set_xlabel("predicted")
    for line in axes:
        line[0].set_ylabel("observed")
    if handles:
        ncols = min(len(handles), 6)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=ncols, frameon=False)
    return Figure(
        figures.svg(figure),
        alt="Observed against predicted means of ten buckets of test rows, one panel per task and one line per arm.",
        caption=(
            "Ten buckets of equally many test rows, by score; mean over seeds. On the dashed line scores mean what "
            "they say; below it the arm predicts too much. Bars: where the observed mean lies in the long run, if rows "
            "are independent."
        ),
    )


def _worst(
    comparison: Comparison, worst: Sequence[Deviation], arms: Sequence[Arm], count: int, unread: Sequence[str]
) -> list[Block]:
    names = " and ".join(f"`{arm.name}`" for arm in arms)
    best = "the best arm on validation beside Single-Task" if len(arms) == 2 else "the best arm on validation"
    blocks: list[Block] = [
        f"**Slices.** {count:,} slices of test were looked at for {names} ({best}): values of features, ids that train "
        "has not seen (`:new`) or seen least (`:rare`), ranges of numbers, and columns of the raw log. Shown are those "
        "that deviate by more than chance, corrected for all slices and tasks. A slice needs "
        f"{slices.FEWEST} positives and {slices.FEWEST} negatives.",
    ]
    for metric, title in (("auc", "ranks worse than elsewhere"), ("calibration", "predicts too much or too little")):
        for outside in (False, True):
            of = [
                one for one in worst if one.metric == metric and one.slice and (one.slice.column in unread) == outside
            ]
            if of:
                of.sort(key=lambda one: one.certain, reverse=True)
                blocks.append(_slice_table(of, title, outside))
    if len(blocks) == 1:
        blocks.append("No slice does.")
    return blocks


def _slice_table(of: Sequence[Deviation], title: str, outside: bool) -> Table:
    auc = of[0].metric == "auc"
    more = f" The {SHOWN} that certainly deviate most, of {len(of):,}." if len(of) > SHOWN else ""
    about = (
        " These columns are in the log, but the model does not read them. A column that is only known after the "
        "impression tells of its outcome; then a deviation is no fault of the model."
        if outside
        else ""
    )
    columns = ("AUC", "on all rows", "difference") if auc else ("predicted", "observed", "predicted / observed")
    rows = []
    for one in of[:SHOWN]:
        assert one.slice is not None
        difference = one.difference
        if auc or not one.reference > 0:
            last = f"{difference.estimate:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"
        else:
            low, high = (1 + end / one.reference for end in (difference.low, difference.high))
            last = f"{_ratio(one)} ({low:.2f} to {high:.2f})"
        name = one.slice.name + (f" ({one.slice.about})" if one.slice.about else "")
        numbers = (report.number(one.value), report.number(one.reference))
        rows.append((name, one.task, one.arm, f"{one.rows:,}", f"{one.positives:,}", *numbers, Cell(last, "bad")))
    return Table(
        ("slice", "task", "arm", "rows", "positives", *columns),
        tuple(rows),
        f"Slices where the arm {title}, by more than chance.{more}{about}",
        left=(1, 2),
    )


def _json(one: Deviation) -> dict[str, Any]:
    return {
        "metric": one.metric,
        "arm": one.arm,
        "task": one.task,
        "slice": one.slice.name if one.slice else None,
        "rows": one.rows,
        "positives": one.positives,
        "value": one.value,
        "reference": one.reference,
        "difference": one.difference.estimate,
        "low": one.difference.low,
        "high": one.difference.high,
        "p_holm": one.p,
    }
