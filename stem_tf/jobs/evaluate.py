"""Evaluates a trained run on a split, beside two trivial answers: the train mean of the label per user and per item.

    stem-evaluate --workdir=RUN --split=test

Prints a table; writes metrics as JSON and predictions as Parquet.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf import configs, report
from stem_tf.evaluation import metrics
from stem_tf.evaluation import table as evaluation
from stem_tf.runtime import quieten_tensorflow, use_memory_as_needed
from stem_tf.training import learning
from stem_tf.workdir import Workdir
from stem_util import cli, files, owned

flags = cli.Flags()

_WORKDIR = flags.DEFINE(cli.PATH, "workdir", None, "Directory of the run, as given to stem-train.", required=True)
_SPLIT = flags.DEFINE_string("split", "test", f"Which rows: {', '.join(manifests.SPLITS)}.")
_CHECKPOINT = flags.DEFINE(cli.PATH, "checkpoint", "best", "best, latest, or the path of one without its suffix.")
_OUTPUT = flags.DEFINE(
    cli.PATH, "output", None, "Where to write <split>.json and <split>.parquet; RUN/evaluation by default."
)
_DATA = flags.DEFINE(cli.PATH, "data", None, "The run's converted data, where it has moved since.")
_INPUT_FORMAT = flags.DEFINE_string(
    "input_format", None, f"{', '.join(manifests.INPUT_FORMATS)}: what to read the rows from, if not as the run did."
)


def main(argv: Sequence[str]) -> None:
    del argv
    workdir, split = Workdir(_WORKDIR.value), _SPLIT.value
    config = workdir.config()
    if _INPUT_FORMAT.value is not None:
        config = configs.checked(configs.flat(config) | {"data.input_format": _INPUT_FORMAT.value})
    manifest = workdir.data(config, _DATA.value, split)
    output = Path(_OUTPUT.value or workdir.path / "evaluation")
    owned.check_for_evaluation(output, split)
    with manifests.in_use(manifest.data_dir):
        if manifest.schema.group is not None:
            manifest.check_raw(split)
        _evaluate(workdir, config, manifest, split, output)


def _evaluate(workdir: Workdir, config: Any, manifest: Manifest, split: str, output: Path) -> None:
    """Scores, compares, prints and writes."""
    quieten_tensorflow()
    from stem_tf import trained
    from stem_tf.evaluation import predictions, trivial
    from stem_tf.training.logger import show_evaluation

    use_memory_as_needed()
    found = trained.load(workdir, config, manifest, _CHECKPOINT.value)
    predicted = predictions.predict(found.model, manifest, split, config.data, desc=f"evaluate {split}")
    results = predictions.evaluate(predicted, manifest)
    cache = workdir.path / f"trivial-{workdir.data_checksum()[:16]}.npz"
    answers = trivial.load(cache, manifest, config.data)
    keys = {key: column for key, column in (("group", manifest.schema.group), ("item", manifest.schema.item)) if column}
    by_key = {
        column: trivial.compare(manifest.schema.tasks, predicted, answers.scores(key, predicted))
        for key, column in keys.items()
    }
    age = report.age(found.epoch, found.step)
    untrained = learning.untrained(config, manifest)
    print(f"{split} of {manifest.data_dir}, {len(predicted.row_id):,} rows; {found.checkpoint} ({age})")
    print(evaluation.table(manifest, results, by_key, untrained))

    mean, _ = metrics.mean_auc({task: values for task, values in results.items() if task not in untrained})
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
    output = owned.claim_for_evaluation(output, split)
    lock = files.hidden(output / f"{split}.json", "lock")  # a name that nobody else's file has
    with files.locked(lock, output, wait=True):  # both files are of one evaluation
        predictions.write(output / f"{split}.parquet", manifest, split, predicted)
        files.write_json(output / f"{split}.json", report.finite(tree))
    show_evaluation(workdir, found.model, split, found.epoch, found.step, results)
    print(f"written to {output}: metrics {split}.json, predictions {split}.parquet")
    if split != "test" and manifest.rows("test"):
        print(f"next: stem-evaluate --workdir={shlex.quote(str(workdir.path))} --split=test")


def run() -> None:
    """Console script ``stem-evaluate``."""
    cli.run(main, flags, memory="a run with a smaller config.model.dim or config.data.batch_size")


if __name__ == "__main__":
    run()
