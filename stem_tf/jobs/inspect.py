"""Looks inside a trained run: its tables and parameters, and how each gate uses the experts on a split (PLE Fig. 8).

    stem-inspect --workdir=RUN --split=test

Prints the model and the mean and standard deviation of every gate's weights; writes them as JSON and as a picture, and
for TensorBoard.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pipelines import manifest as manifests
from stem_tf import report
from stem_tf.runtime import start_tensorflow
from stem_tf.workdir import Workdir
from stem_util import cli, owned

flags = cli.Flags()

_WORKDIR = flags.DEFINE(
    cli.PLACE, "workdir", None, "Directory or URI of the run, as given to stem-train.", required=True
)
_SPLIT = flags.DEFINE_string("split", "test", f"Which rows the gates see: {', '.join(manifests.SPLITS)}.")
_CHECKPOINT = flags.DEFINE(cli.PATH, "checkpoint", "best", "best, latest, or the path of one without its suffix.")
_DATA = flags.DEFINE(cli.PLACE, "data", None, "The run's converted data, if it has moved since.")


def main(argv: Sequence[str]) -> None:
    del argv
    workdir, split = Workdir.fetched(_WORKDIR.value), _SPLIT.value
    config = workdir.config()
    manifest = workdir.data(config, _DATA.value, split)
    owned.check(workdir.inspection, owned.INSPECTIONS)
    with manifests.in_use(manifest.data_dir):
        start_tensorflow()
        from stem_tf import inspection, trained

        found = trained.load(workdir, config, manifest, _CHECKPOINT.value, calibrated=False)
        age = report.age(found.epoch, found.step)
        print(f"{config.experiment}: {config.model.name}; {found.checkpoint} ({age})\n")
        seen = inspection.inspect(found, manifest, split, config.data)
        print(seen)
    if not seen.gates:
        print(f"\n{config.model.name} has no gates")
        return
    with workdir.writing(workdir.inspection):
        written = inspection.write(seen, workdir)
    if len(written) == 1:
        print("no picture: matplotlib is not installed (pip install 'stem-tf[plots]')")
    board = workdir.tensorboard
    print(
        f"written to {workdir.named(workdir.inspection)}: {', '.join(written)}; for TensorBoard under {board / 'gates'}"
    )
    print(f"next: tensorboard --logdir={shlex.quote(str(board))}")


def run() -> None:
    """Console script ``stem-inspect``."""
    cli.run(main, flags, memory="a run with a smaller config.model.dim or config.data.batch_size")


if __name__ == "__main__":
    run()
