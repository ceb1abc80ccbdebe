"""How a model stands against the trivial answers: its metric with an interval, and each difference with an interval.

Intervals are over the test set's users (`stem_tf.evaluation.intervals`), for the model as it is: another seed of the
same model may differ by more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.schema import Schema, Task
from stem_tf.evaluation import metrics
from stem_tf.evaluation.intervals import Resamples, interval
from stem_tf.evaluation.metrics import Results
from stem_tf.evaluation.predictions import Predictions

RESAMPLES = 1000
LEVEL = 0.05
EXACT_ROWS = 20_000
"""Up to here the AUC of each resample is made of its rows; above, of its expansion, which is much faster."""


def answers_of(schema: Schema) -> dict[str, str]:
    """The answers that a schema has, ``group``, ``item`` and ``both``, each with its name for people."""
    found = {key: column for key, column in (("group", schema.group), ("item", schema.item)) if column}
    return found | ({"both": f"{schema.group} + {schema.item}"} if len(found) == 2 else {})


def drawn_again(predicted: Predictions, resamples: int = RESAMPLES) -> Resamples:
    """Draws of the users of a split, or of its rows where the schema has no group."""
    return Resamples(predicted.group, resamples, 0, rows=len(predicted.row_id))


def standing(
    tasks: Sequence[Task],
    predicted: Predictions,
    results: Results,
    answers: Mapping[str, Iterable[tuple[str, NDArray[np.float64]]]],
    counted: Sequence[str],
    resamples: Resamples,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Measures each task, and the mean over the binary tasks.

    Args:
      tasks: the tasks of ``predicted``.
      predicted: scores and labels of N rows.
      results: the model's metrics by task.
      answers: by name, each trivial answer's scores [N] of the tasks that it has.
      counted: the tasks that the mean AUC is over.
      resamples: `drawn_again` of ``predicted``.

    Returns:
      By task and for the mean: ``interval``, the ends of the interval of 95 % of the AUC or MSE; ``trivial``, each
      answer's AUC or MSE; ``over_trivial``, for each answer the ``difference``, positive where the model is better (of
      MSE: the answer's less the model's), with the ends ``low`` and ``high`` of its interval. Numbers that are not
      defined, or that rest on too few users, are NaN.
    """

    def drawn(task: Task, scores: NDArray) -> NDArray[np.float64]:
        few = len(scores) <= EXACT_ROWS
        return _drawn(resamples, task, predicted.labels[task.name], scores, predicted.weights_of(task.name), exact=few)

    by_name = {task.name: task for task in tasks}
    own = {task.name: drawn(task, predicted.scores[task.name]) for task in tasks}

    def empty(values: NDArray[np.float64]) -> dict[str, Any]:
        return {"interval": list(interval(values, LEVEL)), "trivial": {}, "over_trivial": {}}

    found, mean = {name: empty(values) for name, values in own.items()}, empty(_mean(own, counted))
    for answer, of_tasks in answers.items():
        trivial = {task.name: float("nan") for task in tasks}
        leads = {task.name: np.full(RESAMPLES, np.nan) for task in tasks}
        for name, scores in of_tasks:
            task = by_name[name]
            trivial[name] = metrics.main(task.type, predicted.labels[name], scores, predicted.weights_of(name))
            leads[name] = _better(task) * (own[name] - drawn(task, scores))
        for task in tasks:
            values = found[task.name]
            values["trivial"][answer] = trivial[task.name]
            difference = _better(task) * (results[task.name][metrics.MAIN[task.type]] - trivial[task.name])
            values["over_trivial"][answer] = _lead(difference, leads[task.name])
        differences = {task: found[task]["over_trivial"][answer]["difference"] for task in counted}
        mean["trivial"][answer] = float(np.mean(_mean(trivial, counted)))
        mean["over_trivial"][answer] = _lead(float(np.mean(_mean(differences, counted))), _mean(leads, counted))
    return found, mean


def slice_intervals(
    task: Task, predicted: Predictions, rows: NDArray[np.bool_], resamples: Resamples
) -> dict[str, list[float]]:
    """The intervals of a slice's metrics, for the users that it has.

    Args:
      task: a task of ``predicted``.
      predicted: scores and labels of N rows.
      rows: bool [N], those of the slice.
      resamples: `drawn_again` of ``predicted``.

    Returns:
      The ends of ``interval`` (AUC or MSE) and ``predicted_over_observed_interval``; NaN where they rest on too few
      users, or the ratio is not defined.
    """
    at = np.flatnonzero(rows)
    part = resamples.within(at)
    labels, scores = predicted.labels[task.name][at], predicted.scores[task.name][at]
    weights = predicted.weights_of(task.name)[at]
    means, rates = part.means(scores, weights), part.means(labels, weights)
    ratios = np.divide(means, rates, out=np.full(len(means), np.nan), where=(rates > 0) & (means >= 0))
    own = _drawn(part, task, labels, scores, weights, exact=False)
    return {"interval": [*interval(own, LEVEL)], "predicted_over_observed_interval": [*interval(ratios, LEVEL)]}


def _drawn(
    resamples: Resamples, task: Task, labels: NDArray, scores: NDArray, weights: NDArray, *, exact: bool
) -> NDArray[np.float64]:
    """The AUC or MSE of each resample, [R]."""
    if task.type == "binary":
        return resamples.aucs(labels, scores, weights, approximate=not exact)
    return resamples.means((labels - scores.astype(np.float64)) ** 2, weights)


def _better(task: Task) -> int:
    """1 where more is better, -1 where less is."""
    return 1 if task.type == "binary" else -1


def _mean(values: Mapping[str, Any], counted: Sequence[str]) -> Any:
    """The mean over tasks of numbers, or of arrays [R]; NaN, [R], over no task."""
    return np.mean([values[task] for task in counted], axis=0) if counted else np.full(RESAMPLES, np.nan)


def _lead(difference: float, drawn: NDArray[np.float64]) -> dict[str, float]:
    low, high = interval(drawn, LEVEL)
    return {"difference": difference, "low": low, "high": high}
