"""Conversion speed and memory: generates Parquet logs, runs the real job on them, and measures it from outside.

    python -m benchmarks.convert --rows=1000000,5000000,20000000
    python -m benchmarks.convert --rows=1000000,5000000 --runners=local,direct

The log has 8 categorical int64 features whose values follow a power law, 2 binary labels and a time by which it is
sorted; it is divided at random, 80 / 10 / 10. Printed: rows/s of the whole job (starting processes, both passes,
flush to the disk), CPU seconds, peak memory of all its processes together (with and without mapped files, which the
system may drop), and the rank correlation of input and output place in train.
"""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import manifest, tfrecord
from stem_util import cli, owned

flags = cli.Flags()

_ROWS = flags.DEFINE_list("rows", ["1000000", "5000000", "20000000"], "Rows of the logs, one after another.")
_PROCESSES = flags.DEFINE_integer("processes", 2, "Worker processes.")
_RUNNERS = flags.DEFINE_list("runners", ["local"], "Runners that convert each log, one after another: local, direct.")
_LAYOUTS = flags.DEFINE_string("layouts", "blocks", "Layouts to write.")
_IDS = flags.DEFINE_integer("ids", 1_000_000, "Values that a feature can take.")
_DIRECTORY = flags.DEFINE(cli.PATH, "directory", None, "Where to work; a temporary directory by default.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the results to this file.")

_FEATURES = 8
_ROW_GROUP = 1 << 19

_SCHEMA = "\n".join(
    [
        "name: generated",
        "group: f0",
        "item: f1",
        "features:",
        *(f"  f{i}: {{kind: categorical, side: user, dtype: int64}}" for i in range(_FEATURES)),
        "tasks:",
        "  a: {label: {column: a}}",
        "  b: {label: {column: b}}",
    ]
)


def generate(path: str, rows: int, ids: int) -> None:
    """Writes a log. Feature values are spread over int64, so that nothing gains from small ones."""
    rng = np.random.default_rng(0)
    writer = None
    for start in range(0, rows, _ROW_GROUP):
        count = min(_ROW_GROUP, rows - start)
        columns = {"time": np.arange(start, start + count)}
        for i in range(_FEATURES):
            rank = (float(ids) ** rng.random(count)).astype(np.uint64)  # frequency of rank r: 1 / r
            columns[f"f{i}"] = (rank * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
        columns |= {name: rng.integers(0, 2, count, dtype=np.int8) for name in "ab"}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _tree(root: int) -> list[int]:
    """The process and its descendants."""
    pids = [root]
    for pid in pids:
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    pids += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return pids


def _memory(pid: int) -> tuple[int, int]:
    """(all, anonymous) bytes, pages shared by several processes divided among them.

    All includes mapped input and scratch files, which the system may drop.
    """
    size = {"Pss:": 0, "Pss_Anon:": 0}
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for name, value, *_ in (line.split() for line in file):
                if name in size:
                    size[name] = int(value) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return size["Pss:"], size["Pss_Anon:"]


def measure(command: list[str]) -> tuple[float, int, int]:
    """Runs a command: (seconds, peak bytes, peak anonymous bytes), of all its processes together."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    everything = anonymous = 0
    while process.poll() is None:
        sizes = [_memory(pid) for pid in _tree(process.pid)]
        everything = max(everything, sum(size for size, _ in sizes))
        anonymous = max(anonymous, sum(size for _, size in sizes))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return time.monotonic() - started, everything, anonymous


def rank_correlation(done: manifest.Manifest) -> float:
    """Of row_id and place among the train records."""
    parts = []
    for shard in done.shards("train", "blocks"):
        for _, payload in tfrecord.scan(shard.path):
            feature = tfrecord.Example.FromString(payload).features.feature
            parts.append(np.frombuffer(feature["key:row_id"].bytes_list.value[0], "<i8"))
    ranks = np.argsort(np.argsort(np.concatenate(parts)))
    return float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])


def convert(rows: int) -> Iterator[dict[str, Any]]:
    """Converts a log of so many rows with each runner; what was measured."""
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as directory:
        log, schema, output = (os.path.join(directory, name) for name in ("log.parquet", "schema.yaml", "data"))
        generate(log, rows, _IDS.value)
        with open(schema, "w", encoding="utf-8") as file:
            file.write(_SCHEMA)
        for runner in _RUNNERS.value:
            workers = {"local": f"--processes={_PROCESSES.value}"}
            workers["direct"] = f"--runner=direct --beam_args=--direct_num_workers={_PROCESSES.value}"
            command = [sys.executable, "-m", "pipelines.jobs.convert", log, f"--schema={schema}", f"--output={output}"]
            command += ["--split=random", f"--layouts={_LAYOUTS.value}", "--overwrite", *workers[runner].split()]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds, everything, anonymous = measure(command)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = manifest.load(output)
            yield {
                "rows": rows,
                "runner": runner,
                "seconds": round(seconds, 2),
                "rows_per_second": round(rows / seconds),
                "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
                "peak_bytes": everything,
                "peak_anonymous_bytes": anonymous,
                "rank_correlation": rank_correlation(done) if "blocks" in _LAYOUTS.value else None,
                "distinct": done.vocabularies["f0"].distinct,
                "log_bytes": os.path.getsize(log),
                "processes": _PROCESSES.value,
                "layouts": _LAYOUTS.value,
            }


def main(argv: Sequence[str]) -> None:
    del argv
    results = []
    print("      rows  runner  seconds      rows/s  CPU seconds  peak MB  without files  rank correlation", flush=True)
    for result in itertools.chain.from_iterable(map(convert, map(int, _ROWS.value))):
        results.append(result)
        correlation = "-" if result["rank_correlation"] is None else f"{result['rank_correlation']:.4f}"
        print(
            f"{result['rows']:>10,}{result['runner']:>8}{result['seconds']:>9}{result['rows_per_second']:>12,}{result['cpu_seconds']:>13}"
            f"{result['peak_bytes'] / 1e6:>9,.0f}{result['peak_anonymous_bytes'] / 1e6:>15,.0f}{correlation:>18}",
            flush=True,
        )
    if _JSON.value:
        owned.write_figures(_JSON.value, results)


if __name__ == "__main__":
    cli.run(main, flags)
