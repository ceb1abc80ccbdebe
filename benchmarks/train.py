"""Samples per second of the real training job, compared with the same model in a bare loop on batches in memory.

    python -m benchmarks.train --rows=614400

Generates a log of 8 categorical features (240,000 ids in all, power-law popularity) and two labels, converts it to
blocks, and trains STEM-Net as the paper has it: T = 2, K1 = K2 = 1, D = 16, experts 512-512-512, batch 4096, float32,
row-sparse Adam. The bare loop and the job take turns. The job is ``stem-train`` in a separate process, with input,
shuffle, metrics, logs, and checkpoints inside the epoch. The ratio is that of the medians. The first step, which
compiles, and the job's evaluation after the epoch are not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import manifest as manifests
from pipelines import schema_yaml
from pipelines.schema import Feature, Label, Schema, Task
from stem_tf import configs
from stem_tf.runtime import quieten_tensorflow
from stem_util import cli, owned
from stem_util.errors import JobError

flags = cli.Flags()

_ROWS = flags.DEFINE_integer("rows", 614_400, "Rows of the log.", lower_bound=100_000)
_IDS = flags.DEFINE_integer("ids", 30_000, "Ids of each of the 8 features.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 60, "Steps of each turn of the bare loop.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Turns of each.", lower_bound=1)
_PRECISION = flags.DEFINE_enum("precision", "float32", ["float32", "mixed_bfloat16"], "config.train.precision.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")

_FEATURES = [f"f{i}" for i in range(8)]
_LABELS = ["click", "like"]


def main(argv: Sequence[str]) -> None:
    del argv
    quieten_tensorflow()
    import tensorflow as tf

    with tempfile.TemporaryDirectory(prefix="stem-benchmark-") as directory:
        data = convert(directory, _ROWS.value, _IDS.value)
        overrides = [
            f"data.dir={data}",
            "data.batch_size=4096",
            f"train.precision={_PRECISION.value}",
            "train.epochs=1",
            "train.checkpoint_every=100",
            "optimizer.tables=deferred",
        ]
        config = configs.load(write_config(directory), overrides)
        manifest = manifests.load(data)
        bare_loop = _BareLoop(config, manifest)
        bare, job = [], []
        for turn in range(_REPEATS.value):
            bare.append(bare_loop.rate(_STEPS.value))
            job.append(_job_rate(directory, overrides, turn))
        bare.append(bare_loop.rate(_STEPS.value))

    ratio = statistics.median(job) / statistics.median(bare)
    cores = len(os.sched_getaffinity(0))
    print(f"{_ROWS.value:,} rows, 8 features of {_IDS.value:,} ids, batch 4,096, {_PRECISION.value}, {cores} cores")
    print(f"{'':12}{'median samples/s':>18}{'least':>10}{'most':>10}")
    for name, rates in (("bare loop", bare), ("stem-train", job)):
        print(f"{name:12}{statistics.median(rates):>18,.0f}{min(rates):>10,.0f}{max(rates):>10,.0f}")
    print(f"stem-train / bare loop: {ratio:.3f}")
    if _JSON.value:
        figures = {"cores": cores, "tensorflow": tf.__version__, "bare": bare, "job": job, "ratio": ratio}
        figures |= {flag.name: flag.value for flag in (_ROWS, _IDS, _STEPS, _PRECISION)}
        owned.write_figures(_JSON.value, figures)


def write_config(directory: str) -> str:
    """An experiment that is the defaults: the paper's STEM-Net."""
    path = os.path.join(directory, "paper.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write("from stem_tf.configs.base import get_config\n")
    return path


def convert(directory: str, rows: int, ids: int) -> str:
    """Generates the log and converts it; returns the data directory."""
    random = np.random.default_rng(0)
    # The cube of a uniform draw: a tenth of the ids has almost half of the rows. Every id is there at least once.
    columns: dict[str, Any] = {}
    for name in _FEATURES:
        drawn = (ids * random.random(rows) ** 3).astype(np.int64)
        drawn[random.permutation(rows)[:ids]] = np.arange(ids)
        columns[name] = pa.array(drawn)
    for name, rate in zip(_LABELS, (0.3, 0.02), strict=True):
        columns[name] = pa.array((random.random(rows) < rate).astype(np.int64))
    log, schema, data = (os.path.join(directory, name) for name in ("log.parquet", "schema.yaml", "data"))
    pq.write_table(pa.table(columns), log)
    described = Schema(
        name="benchmark",
        features=tuple(Feature(name, "categorical", "user", name, "int64") for name in _FEATURES),
        tasks=tuple(Task(name, Label(name)) for name in _LABELS),
    )
    with open(schema, "w", encoding="utf-8") as file:
        file.write(schema_yaml.dumps(described))
    split = ["--split=random", "--fractions=0.98,0.01,0.01", "--layouts=blocks"]
    _run("pipelines.jobs.convert", log, f"--schema={schema}", f"--output={data}", *split)
    return data


class _BareLoop:
    """The job's model and step on 8 batches in memory."""

    def __init__(self, config: Any, manifest: manifests.Manifest) -> None:
        import tensorflow as tf

        from pipelines.batches.dataset import read_batches
        from stem_tf import models

        self._batch_size = config.data.batch_size
        self._step = tf.function(models.build(config, manifest).train_step)
        dataset = read_batches(manifest, "train", batch_size=self._batch_size, training=True)
        self._batches = list(dataset.take(8))
        self._step(self._batches[0])

    def rate(self, steps: int) -> float:
        """Samples per second over ``steps`` steps."""
        start = time.perf_counter()
        for i in range(steps):
            logs = self._step(self._batches[i % len(self._batches)])
        float(logs["loss"])
        return steps * self._batch_size / (time.perf_counter() - start)


def _job_rate(directory: str, overrides: list[str], turn: int) -> float:
    """The samples per second that the job reports."""
    workdir = os.path.join(directory, f"run-{turn}")
    keys = [f"--config.{override}" for override in overrides]
    _run("stem_tf.jobs.train", f"--config={os.path.join(directory, 'paper.py')}", f"--workdir={workdir}", *keys)
    with open(os.path.join(workdir, "report.json"), encoding="utf-8") as file:
        return float(json.load(file)["samples_per_second"])


def _run(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise JobError(f"{module} failed: {done.stderr}")


if __name__ == "__main__":
    cli.run(main, flags)
