"""Samples per second of two processes of one core each, compared with one process of one core, and their losses.

    python -m benchmarks.multi_worker --rows=270000

The log and the model of ``benchmarks.train``, with the same global batches (``data.parts=2``). Both take turns;
each process is kept on one core. The ratio is that of the medians, and what the jobs report: the first step, which
compiles, and the evaluation after the epoch are not counted. The losses compared are the means over the epoch so far,
at every tenth step; beside them stands how far two runs of one process are apart, since the order in which threads add
floats up differs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import train
from stem_tf import cluster
from stem_tf.jobs import train as job
from stem_tf.workdir import Workdir
from stem_util import cli, owned
from stem_util.errors import JobError

flags = cli.Flags()

_ROWS = flags.DEFINE_integer("rows", 270_000, "Rows of the log.", lower_bound=100_000)
_IDS = flags.DEFINE_integer("ids", 30_000, "Ids of each of the 8 features.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Turns of each.", lower_bound=2)
_KEYS = flags.DEFINE_multi_string("set", [], "Another config key, as in train.precision=mixed_bfloat16.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")

_LAUNCH = ("-m", "stem_tf.jobs.launch", "--workers=2", "--", sys.executable)
_CHILD = ("-m", "benchmarks.multi_worker", "on_one_core")


def main(argv: Sequence[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory(prefix="stem-benchmark-") as directory:
        data = train.convert(directory, _ROWS.value, _IDS.value)
        experiment = train.write_config(directory)
        keys = [f"data.dir={data}", "data.parts=2", "train.epochs=1", "train.log_every=10", *_KEYS.value]
        rates: dict[str, list[float]] = {"none": [], "multi_worker": []}
        for turn in range(_REPEATS.value):
            for strategy in rates:
                workdir = Path(directory, f"{strategy}-{turn}")
                words = [f"--config={experiment}", f"--workdir={workdir}", f"--config.train.strategy={strategy}"]
                words += [f"--config.{key}" for key in keys]
                launch = _LAUNCH if strategy == "multi_worker" else ()
                _run([sys.executable, *launch, *_CHILD, *words])
                rates[strategy].append(float(json.loads((workdir / "report.json").read_bytes())["samples_per_second"]))
        one, again, two = (_losses(Path(directory, name)) for name in ("none-0", "none-1", "multi_worker-0"))
    difference, noise = _difference(one, two), _difference(one, again)
    ratio = statistics.median(rates["multi_worker"]) / statistics.median(rates["none"])
    print(f"{'':14}{'median samples/s':>18}{'least':>10}{'most':>10}")
    for name, of_kind in (("one process", rates["none"]), ("two processes", rates["multi_worker"])):
        print(f"{name:14}{statistics.median(of_kind):>18,.0f}{min(of_kind):>10,.0f}{max(of_kind):>10,.0f}")
    print(f"two / one: {ratio:.2f}")
    print(f"losses at {len(one)} steps differ by at most {difference:.1e}; of one process twice, {noise:.1e}")
    if _JSON.value:
        figures = {"rates": rates, "ratio": ratio, "difference": difference, "noise": noise, "steps": len(one)}
        owned.write_figures(_JSON.value, figures | {"rows": _ROWS.value, "keys": _KEYS.value})


def _losses(workdir: Path) -> list[float]:
    return [record["loss"] for record in Workdir(workdir).read_metrics() if record["kind"] == "train"]


def _difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference between losses of one step, relative to the first."""
    return max(abs(a - b) / a for a, b in zip(one, other, strict=True))


def _run(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise JobError(f"a training failed: {done.stderr}")


def _train_on_one_core() -> None:
    """Runs stem-train with the other arguments, on a core for each task."""
    task = json.loads(os.environ.get(cluster.VARIABLE, '{"task": {"index": 0}}'))["task"]
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[task["index"]]})
    sys.argv.remove(_CHILD[-1])
    job.run()


if __name__ == "__main__":
    if _CHILD[-1] in sys.argv:
        _train_on_one_core()
    cli.run(main, flags)
