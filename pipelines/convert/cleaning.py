"""From a chunk of the log to rows that can be counted and encoded: values cast, labels made, bad rows found."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import hashing
from pipelines.convert import advice
from pipelines.convert.advice import Wanted
from pipelines.convert.split import GivenSplit, HashSplit, LastSplit, RandomSplit, SplitPolicy, order_keys, time_values
from pipelines.log import casts
from pipelines.log.casts import Lists
from pipelines.log.source import Chunk, Log
from pipelines.schema import Feature, Schema, Task, Threshold
from stem_util.errors import UserError


@dataclass(frozen=True)
class Rows:
    """The good rows of a chunk, n of them.

    Attributes:
      places: int64 [n], which rows of the chunk these are.
      row_ids: int64 [n].
      split: uint8 [n], 0 train, 1 validation, 2 test.
      ids: by categorical feature, raw values: int64 or string [n], missing ones null.
      lists: by multivalent feature.
      numerics: by numeric feature, float32 [n], missing ones NaN.
      vectors: by dense feature, float32 [n, length]; missing elements are 0.
      labels: by task, float32 [n]; NaN outside its sample space.
      weights: by column of row weights, float32 [n] of 0 or more; what no task's label counts with is 0.
      keys: by role (group, item), raw values: int64 or string [n] without nulls.
    """

    places: np.ndarray
    row_ids: np.ndarray
    split: np.ndarray
    ids: dict[str, pa.Array]
    lists: dict[str, Lists]
    numerics: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    keys: dict[str, pa.Array]

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, one part after another; there is at least one."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if isinstance(values[0], dict):
                joined[field.name] = {name: _join([value[name] for value in values]) for name in values[0]}
            else:
                joined[field.name] = _join(values)
        return cls(**joined)

    @property
    def nbytes(self) -> int:
        """Of the values of features."""
        lists = [lists.values for lists in self.lists.values()]
        return sum(values.nbytes for values in (*self.ids.values(), *lists, *self.vectors.values()))

    def take(self, places: np.ndarray) -> Rows:
        """Some of the rows, by ascending place among these."""
        if len(places) == len(self.row_ids):
            return self
        index = pa.array(places)
        return Rows(
            self.places[places],
            self.row_ids[places],
            self.split[places],
            {name: values.take(index) for name, values in self.ids.items()},
            {name: _take_lists(lists, places) for name, lists in self.lists.items()},
            {name: values[places] for name, values in self.numerics.items()},
            {name: values[places] for name, values in self.vectors.items()},
            {name: values[places] for name, values in self.labels.items()},
            {name: values[places] for name, values in self.weights.items()},
            {name: values.take(index) for name, values in self.keys.items()},
        )


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], Lists):
        fields = ([getattr(part, field.name) for part in parts] for field in dataclasses.fields(Lists))
        return Lists(*map(_join, fields))
    return pa.concat_arrays(parts) if isinstance(parts[0], pa.Array) else np.concatenate(parts)


def _take_lists(lists: Lists, places: np.ndarray) -> Lists:
    chosen = np.zeros(len(lists.lengths), bool)
    chosen[places] = True
    values = lists.values.filter(pa.array(np.repeat(chosen, lists.lengths)))
    return Lists(values, lists.lengths[places], lists.missing[places])


def integer_columns(schema: Schema) -> set[str]:
    """Columns whose text is read as integers, because a categorical feature says so."""
    return {f.column for f in schema.features if f.kind == "categorical" and f.dtype == "int64"}


def kept_types(log: Log, schema: Schema) -> dict[str, pa.DataType]:
    """The types in which columns of a log are kept.

    They are those of the log; text, which has none, is int64 or float64 where the schema says so, else strings.
    """
    ids = {f.column for f in schema.features if f.kind != "numeric"}
    typed = {f.column: pa.float64() for f in schema.features if f.kind == "numeric" and f.column not in ids}
    typed |= dict.fromkeys(integer_columns(schema), pa.int64())
    text = log.types if log.text else log.directory_columns
    return dict(log.types) | {name: typed.get(name, pa.string()) for name in text}


def kept_columns(columns: Mapping[str, pa.Array], kinds: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
    """Columns of good rows as `kept_types` says."""
    return {name: _kept(array, kinds[name]) for name, array in columns.items()}


def _kept(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if not casts.is_text(array.type) or array.type == kind:
        return casts.to_type(array, kind)
    if pa.types.is_integer(kind):
        return casts.to_int64(array)[0]
    return casts.to_float64(array)[0] if pa.types.is_floating(kind) else _decoded(array, kind)


def _decoded(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Text; what is not UTF-8, which can only be in columns that the schema does not use, becomes U+FFFD."""
    try:
        return array.cast(kind)
    except pa.ArrowInvalid:
        texts = [None if v is None else v.decode(errors="replace") for v in array.cast(pa.binary()).to_pylist()]
        return pa.array(texts, kind)


class _BadRows:
    """Gathers what is wrong with the rows of one chunk; a row counts once, for what was found first."""

    def __init__(self, chunk: Chunk, drop: bool, served: bool = False) -> None:
        self._chunk, self._drop, self._served = chunk, drop, served
        self._mask = np.zeros(len(chunk.rows), bool)
        self._first: tuple[int, str] | None = None  # the earliest bad row and what is wrong with it
        self.counts: Counter[tuple[str, str]] = Counter()

    @property
    def good(self) -> np.ndarray:
        return np.flatnonzero(~self._mask)

    def add(
        self,
        bad: np.ndarray,
        column: str,
        reason: str,
        detail: str,
        values: np.ndarray | None = None,
        wanted: Wanted | None = None,
    ) -> None:
        """Marks rows bad.

        Args:
          bad: bool [n].
          column: of the log.
          reason: under which they are counted.
          detail: the message, ``{}`` standing for the value.
          values: those that are bad, if not the column's own.
          wanted: what the column's own should be, for advice.
        """
        new = bad & ~self._mask
        if not new.any():
            return
        self._mask |= new
        self.counts[column, reason] += int(new.sum())
        place = int(np.flatnonzero(new)[0])
        if not self._drop and (self._first is None or place < self._first[0]):
            array = self._chunk.columns[column] if values is None else pa.array(values)
            value = _raw(array[place])
            if wanted is not None:
                csv = pa.types.is_binary(array.type)
                detail += advice.way_out(value, wanted, self._chunk.path, csv=csv, served=self._served)
            self._first = (place, detail.replace("{}", _shown(value), 1))

    def raise_first(self) -> None:
        if self._first is not None:
            place, detail = self._first
            where = f"{self._chunk.path}, row {self._chunk.rows[place]:,}"
            raise UserError(f"{where}: {detail} (--on_bad_rows=drop counts and skips such rows)")


def _raw(value: pa.Scalar) -> Any:
    """A value; text that is not UTF-8 as bytes."""
    raw = (value.cast(pa.binary()) if casts.is_text(value.type) else value).as_py()
    if isinstance(raw, bytes):
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw[:60]
    return raw


def _shown(raw: Any) -> str:
    text = repr(raw)
    return "null" if raw is None else text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Cleaner:
    """Turns chunks into rows under one schema, split policy and policy for bad rows.

    Attributes:
      schema: what the columns mean.
      split: how rows are divided.
      drop: whether bad rows are skipped and counted; otherwise the first one is an error.
      served: the schema came with an exported model, so that it is no advice to change it.
    """

    schema: Schema
    split: SplitPolicy
    drop: bool
    served: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns of the log that are read."""
        names = dict.fromkeys(feature.column for feature in self.schema.features)
        names |= dict.fromkeys(column for task in self.schema.tasks for column in task.columns)
        names |= dict.fromkeys(filter(None, (self.schema.group, self.schema.item)))
        return list(names | dict.fromkeys(self.split.columns))

    def clean(self, chunk: Chunk, row_ids: np.ndarray, file: int) -> tuple[Rows, Counter[tuple[str, str]]]:
        """Rows of a chunk, and how many were bad by (column, reason).

        Args:
          chunk: with all of `columns`.
          row_ids: int64 [n] of the chunk's rows.
          file: the file's place in the log, for given splits.

        Raises:
          UserError: a bad row, unless they are dropped: its file, place, column, value and the rule it breaks.
        """
        bad = _BadRows(chunk, self.drop, self.served)
        ids: dict[str, pa.Array] = {}
        lists: dict[str, Lists] = {}
        numerics: dict[str, np.ndarray] = {}
        vectors: dict[str, np.ndarray] = {}
        for feature in self.schema.features:
            array = chunk.columns[feature.column]
            if feature.kind == "categorical":
                ids[feature.name] = _categorical(array, feature, bad)
            elif feature.kind == "multivalent":
                lists[feature.name] = _multivalent(array, feature, bad)
            elif feature.kind == "numeric":
                numerics[feature.name] = _numeric(array, feature, bad)
            else:
                vectors[feature.name] = _dense(array, feature, bad)
        labels = _labels(chunk, self.schema.tasks, bad)
        weights = {
            column: _weights(chunk, column, self.schema.tasks, labels, bad) for column in self.schema.row_weights
        }
        keys = {
            role: self._key(chunk, column, bad)
            for role, column in (("group", self.schema.group), ("item", self.schema.item))
            if column is not None
        }
        split = self._assign(chunk, row_ids, file, bad)
        bad.raise_first()
        rows = Rows(np.arange(len(row_ids)), row_ids, split, ids, lists, numerics, vectors, labels, weights, keys)
        return rows.take(bad.good), bad.counts

    def _key(self, chunk: Chunk, column: str, bad: _BadRows) -> pa.Array:
        """Raw values of a key column; integers are int64, text is text unless a feature says that it holds int64."""
        array = chunk.columns[column]
        if casts.is_text(casts.plain_type(array.type)) and column not in integer_columns(self.schema):
            values, wrong = casts.to_text(array)
            bad.add(wrong, column, "not UTF-8", f"column '{column}' is {{}}, which is not UTF-8 text", wanted="text")
        else:
            values, wrong = casts.to_int64(array)
            bad.add(wrong, column, "not an int64", f"column '{column}' is {{}}, which is not an int64", wanted="id")
        missing = casts.to_numpy(values.is_null())
        detail = (
            f"the key column '{column}' is {{}}; every row needs a value: cast missing ones to an id of their own "
            f"when the log is written (pandas: log['{column}'].fillna(0))"
        )
        bad.add(missing & ~wrong, column, "missing key", detail)
        return values.fill_null("" if pa.types.is_string(values.type) else 0) if values.null_count else values

    def _assign(self, chunk: Chunk, row_ids: np.ndarray, file: int, bad: _BadRows) -> np.ndarray:
        policy: SplitPolicy = self.split
        if isinstance(policy, GivenSplit):
            number = policy.file_splits[file]
            if number or policy.rest is None:
                return np.full(len(row_ids), number, np.uint8)
            policy = policy.rest
        if isinstance(policy, RandomSplit):
            return policy.assign(row_ids)
        if isinstance(policy, HashSplit):
            return policy.assign(hashing.key64(self._key(chunk, policy.column, bad)))
        if isinstance(policy, LastSplit):
            self._group_times(chunk, policy, bad)
            return policy.assign(row_ids)
        return policy.assign(time_keys(chunk, policy.column, policy.kind, bad))

    def _group_times(self, chunk: Chunk, policy: LastSplit, bad: _BadRows) -> tuple[np.ndarray, np.ndarray]:
        """Keys of groups, int64 [n], and of times, uint64 [n]; rows without one of them are bad."""
        groups = hashing.key64(self._key(chunk, policy.group, bad))
        return groups, time_keys(chunk, policy.column, policy.kind, bad)

    def splits(self, chunk: Chunk, row_ids: np.ndarray, file: int) -> np.ndarray:
        """uint8 [n], the split of every row; of a row that is bad, any. Arguments as of `clean`, which checks them."""
        return self._assign(chunk, row_ids, file, _BadRows(chunk, drop=True))

    def times(self, chunk: Chunk, column: str, kind: pa.DataType) -> np.ndarray:
        """Times of a chunk's rows that have one, uint64 keys that sort as they do."""
        bad = _BadRows(chunk, self.drop)
        keys = time_keys(chunk, column, kind, bad)
        bad.raise_first()
        return keys[bad.good]

    def group_times(self, chunk: Chunk, policy: LastSplit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Groups and times of a chunk's rows that have both, and the places of these rows in the chunk."""
        bad = _BadRows(chunk, self.drop)
        groups, times = self._group_times(chunk, policy, bad)
        bad.raise_first()
        return groups[bad.good], times[bad.good], bad.good


def time_keys(chunk: Chunk, column: str, kind: pa.DataType, bad: _BadRows) -> np.ndarray:
    """uint64 [n] that sort as a time column does; rows without a time are bad."""
    values, wrong = time_values(chunk.columns[column], kind)
    detail = f"column '{column}' is {{}}, which is not of the column's type {kind}"
    bad.add(wrong, column, "not a time", detail, wanted="time")
    missing = casts.to_numpy(values.is_null()) & ~wrong
    bad.add(missing, column, "missing time", f"the time column '{column}' is {{}}; every row needs a time")
    return order_keys(values.fill_null(pa.scalar(0, pa.int64()).cast(values.type)) if values.null_count else values)


def _check_missing(missing: np.ndarray, feature: Feature, bad: _BadRows) -> None:
    if feature.missing == "error":
        detail = f"feature '{feature.name}' is {{}}, and its schema says missing: error"
        bad.add(missing, feature.column, "missing value", detail)


_TYPE_NAMES: dict[str, tuple[str, Wanted]] = {
    "int64": ("an int64", "id"),
    "string": ("UTF-8 text", "text"),
    "float32": ("a number", "number"),
}


def _check_type(wrong: np.ndarray, feature: Feature, bad: _BadRows) -> None:
    name, wanted = _TYPE_NAMES[feature.dtype]
    detail = f"feature '{feature.name}' is {{}}, which is not {name}"
    bad.add(wrong, feature.column, f"not {name}", detail, wanted=wanted if feature.kind != "multivalent" else None)


def _categorical(array: pa.Array, feature: Feature, bad: _BadRows) -> pa.Array:
    values, wrong = casts.to_int64(array) if feature.dtype == "int64" else casts.to_text(array)
    _check_type(wrong, feature, bad)
    if feature.missing == "error":
        _check_missing(casts.to_numpy(values.is_null()) & ~wrong, feature, bad)
    return values


def _multivalent(array: pa.Array, feature: Feature, bad: _BadRows) -> Lists:
    """Missing values are left out, then the first max_length of the others kept."""
    lists, wrong = casts.to_lists(array, feature.dtype, feature.separator)
    _check_type(wrong, feature, bad)
    _check_missing(lists.missing, feature, bad)
    rows = np.repeat(np.arange(len(lists.lengths)), lists.lengths)
    present = casts.to_numpy(lists.values.is_valid())
    lengths = np.bincount(rows[present], minlength=len(lists.lengths))
    before = np.cumsum(lengths) - lengths
    order = np.cumsum(present) - 1 - np.repeat(before, lists.lengths)  # place among the row's present values
    kept = present & (order < feature.max_length)
    values = lists.values if kept.all() else lists.values.filter(pa.array(kept))
    return Lists(values, np.minimum(lengths, feature.max_length), lists.missing)


def _numeric(array: pa.Array, feature: Feature, bad: _BadRows) -> np.ndarray:
    values, wrong = casts.to_float64(array)
    _check_type(wrong, feature, bad)
    _check_missing(casts.to_numpy(values.is_null()) & ~wrong, feature, bad)
    with np.errstate(over="ignore"):
        floats = casts.to_numpy(values.fill_null(np.nan)).astype(np.float32)
    detail = f"feature '{feature.name}' is {{}}, which is not finite in float32"
    bad.add(np.isinf(floats), feature.column, "not finite", detail)
    if "log1p" in feature.transform:
        detail = f"feature '{feature.name}' is {{}}; log1p needs values above -1"
        bad.add(floats <= -1, feature.column, "log1p of -1 or less", detail)
    return floats


def _dense(array: pa.Array, feature: Feature, bad: _BadRows) -> np.ndarray:
    """A null vector is all 0, and so is a null or NaN element."""
    lists, wrong = casts.to_lists(array, "float32", feature.separator)
    _check_type(wrong, feature, bad)
    _check_missing(lists.missing, feature, bad)
    empty = casts.to_numpy(array.is_null())
    unequal = (lists.lengths != feature.length) & ~empty
    detail = f"feature '{feature.name}' is {{}}, which has not the {feature.length} elements of its schema"
    bad.add(unequal, feature.column, "vector of another length", detail)
    with np.errstate(over="ignore"):
        flat = casts.to_numpy(lists.values.fill_null(0.0)).astype(np.float32)
    rows = np.repeat(np.arange(len(array)), lists.lengths)
    infinite = np.zeros(len(array), bool)
    infinite[rows[np.isinf(flat)]] = True
    bad.add(infinite, feature.column, "not finite", f"feature '{feature.name}' is {{}}, which is not finite in float32")
    vectors = np.zeros((len(array), feature.length), np.float32)
    full = lists.lengths == feature.length
    vectors[full] = flat[np.repeat(full, lists.lengths)].reshape(-1, feature.length)
    return vectors


def _labels(chunk: Chunk, tasks: tuple[Task, ...], bad: _BadRows) -> dict[str, np.ndarray]:
    """By task, float32 [n]; NaN outside its space."""
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


def _weights(
    chunk: Chunk, column: str, tasks: tuple[Task, ...], labels: dict[str, np.ndarray], bad: _BadRows
) -> np.ndarray:
    """float32 [n] of a column of row weights; the labels of its tasks become NaN where it is 0."""
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


def _label(chunk: Chunk, task: Task, space: np.ndarray, bad: _BadRows) -> np.ndarray:
    """float32 [n]; what the log holds outside the space, bool [n], is no label and never bad."""
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


def _check_label(missing: np.ndarray, task: Task, column: str, detail: str, bad: _BadRows) -> None:
    if task.label.missing == "error":
        advice = " (missing: outside would leave such rows out of the task)"
        bad.add(missing, column, "missing label", detail + advice)


def _holds(
    array: pa.Array, wanted: tuple[str | float, ...], column: str, space: np.ndarray, bad: _BadRows
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the column holds one of some values: (float64 [n] of 0 and 1, bool [n] missing)."""
    if isinstance(wanted[0], str):
        texts, wrong = casts.to_text(array)
        detail = f"label '{column}' is {{}}, which is not UTF-8 text"
        bad.add(wrong & space, column, "not UTF-8", detail, wanted="text")
        missing = casts.to_numpy(array.is_null()).copy()  # "" is a value like others here
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


_EXACT = 2**53
"""Whole numbers up to here are float64 as they are."""


def _stored(values: Sequence[Any], kind: pa.DataType) -> np.ndarray:
    """float64 [n] of numbers of the schema as a column of type ``kind`` would hold them: 0.7 is not 0.7 in float32."""
    narrow = {pa.float16(): np.float16, pa.float32(): np.float32}.get(kind, np.float64)
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(narrow).astype(np.float64)


def _meets(
    chunk: Chunk, task: Task, values: np.ndarray, present: np.ndarray, bad: _BadRows
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the values, float64 [n], are within the label's thresholds.

    Args:
      chunk: of the log.
      task: whose label it is.
      values: of the label's column.
      present: bool [n], rows that have one and are inside the task's space.
      bad: where to note what is wrong.

    Returns:
      (float64 [n] of 0 and 1, bool [n]: there is no threshold).
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
    array: pa.Array, column: str, shown: str, space: np.ndarray, bad: _BadRows, wanted: Wanted = "number"
) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [n] with 0 for missing, bool [n] missing); true and false are 1 and 0, as text too."""
    values, wrong = casts.to_float64(array, bools=True)
    bad.add(wrong & space, column, "not a number", f"{shown}, which is not a number", wanted=wanted)
    missing = casts.to_numpy(values.is_null()) & ~wrong
    return casts.to_numpy(values.fill_null(0.0)), missing
