"""Comparisons of runs that were never trained: scores and labels as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.schema import Label, Schema, Task
from stem_tf.compare.comparison import Arm, Comparison, Settings
from stem_tf.evaluation.predictions import Predictions

Scores = Mapping[str, NDArray]


def comparison(
    labels: Scores,
    arms: Mapping[str, Sequence[Scores]],
    *,
    single: str | None = "single",
    regressions: Sequence[str] = (),
    weights: Scores | None = None,
    group: NDArray | None = None,
    row_id: NDArray | None = None,
    **settings: Any,
) -> Comparison:
    """A comparison of arms, each of one mapping of scores ([N] by task) per seed; both splits are the same rows."""
    weights = weights or {}
    tasks = {
        name: Task(
            name,
            Label(name),
            type="regression" if name in regressions else "binary",
            row_weight="w" if name in weights else None,
        )
        for name in labels
    }

    def described(names: Sequence[str]) -> Any:
        schema = Schema("made_up", (), tuple(tasks[name] for name in names), group=None if group is None else "user")
        return SimpleNamespace(schema=schema)

    def run(seed: int, scores: Scores) -> Any:
        rows = len(next(iter(scores.values())))
        predicted = Predictions(
            row_id=np.arange(rows) if row_id is None else row_id,
            labels={task: labels[task].astype(np.float32) for task in scores},
            scores={task: values.astype(np.float32) for task, values in scores.items()},
            weights={task: values.astype(np.float32) for task, values in weights.items() if task in scores},
            group=group,
            item=None,
        )
        return SimpleNamespace(
            seed=seed,
            manifest=described(list(scores)),
            predictions=lambda split: predicted,
            metrics=lambda split: {"mean_auc": 0.5, "tasks": {task: {} for task in scores}},
        )

    return Comparison(
        name="made up",
        manifest=described(list(labels)),
        arms={name: Arm(name, {}, tuple(run(*found) for found in enumerate(runs))) for name, runs in arms.items()},
        single=single,
        incumbent=None,
        settings=Settings(**settings),
    )
