"""One cell of a comparison, in a process of its own: trains a run as stem-train does, evaluates and measures it.

    python -m stem_tf.compare.cell --config=small --config.data.dir=DATA --workdir=RUN --report --parent=PID

Without --config it evaluates and measures a run that is trained already. The process ends with its parent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from stem_tf import configs
from stem_tf.compare import cells
from stem_tf.runtime import start_tensorflow
from stem_tf.workdir import Workdir
from stem_util import cli, files, processes

flags = cli.Flags()

_CONFIG = flags.DEFINE(cli.PATH, "config", None, "As of stem-train.")
_OVERRIDES = flags.DEFINE_multi_string(configs.OVERRIDE, [], "As of stem-train.")
_WORKDIR = flags.DEFINE(cli.PATH, "workdir", None, "Directory of the run.", required=True)
_DATA = flags.DEFINE(cli.PLACE, "data", None, "The run's converted data, if it has moved since.")
_REPORT = flags.DEFINE_bool("report", False, "Evaluate on validation and test, and measure what a report shows.")
_PARENT = flags.DEFINE_integer("parent", 0, "Process that this one ends with; 0: none.")


def main(argv: Sequence[str]) -> None:
    del argv
    if _PARENT.value:
        processes.end_with(_PARENT.value)
    start = time.monotonic()
    start_tensorflow()
    from stem_tf import api

    if _CONFIG.value is not None:
        api.train(configs.load(_CONFIG.value, _OVERRIDES.value, lambda sentence: None), workdir=_WORKDIR.value)
    workdir = Workdir(_WORKDIR.value)
    files.make_directory(workdir.comparison)
    if _REPORT.value:
        _report(workdir)
    files.write_json(cells.done_file(workdir), {"report": _REPORT.value, "seconds": round(time.monotonic() - start, 1)})


def _report(workdir: Workdir) -> None:
    """Writes the evaluations and the measures of a trained run."""
    from pipelines import manifest as manifests
    from stem_tf.compare import measures, runs
    from stem_tf.evaluation import evaluator

    config = workdir.config()
    found = None
    for split in runs.SPLITS:
        evaluation = evaluator.evaluate_run(workdir, split, data=_DATA.value, found=found)
        found = evaluation.found
    manifest = workdir.data(config, _DATA.value, "test")
    with manifests.in_use(manifest.data_dir):
        assert found is not None
        tree = measures.measure(workdir, config, manifest, found)
    files.write_json(workdir.measures, tree)


if __name__ == "__main__":
    cli.run(main, flags, memory="an arm with a smaller model.dim or data.batch_size", rewritten=configs.override_flags)
