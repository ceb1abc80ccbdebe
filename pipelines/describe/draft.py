"""Drafts a schema from a sample of a log: YAML, with comments that say what each column seems to be, and why.

Guesses are cautious: columns that look like outcomes, or predict a label too well by themselves, are commented out. The
others are tried on the sample with the code that converts, so that conversion accepts the draft unchanged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import schema_yaml, yaml_reader
from pipelines.convert.cleaner import Cleaner
from pipelines.convert.split import GivenSplit
from pipelines.convert.times import order_keys, time_kind, time_values
from pipelines.describe import guess, leakage
from pipelines.describe.guess import Column
from pipelines.log import casts
from pipelines.log.parts import Chunk
from stem_util.errors import UserError, did_you_mean

SUSPECT_AUC = 0.95
_POSITIVE = ("yes", "y", "true", "t")
_FRACTIONS = (0.8, 0.9)  # the default split by time ends train and validation here
_LIKE = 0.8  # share of the best mark from which a rating is a like
_SAME = 0.99  # share of rows in which a user's or item's attribute must have its most frequent value
_SHOWN_CANDIDATES = 5
_LONGEST = 100  # characters in a name
_MANY_VALUES = 5_000_000  # of a feature: with D = 16 and 8 tasks, 3 GB of a table and 6 GB of its optimizer's state


@dataclass
class Draft:
    """The parts of the schema, with a comment for each.

    Attributes:
      name: the name of the data set.
      keys: the columns of ``group``, ``item`` and ``time``.
      no_keys: (column, reason) for a key, if the column that looks like it cannot be the key.
      features: the fields of each feature, by column.
      tasks: the fields of each task, by column; by ``column=value`` or ``column>=4`` if the column has several labels.
      notes: the comment on each feature or task.
      doubts: why a feature or task is commented out, by column or task.
      left_out: why a column is neither feature nor task, by column.
      suspects: (AUC, task) of each feature that predicts a label too well, by column.
      times: columns that hold times; the one that is most likely the time of the event comes first.
      split: the column of `times` that conversion can split the log by, or None.
      no_split: why columns before it in `times` cannot split the log, by column.
    """

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    no_keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    suspects: dict[str, tuple[float, str]] = field(default_factory=dict)
    times: list[str] = field(default_factory=list)
    split: str | None = None
    no_split: dict[str, str] = field(default_factory=dict)

    @property
    def sure_features(self) -> list[str]:
        """The entries that are not commented out."""
        return [column for column in self.features if column not in self.doubts]

    @property
    def sure_tasks(self) -> list[str]:
        """The entries that are not commented out."""
        return [task for task in self.tasks if task not in self.doubts]


def draft(
    name: str, table: pa.Table, types: Mapping[str, str], labels: Sequence[str] = (), rows: int | None = None
) -> Draft:
    """Guesses what each column of a sample is.

    Args:
      name: the name of the data set.
      table: the sample's rows.
      types: the type of each column in the log, for comments.
      labels: the tasks' labels, each ``column``, ``column=value`` or ``column>=number``; empty to guess them.
      rows: number of rows in the log; None if the sample is all of it.

    Raises:
      UserError: the sample is empty, a given label is no column or cannot be a label, no column looks like a label, or
        no column can be a feature.
    """
    if not len(table):
        raise UserError("the log holds no rows: there is nothing to describe")
    columns = {
        column: guess.read(column, table.column(column).combine_chunks(), types[column])
        for column in table.column_names
    }
    result = Draft(_identifier(name))
    _sort_columns(result, columns, _asked(labels, columns))
    if not result.sure_tasks:
        raise UserError(_no_label(result, columns))
    _find_keys(result, columns)
    _find_sides(result, columns)
    _find_relations(result, columns)
    _find_suspects(result, columns)
    _find_large(result, columns, len(table) if rows is None else rows)
    _find_split(result, columns)
    _rehearse(result, table)
    return result


def _sort_columns(result: Draft, columns: Mapping[str, Column], asked: Mapping[str, dict[str, Any]]) -> None:
    """Makes each column one or more tasks, a feature, or neither."""
    for task, fields in asked.items():
        _add_task(result, columns, task, fields)
    labels = {fields["label"]["column"] for fields in asked.values()}
    for name, column in columns.items():
        if name in labels:
            continue
        if why := guess.no_use(column):
            result.left_out[name] = why
        elif guess.is_outcome(column):
            _add_outcomes(result, columns, column, bool(asked))
        else:
            result.features[name], result.notes[name] = guess.feature(column)
    last = [name for name in result.features if not result.sure_tasks and guess.is_last_outcome(columns[name])]
    for name in last:
        del result.features[name]
        _add_task(result, columns, name, _task(columns[name]))


def _add_outcomes(result: Draft, columns: Mapping[str, Column], column: Column, asked: bool) -> None:
    """Adds the tasks that a column which looks like an outcome can be; unlikely ones get a doubt."""
    if guess.is_event(column):
        values = sorted(_counts(column).items(), key=lambda item: (-item[1], str(item[0])))
        tasks = {f"{column.name}={value}": _task(column, value) for value, _ in values[1:]}
    elif guess.is_rating(column) and not guess.is_binary(column):
        limit = _liked(column)
        tasks = {f"{column.name}>={limit:g}": _task(column, at_least=limit), column.name: _task(column)}
    else:
        tasks = {column.name: _task(column)}
    for task, fields in tasks.items():
        _add_task(result, columns, task, fields)
        if asked:
            result.doubts[task] = "another outcome? Uncomment it to predict it too; it is no feature"
        elif fields.get("type") == "regression":
            result.doubts[task] = "an outcome by its name: no feature, but perhaps a task"
        elif len(set(_known(_label(column, fields)))) < 2:
            result.doubts[task] = "the same in every row that has it; write 0 where it did not happen"


def _liked(column: Column) -> float:
    """The mark from which a rating is a like: four fifths of the best mark, or the median if that divides nothing."""
    limit = _LIKE * pc.max(column.present).as_py()
    limit = round(limit) if column.kind == "int" or limit > 1 else limit
    if not 0 < pc.mean(pc.greater_equal(column.present, limit).cast(pa.int8())).as_py() < 1:
        limit = pc.quantile(column.present, 0.5, interpolation="higher")[0].as_py()
    return limit


def _add_task(result: Draft, columns: Mapping[str, Column], task: str, fields: dict[str, Any]) -> None:
    column = columns[fields["label"]["column"]]
    values = _known(_label(column, fields))
    mean = f"{values.mean():.4g}" if len(values) else "unknown"
    result.tasks[task] = fields
    result.notes[task] = f"{column.about()}; {'mean' if fields.get('type') == 'regression' else 'rate'} {mean}"


def _no_label(result: Draft, columns: Mapping[str, Column]) -> str:
    """The error if no column looks like a label."""
    two = [name for name in result.features if columns[name].kind != "list" and columns[name].distinct == 2]
    some = [columns[name] for name in reversed(two)][:_SHOWN_CANDIDATES]
    ways = [column.name if guess.is_binary(column) and column.kind == "int" else _asking(column) for column in some]
    left = [
        name for name, why in result.left_out.items() if why.startswith("constant") and guess.is_outcome(columns[name])
    ]
    return (
        "no column looks like a label (0 and 1 under a name like click or is_*, or marks under one like rating); name "
        "it: --label=COLUMN, --label='COLUMN=VALUE' or --label='COLUMN>=NUMBER'"
        + (f". With two values: {', '.join(ways)}" if ways else "")
        + (f". Numbers: {', '.join(result.tasks)}" if result.tasks else "")
        + (f". Constant: {', '.join(left)}" if left else "")
    )


def _asking(column: Column) -> str:
    return f"'{column.name}={_positive(column)}'"


def render(result: Draft, head: Sequence[str]) -> str:
    """The schema as YAML with comments, the first of which has the lines ``head``."""
    lines = [line for text in head for line in _comment(text)]
    lines += [f"name: {result.name}"]
    lines += [f"{key}: {yaml_reader.inline(column)}  # {_KEY_NOTES[key]}" for key, column in result.keys.items()]
    for key, (column, why) in result.no_keys.items():
        lines += _comment(f"{key}: {yaml_reader.inline(column)}  # {why}")
    lines += ["task_tables: all  # features with tables of their own for each task: all, none, user, item or a list"]
    for title, entries in (("features", result.features), ("tasks", result.tasks)):
        lines += ["", f"{title}:"]
        taken: set[str] = set()
        for key, fields in entries.items():
            lines += _comment(result.notes[key], "  ")
            entry = _entry(title, key, fields, taken)
            if key in result.doubts:
                lines += _comment(f"{result.doubts[key]}\n{entry}", "  ")
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
    """Lines of a comment; characters that YAML does not allow are escaped."""
    shown = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in text.splitlines())
    return [f"{indent}# {line}" for line in shown]


_KEY_NOTES = {
    "group": "guessed by name; rows are grouped by it for grouped AUC",
    "item": "guessed by name; names the item of a row",
    "time": "guessed; when the row happened: data that grow keep by it when each value was last seen",
}


def _entry(title: str, key: str, fields: dict[str, Any], taken: set[str]) -> str:
    """One feature or task on one line, under a name that is allowed and not taken."""
    name = _identifier(re.sub("^(is|has|did)_(?=.)", "", key.replace(">=", "_at_least_")) if title == "tasks" else key)
    while name in taken:
        name += "_2"
    taken.add(name)
    if title == "features" and name != key:
        fields = {**fields, "column": key}
    return f"{yaml_reader.inline(name)}: {yaml_reader.inline(fields)}"


def _identifier(text: str) -> str:
    name = re.sub("[^A-Za-z0-9]+", "_", text).strip("_")[:_LONGEST]  # files are named after it
    return name if name[:1].isalpha() else f"c_{name}".rstrip("_")


def _find_keys(result: Draft, columns: Mapping[str, Column]) -> None:
    """Chooses ``group`` and ``item``: among columns with such names and no missing value, that with the most values."""
    for key, sides in (("group", ("user", "session")), ("item", ("item",))):
        named = [name for side in sides for name in result.features if guess.is_side_key(columns[name], side)]
        for side in sides:
            whole = [n for n in named if guess.is_side_key(columns[n], side) and not columns[n].values.null_count]
            if whole:
                result.keys[key] = max(whole, key=lambda name: columns[name].distinct)
                break
        if named and key not in result.keys:
            why = (
                f"{columns[named[0]].missing_share} missing, and a key needs a value in every row: write one for those"
            )
            result.no_keys[key] = named[0], why


def _find_sides(result: Draft, columns: Mapping[str, Column]) -> None:
    """Decides the side of each feature: by its name, or by the key that determines its value."""
    keys = {
        side: columns[result.keys[key]] for key, side in (("group", "user"), ("item", "item")) if key in result.keys
    }
    for name, fields in result.features.items():
        side, why = guess.side_of(columns[name]) or ("context", "context, as its name says neither user nor item")
        if side == "context":
            decided = [other for other, key in keys.items() if _decides(key, columns[name])]
            if len(decided) == 1:
                side, why = decided[0], f"{decided[0]}, as {keys[decided[0]].name} decides it"
        result.features[name] = {"kind": fields["kind"], "side": side, **fields}
        result.notes[name] += f"; {why}"


def _decides(key: Column, column: Column) -> bool:
    """Whether the key determines the column: nearly all rows of a key have one value, and enough rows can show it."""
    if key.name == column.name or column.kind == "list":
        return False
    known = casts.to_numpy(pc.is_valid(column.values))
    of, value = leakage.codes(key.values)[known], leakage.codes(column.values)[known]
    if not len(of):
        return False
    first = np.zeros(of.max() + 1, np.int64)
    first[of[::-1]] = value[::-1]
    again = len(of) - len(np.unique(of))
    same = np.count_nonzero(first[of] == value) - (len(of) - again)
    return again >= len(of) / 2 and same >= _SAME * again


def _asked(labels: Sequence[str], columns: Mapping[str, Column]) -> dict[str, dict[str, Any]]:
    """The fields of the tasks asked for, by column; by the text of the flag if a column is asked for again."""
    asked: dict[str, dict[str, Any]] = {}
    for label in labels:
        name, sign, value = next(_parts(label, columns), (label, "", ""))
        if name not in columns:
            raise UserError(
                f"--label={label}: {name!r} is not in the log{did_you_mean(name, columns) or '.'} "
                f"Columns: {', '.join(columns)}"
            )
        column = columns[name]
        if column.kind not in ("int", "float", "text") or not name:
            raise UserError(f"--label={label}: a column of {column.stored} cannot be a label")
        if not len(column.present):
            raise UserError(f"--label={label}: every value of {name!r} is missing")
        fields = _task(column)
        if sign == ">=":
            fields = _task(column, at_least=_number(label, value, column))
        elif sign:
            fields = _task(column, _value(label, value, column))
        elif fields.get("type") == "regression" and column.kind == "text":
            values = column.tally[0]
            raise UserError(
                f"--label={name}: {len(values):,} different texts; say which one counts as 1, "
                f"as in --label='{name}={values[0].as_py()}'. Values: {_some(column)}"
            )
        asked[label if name in asked else name] = fields
    return asked


def _parts(label: str, columns: Mapping[str, Column]) -> Iterator[tuple[str, str, str]]:
    """Yields the ways to read ``column``, ``column=value`` or ``column>=number``; those that name a column first."""
    ways = [(label, "", "")]
    ways += [label.partition(sign) for sign in (">=", "=") if sign in label]
    yield from (way for way in ways if way[0] in columns)
    yield from ways[1:]


def _some(column: Column) -> str:
    values = column.tally[0]
    return ", ".join(guess.shown(value.as_py()) for value in values[:8]) + (", ..." if len(values) > 8 else "")


def _number(label: str, text: str, column: Column) -> float:
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"--label={label}: {text!r} is no number") from None
    if column.kind == "text":
        raise UserError(f"--label={label}: {column.name!r} holds texts, not numbers. Values: {_some(column)}")
    if not pc.any(pc.greater_equal(column.present, number)).as_py():
        raise UserError(f"--label={label}: no value is as large; the largest is {pc.max(column.present).as_py():g}")
    return int(number) if number.is_integer() else number


def _value(label: str, text: str, column: Column) -> Any:
    by_text = {str(value): value for value in column.tally[0].to_pylist()}
    if column.kind == "float":
        by_text |= {f"{value:g}": value for value in by_text.values()}
    if text not in by_text:
        raise UserError(
            f"--label={label}: {text!r} is no value of {column.name!r}{did_you_mean(text, by_text) or '.'} "
            f"Values: {_some(column)}"
        )
    return by_text[text]


def _task(column: Column, equals: Any = None, at_least: float | None = None) -> dict[str, Any]:
    """The fields of a task whose column equals a value or reaches a number; if neither is given, by what it holds."""
    label: dict[str, Any] = {"column": column.name}
    if equals is not None:
        label["equals"] = equals
    elif at_least is not None:
        label["at_least"] = at_least
    elif not pc.all(pc.is_in(column.tally[0], pa.array([0, 1]).cast(column.values.type))).as_py():
        if column.kind == "float" or column.distinct != 2:
            return {"type": "regression", "label": {**label, **_outside(column)}}
        label["equals"] = _positive(column)
    return {"label": {**label, **_outside(column)}}


def _outside(column: Column) -> dict[str, str]:
    return {"missing": "outside"} if column.values.null_count else {}


def _counts(column: Column) -> dict[Any, int]:
    values, counts = column.tally
    return dict(zip(values.to_pylist(), counts.tolist(), strict=True))


def _positive(column: Column) -> Any:
    """The value of two that means 1: the larger number, a yes, or the rarer text."""
    counts = _counts(column)
    if column.kind != "text":
        return max(counts)
    return min(counts, key=lambda text: (text.lower() not in _POSITIVE, counts[text], text))


def _label(column: Column, task: Mapping[str, Any]) -> np.ndarray:
    """The task's labels, float64 [n]; NaN where there is none."""
    values, label = column.values, task["label"]
    if "equals" in label:
        values = pc.equal(values, pa.scalar(label["equals"], values.type)).cast(pa.int8())
    elif "at_least" in label:
        values = pc.greater_equal(values, label["at_least"]).cast(pa.int8())
    return values.to_numpy(False).astype(np.float64)


def _known(label: np.ndarray) -> np.ndarray:
    return label[~np.isnan(label)]


def _binary(result: Draft, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """The labels of binary tasks, float64 [n], by task."""
    tasks = {name: task for name, task in result.tasks.items() if task.get("type") != "regression"}
    return {name: _label(columns[task["label"]["column"]], task) for name, task in tasks.items()}


def _find_relations(result: Draft, columns: Mapping[str, Column]) -> None:
    """Comments out features that are nonzero only, or always, where a label is 1: they are stages of the same event."""
    labels = _binary(result, columns)
    for name in result.sure_features:
        happens = _happens(columns[name])
        if happens is None or name in result.keys.values():
            continue
        for task, label in labels.items():
            if leakage.implies(happens == 1, label == 1):
                why = f"only ever there where {task} is 1"
            elif columns[name].distinct == 2 and leakage.implies(label == 1, happens == 1):
                why = f"always there where {task} is 1"
            else:
                continue
            result.doubts[name] = f"an outcome? It is {why}; uncomment it only if it is known before"
            break
    for name, label in labels.items():
        above = [task for task, whole in labels.items() if task != name and leakage.implies(label == 1, whole == 1)]
        if above:
            result.notes[name] += f"\nonly ever 1 where {above[0]} is; with a space it would be about those rows only"


def _happens(column: Column) -> np.ndarray | None:
    """The rows, bool [n], in which a number is present and not 0; None if the column does not hold numbers."""
    if column.kind == "text" and guess.is_binary(column):
        return np.asarray(_label(column, _task(column)))
    return _known_or_0(column) != 0 if column.kind in ("int", "float") else None


def _known_or_0(column: Column) -> np.ndarray:
    return casts.to_numpy(column.values.fill_null(0))


def _find_suspects(result: Draft, columns: Mapping[str, Column]) -> None:
    """Comments out features that predict a label too well by themselves; a key only gets a note."""
    labels = _binary(result, columns)
    for name in result.sure_features:
        if columns[name].kind == "list" or not labels:
            continue
        codings = leakage.codings(columns[name].values)
        auc, task = max((leakage.alone_auc(codings, label), other) for other, label in labels.items())
        if auc > SUSPECT_AUC:
            result.suspects[name] = (auc, task)
            why = f"suspect: alone it predicts {task} with an AUC of {auc:.3f} on rows it was not fitted on"
            if name in result.keys.values():
                result.notes[name] += f"\n{why}"
            else:
                result.doubts[name] = f"{why}; uncomment it only if it is known before the outcome"


def _find_large(result: Draft, columns: Mapping[str, Column], rows: int) -> None:
    """Notes features of so many values that hashed ids are worth a thought."""
    for name, fields in result.features.items():
        if fields["kind"] == "categorical" and (values := min(columns[name].likely_distinct, rows)) > _MANY_VALUES:
            result.notes[name] += (
                f"\nabout {values:,.0f} values or more in the log: if their tables outgrow the memory, "
                "hash: {buckets: 1000000, hashes: 2} gives them so many rows"
            )


def _find_split(result: Draft, columns: Mapping[str, Column]) -> None:
    """Finds columns of times, those of users and items (birth, release) last. The first that can split is ``time``."""
    used = {fields["label"]["column"] for fields in result.tasks.values()}
    keys = [columns[name] for name in result.keys.values()]
    times = [column for name, column in columns.items() if name and name not in used and guess.time_of(column)]
    order = {column.name: (any(_decides(key, column) for key in keys), -column.distinct) for column in times}
    result.times = sorted(order, key=order.__getitem__)
    for name in result.times:
        why = _no_split(columns[name])
        if why is None:
            result.split = result.keys["time"] = name
            break
        result.no_split[name] = why


def _no_split(column: Column) -> str | None:
    """Why conversion cannot split the log by this column, or None."""
    if column.values.null_count:
        return f"{column.missing_share} missing, and a split by time needs one in every row"
    try:
        values, bad = time_values(column.values, time_kind(column.values, column.name))
    except UserError:
        return f"{column.stored} is no time to split by"
    if bad.any():
        return "not all of its values are times of one kind"
    keys = np.sort(order_keys(values))
    train, validation = (keys[max(round(len(keys) * share), 1) - 1] for share in _FRACTIONS)
    return None if train < validation < keys[-1] else "too few different times for train, validation and test"


def _rehearse(result: Draft, table: pa.Table) -> None:
    """Tries the draft on the sample as conversion would, and comments out columns that would stop the conversion.

    Raises:
      UserError: no feature or no task is left.
    """
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    chunk, row_ids = Chunk("the sample", np.arange(len(table)), columns, 0), np.arange(len(table))
    while True:
        if not result.sure_features:
            nothing = "; ".join(f"{name}: {why}" for name, why in {**result.left_out, **result.doubts}.items())
            raise UserError(f"no column is left to be a feature ({nothing})")
        if not result.sure_tasks:
            nothing = "; ".join(f"{task}: {result.doubts[task]}" for task in result.tasks)
            raise UserError(f"no column is left to be a label ({nothing})")
        drafted = schema_yaml.loads(render(result, []), "the draft")
        bad = Cleaner(drafted, GivenSplit((0,)), drop=True).clean(chunk, row_ids, 0)[1]
        if not bad:
            return
        _doubt(result, bad)


def _doubt(result: Draft, bad: Counter[tuple[str, str]]) -> None:
    """Comments out all uses of columns in which conversion finds bad rows."""
    for (column, reason), rows in bad.items():
        why = f"conversion would stop at {rows:,} rows of the sample: {reason}"
        for key in [key for key, name in result.keys.items() if name == column]:
            result.no_keys[key] = result.keys.pop(key), why
        for task in result.sure_tasks:
            if result.tasks[task]["label"]["column"] == column:
                result.doubts[task] = why
        if column in result.features:
            result.doubts[column] = why
