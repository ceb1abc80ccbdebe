"""Publishes a trained run as the next version of a model that services can load.

    stem-export --workdir=RUN --output=DIR

writes DIR/<version>: a TensorFlow SavedModel that takes raw values, with its vocabularies, warm-up requests, a manifest
and a card (card.md). Before anything is published, a fresh process loads it as TensorFlow Serving does and must
reproduce the trainer's scores on validation rows through every signature.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from export import card, preconditions, stored
from stem_tf import report
from stem_tf.runtime import quieten_tensorflow
from stem_tf.workdir import Workdir
from stem_util import cli, stores

flags = cli.Flags()

_WORKDIR = flags.DEFINE(
    cli.PLACE, "workdir", None, "Directory or URI of the run, as given to stem-train.", required=True
)
_OUTPUT = flags.DEFINE(
    cli.PLACE,
    "output",
    None,
    "Directory or URI of the model's versions; the new one gets the next number.",
    required=True,
)
_CHECKPOINT = flags.DEFINE(
    cli.PATH, "checkpoint", "best", "best, latest, or the path of a checkpoint without its suffix."
)
_DATA = flags.DEFINE(cli.PLACE, "data", None, "The run's converted data, if it has moved since the training.")
_NAME = flags.DEFINE_string("name", "ranker", "The name under which services ask for the model.")
_CALIBRATED = flags.DEFINE_bool(
    "calibrated", True, "Calibrated scores, where the run's config.train.calibration asks for them."
)
_TABLES = flags.DEFINE_enum(
    "tables",
    "float32",
    ["float32", "bfloat16", "int8"],
    "How embedding tables are stored: bfloat16 takes half the bytes, int8 about a third; the job prints what it costs.",
)
_RANKING = flags.DEFINE(
    cli.PATH,
    "ranking",
    None,
    "One score to rank by, instead of the schema's: a YAML file with a block `ranking`, or a formula such as "
    "click^2*like. Clients get it as ranking_score.",
)


def main(argv: Sequence[str]) -> None:
    del argv
    workdir = Workdir.fetched(_WORKDIR.value)
    config = workdir.config()
    with stored.staging(_OUTPUT.value) as output:
        manifest = preconditions.check(workdir, config, _DATA.value, output, _NAME.value, _RANKING.value)
        quieten_tensorflow()
        import tensorflow as tf

        from export import exporter

        tf.config.set_visible_devices([], "GPU")  # the graph is the same everywhere; leave the GPU to others
        directory, tree = exporter.export(
            workdir,
            config,
            manifest,
            _CHECKPOINT.value,
            output,
            _NAME.value,
            _TABLES.value,
            calibrated=_CALIBRATED.value,
        )
        _say(workdir, directory, stored.upload(directory, _OUTPUT.value), tree)


def _say(workdir: Workdir, directory: Path, place: str, tree: dict[str, Any]) -> None:
    checked = tree["check"]
    rows = f"{checked['rows']:,} validation rows"
    if checked["rows"] < checked["rows_of_split"]:
        rows = f"the first {rows} of {checked['rows_of_split']:,}"
    worst = ", ".join(f"{signature} {difference:.0e}" for signature, difference in checked["worst"].items())
    weights = _megabytes((directory / "variables").iterdir())
    values = sum(entry["size"] for entry in tree["vocabularies"].values())
    print(f"{tree['model']} version {tree['version']}: {workdir.named(Path(tree['run']['checkpoint']))}")
    print(f"checked in a fresh process on {rows}; worst differences from the trainer: {worst}")
    if "cost" in tree["tables"]:
        sentence, head, lines = card.cost(tree["tables"])
        print(f"{sentence}\n{report.table(head, lines)}")
    for output in tree["outputs"]:
        print(f"{output['name']}, {output['meaning']}: {output['text']}")
    if tree["why_no_rank"]:
        print(f"no signature 'rank': {tree['why_no_rank']}")
    for task, why in tree["run"]["untrained"].items():
        print(f"warning: the task '{task}' was not trained ({why}): its scores mean nothing", file=sys.stderr)
    if tree["test_metrics"] is None:
        print(f"no test metrics: run stem-evaluate --workdir={shlex.quote(workdir.place)} before exporting")
    print(
        f"written: {place}, {_megabytes(directory.rglob('*')):.1f} MB ({weights:.1f} MB of weights, {values:,} raw "
        f"values in vocabularies); its card is {place}/card.md"
    )
    if stores.is_uri(place):
        return
    base = shlex.quote(str(directory.parent))
    print(f"next: stem-serve --model_base_path={base}  # under the name {shlex.quote(tree['model'])}")
    print(f"next: stem-deploy --model={base} --output=deploy  # files to operate it: limits, alerts, a runbook")


def _megabytes(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def run() -> None:
    """Console script ``stem-export``."""
    cli.run(main, flags, memory="a run with a smaller config.model.dim")


if __name__ == "__main__":
    run()
