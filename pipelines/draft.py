"""Drafts a schema from a log: what each column seems to be, and why, as YAML with comments.

Guesses lean to the safe side: what looks like an outcome, or predicts a label too well by itself, is commented out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import guess, leakage, yaml_reader
from pipelines.errors import UserError, did_you_mean
from pipelines.guess import Column

SUSPECT_AUC = 0.95
_POSITIVE = ("yes", "y", "true", "t")


@dataclass
class Draft:
    """The parts of the schema, with a comment for each.

    Attributes:
      name: of the data set.
      keys: ``group`` and ``item`` columns.
      features: fields, by column; likewise ``tasks``.
      notes: why, by column.
      doubts: why a feature or task is commented out, by column.
      left_out: why a column is nothing, by column.
      suspects: (AUC, task column) of features that predict a label too well, by column.
      times: columns that tell the time, the finest first.
    """

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    suspects: dict[str, tuple[float, str]] = field(default_factory=dict)
    times: list[str] = field(default_factory=list)


def draft(name: str, table: pa.Table, types: Mapping[str, str], labels: Sequence[str] = ()) -> Draft:
    """Guesses what each column of a sample is.

    Args:
      name: of the data set.
      table: the sample's rows.
      types: the type of each column in the log, for people.
      labels: ``column`` or ``column=value`` of the tasks, or none to guess them.

    Raises:
      UserError: an empty sample, a label that is not a column or cannot be one, no column that looks like a label, or
        no column left for a feature.
    """
    if not len(table):
        raise UserError("the log holds no rows: there is nothing to describe")
    columns = [
        guess.read(column, table.column(column).combine_chunks(), types[column]) for column in table.column_names
    ]
    result = Draft(_identifier(name))
    by_name = {column.name: column for column in columns}
    for label, value in _asked(labels, by_name).items():
        result.tasks[label] = _task(by_name[label], value)
        result.notes[label] = _rate(by_name[label], result.tasks[label])
    for column in columns:
        if column.name in result.tasks:
            continue
        if why := guess.no_use(column):
            result.left_out[column.name] = why
        elif guess.is_outcome(column):
            task = result.tasks[column.name] = _task(column, None)
            result.notes[column.name] = _rate(column, task)
            if labels:
                result.doubts[column.name] = "another outcome? Uncomment it to predict it too; it is no feature"
            elif task.get("type") == "regression":
                result.doubts[column.name] = "an outcome by its name: no feature, but perhaps a task"
        else:
            result.features[column.name], result.notes[column.name] = guess.feature(column)
    times = [column for column in columns if column.name not in result.tasks and guess.time_of(column)]
    result.times = [column.name for column in sorted(times, key=lambda column: -column.distinct)]
    if not any(column not in result.doubts for column in result.tasks):
        raise UserError(
            "no column looks like a label (0 and 1 under a name like click or is_*); name it: --label=COLUMN"
        )
    _find_keys(result, by_name)
    _find_suspects(result, by_name)
    if not any(column not in result.doubts for column in result.features):
        nothing = "; ".join(f"{column}: {why}" for column, why in {**result.left_out, **result.doubts}.items())
        raise UserError(f"no column is left to be a feature ({nothing})")
    return result


def render(result: Draft, head: Sequence[str]) -> str:
    """The schema as YAML, with comments; ``head`` are lines of its first comment."""
    lines = [f"# {line}" for line in head]
    lines += [f"name: {result.name}"]
    lines += [f"{key}: {yaml_reader.inline(column)}  # {_KEY_NOTES[key]}" for key, column in result.keys.items()]
    lines += ["task_tables: all  # features with tables of their own for each task: all, none, user, item or a list"]
    for title, entries in (("features", result.features), ("tasks", result.tasks)):
        lines += ["", f"{title}:"]
        taken: set[str] = set()
        for column, fields in entries.items():
            lines += _comment(result.notes[column], "  ")
            entry = _entry(title, column, fields, taken)
            if column in result.doubts:
                lines += _comment(f"{result.doubts[column]}\n{entry}", "  ")
            else:
                lines += [f"  {entry}"]
    if result.left_out:
        lines += ["", "# left out:"]
        lines += [
            line
            for column, why in result.left_out.items()
            for line in _comment(f"  {yaml_reader.inline(column)}: {why}")
        ]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str = "") -> list[str]:
    return [f"{indent}# {line}" for line in text.splitlines()]


_KEY_NOTES = {
    "group": "guessed by name; rows are grouped by it for grouped AUC",
    "item": "guessed by name; names the item of a row",
}


def _entry(title: str, column: str, fields: dict[str, Any], taken: set[str]) -> str:
    """One feature or task on one line, under a name that is allowed and not yet taken."""
    name = _identifier(re.sub("^(is|has|did)_(?=.)", "", column) if title == "tasks" else column)
    while name in taken:
        name += "_2"
    taken.add(name)
    if title == "features" and name != column:
        fields = {**fields, "column": column}
    return f"{yaml_reader.inline(name)}: {yaml_reader.inline(fields)}"


def _identifier(text: str) -> str:
    name = re.sub("[^A-Za-z0-9]+", "_", text).strip("_")
    return name if name[:1].isalpha() else f"c_{name}".rstrip("_")


def _find_keys(result: Draft, columns: Mapping[str, Column]) -> None:
    for key, side in (("group", "user"), ("item", "item")):
        named = [
            name
            for name in result.features
            if guess.is_side_key(columns[name]) and guess.side_of(columns[name])[0] == side
        ]
        if named:
            result.keys[key] = max(named, key=lambda name: columns[name].distinct)


def _asked(labels: Sequence[str], columns: Mapping[str, Column]) -> dict[str, str | None]:
    """The value asked for (or None) by column, for ``column`` or ``column=value`` each."""
    asked: dict[str, str | None] = {}
    for label in labels:
        name, equals, value = (label, "", "") if label in columns else label.partition("=")
        if name not in columns:
            raise UserError(
                f"--label={label}: {name!r} is not in the log{did_you_mean(name, columns) or '.'} "
                f"Columns: {', '.join(columns)}"
            )
        asked[name] = value if equals else None
    return asked


def _task(column: Column, value: str | None) -> dict[str, Any]:
    """The fields of a task whose label is the column, or the column's being equal to a value."""
    label: dict[str, Any] = {"column": column.name}
    if column.values.null_count:
        label["missing"] = "outside"
    if column.kind not in ("int", "float", "text"):
        raise UserError(f"--label={column.name}: a column of {column.stored} cannot be a label")
    values = pc.unique(column.present).to_pylist()
    shown = ", ".join(guess.shown(other) for other in values[:8]) + (", ..." if len(values) > 8 else "")
    if value is not None:
        by_text = {str(other): other for other in values}
        if value not in by_text or column.kind == "float":
            raise UserError(
                f"--label={column.name}={value}: {value!r} is no value of {column.name!r}"
                f"{did_you_mean(value, by_text) or '.'} Values: {shown}"
            )
        return {"label": {"column": column.name, "equals": by_text[value], **label}}
    if set(values) <= {0, 1}:
        return {"label": label}
    if column.kind in ("int", "text") and len(values) == 2:
        return {"label": {"column": column.name, "equals": _positive(column), **label}}
    if column.kind == "text":
        raise UserError(
            f"--label={column.name}: {len(values):,} different texts; say which one counts as 1, "
            f"as in --label='{column.name}={values[0] if values else ''}'. Values: {shown}"
        )
    return {"type": "regression", "label": label}


def _positive(column: Column) -> Any:
    """Which of two values means 1: the larger number, a yes, or the rarer text."""
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(column.present).to_pylist()}
    if column.kind == "int":
        return max(counts)
    return min(counts, key=lambda text: (text.lower() not in _POSITIVE, counts[text], text))


def _label(column: Column, task: Mapping[str, Any]) -> np.ndarray:
    """The label's values, float64 [n], NaN where there is none."""
    values = column.values
    if "equals" in task["label"]:
        values = pc.equal(values, pa.scalar(task["label"]["equals"], values.type))
    return (
        values.cast(pa.int8() if pa.types.is_boolean(values.type) else values.type).to_numpy(False).astype(np.float64)
    )


def _rate(column: Column, task: Mapping[str, Any]) -> str:
    values = _label(column, task)
    mean = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
    return f"{column.about()}; {'mean' if task.get('type') == 'regression' else 'rate'} {mean:.4g}"


def _find_suspects(result: Draft, columns: Mapping[str, Column]) -> None:
    """Comments out features that alone predict a label of the draft too well; keys are only remarked on."""
    labels = {
        name: _label(columns[name], task) for name, task in result.tasks.items() if task.get("type") != "regression"
    }
    for name in result.features:
        if columns[name].kind not in ("int", "float", "text") or not labels:
            continue
        codings = leakage.codings(columns[name].values.to_numpy(zero_copy_only=False))
        auc, task = max((leakage.alone_auc(codings, label), other) for other, label in labels.items())
        if auc > SUSPECT_AUC:
            result.suspects[name] = (auc, task)
            why = f"suspect: alone it predicts {task} with an AUC of {auc:.3f} on rows it was not fitted on"
            if name in result.keys.values():
                result.notes[name] += f"\n{why}"
            else:
                result.doubts[name] = f"{why}; uncomment it only if it is known before the outcome"
