"""The evaluation of a run on a split, beside two answers that need no model: label means per user and per item."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.manifest import Manifest
from stem_tf import report
from stem_tf.evaluation import metrics, predictions, scoring, table, trivial
from stem_tf.evaluation.metrics import Results
from stem_tf.evaluation.predictions import Predictions
from stem_tf.trained import Trained
from stem_tf.training import learning
from stem_tf.training.logger import show_evaluation
from stem_tf.workdir import Workdir
from stem_util import files, owned


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
      metrics: what ``<split>.json`` holds: the split, its rows, the checkpoint, the mean AUC, the metrics of each task
        and so on. A metric that is not defined is None.
      table: the same for people.
      predictions: the scores and labels that were measured.
      found: the model that was evaluated.
      results: the metrics of each task, as `stem_tf.evaluation.metrics.evaluate` returns them.
    """

    metrics: dict[str, Any]
    table: str
    predictions: Predictions
    found: Trained
    results: Results


def evaluate(workdir: Workdir, config: Any, manifest: Manifest, found: Trained, split: str) -> Evaluation:
    """Scores a split and measures the scores; prints and writes nothing but a cache of the train means in the run.

    Args:
      workdir: the run's directory.
      config: the run's config; ``config.data`` says how the rows are read.
      manifest: manifest of the run's data.
      found: the run's model.
      split: name of the split.

    Raises:
      JobError: a score is not a number, or a record is damaged.
    """
    predicted = scoring.predict(found.model, manifest, split, config.data, desc=f"evaluate {split}")
    results = predictions.evaluate(predicted, manifest)
    cache = workdir.path / f"trivial-{workdir.data_checksum()[:16]}.npz"
    answers = trivial.load(cache, manifest, config.data)
    keys = {key: column for key, column in (("group", manifest.schema.group), ("item", manifest.schema.item)) if column}
    by_key = {
        column: trivial.compare(manifest.schema.tasks, predicted, answers.scores(key, predicted))
        for key, column in keys.items()
    }
    untrained = learning.untrained(config, manifest)
    mean = metrics.mean_auc({task: values for task, values in results.items() if task not in untrained})
    without = [task for task, values in results.items() if task in untrained or np.isnan(values.get("auc", np.nan))]
    weighted = {task.name: {"row_weight": task.row_weight} for task in manifest.schema.tasks if task.row_weight}
    tasks = {
        task: {
            **values,
            **weighted.get(task, {}),
            "trivial": {column: answer.get(task) for column, answer in by_key.items()},
        }
        for task, values in results.items()
    }
    tree = {
        "split": split,
        "rows": len(predicted.row_id),
        "checkpoint": found.checkpoint,
        "epoch": found.epoch,
        "weights": found.fingerprint(),
        "step": found.step,  # of an epoch that was not finished; 0 after one that was
        "mean_auc": mean,
        "mean_auc_without": without,
        "untrained": untrained,
        "tasks": tasks,
        "prior_rows": trivial.PRIOR_ROWS,
    }
    return Evaluation(report.finite(tree), table.table(manifest, results, by_key, untrained), predicted, found, results)


def write(evaluation: Evaluation, workdir: Workdir, manifest: Manifest, output: Path) -> Path:
    """Writes the metrics as ``<split>.json`` and the predictions as ``<split>.parquet``; returns their directory.

    TensorBoard shows the metrics, too.

    Raises:
      UserError: ``output`` holds something else.
    """
    split = evaluation.metrics["split"]
    output = owned.claim_for_evaluation(output, split)
    lock = files.hidden(output / f"{split}.json", "lock")  # a name that nobody else's file has
    with files.locked(lock, output, wait=True):  # both files are of one evaluation
        predictions.write(output / f"{split}.parquet", manifest, split, evaluation.predictions)
        files.write_json(output / f"{split}.json", evaluation.metrics)
    found = evaluation.found
    show_evaluation(workdir, found.model, split, found.epoch, found.step, evaluation.results)
    return output
