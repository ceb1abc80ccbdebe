"""Scores one user and a list of items that a person typed, with an exported model or a server, as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from export.published import Published
from pipelines.log import casts, source
from pipelines.log.find import find_files
from pipelines.log.parts import CsvOptions
from pipelines.outputs import RANKING_SCORE
from pipelines.schema import Schema
from stem_client import FeatureError, RankingClient, RankingError
from stem_client import features as client_features
from stem_client.metadata import Feature
from stem_tf import report
from stem_util.errors import JobError, UserError, did_you_mean

_TIMEOUT = 30.0
_CELL = 32
_CODES = {
    "UNAVAILABLE": "; is a server running there? stem-serve starts one",
    "NOT_FOUND": "; --model_name says which model to ask for",
}

Items = Mapping[str, Any]
Scores = dict[str, np.ndarray]


def features_of(schema: Schema) -> tuple[Feature, ...]:
    """The inputs of the signature ``rank``, in the form that a client gets from a server."""
    kinds = {"multivalent": "list", "dense": "vector"}
    return tuple(
        Feature(f.name, f.dtype, kinds.get(f.kind, "value"), f.length or f.max_length or None, f.side == "item")
        for f in schema.features
    )


def from_model(model: Published, user: str, items: str, csv: CsvOptions | None = None) -> tuple[Items, Scores]:
    """Scores ``items`` for ``user`` with an exported model.

    Args:
      model: an exported model.
      user: a JSON object of feature to value, or the path of a file that holds one.
      items: a JSON object of feature to list of values, a JSON list of objects, the path of a file with either, or the
        path of a Parquet or CSV file.
      csv: how a CSV file is written.

    Returns:
      The features of the items, and scores [N] by output (the first ones) and task.

    Raises:
      UserError: user or items are wrong; the message says where.
      JobError: the model fails.
    """
    features = features_of(model.schema)
    sources = {f.name: (f.column, f.separator) for f in model.schema.features}
    columns = _items(items, features, sources, csv)
    try:
        count, arrays = client_features.rank(features, _user(user), columns)
    except FeatureError as error:
        raise UserError(str(error)) from None
    if not count:
        raise UserError("--items: there are no items")
    scores = model.signature("rank")(arrays)
    return _as_columns(columns), {name: scores[name][0] for name in (*model.outputs, *model.tasks)}


def from_server(target: str, name: str, user: str, items: str, csv: CsvOptions | None = None) -> tuple[Items, Scores]:
    """Scores ``items`` for ``user`` with a server.

    Args:
      target: host:port.
      name: of the model.
      user, items, csv: as in `from_model`; columns of files are named like features.
    """
    given = _user(user)
    try:
        with RankingClient(target, model=name, timeout=_TIMEOUT) as client:
            features = client.metadata().rank_features()
            columns = _items(items, features, {feature.name: (feature.name, None) for feature in features}, csv)
            scores = client.rank(given, columns)
    except FeatureError as error:
        raise UserError(str(error)) from None
    except RankingError as error:
        raise JobError(f"{error}{_CODES.get(error.code.name, '')}") from None
    if not len(next(iter(scores.values()))):
        raise UserError("--items: there are no items")
    return _as_columns(columns), scores


def table(items: Items, scores: Scores, by: str) -> str:
    """A table with one line per item, the highest score of ``by`` first."""
    order = np.argsort(-scores[by], kind="stable")
    tasks = [by, *(task for task in scores if task != by)]
    shown = {name: [_shown(value) for value in values] for name, values in items.items()}
    lines = [
        [str(place), *(cells[row] for cells in shown.values()), *(report.number(scores[task][row]) for task in tasks)]
        for place, row in enumerate(order, start=1)
    ]
    return report.table(["", *shown, *tasks], lines)


def check_task(by: str | None, tasks: Sequence[str]) -> str:
    """Returns ``by``; if it is None, the score to rank by, or the first task of a model that has no such output.

    Raises:
      UserError: the model has no such task.
    """
    if by is None:
        return RANKING_SCORE if RANKING_SCORE in tasks else tasks[0]
    if by not in tasks:
        raise UserError(f"--by={by}: no such task{did_you_mean(by, tasks) or '.'} Tasks: {', '.join(tasks)}")
    return by


def _user(text: str) -> Mapping[str, Any]:
    user = _json(text, "--user")
    if not isinstance(user, dict):
        raise UserError(f'--user is a JSON {_kind(user)}; an object is expected, as in {{"user_id": 1042}}')
    return user


def _items(
    text: str,
    features: Sequence[Feature],
    sources: Mapping[str, tuple[str, str | None]],
    csv: CsvOptions | None,
) -> Any:
    """Columns by feature, or the value of the JSON text."""
    if not _is_literal(text) and not text.endswith(".json"):
        return _read_table(text, [feature for feature in features if feature.per_item], sources, csv)
    items = _json(text, "--items")
    if not isinstance(items, dict | list) or (
        isinstance(items, list) and not all(isinstance(item, dict) for item in items)
    ):
        raise UserError(
            f'--items is a JSON {_kind(items)}; expected is an object of lists, as in {{"video_id": [7, 8]}}, or a '
            "list of objects, one per item"
        )
    if isinstance(items, dict):
        for name, values in items.items():
            if not isinstance(values, list):
                raise UserError(
                    f"--items: '{name}' is a JSON {_kind(values)}; a list with one value per item is expected"
                )
    return items


def _is_literal(text: str) -> bool:
    return text.lstrip()[:1] in ("{", "[")


def _json(text: str, flag: str) -> Any:
    """The JSON value in ``text``, or in the file of that name."""
    where = flag
    if not _is_literal(text) and (text.endswith(".json") or Path(text).is_file()):
        where = f"{flag}={text}"
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, where))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        found = f"before {text[error.pos : error.pos + 20]!r}" if error.pos < len(text) else "where it ends"
        hint = "" if where != flag else "; in a shell the whole stands in single quotes"
        raise UserError(f"{where} is not JSON: {error.msg}, {place}, {found}{hint}") from None


def _object(pairs: Iterable[tuple[str, Any]], where: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise UserError(f"{where}: '{name}' occurs twice")
        result[name] = value
    return result


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _read_table(
    path: str, features: Sequence[Feature], sources: Mapping[str, tuple[str, str | None]], csv: CsvOptions | None
) -> Items:
    """Reads the columns of a Parquet or CSV file by feature; other columns are not read."""
    log = source.open_log(find_files(path), csv)
    chosen = {}
    for feature in features:
        column = feature.name if feature.name in log.types else sources[feature.name][0]
        if column not in log.types:
            hint = did_you_mean(column, log.types) or "."
            raise UserError(f"--items={path}: no column '{column}'{hint} Columns: {', '.join(log.types)}")
        chosen[feature.name] = column
    names = list(dict.fromkeys(chosen.values()))
    result: dict[str, list[Any]] = {feature.name: [] for feature in features}
    for unit in log.units:
        for chunk in source.read(log, unit, names, skip_malformed=False):
            for feature in features:
                array, separator = chunk.columns[chosen[feature.name]], sources[feature.name][1]
                where = f"--items: {chunk.path}, column '{chosen[feature.name]}'"
                result[feature.name] += _cast(array, feature, separator, where, chunk.rows)
    return result


def _cast(array: pa.Array, feature: Feature, separator: str | None, where: str, rows: np.ndarray) -> list[Any]:
    """Reads values as conversion does; None for missing ones."""
    if feature.kind != "value":
        kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
        if casts.is_list(kind):
            return list(array.to_pylist())
        if separator is None:
            raise UserError(
                f"{where} holds {kind}; the model takes a {feature.kind} for each item: write --items as JSON, or as "
                "Parquet with a list column"
            )
        lists, bad = casts.to_lists(array, feature.dtype, separator)
        _refuse(bad, array, feature, where, rows)
        ends = np.cumsum(lists.lengths)
        values = lists.values.to_pylist()
        return [values[end - length : end] for length, end in zip(lists.lengths, ends, strict=True)]
    if casts.is_list(array.type):
        raise UserError(f"{where} holds {array.type}; the model takes one value for each item")
    cast = {"int64": casts.to_int64, "string": casts.to_text, "float32": casts.to_float64}[feature.dtype]
    values, bad = cast(array)
    _refuse(bad, array, feature, where, rows)
    return list(values.to_pylist())


def _refuse(bad: np.ndarray, array: pa.Array, feature: Feature, where: str, rows: np.ndarray) -> None:
    if bad.any():
        place = int(bad.argmax())
        value = array[place].as_py()
        shown = value.decode(errors="replace") if isinstance(value, bytes) else value
        raise UserError(f"{where}, row {rows[place]:,}: {shown!r}; the model takes {feature.dtype}")


def _as_columns(items: Any) -> Items:
    return items if isinstance(items, Mapping) else {name: [item[name] for item in items] for name in items[0]}


def _shown(value: Any) -> str:
    """Text of a cell, on one line: a dash for a missing value, bars in lists, long texts cut."""
    if value is None or value != value:
        return "-"
    text = " | ".join(map(_shown, value)) if isinstance(value, list) else " ".join(str(value).split())
    return text if len(text) <= _CELL else f"{text[: _CELL - 3]}..."
