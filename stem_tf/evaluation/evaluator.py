"""The evaluation of a run on a split, beside answers that need no model: label means per user and per item.

TensorFlow is imported when the checks have passed, so that a mistake is reported at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.manifest import Manifest
from stem_tf import configs, report
from stem_tf.evaluation import metrics, preconditions, predictions, table
from stem_tf.evaluation.metrics import Results
from stem_tf.evaluation.predictions import Predictions
from stem_tf.runtime import start_tensorflow
from stem_tf.workdir import Workdir
from stem_util import files, owned

if TYPE_CHECKING:
    from stem_tf.trained import Trained


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
      manifest: manifest of the data.
      output: the directory that holds ``<split>.json`` and ``<split>.parquet``.
    """

    metrics: dict[str, Any]
    table: str
    predictions: Predictions
    found: Trained
    results: Results
    manifest: Manifest
    output: Path


def evaluate_run(
    workdir: Workdir,
    split: str,
    *,
    checkpoint: str = "best",
    data: str | None = None,
    input_format: str | None = None,
    output: str | os.PathLike[str] | None = None,
    found: Trained | None = None,
) -> Evaluation:
    """Scores and measures a split; writes metrics as ``<split>.json`` and predictions as ``<split>.parquet``.

    Prints nothing. TensorBoard shows the metrics, too; the run keeps a cache of the trivial answers.

    Args:
      workdir: the run's directory.
      split: ``train``, ``validation`` or ``test``.
      checkpoint: ``best``, ``latest``, or the path of one without its suffix.
      data: directory of the run's converted data, if it has moved since.
      input_format: what to read the rows from; as in the run by default.
      output: where to write; RUN/evaluation by default.
      found: the run's model, if it is loaded already; ``checkpoint`` is not looked at then.

    Raises:
      UserError: no run, other data, no such split, no rows in it, no such checkpoint, or ``output`` holds something
        else.
      JobError: a score is not a number, or a record is damaged.
    """
    config = workdir.config()
    if input_format is not None:
        config = configs.checked(configs.flat(config) | {"data.input_format": input_format})
    output = Path(output or workdir.evaluation)
    with preconditions.prepared(workdir, config, data, split, output) as manifest:
        start_tensorflow()
        from stem_tf import trained
        from stem_tf.evaluation import scoring, trivial
        from stem_tf.training import learning, logger

        found = found or trained.load(workdir, config, manifest, checkpoint)
        predicted = scoring.predict(found.model, manifest, split, config.data, desc=f"evaluate {split}")
        answers = trivial.load(workdir.path / f"trivial-{workdir.data_checksum()[:16]}.npz", manifest, config.data)
        untrained = learning.untrained(config, manifest)
        results = predictions.evaluate(predicted, manifest)
        by_key = {
            name: trivial.compare(manifest.schema.tasks, predicted, answers.scores(answer, predicted))
            for answer, name in trivial.names(manifest.schema).items()
        }
        tree = report.finite(_tree(split, found, predicted, manifest, results, by_key, untrained))
        tree["prior_rows"] = trivial.PRIOR_ROWS
        output = _write(output, split, manifest, predicted, tree)
        logger.show_evaluation(workdir, found.model, split, found.epoch, found.step, results)
    text = table.table(manifest, results, by_key, untrained)
    return Evaluation(tree, text, predicted, found, results, manifest, output)


def _tree(
    split: str,
    found: Trained,
    predicted: Predictions,
    manifest: Manifest,
    results: Results,
    by_key: dict[str, dict[str, float]],
    untrained: dict[str, str],
) -> dict[str, Any]:
    """What ``<split>.json`` holds."""
    weighted = {task.name: {"row_weight": task.row_weight} for task in manifest.schema.tasks if task.row_weight}
    return {
        "split": split,
        "rows": len(predicted.row_id),
        "checkpoint": found.checkpoint,
        "epoch": found.epoch,
        "weights": found.fingerprint(),
        "step": found.step,  # of an epoch that was not finished; 0 after one that was
        "mean_auc": metrics.mean_auc({task: values for task, values in results.items() if task not in untrained}),
        "mean_auc_without": [
            task for task, values in results.items() if task in untrained or np.isnan(values.get("auc", np.nan))
        ],
        "untrained": untrained,
        "tasks": {
            task: {
                **values,
                **weighted.get(task, {}),
                "trivial": {column: answer.get(task) for column, answer in by_key.items()},
            }
            for task, values in results.items()
        },
    }


def _write(output: Path, split: str, manifest: Manifest, predicted: Predictions, tree: dict[str, Any]) -> Path:
    """Writes both files of an evaluation; returns their directory."""
    output = owned.claim_for_evaluation(output, split)
    lock = files.hidden(output / f"{split}.json", "lock")  # a name that nobody else's file has
    with files.locked(lock, output, wait=True):  # both files are of one evaluation
        predictions.write(output / f"{split}.parquet", manifest, split, predicted)
        files.write_json(output / f"{split}.json", tree)
    return output
