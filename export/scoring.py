"""Scores a whole log with an exported model, in memory that does not grow with the log."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from export import raw
from export.published import Call
from pipelines.convert.raw_columns import kept_types
from pipelines.log.parts import CsvOptions, Log
from pipelines.schema import Schema
from stem_util import files, owned, stores
from stem_util.errors import UserError
from stem_util.progress import Progress

ROW = "row"
_BATCH_ROWS = 8192


class Model(Protocol):
    """What scores a log: `export.published.Published`, or `export.unpublished.Unpublished`.

    Attributes:
      schema: the schema of the data that it was trained on.
      tasks: names of the tasks.
      outputs: names of the outputs that are made of their scores.
    """

    schema: Schema
    tasks: tuple[str, ...]
    outputs: tuple[str, ...]

    def signature(self, name: str) -> Call:
        """Returns a function from tensors by feature to scores by task."""


@dataclass
class Outcome:
    """The result of scoring.

    Attributes:
      columns: columns of the output.
      rows: number of scored rows.
      seconds: how long it took, without loading the model.
      bad: number of rows that were left out, by (column, reason).
    """

    columns: list[str]
    rows: int = 0
    seconds: float = 0.0
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)


def score_log(
    model: Model,
    patterns: str,
    output: Path,
    *,
    keep: Sequence[str] = (),
    csv: CsvOptions | None = None,
    drop_bad_rows: bool = False,
) -> Outcome:
    """Writes ``row``, the schema's group column if the log has it, ``keep``, outputs by name, and ``score_<task>``.

    Outputs and scores are float32.

    Args:
      model: an exported model, or a run's model.
      patterns: comma-separated files, globs and directories of the log.
      output: Parquet file, which appears complete or not at all.
      keep: more columns of the log to write.
      csv: how CSV files are written.
      drop_bad_rows: leave out rows that conversion would refuse.

    Raises:
      UserError: the log does not fit the model's schema, a row is bad, or the output is in use or cannot be written.
    """
    schema = raw.without_outcomes(model.schema)
    log = raw.open_log(patterns, schema, csv)
    local = [path for path in log.files if not stores.is_uri(path)]
    if any(os.path.exists(output) and os.path.samefile(output, path) for path in local):
        raise UserError(f"--output={output} is a file of the log")
    owned.check_scores(output)
    files.make_directory(output.parent)
    with files.locked(files.hidden(Path(os.path.realpath(output)), "lock"), output):
        return _score(model, log, output, keep, drop_bad_rows)


def _score(model: Model, log: Log, output: Path, keep: Sequence[str], drop_bad_rows: bool) -> Outcome:
    schema = raw.without_outcomes(model.schema)
    kept = _kept(model, log, keep)
    types = _types(model, log, kept)
    outcome = Outcome(types.names)
    total = None if log.text else sum(unit.rows for unit in log.units)
    call = model.signature("serving_default")
    started = time.monotonic()
    with (
        files.replace_file(output) as beside,
        pq.ParquetWriter(beside, types) as writer,
        Progress(total, unit="rows", desc="score") as progress,
    ):
        for rows, columns, bad in raw.read(log, schema, kept, drop_bad_rows=drop_bad_rows):
            outcome.bad += bad
            arrays = raw.tensors(schema, rows)
            scores: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.float32)] for name in score_columns(model)}
            for batch in _batches(arrays, len(rows.row_ids)):
                answer = call(batch)
                for name, parts in scores.items():
                    parts.append(answer[name])
                progress.update(len(answer[name]))
            columns = {ROW: pa.array(rows.row_ids)} | columns
            columns |= {column: pa.array(np.concatenate(scores[name])) for name, column in score_columns(model).items()}
            writer.write_batch(pa.record_batch(columns).cast(types))
            outcome.rows += len(rows.row_ids)
    outcome.seconds = time.monotonic() - started
    return outcome


def _batches(arrays: dict[str, np.ndarray], rows: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, rows, _BATCH_ROWS):
        yield {name: values[start : start + _BATCH_ROWS] for name, values in arrays.items()}


def score_columns(model: Model) -> dict[str, str]:
    """The column of each output and each task's score, by its name in the model; the scores come last."""
    return {name: name for name in model.outputs} | {task: f"score_{task}" for task in model.tasks}


def _kept(model: Model, log: Log, keep: Sequence[str]) -> list[str]:
    """The columns of the log to write: the group's, then those of ``keep``."""
    ours = {ROW, *score_columns(model).values()}
    for name in keep:
        log.require(name, f"--keep={name}")
        if name in ours:
            raise UserError(f"--keep: the output has a column '{name}' of its own; rename the log's")
    group = model.schema.group
    first = [group] if group is not None and group in log.types and group not in ours else []
    return list(dict.fromkeys([*first, *keep]))


def _types(model: Model, log: Log, kept: Sequence[str]) -> pa.Schema:
    kinds = kept_types(log, model.schema)
    scores = [(column, pa.float32()) for column in score_columns(model).values()]
    return pa.schema([(ROW, pa.int64()), *((name, kinds[name]) for name in kept), *scores])
