"""The true expected labels of a generated log.

A generated log has a column ``truth_<task>`` for each task: the probability of label 1 from which a binary label was
drawn, or the mean of a regression label before noise was added. The schema does not use them, so no model sees them;
conversion keeps them with the raw rows of validation and test. No model can order rows better than their truth does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
from numpy.typing import NDArray

from pipelines.manifest import Manifest


def column(task: str) -> str:
    """The log's column with the truth of a task."""
    return f"truth_{task}"


def load(manifest: Manifest, split: str) -> dict[str, NDArray[np.float64]] | None:
    """The truth of each task, float64 [N], for the N rows of a split in the order of row_id.

    Returns:
      None where the log holds no truth, and for the train split, whose raw rows are not kept.

    Raises:
      UserError: the raw rows are missing or have changed since the conversion.
    """
    raw = _raw(manifest, split)
    columns = {task: column(task) for task in manifest.schema.task_names if raw and column(task) in raw.schema.names}
    return _columns(raw, columns) if columns else None


def best(manifest: Manifest, split: str) -> list[str]:
    """What the truth itself reaches on a split, as text: ``a AUC .7954``, ``y MSE .0100``; [] without truth or rows."""
    from sklearn.metrics import mean_squared_error, roc_auc_score

    truths = load(manifest, split) or {}
    tasks = {task.name: task for task in manifest.schema.tasks if task.name in truths}
    labels = _columns(_raw(manifest, split), {name: task.label.column for name, task in tasks.items()}) if tasks else {}
    found = []
    for name, task in tasks.items():
        if task.type == "regression":
            found.append(f"{name} MSE {_number(mean_squared_error(labels[name], truths[name]))}")
        elif 0 < labels[name].mean() < 1:
            found.append(f"{name} AUC {_number(roc_auc_score(labels[name], truths[name]))}")
    return found


def _number(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def _raw(manifest: Manifest, split: str) -> ds.Dataset | None:
    """The raw rows of a split, or None where none are kept."""
    manifest.check_raw(split)
    path = Path(manifest.data_dir) / "raw" / split
    return ds.dataset(path, format="parquet") if path.is_dir() and any(path.iterdir()) else None


def _columns(raw: ds.Dataset, names: Mapping[str, str]) -> dict[str, NDArray[np.float64]]:
    """Columns, float64 [N], in the order of row_id; ``names`` maps keys of the result to names of columns."""
    table = raw.to_table(columns=["row_id", *names.values()]).sort_by("row_id")
    return {key: table[name].to_numpy().astype(np.float64) for key, name in names.items()}
