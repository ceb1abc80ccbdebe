"""Loads an exported model as TensorFlow Serving does and compares its scores with the trainer's.

    python -P check.py TASK.json

This program imports nothing of this project, so it proves that the directory alone gives the trainer's scores. It loads
the SavedModel with the TF1 session loader (tag ``serve``), sends the raw rows that conversion kept through every
signature, and joins the scores with the trainer's by ``row_id``. TASK.json holds the arguments of :func:`check`, and in
``result`` the path to write the result to. For every chunk of rows, the number of rows is printed on a line.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

EMPTY: dict[str, Any] = {"int64": -(2**63), "string": b"", "float32": np.float32("nan")}
_CHUNK_ROWS = 1024
_CROSSED_REQUESTS, _CROSSED_CANDIDATES = 4, 50

Arrays = Mapping[str, np.ndarray]
Call = Callable[[Arrays], dict[str, np.ndarray]]


class Mismatch(Exception):
    """A score differs from the trainer's; the message names it."""


def request(features: Sequence[Mapping[str, Any]], rows: pa.RecordBatch) -> dict[str, np.ndarray]:
    """The tensors of ``serving_default`` for raw rows.

    Args:
      features: name, kind, column, dtype, separator, length and max_length of each feature of the schema.
      rows: columns of the log, as conversion kept them.
    """
    raw = whole(features, rows)
    lists = {feature["name"]: feature["max_length"] for feature in features if feature["kind"] == "multivalent"}
    return {name: _first(array, lists[name]) if name in lists else array for name, array in raw.items()}


def whole(features: Sequence[Mapping[str, Any]], rows: pa.RecordBatch) -> dict[str, np.ndarray]:
    """The tensors of :func:`request`, but with all values of lists, ``[n, longest]``, empty ones in their places."""
    return {feature["name"]: _tensor(feature, rows.column(feature["column"])) for feature in features}


def _first(lists: np.ndarray, length: int) -> np.ndarray:
    """The first values ``[n, length]`` that are not empty, padded with the empty value."""
    empty = EMPTY["string" if lists.dtype == object else "int64"]
    result = np.full((len(lists), length), empty, lists.dtype)
    for row, row_values in enumerate(lists):
        kept = [value for value in row_values if value != empty][:length]
        result[row, : len(kept)] = kept
    return result


def _tensor(feature: Mapping[str, Any], column: pa.Array) -> np.ndarray:
    dtype, column = feature["dtype"], _plain(column)
    if feature["kind"] not in ("multivalent", "dense"):
        return _values(column, dtype)
    if feature.get("separator") is not None:
        column = pc.split_pattern(_without_ends(_text(column), feature["separator"]), feature["separator"])
    elif pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    width = feature["length"] if feature["kind"] == "dense" else int(lengths.max(initial=0))
    padded = np.full((len(column), width), EMPTY[dtype], _NUMPY[dtype])
    padded[np.arange(width) < lengths[:, np.newaxis]] = _values(_plain(column.flatten()), dtype)
    return padded


def _without_ends(text: pa.Array, separator: str) -> pa.Array:
    """Removes separators at the ends of the text that lost their spaces, as values of CSV files do."""
    begin, end = re.escape(separator.lstrip(" ")), re.escape(separator.rstrip(" "))
    patterns = (f"^{begin}" if separator[0] == " " else "", f"{end}$" if separator[-1] == " " else "")
    for pattern in filter(None, patterns):
        text = pc.replace_substring_regex(text, pattern=pattern, replacement="")
    return text


_NUMPY: dict[str, Any] = {"int64": np.int64, "string": object, "float32": np.float32}


def _values(column: pa.Array, dtype: str) -> np.ndarray:
    """Values as int64, object (bytes) or float32 ``[n]``, with the empty value for nulls."""
    if dtype == "string":
        return np.array(_text(column).cast(pa.binary()).fill_null(b"").to_pylist(), object)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        text = _text(column)
        column = pc.if_else(pc.equal(pc.binary_length(text), 0), None, pc.utf8_trim_whitespace(text))
        column = pc.replace_substring_regex(
            column, pattern=r"^([-+]?[0-9]+)\.0*$", replacement=r"\1"
        )  # reads 18.0 as 18
    if dtype == "int64":
        return column.cast(pa.int64()).fill_null(EMPTY["int64"]).to_numpy()
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy().astype(np.float32)


def _plain(column: pa.Array) -> pa.Array:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _text(column: pa.Array) -> pa.Array:
    return column if pa.types.is_string(column.type) else column.cast(pa.string())


def load(directory: str) -> dict[str, Call]:
    """Loads the signatures of a SavedModel as functions of arrays, by name."""
    import tensorflow as tf

    v1 = tf.compat.v1
    session = v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        meta = v1.saved_model.load(session, ["serve"], directory)

    def call(signature: Any) -> Call:
        inputs, outputs = dict(signature.inputs), dict(signature.outputs)
        names = list(inputs)
        run = session.make_callable(
            {task: info.name for task, info in outputs.items()}, [inputs[name].name for name in names]
        )
        return lambda arrays: run(*(arrays[name] for name in names))

    return {key: call(signature) for key, signature in meta.signature_def.items() if signature.inputs}


def examples(arrays: Arrays) -> np.ndarray:
    """Serialises rows of ``serving_default`` as tf.Examples ``[n]``; empty values are left out."""
    import tensorflow as tf

    def message(row: int) -> bytes:
        example = tf.train.Example()
        for name, values in arrays.items():
            # A slice stays an array of objects. One bytes object would get the dtype S, which cuts NULs at the end.
            cells = values[row : row + 1].ravel()
            if values.dtype.kind == "f":
                if not np.isnan(cells).all():
                    example.features.feature[name].float_list.value.extend(cells)
                continue
            empty = EMPTY["string" if values.dtype == object else "int64"]
            present = [cell for cell in cells if cell != empty]
            if present and values.dtype == object:
                example.features.feature[name].bytes_list.value.extend(present)
            elif present:
                example.features.feature[name].int64_list.value.extend(present)
        return bytes(example.SerializeToString())

    return np.array([message(row) for row in range(_rows(arrays))], object)


def _rows(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


class Comparison:
    """Compares scores, and keeps the worst difference of each signature and task, and of each other output.

    A difference is ``|served - trained| / max(1, |trained|)``: absolute for probabilities, relative for large values.

    An output that is made of scores should be what its formula gives for the trained scores, up to what it gives for
    the served ones and to rounding: ``(|served - f(trained)| - |f(served) - f(trained)|) / |f(trained)|``.

    Args:
      tolerances: the largest allowed difference, by task.
      outputs: ``steps``, ``constants`` and so on of each output that is made of scores.
    """

    def __init__(self, tolerances: Mapping[str, float], outputs: Sequence[Mapping[str, Any]] = ()) -> None:
        self._tolerances, self._outputs = tolerances, outputs
        self.worst: dict[str, dict[str, float]] = {}

    def __call__(self, signature: str, arrays: Arrays, row_ids: np.ndarray, served: Arrays, trained: Arrays) -> None:
        """Compares the scores of n rows, whose features are ``arrays`` in the form of ``serving_default``.

        Raises:
          Mismatch: a difference is larger than the tolerance.
        """
        outputs = {output["name"] for output in self._outputs}
        if served.keys() != trained.keys() | outputs:
            names = sorted(trained.keys() | outputs)
            raise Mismatch(f"signature {signature} answers with {sorted(served)}, not with {names}")
        trained = {name: scores for name, scores in trained.items() if name not in outputs}
        for task, expected in trained.items():
            self._compare(signature, arrays, row_ids, task, served[task], expected)
        for output in self._outputs:
            expected, found = _computed(output, arrays, trained), _computed(output, arrays, served)
            self._compare(signature, arrays, row_ids, output["name"], served[output["name"]], expected, found)

    def _compare(
        self,
        signature: str,
        arrays: Arrays,
        row_ids: np.ndarray,
        name: str,
        score: np.ndarray,
        expected: np.ndarray,
        found: np.ndarray | None = None,
    ) -> None:
        """Compares scores of a task or an output, whose formula gives ``found`` for the served scores."""
        if score.dtype != np.float32 or score.shape != expected.shape:
            raise Mismatch(f"signature {signature}: scores of '{name}' are {score.dtype} {list(score.shape)}")
        wanted = expected.astype(np.float64)
        difference = np.abs(score.astype(np.float64) - wanted)
        if found is None:
            difference /= np.maximum(1.0, np.abs(wanted))
        else:
            difference = np.maximum(difference - np.abs(found.astype(np.float64) - wanted), 0.0)
            difference /= np.maximum(_SMALLEST, np.abs(wanted))
        tolerance = self._tolerances.get(name, _OF_OUTPUTS)
        bad = np.flatnonzero(~(difference <= tolerance))  # true for NaN, too
        if len(bad):
            row = bad[0]
            what = "task" if found is None else "output"
            values = ", ".join(f"{name}={_shown(values[row])}" for name, values in arrays.items())
            raise Mismatch(
                f"signature {signature}, row_id {row_ids[row]}, {what} '{name}': trained {expected[row]:.9g}, served "
                f"{score[row]:.9g}, difference {difference[row]:.1e} beyond {tolerance:.0e}; "
                f"{len(bad)} of {len(expected)} rows differ so; features: {values}"
            )
        worst = self.worst.setdefault(signature, {})
        worst[name] = max(worst.get(name, 0.0), float(difference.max(initial=0.0)))


_OF_OUTPUTS = 1e-5
"""The largest allowed difference of an output, relative: it is computed from scores in float64 and rounded once."""
_LARGEST, _SMALLEST = (float(getattr(np.finfo(np.float32), name)) for name in ("max", "tiny"))
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "^": np.power,
    "negative": np.negative,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "min": np.minimum,
    "max": np.maximum,
    "default": lambda x, y: np.where(np.isnan(x), y, x),
}


def _computed(output: Mapping[str, Any], features: Arrays, scores: Arrays) -> np.ndarray:
    """An output float32 ``[n]`` by its steps: names and numbers go on a stack, operations replace their operands."""
    stack: list[Any] = []
    with np.errstate(all="ignore"):
        for kind, value in output["steps"]:
            if kind == "number":
                stack.append(np.float64(value))
            elif kind != "name":
                stack[-value:] = [_OPERATIONS[kind](*stack[-value:])]
            elif value in output["constants"]:
                stack.append(np.float64(output["constants"][value]))
            elif value in output["features"]:
                x = features[value]
                stack.append(np.where(np.isfinite(x), _without_denormals(x), np.nan))
            else:
                stack.append(_without_denormals(scores[value]))
        known = np.where(np.isnan(stack[0]), -_LARGEST, np.clip(stack[0], -_LARGEST, _LARGEST))
    return _without_denormals(known).astype(np.float32)


def _without_denormals(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < _SMALLEST, 0.0, x.astype(np.float64))


def _shown(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def _requests(arrays: Arrays, once: Sequence[str]) -> Iterator[np.ndarray]:
    """Yields places ``[B, N]`` of rows for one call: B requests, whose N rows each share all features of ``once``."""
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    columns = [arrays[name] for name in once]
    for row in range(_rows(arrays)):
        groups.setdefault(tuple(_key(column[row]) for column in columns), []).append(row)
    by_size: dict[int, list[list[int]]] = {}
    for group in groups.values():
        by_size.setdefault(len(group), []).append(group)
    yield from map(np.array, by_size.values())


def _key(value: Any) -> Hashable:
    """A hashable form of a row's value, which is bytes, a number, or an array of either."""
    if isinstance(value, bytes):
        return value
    return tuple(value) if value.dtype == object else bytes(value.tobytes())


def _rank(call: Call, arrays: Arrays, once: Sequence[str], places: np.ndarray) -> dict[str, np.ndarray]:
    """Scores ``[B, N]`` of the rows at ``places`` ``[B, N]``; features of ``once`` are taken from the first row."""
    return call({name: values[places[:, 0]] if name in once else values[places] for name, values in arrays.items()})


def _compare_ranked(
    call: Call, arrays: Arrays, row_ids: np.ndarray, trained: Arrays, once: Sequence[str], compare: Comparison
) -> None:
    """Compares ``rank`` on every row once; rows that share user and context go into one request."""
    for places in _requests(arrays, once):
        served, flat = _rank(call, arrays, once, places), places.reshape(-1)
        _compare_shape(served, places.shape)
        compare(
            "rank",
            {name: values[flat] for name, values in arrays.items()},
            row_ids[flat],
            {task: scores.reshape(-1) for task, scores in served.items()},
            {task: scores[flat] for task, scores in trained.items()},
        )


def _compare_shape(served: Arrays, shape: tuple[int, ...]) -> None:
    for task, scores in served.items():
        if scores.shape != shape:
            raise Mismatch(f"signature rank: scores of '{task}' are {list(scores.shape)}, not {list(shape)}")


def _compare_crossed(
    calls: Mapping[str, Call], arrays: Arrays, row_ids: np.ndarray, once: Sequence[str], compare: Comparison
) -> None:
    """Compares ``rank`` with ``serving_default`` for users of some rows and items of many, as in a service."""
    users = np.arange(min(_CROSSED_REQUESTS, len(row_ids)))
    items = np.arange(min(_CROSSED_CANDIDATES, len(row_ids)))
    left, right = np.repeat(users, len(items)), np.tile(items, len(users))
    rows = {name: values[left if name in once else right] for name, values in arrays.items()}
    served = calls["rank"](
        {
            name: values[users] if name in once else np.repeat(values[np.newaxis, items], len(users), axis=0)
            for name, values in arrays.items()
        }
    )
    _compare_shape(served, (len(users), len(items)))
    compare(
        "rank",
        rows,
        row_ids[right],
        {task: scores.reshape(-1) for task, scores in served.items()},
        calls["serving_default"](rows),
    )


def _raw_rows(directory: str, columns: list[str], wanted: int) -> Iterator[pa.RecordBatch]:
    """Yields the rows with a row_id up to ``wanted``, in chunks."""
    for path in sorted(Path(directory).glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_CHUNK_ROWS, columns=columns):
                row_ids = batch.column("row_id").to_numpy()
                yield batch.filter(pa.array(row_ids <= wanted))
                if row_ids.max(initial=-1) >= wanted:
                    return


def check(
    directory: str,
    raw: str,
    predictions: str,
    features: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    outputs: Sequence[Mapping[str, Any]],
    tolerances: Mapping[str, float],
) -> dict[str, Any]:
    """Compares the scores of every signature with the trainer's.

    Args:
      directory: the SavedModel.
      raw: directory of Parquet files with the raw rows.
      predictions: Parquet file of the trainer's scores: row_id, ascending, and ``score_<task>``.
      features, tasks: the schema's.
      outputs: the outputs that are made of scores.
      tolerances: see :class:`Comparison`.

    Returns:
      ``rows``, the number of rows, and ``worst``, the worst difference by signature and task.

    Raises:
      Mismatch: a score differs, or a row is missing.
    """
    calls = load(directory)
    table = pq.read_table(predictions)
    known = table["row_id"].to_numpy()
    scores = {task: table[f"score_{task}"].to_numpy() for task in tasks}
    once = [feature["name"] for feature in features if feature["side"] != "item"]
    compare, checked = Comparison(tolerances, outputs), 0
    columns = list(dict.fromkeys(["row_id", *(feature["column"] for feature in features)]))
    for batch in _raw_rows(raw, columns, int(known[-1])):
        row_ids = batch.column("row_id").to_numpy()
        places = np.minimum(np.searchsorted(known, row_ids), len(known) - 1)
        scored = known[places] == row_ids
        batch, row_ids, places = batch.filter(pa.array(scored)), row_ids[scored], places[scored]
        if not len(row_ids):
            continue
        arrays, trained = request(features, batch), {task: score[places] for task, score in scores.items()}
        compare("serving_default", arrays, row_ids, calls["serving_default"](arrays), trained)
        served = calls["examples"]({"examples": examples(whole(features, batch))})
        compare("examples", arrays, row_ids, served, trained)
        if "rank" in calls:
            _compare_ranked(calls["rank"], arrays, row_ids, trained, once, compare)
            if not checked:
                _compare_crossed(calls, arrays, row_ids, once, compare)
        checked += len(row_ids)
        print(len(row_ids), flush=True)
    if checked != len(known):
        raise Mismatch(f"{raw} holds {checked:,} of the {len(known):,} rows that the trainer scored")
    return {"rows": checked, "worst": compare.worst}


def main(path: str) -> None:
    arguments = json.loads(Path(path).read_text(encoding="utf-8"))
    result = Path(arguments.pop("result"))
    os.chdir(arguments["directory"])  # TensorFlow would take some characters of its path for a pattern
    try:
        outcome = check(**arguments | {"directory": "."})
    except Mismatch as mismatch:
        outcome = {"mismatch": str(mismatch)}
    result.write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
