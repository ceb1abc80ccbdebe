"""The table that an evaluation prints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from pipelines.manifest import Manifest
from stem_tf import report
from stem_tf.evaluation import metrics


def table(
    manifest: Manifest,
    results: metrics.Results,
    by_key: Mapping[str, Mapping[str, float]],
    untrained: Collection[str] = (),
) -> str:
    """The metrics as text: one line per task, a line of means, and a note where a trivial answer is as good.

    Args:
      manifest: manifest of the data.
      results: metrics by task.
      by_key: the trivial answers' AUC or MSE by key column and task.
      untrained: tasks that were not trained; the mean is without them.
    """
    types = {task.name: task.type for task in manifest.schema.tasks}
    groups = {
        "binary": ["AUC", *[f"per {column}" for column in by_key], "grouped AUC", "logloss"],
        "regression": ["MSE", *[f"per {column}" for column in by_key]],
    }
    if manifest.schema.group is None:
        groups["binary"].remove("grouped AUC")
    texts = []
    for kind, columns in groups.items():
        tasks = [task for task in results if types[task] == kind]
        if not tasks:
            continue
        lines = []
        for task in tasks:
            values = results[task]
            own = values["auc" if kind == "binary" else "mse"]
            trivial = {column: answers.get(task, float("nan")) for column, answers in by_key.items()}
            numbers = [own, *trivial.values()]
            if kind == "binary":
                numbers += [values[name] for name in ("grouped_auc", "logloss") if name in values]
            lines.append(
                [
                    task,
                    f"{values['rows']:,}",
                    report.number(values["rate"]),
                    *map(report.number, numbers),
                    "not trained" if task in untrained else _verdict(kind, own, trivial),
                ]
            )
        tasks = [task for task in tasks if task not in untrained]
        if kind == "binary" and len(tasks) > 1:
            lines.append(_mean_line(results, tasks, by_key))
        texts.append(report.table([kind, "rows", "rate" if kind == "binary" else "mean", *columns, ""], lines))
    if by_key:
        columns = [f"per {column}" for column in by_key]
        texts.append(f"{', '.join(columns)}: what the train mean of the label for that value would reach as a score")
    weighted = {task.name: task.row_weight for task in manifest.schema.tasks if task.row_weight}
    if weighted:
        texts.append(
            f"rows count with weights: {', '.join(f'{task} by {column}' for task, column in weighted.items())}"
        )
    return "\n\n".join(texts)


def _mean_line(results: metrics.Results, tasks: Sequence[str], by_key: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Means over the tasks that have an AUC."""
    tasks = [task for task in tasks if not np.isnan(results[task]["auc"])]

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else float("nan")

    trivial = {column: mean([answers.get(task, float("nan")) for task in tasks]) for column, answers in by_key.items()}
    own = metrics.mean_auc({task: results[task] for task in tasks})
    rest = [
        mean([results[task][name] for task in tasks])
        for name in ("grouped_auc", "logloss")
        if all(name in results[task] for task in tasks)
    ]
    return ["mean", "", "", *map(report.number, [own, *trivial.values(), *rest]), _verdict("binary", own, trivial)]


def _verdict(kind: str, own: float, trivial: Mapping[str, float]) -> str:
    """A note where the model does not beat a trivial answer; "" where it beats all of them, or has no score."""
    sign = 1 if kind == "binary" else -1
    beaten = [column for column, value in trivial.items() if sign * own <= sign * value]
    if len(beaten) == 2:
        return "no better than either"
    return f"no better than per {beaten[0]}" if beaten else ""
