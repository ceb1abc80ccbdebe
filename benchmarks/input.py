"""Rows a second out of pipelines.input, with the shuffle and everything else that training has on.

    python -m benchmarks.input --rows=2000000

Generates rows of categorical features of 30,000 ids each, two labels and the three keys, writes them in both layouts,
and reads whole epochs: each case ``--repeats`` times, in turn, after one pass that is not timed. ``bare parse_example``
is what any reader of one tf.Example a row has to do: TFRecordDataset, batch, tf.io.parse_example, no shuffle.
The files are in the page cache: this measures the processor, not the disk. Rows per second of processor time (all
threads together) are what to compare when the machine has other work.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import tensorflow as tf
from absl import flags

from pipelines import cli, input, manifest, records, schema
from pipelines.tfrecord import Writer

_ROWS = flags.DEFINE_integer("rows", 2_000_000, "Rows of the epoch.", lower_bound=1)
_FEATURES = flags.DEFINE_integer("features", 8, "Categorical features of a row.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4096, "B.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Epochs of each case.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

_SHARD_ROWS = 250_000
_BLOCK_ROWS = 512


def main(argv: Sequence[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory(prefix="stem-benchmark-") as directory:
        data = generate(directory, _ROWS.value, _FEATURES.value)
        sizes = {x: sum(shard.bytes for shard in data.shards("train", x)) / _ROWS.value for x in manifest.LAYOUTS}
        figures = measure(data, _BATCH_SIZE.value, _REPEATS.value)
    report = {
        "rows": _ROWS.value,
        "features": _FEATURES.value,
        "batch_size": _BATCH_SIZE.value,
        "cores": len(os.sched_getaffinity(0)),
        "tensorflow": tf.__version__,
        "bytes_a_row": sizes,
        "epochs": figures,
    }
    print(f"{_ROWS.value:,} rows, {_FEATURES.value} features, batch {_BATCH_SIZE.value:,}, {report['cores']} cores")
    print(f"bytes a row: {', '.join(f'{layout} {size:.0f}' for layout, size in sizes.items())}")
    print(f"{'':24}{'median rows/s':>16}{'least':>12}{'most':>12}{'rows per CPU second':>22}")
    for case, epochs in figures.items():
        rates = [_ROWS.value / epoch["seconds"] for epoch in epochs]
        cpu = statistics.median(_ROWS.value / epoch["cpu_seconds"] for epoch in epochs)
        print(f"{case:24}{statistics.median(rates):>16,.0f}{min(rates):>12,.0f}{max(rates):>12,.0f}{cpu:>22,.0f}")
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def generate(directory: str, rows: int, features: int) -> manifest.Manifest:
    """Writes a train split of random rows in both layouts under ``directory``."""
    random = np.random.default_rng(0)
    names = [f"f{i}" for i in range(features)]
    shards: dict[str, list[manifest.Shard]] = {layout: [] for layout in manifest.LAYOUTS}
    for layout in manifest.LAYOUTS:
        os.makedirs(os.path.join(directory, layout))
    for start in range(0, rows, _SHARD_ROWS):
        n = min(_SHARD_ROWS, rows - start)
        columns = {f"feature:{name}": pa.array(random.integers(1, 30_000, n, np.int32)) for name in names}
        columns |= {f"label:{task}": pa.array((random.random(n) < 0.3).astype(np.float32)) for task in ("a", "b")}
        columns |= {f"key:{key}": pa.array(random.integers(-(2**63), 2**63 - 1, n)) for key in ("group", "item")}
        columns["key:row_id"] = pa.array(np.arange(start, start + n))
        batch = pa.record_batch(columns)
        for layout in manifest.LAYOUTS:
            path = os.path.join(layout, f"train-{len(shards[layout]):05}.tfrecord")
            with Writer(os.path.join(directory, path)) as writer:
                if layout == "rows":
                    messages = records.rows(batch)
                else:
                    messages = (message for _, message in records.blocks(batch, _BLOCK_ROWS))
                for message in messages:
                    writer.write(message)
            shards[layout].append(manifest.Shard(path, n, writer.records, writer.bytes, writer.sha256))

    described = schema.Schema(
        name="benchmark",
        features=tuple(schema.Feature(name, "categorical", "context", name, "int64") for name in names),
        tasks=tuple(schema.Task(task, schema.Label(task)) for task in ("a", "b")),
        group="group",
        item="item",
    )
    with open(os.path.join(directory, "schema.yaml"), "w", encoding="utf-8") as file:
        file.write(schema.dumps(described))
    manifest.save(
        manifest.Manifest(
            data_dir=directory,
            name="benchmark",
            seed=0,
            sources=(),
            split={},
            splits={"train": manifest.Split(rows, {}, {}, shards)},
            vocabularies={},
            numerics={},
        )
    )
    return manifest.load(directory)


def measure(data: manifest.Manifest, batch_size: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Time of each of ``repeats`` epochs (building the pipeline included) by case."""

    def batches(layout: str, training: bool) -> Callable[[int], tf.data.Dataset]:
        return lambda epoch: input.dataset(
            data, "train", batch_size=batch_size, layout=layout, training=training, epoch=epoch
        )

    def bare(epoch: int) -> tf.data.Dataset:
        del epoch
        spec = {f"feature:{f.name}": tf.io.FixedLenFeature([], tf.int64) for f in data.schema.features}
        spec |= {f"label:{task.name}": tf.io.FixedLenFeature([], tf.float32) for task in data.schema.tasks}
        spec |= {f"key:{key}": tf.io.FixedLenFeature([], tf.int64) for key in ("group", "item", "row_id")}
        lines = tf.data.TFRecordDataset([shard.path for shard in data.shards("train", "rows")])
        parsed = lines.batch(batch_size).map(
            lambda x: tf.io.parse_example(x, spec), num_parallel_calls=tf.data.AUTOTUNE
        )
        return parsed.prefetch(tf.data.AUTOTUNE)

    cases = {
        "blocks, training": batches("blocks", True),
        "blocks, evaluation": batches("blocks", False),
        "rows, training": batches("rows", True),
        "rows, evaluation": batches("rows", False),
        "bare parse_example": bare,
    }
    figures: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for epoch in range(repeats + 1):
        for case, make in cases.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in make(epoch):
                pass
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            if epoch:
                figures[case].append({"seconds": seconds, "cpu_seconds": cpu_seconds})
    return figures


if __name__ == "__main__":
    cli.run(main)
