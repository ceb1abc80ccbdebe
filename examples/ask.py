"""Asks a server for the scores of real candidates, and shows what really happened beside them.

    python -m examples.ask --server=127.0.0.1:8500 --data=runs/quickstart/data

The candidates are ten items that one user saw in the same context, from the test split of the data that the served
model was trained on. Some have label 1 of the task that ranks them, some 0. With --predictions (the file that
stem-evaluate wrote), the served scores are compared with the trainer's.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from export import raw
from pipelines import manifest as manifests
from pipelines.convert.rows import Rows
from pipelines.schema import Schema
from stem_client import FeatureError, RankingClient, RankingError
from stem_tf import report
from stem_util.errors import UserError

EQUAL = 1e-5
"""The largest difference that sums in another order cause; the tolerance of an export's check."""


class Candidates(NamedTuple):
    """Rows of the log that one request asks for.

    Attributes:
      user: features of the user and the context.
      items: features of the items by name, [N] (lists and vectors [N, L]).
      labels: labels by task, float32 [N]; NaN where there is none.
      row_ids: int64 [N].
    """

    user: dict[str, object]
    items: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    row_ids: np.ndarray


def find(data: Path, schema: Schema, by: str, count: int) -> Candidates:
    """The first user of the test split, in the log's order, with ``count`` candidates of both labels of ``by``."""
    log = raw.open_log(str(data / "raw" / "test"), schema)
    for rows, kept, _ in raw.read(log, schema, ["row_id"]):
        places = _choose(schema, rows, by, count)
        if places is not None:
            arrays = raw.tensors(schema, rows)
            sides = {feature.name: feature.side for feature in schema.features}
            return Candidates(
                user={name: values[places[0]] for name, values in arrays.items() if sides[name] != "item"},
                items={name: values[places] for name, values in arrays.items() if sides[name] == "item"},
                labels={task: labels[places] for task, labels in rows.labels.items()},
                row_ids=kept["row_id"].to_numpy()[places],
            )
    raise UserError(f"no user of the test split of {data} has {count} candidates with and without '{by}'")


def _choose(schema: Schema, rows: Rows, by: str, count: int) -> np.ndarray | None:
    """Places of the first ``count`` rows with different items that share all other features; None if there are none."""
    arrays = raw.tensors(schema, rows)
    once = [arrays[feature.name].tolist() for feature in schema.features if feature.side != "item"]
    each = [arrays[feature.name].tolist() for feature in schema.features if feature.side == "item"]
    found: dict[str, dict[str, int]] = {}  # by user and context: the row of each item
    for place in range(len(rows.row_ids)):
        request, item = (str([values[place] for values in side]) for side in (once, each))
        items = found.setdefault(request, {})
        if len(items) < count:
            items.setdefault(item, place)
    for items in found.values():
        places = np.fromiter(items.values(), np.int64)
        labels = rows.labels[by][places]
        if len(places) == count and 0 < np.count_nonzero(labels == 1) < np.count_nonzero(labels == labels):
            return places
    return None


def table(schema: Schema, asked: Candidates, scores: dict[str, np.ndarray], by: str) -> str:
    """One line per candidate, ranked by ``by``: the item, then score and label of each task."""
    tasks = [by, *(task.name for task in schema.tasks if task.name != by)]
    items = {name: values for name, values in asked.items.items() if values.ndim == 1}
    lines = []
    for place, row in enumerate(np.argsort(-scores[by], kind="stable"), start=1):
        cells = [f"{report.number(scores[task][row])} {_happened(schema, task, asked, row)}" for task in tasks]
        shown = [_shown(values[row]) for values in items.values()]
        lines.append([str(place), *shown, *cells])
    return report.table(["", *items, *tasks], lines)


def _happened(schema: Schema, task: str, asked: Candidates, row: int) -> str:
    label = asked.labels[task][row]
    if next(t.type for t in schema.tasks if t.name == task) == "regression":
        return f"{report.number(float(label), 2):>4}"
    return "  -" if np.isnan(label) else "yes" if label else " no"


def _shown(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text.removesuffix(".0")[:32]


def worst_difference(path: Path, asked: Candidates, scores: dict[str, np.ndarray]) -> float:
    """The largest difference between these scores and the trainer's for the same rows."""
    predicted = pq.read_table(path)
    places = {row_id: place for place, row_id in enumerate(predicted["row_id"].to_pylist())}
    try:
        index = [places[row_id] for row_id in asked.row_ids.tolist()]
    except KeyError as error:
        raise UserError(f"{path} does not hold row {error} of the test split; run stem-evaluate again") from None
    return max(float(np.abs(scores[task] - predicted[f"score_{task}"].to_numpy()[index]).max()) for task in scores)


def path(text: str) -> Path:
    """A path with ~ expanded: a shell does not expand it in --data=~/data."""
    return Path(text).expanduser()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="host:port")
    parser.add_argument("--model", default="ranker", help="the name under which the model is served")
    parser.add_argument("--data", type=path, required=True, help="the converted data that the model was trained on")
    parser.add_argument("--by", help="the task that ranks the items (default: the schema's first)")
    parser.add_argument("--count", type=int, default=10, help="number of candidates")
    parser.add_argument("--predictions", type=path, help="RUN/evaluation/test.parquet, to compare with")
    flags = parser.parse_args()
    try:
        return ask(flags)
    except (UserError, FeatureError, RankingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def ask(flags: argparse.Namespace) -> int:
    schema = manifests.load(str(flags.data)).schema
    by = flags.by or schema.task_names[0]
    if by not in schema.task_names:
        raise UserError(f"--by={by}: the tasks are {', '.join(schema.task_names)}")
    asked = find(flags.data, schema, by, flags.count)
    with RankingClient(flags.server, model=flags.model, timeout=10) as client:
        version = client.metadata().version
        start = time.monotonic()
        scores = client.rank(user=asked.user, items=asked.items)
        milliseconds = 1000 * (time.monotonic() - start)
    user = ", ".join(f"{name} {_shown(value)}" for name, value in asked.user.items())
    print(f"{flags.count} candidates for {user}: one call of {milliseconds:.1f} ms to {flags.model} version {version}")
    print(f"ranked by {by}; scores, and beside each what really happened")
    print(table(schema, asked, scores, by))
    if flags.predictions is None:
        return 0
    worst = worst_difference(flags.predictions, asked, scores)
    verdict = "equal" if worst <= EQUAL else "NOT equal"
    print(f"served and trained scores of these rows are {verdict}: worst difference {worst:.0e}")
    return 0 if worst <= EQUAL else 1


if __name__ == "__main__":
    sys.exit(main())
