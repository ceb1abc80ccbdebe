"""Evaluates a trained run on a split, beside trivial answers: train means per user and per item, and a bias model.

    stem-evaluate --workdir=RUN --split=test
    stem-evaluate --workdir=RUN --slice=hour,user_id:new     # these rows by themselves, too

Prints tables; writes metrics as JSON and predictions as Parquet. Metrics have intervals over users.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pipelines import manifest as manifests
from stem_tf import report
from stem_tf.evaluation import evaluator
from stem_tf.workdir import Workdir
from stem_util import cli

flags = cli.Flags()

_WORKDIR = flags.DEFINE(
    cli.PLACE, "workdir", None, "Directory or URI of the run, as given to stem-train.", required=True
)
_SPLIT = flags.DEFINE_string("split", "test", f"Which rows: {', '.join(manifests.SPLITS)}.")
_CHECKPOINT = flags.DEFINE(cli.PATH, "checkpoint", "best", "best, latest, or the path of one without its suffix.")
_OUTPUT = flags.DEFINE(
    cli.PATH, "output", None, "Where to write <split>.json and <split>.parquet; RUN/evaluation by default."
)
_DATA = flags.DEFINE(cli.PLACE, "data", None, "The run's converted data, if it has moved since.")
_INPUT_FORMAT = flags.DEFINE_string(
    "input_format", None, f"{', '.join(manifests.INPUT_FORMATS)}: what to read the rows from; as in the run by default."
)
_CALIBRATED = flags.DEFINE_bool(
    "calibrated", True, "Calibrated scores, where the run's config.train.calibration asks for them."
)
_K = flags.DEFINE_integer("k", 10, "How many places of each group's list NDCG looks at.")
_SLICE = flags.DEFINE_list(
    "slice",
    [],
    "Rows to measure by themselves, too: COLUMN (each value, or ranges of numbers), COLUMN=VALUE, COLUMN:new (not seen "
    "in train), COLUMN:rare (seen least in train). Any feature, or column that the raw log keeps.",
)


def main(argv: Sequence[str]) -> None:
    del argv
    workdir, split = Workdir.fetched(_WORKDIR.value), _SPLIT.value
    evaluation = evaluator.evaluate_run(
        workdir,
        split,
        checkpoint=_CHECKPOINT.value,
        data=_DATA.value,
        input_format=_INPUT_FORMAT.value,
        output=_OUTPUT.value,
        calibrated=_CALIBRATED.value,
        k=_K.value,
        slices=_SLICE.value,
    )
    manifest, found, rows = evaluation.manifest, evaluation.found, evaluation.metrics["rows"]
    print(f"{split} of {manifest.data_dir}, {rows:,} rows; {found.checkpoint} ({report.age(found.epoch, found.step)})")
    print(evaluation.table)
    print(f"written to {workdir.named(evaluation.output)}: metrics {split}.json, predictions {split}.parquet")
    if split != "test" and manifest.rows("test"):
        print(f"next: stem-evaluate --workdir={shlex.quote(workdir.place)} --split=test")


def run() -> None:
    """Console script ``stem-evaluate``."""
    cli.run(main, flags, memory="a run with a smaller config.model.dim or config.data.batch_size")


if __name__ == "__main__":
    run()
