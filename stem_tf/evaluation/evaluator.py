"""The evaluation of a run on a split, beside answers that need no model: label means per user and per item.

TensorFlow is imported when the checks have passed, so that a mistake is reported at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.manifest import Manifest
from stem_tf import configs, report
from stem_tf.evaluation import preconditions, predictions, ranking_score, ranking_search, standing, table
from stem_tf.evaluation import slices as slicing
from stem_tf.evaluation.calibration import calibration, measures
from stem_tf.evaluation.intervals import Resamples
from stem_tf.evaluation.metrics import Results
from stem_tf.evaluation.predictions import Predictions
from stem_tf.evaluation.ranking import ranking as ranking_of
from stem_tf.evaluation.ranking_search import Chosen, Search
from stem_tf.runtime import start_tensorflow
from stem_tf.workdir import Workdir
from stem_util import files, owned
from stem_util.errors import UserError

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
      manifest: manifest of the data.
      output: the directory that holds ``<split>.json`` and ``<split>.parquet``.
      chosen: what a search of the ranking has found, or None.
    """

    metrics: dict[str, Any]
    table: str
    predictions: Predictions
    found: Trained
    manifest: Manifest
    output: Path
    chosen: Chosen | None = None


def evaluate_run(
    workdir: Workdir,
    split: str,
    *,
    checkpoint: str = "best",
    data: str | None = None,
    input_format: str | None = None,
    output: str | os.PathLike[str] | None = None,
    calibrated: bool = True,
    found: Trained | None = None,
    k: int = 10,
    slices: Sequence[str] = (),
    ranking: str | None = None,
    search: Search | None = None,
) -> Evaluation:
    """Scores and measures a split; writes metrics as ``<split>.json`` and predictions as ``<split>.parquet``.

    A search of the ranking's parameters comes first; the split is then measured with what it has chosen.

    Prints nothing. TensorBoard shows the metrics, too; the run keeps a cache of the trivial answers.

    Args:
      workdir: the run's directory.
      split: ``train``, ``validation`` or ``test``.
      checkpoint: ``best``, ``latest``, or the path of one without its suffix.
      data: directory of the run's converted data, if it has moved since.
      input_format: what to read the rows from; as in the run by default.
      output: where to write; RUN/evaluation by default.
      calibrated: measure calibrated scores, where the run's config asks for them.
      found: the run's model, if it is loaded already; ``checkpoint`` and ``calibrated`` are not looked at then.
      k: how many places of each group's list NDCG looks at.
      slices: rows to measure by themselves, too, as `stem_tf.evaluation.slices` spells them.
      ranking: one score to rank by, instead of the schema's: a YAML file or a formula.
      search: how to search its parameters on validation; not at all if not given.

    Raises:
      UserError: no run, other data, no such split, no rows in it, no such checkpoint or slice, no calibrators for the
        checkpoint, a mistake in the ranking, or ``output`` holds something else.
      JobError: a score is not a number, or a record is damaged.
    """
    if k < 1:
        raise UserError(f"k={k}: NDCG needs 1 place or more")
    config = workdir.config()
    if input_format is not None:
        config = configs.checked(configs.flat(config) | {"data.input_format": input_format})
    output = Path(output or workdir.evaluation)
    with (
        workdir.writing(output),
        preconditions.prepared(workdir, config, data, split, output, slices, ranking, search is not None) as manifest,
    ):
        start_tensorflow()
        from stem_tf import trained
        from stem_tf.evaluation import scoring, trivial
        from stem_tf.training import learning, logger

        found = found or trained.load(workdir, config, manifest, checkpoint, calibrated=calibrated)
        chosen = None
        if search is not None:
            validation = scoring.predict(found.model, manifest, "validation", config.data, desc="score validation")
            chosen = ranking_search.search(validation, manifest, k, search)
            manifest = dataclasses.replace(manifest, ranking=chosen.ranking)
        predicted = scoring.predict(found.model, manifest, split, config.data, desc=f"evaluate {split}")
        answers = trivial.load(workdir.path / f"trivial-{workdir.data_checksum()[:16]}.npz", manifest, config.data)
        by_name = {
            name: answers.scores(answer, predicted) for answer, name in standing.answers_of(manifest.schema).items()
        }
        untrained = learning.untrained(config, manifest)
        resamples = standing.drawn_again(predicted)
        results, tree = measured(predicted, manifest, by_name, untrained, k, resamples)
        for task, fitted in (found.calibration or {"tasks": {}})["tasks"].items():
            tree["tasks"][task]["calibration"] = {key: fitted[key] for key in ("method", "why") if key in fitted}
        tree = report.finite(
            {
                "split": split,
                "rows": len(predicted.row_id),
                "checkpoint": found.checkpoint,
                "epoch": found.epoch,
                "weights": found.fingerprint(),
                "step": found.step,  # of an epoch that was not finished; 0 after one that was
                **tree,
                "prior_rows": trivial.PRIOR_ROWS,
                "slices": _slices(slices, predicted, manifest, split, resamples),
                "ranking": _ranking(predicted, manifest, split, k, resamples, chosen),
            }
        )
        output = _write(output, split, manifest, predicted, tree)
        if chosen is not None:
            ranking_search.write(output, chosen, tree)
        logger.show_evaluation(workdir, found.model, split, found.epoch, found.step, results)
    return Evaluation(tree, table.tables(tree, manifest.schema), predicted, found, manifest, output, chosen)


def measured(
    predicted: Predictions,
    manifest: Manifest,
    answers: Mapping[str, Iterable[tuple[str, NDArray[np.float64]]]],
    untrained: Mapping[str, str],
    k: int,
    resamples: Resamples,
) -> tuple[Results, dict[str, Any]]:
    """Measures scores.

    Args:
      predicted: scores and labels of a split.
      manifest: manifest of the data.
      answers: by name, the scores of each trivial answer, task by task.
      untrained: tasks that were not trained, which means leave out.
      k: of NDCG@k.
      resamples: draws of the split's users.

    Returns:
      The metrics of each task, and the part of ``<split>.json`` that is about them.

    Raises:
      JobError: a score is not a number.
    """
    schema = manifest.schema
    results = predictions.evaluate(predicted, manifest)
    tasks: dict[str, dict[str, Any]] = {}
    for task in schema.tasks:
        labels, scores = predicted.labels[task.name], predicted.scores[task.name]
        weights, metrics_of_task = predicted.weights_of(task.name), results[task.name]
        meaning = calibration(task.type, labels, scores, weights)
        tasks[task.name] = {"predicted": meaning.predicted_mean, "predicted_over_observed": meaning.ratio}
        if task.type == "binary" and predicted.group is not None:
            lists = ranking_of(labels, scores, predicted.group, k, weights)
            metrics_of_task |= {f"ndcg@{k}": lists.ndcg, "map": lists.map}
            tasks[task.name] |= {"groups": lists.groups, "groups_of_one_class": lists.left_out}
        metrics_of_task["calibration_error"] = meaning.error
        tasks[task.name]["calibration_error_by_chance"] = meaning.limit
        if task.name in predicted.logits:
            tasks[task.name]["uncalibrated"] = measures(labels, predicted.uncalibrated(task.name), weights)
        if task.row_weight:
            tasks[task.name]["row_weight"] = task.row_weight
    counted = [
        task for task, values in results.items() if task not in untrained and not np.isnan(values.get("auc", np.nan))
    ]
    against, mean = standing.standing(schema.tasks, predicted, results, answers, counted, resamples)
    mean |= {
        name: float(np.mean([results[task][name] for task in counted]))
        for name in ("auc", "grouped_auc", f"ndcg@{k}", "map", "logloss")
        if counted and name in results[counted[0]]
    }
    return results, {
        "mean_auc": mean.get("auc"),
        "mean_auc_without": [task for task in results if task not in counted],
        "untrained": untrained,
        "tasks": {task: results[task] | tasks[task] | against[task] for task in results},
        "mean": mean,
        "k": k,
        "level": standing.LEVEL,
        "resamples": standing.RESAMPLES,
    }


def _slices(
    spelled: Sequence[str], predicted: Predictions, manifest: Manifest, split: str, resamples: Resamples
) -> list[dict[str, Any]]:
    """The metrics of each slice, with intervals."""
    if not spelled:
        return []
    slicer, found = slicing.Slicer(manifest, split, predicted.row_id), []
    nothing = np.zeros(len(predicted.row_id), bool)
    for one in (one for text in spelled for one in slicer(text) or [slicing.Slice(text, text, "no rows", nothing)]):
        tasks = slicing.evaluate(manifest.schema.tasks, predicted, one.rows)
        for task in manifest.schema.tasks:
            tasks[task.name] |= standing.slice_intervals(task, predicted, one.rows, resamples)
        rows = int(np.count_nonzero(one.rows))
        found.append({"name": one.name, "column": one.column, "about": one.about, "rows": rows, "tasks": tasks})
    return found


def _ranking(
    predicted: Predictions, manifest: Manifest, split: str, k: int, resamples: Resamples, chosen: Chosen | None
) -> dict[str, Any] | None:
    """What is said of the one score to rank by; None where there is none or it cannot be measured."""
    schema = manifest.schema
    if schema.ranking is None or ranking_score.why_not(schema, split):
        return None
    rows = ranking_score.rows(predicted, manifest, split)
    tree = ranking_score.measured(rows, schema, k, resamples, standing.LEVEL)
    if chosen is not None:
        before = ranking_score.score(rows, dataclasses.replace(schema, ranking=chosen.before))
        own = ranking_score.score(rows, schema)
        tree["search"] = {"ndcg_before": ranking_score.ndcg(rows, before, k)} | ranking_score.lead(
            rows, own, before, k, resamples, standing.LEVEL
        )
        tree["search"]["tasks_before"] = ranking_score.of_tasks(rows, schema, before)
    return tree


def _write(output: Path, split: str, manifest: Manifest, predicted: Predictions, tree: dict[str, Any]) -> Path:
    """Writes both files of an evaluation; returns their directory."""
    output = owned.claim_for_evaluation(output, split)
    lock = files.hidden(output / f"{split}.json", "lock")  # a name that nobody else's file has
    with files.locked(lock, output, wait=True):  # both files are of one evaluation
        predictions.write(output / f"{split}.parquet", manifest, split, predicted)
        files.write_json(output / f"{split}.json", tree)
    return output
