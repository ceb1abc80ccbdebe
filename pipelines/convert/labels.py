"""Makes labels (0 or 1, or numbers; NaN outside their task's sample space) and row weights of the log's columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.convert.advice import Wanted
from pipelines.convert.bad_rows import BadRows
from pipelines.log import casts
from pipelines.log.parts import Chunk
from pipelines.schema import Task, Threshold

_EXACT = 2**53
"""float64 holds whole numbers up to here exactly."""


def make_labels(chunk: Chunk, tasks: tuple[Task, ...], bad: BadRows) -> dict[str, np.ndarray]:
    """The label of each row by task, float32 [n]; NaN outside the task's space.

    Args:
      chunk: a chunk of the log.
      tasks: the schema's tasks.
      bad: where bad rows are noted.
    """
    by_name = {task.name: task for task in tasks}
    made: dict[str, np.ndarray] = {}

    def make(task: Task) -> np.ndarray:
        if task.name not in made:
            made[task.name] = _label(chunk, task, space(task), bad)
        return made[task.name]

    def space(task: Task) -> np.ndarray:
        if task.space is None:
            return np.ones(len(chunk.rows), bool)
        if task.space.task is not None:
            return make(by_name[task.space.task]) == 1
        column = str(task.space.column)
        shown = f"the space of task '{task.name}', column '{column}', is {{}}"
        values, wrong = casts.to_bools(chunk.columns[column])
        bad.add(wrong, column, "space not 0 or 1", f"{shown}; 1 and true are inside, 0, false and null outside")
        return casts.to_numpy(values.fill_null(False))

    return {task.name: make(task) for task in tasks}


def make_weights(
    chunk: Chunk, column: str, tasks: tuple[Task, ...], labels: dict[str, np.ndarray], bad: BadRows
) -> np.ndarray:
    """A column of row weights, float32 [n]. Where it is 0, sets the labels of its tasks in ``labels`` to NaN."""
    weighted = [task.name for task in tasks if task.row_weight == column]
    inside = ~np.isnan([labels[name] for name in weighted]).all(axis=0)
    shown = f"weight '{column}' is {{}}"
    values, missing = _number(chunk.columns[column], column, shown, inside, bad)
    detail = f"{shown}; a row of task '{weighted[0]}' needs a weight of 0 or more (0 leaves it out)"
    bad.add(missing & inside, column, "missing weight", detail)
    bad.add((values < 0) & inside, column, "negative weight", detail)
    with np.errstate(over="ignore"):
        weights = values.astype(np.float32)
    bad.add(np.isinf(weights) & inside, column, "weight not finite", f"{shown}, which is not finite in float32")
    weights = np.where(inside & np.isfinite(weights), weights, np.float32(0))
    for name in weighted:
        labels[name] = np.where(weights > 0, labels[name], np.float32("nan"))
    return weights


def _label(chunk: Chunk, task: Task, space: np.ndarray, bad: BadRows) -> np.ndarray:
    """A task's label, float32 [n]: 0 or 1, or a regression's number. NaN outside ``space``, where no row is bad."""
    label, column = task.label, task.label.column
    shown = f"label '{column}' is {{}}"
    if label.values:
        values, missing = _holds(chunk.columns[column], label.values, column, space, bad)
    else:
        values, missing = _number(chunk.columns[column], column, shown, space, bad, "label")
    _check_label(missing & space, task, column, f"{shown}; task '{task.name}' needs a value", bad)
    if label.divide_by is not None:
        denominator, absent = _number(
            chunk.columns[label.divide_by], label.divide_by, f"denominator '{label.divide_by}' is {{}}", space, bad
        )
        absent |= denominator == 0
        detail = f"denominator '{label.divide_by}' is {{}}; task '{task.name}' divides by it"
        _check_label(absent & ~missing & space, task, label.divide_by, detail, bad)
        missing |= absent
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values = values / denominator
    if label.thresholds:
        values, absent = _meets(chunk, task, values, space & ~missing, bad)
        missing |= absent
    with np.errstate(over="ignore", invalid="ignore"):
        if label.clip is not None:
            values = np.clip(values, *label.clip)
        floats = values.astype(np.float32)
    inside = space & ~missing
    if task.type == "binary":
        ratio = f" divided by '{label.divide_by}'" if label.divide_by else ""
        wrong = inside & (floats != 0) & (floats != 1)
        detail = f"{shown}{ratio}; a binary label is 0 or 1"
        bad.add(wrong, column, "binary label not 0 or 1", detail, wanted=None if ratio else "label")
    else:
        bad.add(inside & ~np.isfinite(floats), column, "label not finite", f"{shown}, which is not finite in float32")
    if task.output == "sigmoid":
        detail = (
            f"label {' / '.join(map(repr, label.columns))} is {{}}; task '{task.name}' has output: sigmoid, whose "
            "labels lie in [0, 1]: write clip: [0, 1] in its label, or output: linear"
        )
        bad.add(inside & ((floats < 0) | (floats > 1)), column, "label outside [0, 1]", detail, values)
    return np.where(inside, floats, np.float32("nan"))


def _check_label(missing: np.ndarray, task: Task, column: str, detail: str, bad: BadRows) -> None:
    if task.label.missing == "error":
        advice = " (missing: outside would leave such rows out of the task)"
        bad.add(missing, column, "missing label", detail + advice)


def _holds(
    array: pa.Array, wanted: tuple[str | float, ...], column: str, space: np.ndarray, bad: BadRows
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the column holds one of the label's values: float64 [n] of 0 and 1, and bool [n], the missing ones."""
    if isinstance(wanted[0], str):
        texts, wrong = casts.to_text(array)
        detail = f"label '{column}' is {{}}, which is not UTF-8 text"
        bad.add(wrong & space, column, "not UTF-8", detail, wanted="text")
        missing = casts.to_numpy(array.is_null()).copy()  # "" is an ordinary value here
        return casts.to_numpy(pc.is_in(texts.fill_null(""), pa.array(wanted))).astype(np.float64), missing
    kind = casts.plain_type(array.type)
    large = casts.is_text(kind) and any(isinstance(value, int) and abs(value) > _EXACT for value in wanted)
    if large or not (casts.is_text(kind) or pa.types.is_floating(kind)):
        integers, wrong = casts.to_int64(array)
        detail = f"label '{column}' is {{}}, which is not an int64"
        bad.add(wrong & space, column, "not an int64", detail, wanted="label")
        missing = casts.to_numpy(integers.is_null()) & ~wrong
        whole = pa.array([value for value in wanted if isinstance(value, int)], pa.int64())
        return casts.to_numpy(pc.is_in(integers, whole)).astype(np.float64), missing
    floats, missing = _number(array, column, f"label '{column}' is {{}}", space, bad, "label")
    return (np.isin(floats, _stored(wanted, kind)) & ~missing).astype(np.float64), missing


def _stored(values: Sequence[Any], kind: pa.DataType) -> np.ndarray:
    """Numbers of the schema, float64 [n], rounded as a column of type ``kind`` would hold them (0.7 in float32)."""
    narrow = {pa.float16(): np.float16, pa.float32(): np.float32}.get(kind, np.float64)
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(narrow).astype(np.float64)


def _meets(
    chunk: Chunk, task: Task, values: np.ndarray, present: np.ndarray, bad: BadRows
) -> tuple[np.ndarray, np.ndarray]:
    """Whether values are within the label's thresholds.

    Args:
      chunk: a chunk of the log.
      task: the task of the label.
      values: float64 [n], values of the label's column.
      present: bool [n], whether a row has a value and is inside the task's space.
      bad: where bad rows are noted.

    Returns:
      float64 [n] of 0 and 1, and bool [n], true where a threshold is missing.
    """
    column = task.label.column
    bad.add(
        present & ~np.isfinite(values), column, "label not finite", f"label '{column}' is {{}}, which is not finite"
    )
    kind = casts.plain_type(chunk.columns[column].type)
    hits, missing = np.ones(len(values), bool), np.zeros(len(values), bool)
    for key, limit in task.label.thresholds.items():
        if isinstance(limit, Threshold):
            shown = f"threshold '{limit.column}' is {{}}"
            limits, absent = _number(chunk.columns[limit.column], limit.column, shown, present, bad)
            detail = f"{shown}; task '{task.name}' compares with it"
            _check_label(absent & present, task, limit.column, detail, bad)
            detail = f"{shown}, which is not finite"
            bad.add(present & np.isinf(limits), limit.column, "threshold not finite", detail)
            limits, missing = limits * limit.times, missing | absent
        else:
            limits = _stored([limit], kind)
        hits &= values >= limits if key == "at_least" else values <= limits
    return hits.astype(np.float64), missing


def _number(
    array: pa.Array, column: str, shown: str, space: np.ndarray, bad: BadRows, wanted: Wanted = "number"
) -> tuple[np.ndarray, np.ndarray]:
    """Values as float64 [n] with 0 for missing ones, and bool [n], the missing ones; true and false are 1 and 0."""
    values, wrong = casts.to_float64(array, bools=True)
    bad.add(wrong & space, column, "not a number", f"{shown}, which is not a number", wanted=wanted)
    missing = casts.to_numpy(values.is_null()) & ~wrong
    return casts.to_numpy(values.fill_null(0.0)), missing
