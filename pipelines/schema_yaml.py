"""Reads and writes schemas as YAML, with a message for every mistake. docs/schema.md explains every key.

name: kuairand_sample
group: user_id            # rows are grouped by this column for grouped AUC
item: video_id
task_tables: all          # all | none | user | item | [feature, ...]
features:
  user_id: {kind: categorical, side: user, dtype: int64, min_count: 2, dim: 16}
  hour: {kind: categorical, side: context, dtype: int64, column: hourmin}
  device: {kind: categorical, side: user, dtype: string, hash: {buckets: 1000000, hashes: 2}}   # no vocabulary
  age: {kind: numeric, side: user, bucketise: {boundaries: [18, 25, 35]}}   # or {quantiles: 20}
  length: {kind: numeric, side: item, transform: [log1p, standardise]}
  tags: {kind: multivalent, side: item, dtype: string, max_length: 8, separator: "|", pooling: mean}
  image: {kind: dense, side: item, length: 64}
tasks:
  click: {label: {column: is_click}}
  income: {weight: 0.5, label: {column: income_50k, equals: "50000+."}}    # or in: [a, b]
  loved: {label: {column: rating, at_least: 4}}                           # or at_most, or both
  long_view: {label: {column: play_ms, at_least: {column: duration_ms, times: 0.5}}}
  worth: {label: {column: is_buy}, row_weight: price}                     # each row is weighted by its price
  buy: {label: {column: is_buy}, space: {task: click}}     # only rows where click is 1; or {column: is_shown}
  completion:
    type: regression
    output: sigmoid                                         # or linear
    label: {column: play_ms, divide_by: duration_ms, clip: [0, 1], missing: outside}
ranking:                                                    # one score to rank by; see pipelines.ranking
  score: click^a * long_view
  gain: click + 2 * long_view
  parameters: {a: {value: 1, low: 0, high: 4}}
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import outputs, ranking, yaml_reader
from pipelines.schema import Feature, Hash, Label, Schema, Space, Task, Threshold
from pipelines.yaml_reader import Node
from stem_util.errors import UserError, did_you_mean

_SCHEMA_REQUIRED = {"name": "of the data set", "features": "what the model reads", "tasks": "what it predicts"}
_SCHEMA_OPTIONAL = ("group", "item", "time", "task_tables", "weight", "ranking")
MOST_BUCKETS = 2**31 - 3
"""The most buckets of a hash: ids are int32, and two of them are taken."""
_SCHEMA_NAME = re.compile("[A-Za-z][A-Za-z0-9_.-]*")


# What a SavedModel signature, a Keras layer and a TensorFlow scope all accept.
_NAME = re.compile("[A-Za-z][A-Za-z0-9_]*")


def load(path_or_name: str | os.PathLike[str]) -> Schema:
    """Reads a schema from a file or, by its name, one that is shipped with the package (``kuairand_sample``).

    Raises:
      UserError: the file does not exist or has a mistake.
    """
    name, path = os.fspath(path_or_name), Path(path_or_name)
    shipped = {
        entry.name.removesuffix(".yaml"): entry
        for entry in resources.files("pipelines").joinpath("schemas").iterdir()
        if entry.name.endswith(".yaml")
    }
    if not path.is_file() and name in shipped:
        return loads(shipped[name].read_text("utf-8"), source=f"{name}.yaml")
    if not path.is_file():
        why = "is a directory, not a schema" if path.is_dir() else "no such schema file"
        raise UserError(f"{name}: {why}{did_you_mean(name, shipped) or '.'} Shipped: {', '.join(sorted(shipped))}")
    try:
        return loads(path.read_text("utf-8"), source=name)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text (byte {error.start})") from error


def loads(text: str, source: str = "schema") -> Schema:
    """Reads a schema from YAML text; ``source`` names it in errors.

    Raises:
      UserError: the first mistake, with its key path, the value and what is allowed.
    """
    fields = yaml_reader.parse(text, source).record(_SCHEMA_REQUIRED, _SCHEMA_OPTIONAL, "a schema")
    if not _SCHEMA_NAME.fullmatch(fields["name"].text()):
        fields["name"].fail(f"{fields['name'].value!r} should be letters, digits, '_', '.' and '-', a letter first")
    features = {name: _feature(name, node) for name, node in _named(fields["features"], "feature").items()}
    weight = _row_weight(fields)
    tasks = {name: _task(name, node, weight) for name, node in _named(fields["tasks"], "task").items()}
    if all(task.weight == 0 for task in tasks.values()):
        fields["tasks"].fail("every task has weight 0: nothing would be learned")
    _check_spaces(tasks, fields["tasks"])
    users = {column: f"space of task {task.name!r}" for task in tasks.values() for column in task.columns}
    users |= {task.row_weight: f"row weight of task {task.name!r}" for task in tasks.values() if task.row_weight}
    users |= {column: f"label of task {task.name!r}" for task in tasks.values() for column in task.label.columns}
    for name, feature in features.items():
        if feature.column in users and not feature.allow_label_column:
            fields["features"].child(name).fail(
                f"column {feature.column!r} is used by the {users[feature.column]}, so the feature may "
                "give the label away; drop it, or set allow_label_column: true if it is known before the label"
            )
    for key in ("group", "item"):
        if key in fields and fields[key].text() in users:
            column = fields[key].value
            fields[key].fail(f"column {column!r} is used by the {users[column]}; it cannot name rows too")
    inputs, predicted = tuple(features.values()), tuple(tasks.values())
    schema = Schema(
        name=fields["name"].text(),
        features=inputs,
        tasks=predicted,
        task_tables=_task_tables(fields["task_tables"], features) if "task_tables" in fields else "all",
        group=fields["group"].text() if "group" in fields else None,
        item=fields["item"].text() if "item" in fields else None,
        time=fields["time"].text() if "time" in fields else None,
        ranking=ranking.read(fields["ranking"], inputs, predicted) if "ranking" in fields else None,
    )
    outputs.of(schema)  # refuses names of tasks
    return schema


def _named(node: Node, what: str) -> dict[str, Node]:
    """The children of ``features`` or ``tasks``, with their names checked."""
    children = node.mapping(f"a mapping from {what} names to their keys")
    if not children:
        node.fail(f"is empty; at least one {what} is needed")
    for name in children:
        if not _NAME.fullmatch(name):
            node.fail(
                f"{name!r} cannot be a {what}'s name; use letters, digits and '_', a letter first "
                "(and column: or label: {column: ...} for the log's own name)"
            )
    return children


def _row_weight(fields: Mapping[str, Node]) -> str | None:
    """The column of row weights that the schema names for all tasks, or None."""
    if "weight" not in fields:
        return None
    node = fields["weight"]
    if not isinstance(node.value, str):
        node.fail(
            f"should be a column that holds row weights; got {yaml_reader.shown(node.value)} (a number belongs "
            "to a task, as the weight of its loss)"
        )
    return node.text()


def _check_spaces(tasks: Mapping[str, Task], node: Node) -> None:
    """Checks that each space names another, binary task, and that no task's space depends on itself."""
    for name, task in tasks.items():
        seen = [name]
        while task.space is not None and (other := task.space.task) is not None:
            place = node.child(seen[-1]).child("space").child("task")
            if other not in tasks:
                place.fail(f"{other!r} is not a task{yaml_reader.hint(other, tasks)}")
            if tasks[other].type != "binary":
                place.fail(f"{other!r} is a regression; only the label of a binary task can be 1")
            if other in seen:
                chain = " -> ".join([*seen[seen.index(other) :], other])
                place.fail(f"the space of a task cannot depend on itself ({chain})")
            seen.append(other)
            task = tasks[other]


def _task_tables(node: Node, features: Mapping[str, Feature]) -> Any:
    words = ("all", "none", *_SIDES[:2])
    if not isinstance(node.value, list):
        if isinstance(node.value, str) and node.value in features and node.value not in words:
            node.fail(f"{node.value!r} is a feature; write a list: [{node.value}]")
        chosen = node.choice((*words, "[feature, ...]"))
        if chosen in _SIDES and all(feature.side != chosen for feature in features.values()):
            node.fail(
                f"no feature has side {chosen!r}, so no feature would get task tables; write none if that is meant"
            )
        return chosen
    names = [element.text() for element in node.items("a list of feature names; write none for no feature")]
    for i, name in enumerate(names):
        if name not in features:
            node.child(i).fail(f"{name!r} is not a feature{yaml_reader.hint(name, features)}")
        if name in names[:i]:
            node.child(i).fail(f"{name!r} is listed twice; keep one")
    return tuple(names)


_DTYPES = {
    "categorical": ("int64", "string"),
    "multivalent": ("int64", "string"),
    "numeric": ("float32",),
    "dense": ("float32",),
}
_KINDS = tuple(_DTYPES)
_SIDES = ("user", "item", "context")
_FEATURE_REQUIRED = {"kind": ", ".join(_KINDS), "side": ", ".join(_SIDES)}
_KIND_REQUIRED: dict[str, dict[str, str]] = {
    "categorical": {"dtype": "int64 or string"},
    "multivalent": {"dtype": "int64 or string", "max_length": "how many values to keep"},
    "numeric": {},
    "dense": {"length": "how many elements the vector has"},
}
_KIND_OPTIONAL: dict[str, tuple[str, ...]] = {
    "categorical": ("min_count", "hash"),
    "multivalent": ("min_count", "hash", "separator", "pooling"),
    "numeric": ("dtype", "transform", "bucketise"),
    "dense": ("dtype",),
}
_FEATURE_OPTIONAL = ("column", "dim", "missing", "allow_label_column")


def _feature(name: str, node: Node) -> Feature:
    fields = node.mapping("a mapping with the keys kind, side, ...")
    if "kind" not in fields:
        node.fail(f"the key 'kind' is missing ({', '.join(_KINDS)})")
    kind = fields["kind"].choice(_KINDS)
    required = {**_FEATURE_REQUIRED, **_KIND_REQUIRED[kind]}
    optional = [*_KIND_OPTIONAL[kind], *_FEATURE_OPTIONAL]
    for key, child in fields.items():
        kinds = [other for other in _KINDS if key in (*_KIND_REQUIRED[other], *_KIND_OPTIONAL[other])]
        if kinds and kind not in kinds:
            child.fail(
                f"does not apply to a {kind} feature, only to {' and '.join(kinds)} ones; "
                f"a {kind} feature takes: {', '.join([*required, *optional])}"
            )
    node.record(required, optional, f"a {kind} feature")
    if "transform" in fields and "bucketise" in fields:
        fields["transform"].fail(
            "cannot be combined with bucketise: buckets do not depend on the scale; drop one of them"
        )
    if "min_count" in fields and "hash" in fields:
        fields["min_count"].fail("cannot be combined with hash, which counts no values; drop one of them")
    values = {key: _READ_FEATURE[key](child) for key, child in fields.items() if key in _READ_FEATURE}
    values.setdefault("column", name)
    values["dtype"] = fields["dtype"].choice(_DTYPES[kind]) if "dtype" in fields else "float32"
    if "bucketise" in fields:
        values.update(_bucketise(fields["bucketise"]))
    return Feature(name=name, **values)


def _hash(node: Node) -> Hash:
    fields = node.record({"buckets": "how many rows the values share"}, ("hashes",), "a hash")
    hashes: Any = fields["hashes"].integer(1, 2) if "hashes" in fields else 1
    return Hash(fields["buckets"].integer(2, MOST_BUCKETS), hashes)


def _transform(node: Node) -> tuple[str, ...]:
    steps = tuple(step.choice(("log1p", "standardise")) for step in node.items("a list of log1p and standardise"))
    if steps not in (("log1p",), ("standardise",), ("log1p", "standardise")):
        node.fail(f"{list(steps)} should be [log1p], [standardise] or [log1p, standardise]")
    return steps


def _bucketise(node: Node) -> dict[str, Any]:
    fields = node.record({}, ("boundaries", "quantiles"))
    if len(fields) != 1:
        node.fail("should hold one of boundaries: [a, b, ...] and quantiles: n")
    if "quantiles" in fields:
        return {"quantiles": fields["quantiles"].integer(2)}
    node = fields["boundaries"]
    boundaries = tuple(element.number() for element in node.items("a list of ascending numbers"))
    # Values are compared as float32, where neighbours may become equal or infinite.
    with np.errstate(over="ignore"):
        narrow = np.asarray(boundaries, np.float32)
    for i in range(len(boundaries)):
        if not np.isfinite(narrow[i]):
            node.child(i).fail(f"{node.value[i]} is too large for float32")
        if i and narrow[i] <= narrow[i - 1]:
            node.child(i).fail(f"{node.value[i]} should be greater than {node.value[i - 1]} before it, in float32 too")
    return {"boundaries": boundaries}


_READ_FEATURE: Mapping[str, Callable[[Node], Any]] = {
    "kind": lambda node: node.choice(_KINDS),
    "side": lambda node: node.choice(_SIDES),
    "column": Node.text,
    "dim": lambda node: node.integer(1),
    "min_count": lambda node: node.integer(1),
    "hash": _hash,
    "pooling": lambda node: node.choice(("mean", "sum")),
    "max_length": lambda node: node.integer(1),
    "separator": Node.text,
    "length": lambda node: node.integer(1),
    "transform": _transform,
    "missing": lambda node: node.choice(("rare", "error")),
    "allow_label_column": Node.flag,
}
_TASK_OPTIONAL = ("type", "weight", "row_weight", "output", "space")


def _task(name: str, node: Node, row_weight: str | None) -> Task:
    """A task. ``row_weight`` is the schema's column of row weights, for tasks that name none."""
    fields = node.record({"label": "as in label: {column: is_click}"}, _TASK_OPTIONAL, "a task")
    task_type: Any = fields["type"].choice(("binary", "regression")) if "type" in fields else "binary"
    weight = 1.0
    if "weight" in fields and isinstance(fields["weight"].value, str):
        if "row_weight" in fields:
            fields["weight"].fail(
                "names a column of row weights, which row_weight is for; weight is a number that multiplies the loss"
            )
        row_weight = fields["weight"].text()
    elif "weight" in fields:
        weight = fields["weight"].number(0)
    if "row_weight" in fields:
        row_weight = fields["row_weight"].text()
    label = _label(fields["label"], task_type)
    output: Any = "linear"
    if "output" in fields:
        if task_type == "binary":
            fields["output"].fail("does not apply to a binary task, whose score is a probability; remove it")
        output = fields["output"].choice(("linear", "sigmoid"))
    if output == "sigmoid" and label.clip and not 0 <= label.clip[0] < label.clip[1] <= 1:
        fields["label"].child("clip").fail(
            f"{list(label.clip)} is not inside [0, 1], where scores of output: sigmoid lie; clip to [0, 1], or "
            "write output: linear"
        )
    if output == "sigmoid" and label.standardise:
        fields["label"].child("standardise").fail(
            "cannot be combined with output: sigmoid, whose scores lie in [0, 1]; drop one of them"
        )
    space = _space(fields["space"]) if "space" in fields else None
    if space is not None and space.column == label.column:
        fields["space"].child("column").fail(
            f"{space.column!r} is the label's own column, which is always 1 in that space; name another, or leave "
            "space out"
        )
    return Task(name, label, task_type, weight, output, space, row_weight)


def _space(node: Node) -> Space:
    fields = node.record({}, ("column", "task"), "a space")
    if len(fields) != 1:
        node.fail("should hold one of column: is_shown and task: click")
    return Space(**{key: child.text() for key, child in fields.items()})


_CONDITIONS = ("equals", "in", "at_least", "at_most")
_OF_REGRESSIONS = ("divide_by", "clip", "standardise")
_LABEL_OPTIONAL = (*_CONDITIONS, *_OF_REGRESSIONS, "missing")


def _label(node: Node, task_type: str) -> Label:
    fields = node.record({"column": "of the log"}, _LABEL_OPTIONAL, "a label")
    kinds = dict.fromkeys(_CONDITIONS, "binary") | dict.fromkeys(_OF_REGRESSIONS, "regression")
    for key, wanted in kinds.items():
        if key in fields and task_type != wanted:
            fields[key].fail(f"does not apply to a {task_type} task, only to a {wanted} one (type: {wanted})")
    column = fields["column"].text()
    conditions = [key for key in _CONDITIONS if key in fields]
    if len(conditions) > 1 and conditions != ["at_least", "at_most"]:
        fields[conditions[1]].fail(f"cannot be combined with {conditions[0]}; only at_least and at_most go together")
    label = Label(
        column=column,
        equals=_value(fields["equals"]) if "equals" in fields else None,
        one_of=_values(fields["in"]) if "in" in fields else (),
        at_least=_threshold(fields["at_least"]) if "at_least" in fields else None,
        at_most=_threshold(fields["at_most"]) if "at_most" in fields else None,
        divide_by=fields["divide_by"].text() if "divide_by" in fields else None,
        clip=_clip(fields["clip"]) if "clip" in fields else None,
        standardise="standardise" in fields and fields["standardise"].flag(),
        missing=fields["missing"].choice(("error", "outside")) if "missing" in fields else "error",
    )
    if label.divide_by == column:
        fields["divide_by"].fail(f"{column!r} divided by itself is always 1")
    for key, limit in label.thresholds.items():
        if isinstance(limit, Threshold) and limit.column == column:
            fields[key].child("column").fail(f"{column!r} would be compared with itself; name another column")
    if isinstance(label.at_least, float) and isinstance(label.at_most, float) and label.at_least > label.at_most:
        fields["at_most"].fail(f"no value is at least {label.at_least:g} and at most {label.at_most:g}")
    return label


def _value(node: Node) -> str | float:
    """A value that a column may hold: text or a number (int if it is whole)."""
    value = node.value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < 2**63 else value
    if not isinstance(value, str | int) or isinstance(value, bool):
        node.fail(
            f"should be text (in quotes) or a finite number; got {yaml_reader.shown(value)}"
            + (". A bool column is a label without a condition" if isinstance(value, bool) else "")
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        node.fail(f"{value} does not fit int64")
    return value


def _values(node: Node) -> tuple[str | float, ...]:
    items = node.items("a list of the values that mean 1, as in [click, buy]")
    values = [_value(item) for item in items]
    for i, value in enumerate(values):
        if isinstance(value, str) != isinstance(values[0], str):
            items[i].fail(f"{value!r} stands beside {values[0]!r}; a column holds texts or numbers, not both")
        if value in values[:i]:
            items[i].fail(f"{value!r} is listed twice; keep one")
    return tuple(values)


def _threshold(node: Node) -> float | Threshold:
    if isinstance(node.value, dict):
        fields = node.record({"column": "the column to compare with"}, ("times",), "a threshold")
        times = fields["times"].number() if "times" in fields else 1.0
        if times <= 0:
            fields["times"].fail(f"{times:g} should be above 0")
        return Threshold(fields["column"].text(), times)
    if isinstance(node.value, str | list | None):
        node.fail(
            "should be a number, or another column as in {column: duration_ms, times: 0.5}; "
            f"got {yaml_reader.shown(node.value)}"
        )
    return node.number()


def _clip(node: Node) -> tuple[float, float]:
    limits = [limit.number() for limit in node.items("a list [low, high]")]
    if len(limits) != 2 or limits[0] >= limits[1]:
        node.fail(f"{yaml_reader.shown(node.value)} should be [low, high] with low below high")
    return limits[0], limits[1]


def dumps(schema: Schema) -> str:
    """YAML text that :func:`loads` reads back as an equal schema; defaults are left out."""
    tables = schema.task_tables
    head: dict[str, Any] = {"name": schema.name, "group": schema.group, "item": schema.item, "time": schema.time}
    head["task_tables"] = list(tables) if isinstance(tables, tuple) else tables
    lines = [_line(key, value) for key, value in head.items() if value is not None]
    lines += ["features:", *(f"  {_line(feature.name, _feature_fields(feature))}" for feature in schema.features)]
    lines += ["tasks:", *(f"  {_line(task.name, _task_fields(task))}" for task in schema.tasks)]
    return "\n".join(lines) + "\n" + (ranking.text(schema.ranking) if schema.ranking else "")


def _line(key: str, value: Any) -> str:
    return f"{yaml_reader.inline(key)}: {yaml_reader.inline(value)}"


def _feature_fields(feature: Feature) -> dict[str, Any]:
    leave = ["name", *(["column"] if feature.column == feature.name else [])]
    leave += ["dtype"] if feature.dtype == "float32" else []
    fields = _changed(feature, tuple(leave))
    if feature.hash is not None:
        fields["hash"] = _changed(feature.hash, ())
    bucketise = {key: fields.pop(key) for key in ("boundaries", "quantiles") if key in fields}
    return {**fields, **({"bucketise": bucketise} if bucketise else {})}


def _task_fields(task: Task) -> dict[str, Any]:
    fields = {**_changed(task, ("name", "label", "space")), "label": _label_fields(task.label)}
    return fields if task.space is None else {**fields, "space": _changed(task.space, ())}


def _label_fields(label: Label) -> dict[str, Any]:
    fields = {"in" if key == "one_of" else key: value for key, value in _changed(label, ()).items()}
    thresholds = {key: _changed(limit, ()) for key, limit in label.thresholds.items() if isinstance(limit, Threshold)}
    return {key: thresholds.get(key, value) for key, value in fields.items()}


def _changed(record: Any, leave: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, in order, as YAML values."""
    changed = {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.name not in leave and getattr(record, field.name) != field.default
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()}
