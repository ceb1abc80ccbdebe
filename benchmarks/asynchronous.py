"""What asynchronous training costs in quality: runs on parameter servers beside runs of one process, by seed.

    python -m benchmarks.asynchronous
    python -m benchmarks.asynchronous --workers=4 --seeds=0,1,2,3,4

Trains ``--config=small`` with lazy tables on the bundled sample, each run by the real jobs, and evaluates its best
weights on test. What the two strategies differ by means something only beside what seeds of one of them differ by.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.parameter_servers import LOG
from stem_tf import report
from stem_tf.workdir import Workdir
from stem_util import cli, owned
from stem_util.errors import JobError

flags = cli.Flags()

_WORKERS = flags.DEFINE_integer("workers", 2, "Workers.", lower_bound=1)
_SERVERS = flags.DEFINE_integer("servers", 2, "Parameter servers.", lower_bound=1)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")


def main(argv: Sequence[str]) -> None:
    del argv
    results: dict[str, list[dict[str, Any]]] = {"none": [], "parameter_server": []}
    with tempfile.TemporaryDirectory(prefix="stem-benchmark-") as directory:
        data = f"{directory}/data"
        schema = ["--schema=kuairand_sample", "--split=time", "--split_column=time_ms"]
        _job("pipelines.jobs.convert", str(LOG), *schema, f"--output={data}")
        for seed in _SEEDS.value:
            for strategy, of_strategy in results.items():
                run = Workdir(f"{directory}/{strategy}-{seed}")
                words = ["--config=small", f"--workdir={run.path}", f"--config.seed={seed}"]
                words += [f"--config.data.dir={data}", "--config.optimizer.tables=lazy"]
                words += [f"--config.train.strategy={strategy}"]
                _job("stem_tf.jobs.train", *words, cluster=strategy == "parameter_server")
                _job("stem_tf.jobs.evaluate", f"--workdir={run.path}", "--split=test")
                of_strategy.append(_figures(run))
                print(strategy, "seed", seed, of_strategy[-1], file=sys.stderr, flush=True)
    columns = list(results["none"][0])
    rows = []
    for strategy, of_strategy in results.items():
        values = [[figures[column] for figures in of_strategy] for column in columns]
        rows.append([strategy, *(f"{statistics.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})" for v in values)])
    print(f"mean of seeds {', '.join(_SEEDS.value)} (least to most)")
    print(report.table(["strategy", *columns], rows))
    if _JSON.value:
        owned.write_figures(_JSON.value, results)


def _job(module: str, *words: str, cluster: bool = False) -> None:
    launch = [
        "stem_tf.jobs.launch",
        f"--workers={_WORKERS.value}",
        f"--ps={_SERVERS.value}",
        "--",
        sys.executable,
        "-m",
    ]
    command = [sys.executable, "-m", *(launch if cluster else []), module, *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise JobError(f"{module} failed: {done.stderr}")


def _figures(run: Workdir) -> dict[str, Any]:
    """Of a finished, evaluated run."""
    test = json.loads((run.evaluation / "test.json").read_bytes())
    best = json.loads(run.report.read_bytes())["best"]
    first = next(r for r in reversed(run.read_metrics()) if r["kind"] == "train" and r["epoch"] == 1)
    return {
        "test AUC": test["mean"]["auc"],
        "test logloss": test["mean"]["logloss"],
        "validation AUC": best["score"],
        "best epoch": best["epoch"],
        "train loss, epoch 1": first["loss"],
    }


if __name__ == "__main__":
    cli.run(main, flags)
