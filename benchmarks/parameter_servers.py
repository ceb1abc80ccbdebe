"""Bytes that a training step on parameter servers sends, beside those of the rows that it reads.

    python -m benchmarks.parameter_servers
    python -m benchmarks.parameter_servers --servers=3 --batch=2048

Trains on the bundled sample in a cluster of processes on this machine, and reads the counters of their TCP connections
(``ss``, of iproute2) at two moments of the first epoch. Compared with: the distinct rows of the same batches, times
the bytes of a row and of its slots, times 2 (there and back). Slots stay on their server, so that less is sent.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import manifest as manifests
from stem_tf import configs, report
from stem_tf.jobs import launch
from stem_tf.workdir import Workdir
from stem_util import cli
from stem_util.errors import JobError

LOG = Path(__file__).parents[1] / "datasets" / "kuairand_sample" / "log.parquet"
FIRST, SECONDS = 30, 300
"""The step from which on bytes are counted; how long to wait for one."""

flags = cli.Flags()

_WORKERS = flags.DEFINE_integer("workers", 1, "Workers.", lower_bound=1)
_SERVERS = flags.DEFINE_integer("servers", 2, "Parameter servers.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 512, "Rows per step; an epoch has 33,462.", lower_bound=1, upper_bound=800)
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")


def main(argv: Sequence[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as scratch:
        data, run = f"{scratch}/data", Workdir(f"{scratch}/run")
        convert = ["--schema=kuairand_sample", "--split=random", f"--output={data}"]
        _job("pipelines.jobs.convert", str(LOG), *convert).wait()
        given = [f"data.dir={data}", f"data.batch_size={_BATCH.value}", "train.epochs=1", "train.log_every=1"]
        config = configs.load("kuairand_sample", [*given, "train.strategy=parameter_server"])
        last = manifests.load(data).rows("train") // _BATCH.value - 2
        ports = launch.free_ports(1 + _WORKERS.value + _SERVERS.value)
        chief, *others = (f"127.0.0.1:{port}" for port in ports)
        cluster = {"chief": [chief], "worker": others[: _WORKERS.value], "ps": others[_WORKERS.value :]}
        words = ["--config=kuairand_sample", f"--workdir={run.path}", "--config.train.strategy=parameter_server"]
        words += [f"--config.{word}" for word in given]
        tasks = [(kind, index) for kind, addresses in cluster.items() for index in range(len(addresses))]
        processes = {
            (kind, index): _job(
                "stem_tf.jobs.train", *words, config={"cluster": cluster, "task": {"type": kind, "index": index}}
            )
            for kind, index in tasks
        }
        try:
            serving = {process.pid for task, process in processes.items() if task[0] != "chief"}
            first, before = _step(run, FIRST), _bytes(serving, others)
            then, after = _step(run, last), _bytes(serving, others)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
        sent = (after - before) / (then - first)
        rows, row_bytes, network = _read(config, then)
    print("in bytes per step, from step", first, "to", then)
    figures = {
        "sent between workers and servers": sent,
        "the network's variables and their gradient": network,
        "the rest": sent - network,
        "distinct rows, and their gradients": 2 * row_bytes,
        "distinct rows x (row and slots) x 2": 6 * row_bytes,
    }
    cells = {name: f"{value:,.0f}" for name, value in figures.items()} | {"distinct rows": f"{rows:,.0f}"}
    print(report.table(["per step", ""], [[name, value] for name, value in cells.items()]))
    print(f"the rest / (distinct rows x (row and slots) x 2): {(sent - network) / (6 * row_bytes):.2f}")
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _job(module: str, *words: str, config: Any = None) -> subprocess.Popen[bytes]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | ({"TF_CONFIG": json.dumps(config)} if config else {})
    return subprocess.Popen([sys.executable, "-m", module, *words], env=environment, stdout=subprocess.DEVNULL)


def _step(run: Workdir, wanted: int) -> int:
    """Waits until a step is done; returns the last one that is."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done = max((record["step"] for record in run.read_metrics()), default=0)
        if done >= wanted:
            return done
        time.sleep(0.02)
    raise JobError(f"step {wanted} was not reached in {SECONDS} seconds")


def _bytes(processes: set[int], addresses: Sequence[str]) -> int:
    """Bytes sent and received so far over the connections that ``processes`` have opened to ``addresses``."""
    lines = subprocess.run(["ss", "-tinpHO"], check=True, capture_output=True, text=True).stdout.splitlines()
    total = 0
    for line in lines:
        peer, owner = line.split()[4].replace("[::ffff:", "").replace("]", ""), re.search(r"pid=(\d+)", line)
        if peer in addresses and owner is not None and int(owner[1]) in processes:
            total += sum(int(count) for count in re.findall(r"bytes_(?:acked|received):(\d+)", line))
    return total


def _read(config: Any, steps: int) -> tuple[float, float, int]:
    """What the batches of the steps counted read: distinct rows per step and their bytes, and the network's bytes."""
    import tensorflow as tf

    from pipelines.batches.dataset import read_batches
    from stem_tf import models

    manifest = manifests.load(config.data.dir)
    model = models.build(config, manifest, training=False)
    batches = read_batches(manifest, "train", training=True, seed=config.seed, **configs.reading(config.data))
    rows, size = [], []
    for batch in batches.skip(FIRST).take(steps - FIRST):
        ids = model.embeddings.ids(model.inputs(batch["features"]))
        counts = [0 if of_group is None else int(tf.unique(of_group).y.shape[0]) for of_group in ids]
        rows.append(sum(counts))
        size.append(sum(4 * group.width * n for group, n in zip(model.embeddings.groups, counts, strict=True)))
    variables = [*model.embeddings.trainable_variables, *model.network.trainable_variables]
    return float(np.mean(rows)), float(np.mean(size)), 2 * 4 * sum(v.shape.num_elements() for v in variables)


if __name__ == "__main__":
    cli.run(main, flags)
