"""Peak memory of evaluation and export, in copies of the tables, where one process trained and where servers did.

    python -m benchmarks.sharded_memory

Trains STEM-Net over a generated log with a hashed feature, once with few and once with many buckets, and adds up the
proportional set sizes of each job's processes while it runs (Linux). What TensorFlow itself takes drops out of the
difference: the figure is how many dense copies of the tables a machine holds at the same time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stem_tf import report
from stem_util import cli, owned
from stem_util.errors import JobError

flags = cli.Flags()

_BUCKETS = flags.DEFINE_list("buckets", ["1000000", "3000000"], "Rows of the tables: few and many.")
_DIM = flags.DEFINE_integer("dim", 16, "Width of an embedding; each of the two tasks has one, and one is shared.")
_SERVERS = flags.DEFINE_integer("servers", 2, "Parameter servers.", lower_bound=1)
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")

_SCHEMA = """
name: large
group: user
item: item
features:
  user: {kind: categorical, side: user, dtype: int64, hash: {buckets: %s}}
  item: {kind: categorical, side: item, dtype: int64}
tasks:
  click: {label: {column: click}}
  buy: {label: {column: buy}}
"""
_MIB = 1 << 20


def main(argv: Sequence[str]) -> None:
    del argv
    few, many = sorted(map(int, _BUCKETS.value))
    peaks = {buckets: _peaks(buckets) for buckets in (few, many)}
    tables = {buckets: 4 * 3 * _DIM.value * buckets for buckets in peaks}
    rows, figures = [], {}
    for job in peaks[few]:
        figures[job] = (peaks[many][job] - peaks[few][job]) / (tables[many] - tables[few])
        rows.append([job, *(f"{of[job] / _MIB:,.0f}" for of in peaks.values()), f"{figures[job]:.2f}"])
    head = ["peak of", *(f"MiB, tables of {size / _MIB:,.0f} MiB" for size in tables.values()), "copies of the tables"]
    print(report.table(head, rows))
    if _JSON.value:
        owned.write_figures(_JSON.value, {"peaks": peaks, "tables": tables, "copies": figures})


def _peaks(buckets: int) -> dict[str, int]:
    """Bytes, by job, at tables of so many rows."""
    peaks = {}
    with tempfile.TemporaryDirectory(prefix="stem-benchmark-") as directory:
        random, rows = np.random.default_rng(0), 40_000
        columns: dict[str, Any] = {name: random.integers(50_000, size=rows) for name in ("user", "item")}
        columns |= {name: random.integers(2, size=rows) for name in ("click", "buy")}
        pq.write_table(pa.table(columns), f"{directory}/log.parquet")
        Path(directory, "large.yaml").write_text(_SCHEMA % buckets, encoding="utf-8")
        split = ["--split=random", f"--schema={directory}/large.yaml", f"--output={directory}/data"]
        _peak("pipelines.jobs.convert", f"{directory}/log.parquet", *split)
        train = ["stem_tf.jobs.train", "--config=small", f"--config.data.dir={directory}/data"]
        train += [f"--config.model.dim={_DIM.value}", "--config.optimizer.tables=lazy", "--config.train.epochs=1"]
        train += ["--config.data.batch_size=4096"]
        cluster = ["stem_tf.jobs.launch", f"--ps={_SERVERS.value}", "--", sys.executable, "-m"]
        for name, words in {
            "one process": train,
            "parameter servers": [*cluster, *train, "--config.train.strategy=parameter_server"],
        }.items():
            run = f"--workdir={directory}/run"
            _peak(*words, run)
            for job, peak in {
                "stem-evaluate": _peak("stem_tf.jobs.evaluate", run),
                "stem-evaluate --checkpoint=latest": _peak("stem_tf.jobs.evaluate", run, "--checkpoint=latest"),
                "stem-export": _peak("export.jobs.export", run, f"--output={directory}/export"),
            }.items():
                peaks[f"{job}, trained by {name}"] = peak
            shutil.rmtree(f"{directory}/run")
            shutil.rmtree(f"{directory}/export")
    return peaks


def _peak(module: str, *words: str) -> int:
    """Runs a job; the largest number of bytes that its processes held at once."""
    with tempfile.TemporaryFile("w+") as errors:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", module, *words]
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        peak = 0
        while job.poll() is None:
            peak = max(peak, sum(map(_size, _tree(job.pid))))
            time.sleep(0.05)
        errors.seek(0)
        if job.returncode:
            raise JobError(f"{module} failed: {errors.read()}")
    return peak


def _tree(pid: int) -> Iterator[int]:
    """A process and all that it has started."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))


def _size(pid: int) -> int:
    """Proportional set size of a process: pages that several share are divided among them."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


if __name__ == "__main__":
    cli.run(main, flags)
