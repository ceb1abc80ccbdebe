"""Rows per second of the input pipeline, with the shuffle and everything else that training uses.

    python -m benchmarks.input --rows=2000000

Generates a Parquet log of categorical features of 30,000 ids each, two labels and two keys, converts it to ``blocks``
and a quarter of it, since they are slow, to ``rows``, and reads whole epochs of the three sources: each case
``--repeats`` times, in turn, after one pass that is not timed. ``bare parse_example`` is the least work of any reader
of one tf.Example per row: TFRecordDataset, batch, tf.io.parse_example, no shuffle. An epoch of ``parquet`` includes the
start of its processes.
The files are in the page cache: this measures the processor, not the disk. Rows per second of processor time (all
threads and processes together) can be compared even if the machine has other work. The last column is the share of a
training step's time that reading its rows takes, for a rate that ``benchmarks/train.py`` measured.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from pipelines import manifest
from pipelines.batches.dataset import read_batches
from pipelines.convert.conversion import convert
from pipelines.convert.options import Options
from pipelines.schema import Feature, Label, Schema, Task
from stem_util import cli, owned

flags = cli.Flags()

_ROWS = flags.DEFINE_integer("rows", 2_000_000, "Rows of the epoch.", lower_bound=1)
_FEATURES = flags.DEFINE_integer("features", 8, "Categorical features of a row.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4096, "B.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Epochs of each case.", lower_bound=1)
_STEP = flags.DEFINE_float(
    "step_samples_per_second", 20_000, "What a training step needs, from benchmarks/train.", lower_bound=1
)
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")

_ROW_GROUP_ROWS = 250_000


def main(argv: Sequence[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory(prefix="stem-benchmark-") as directory:
        data = generate(directory, _ROWS.value, _FEATURES.value)
        sizes = {
            layout: sum(shard.bytes for shard in of.shards("train", layout)) / of.rows("train")
            for layout, of in data.items()
            if layout in manifest.LAYOUTS
        }
        figures = measure(data, _BATCH_SIZE.value, _REPEATS.value)
    report = {
        "rows": _ROWS.value,
        "features": _FEATURES.value,
        "batch_size": _BATCH_SIZE.value,
        "cores": len(os.sched_getaffinity(0)),
        "tensorflow": tf.__version__,
        "step_samples_per_second": _STEP.value,
        "bytes_a_row": sizes,
        "epochs": figures,
    }
    print(f"{_ROWS.value:,} rows, {_FEATURES.value} features, batch {_BATCH_SIZE.value:,}, {report['cores']} cores")
    print(f"bytes a row: {', '.join(f'{layout} {size:.0f}' for layout, size in sizes.items())}")
    step = f"of a step at {_STEP.value:,.0f}/s"
    print(f"{'':24}{'median rows/s':>16}{'least':>12}{'most':>12}{'rows per CPU second':>22}{step:>26}")
    for case, epochs in figures.items():
        rates = [epoch["rows"] / epoch["seconds"] for epoch in epochs]
        cpu = statistics.median(epoch["rows"] / epoch["cpu_seconds"] for epoch in epochs)
        median = statistics.median(rates)
        share = _STEP.value / median
        print(f"{case:24}{median:>16,.0f}{min(rates):>12,.0f}{max(rates):>12,.0f}{cpu:>22,.0f}{share:>26.1%}")
    if _JSON.value:
        owned.write_figures(_JSON.value, report)


def generate(directory: str, rows: int, features: int) -> dict[str, manifest.Manifest]:
    """Writes a log of random rows under ``directory`` and converts it, all of it to train; by input format."""
    random = np.random.default_rng(0)
    names = [f"f{i}" for i in range(features)]
    columns = {name: random.integers(1, 30_000, rows) for name in (*names, "group", "item")}
    columns |= {task: (random.random(rows) < 0.3).astype(np.int8) for task in ("a", "b")}
    log = pa.table(columns)
    described = Schema(
        name="benchmark",
        features=tuple(Feature(name, "categorical", "context", name, "int64") for name in names),
        tasks=tuple(Task(task, Label(task)) for task in ("a", "b")),
        group="group",
        item="item",
    )

    def converted(layout: str, part: pa.Table) -> manifest.Manifest:
        path = os.path.join(directory, f"{layout}.parquet")
        pq.write_table(part, path, row_group_size=_ROW_GROUP_ROWS)
        options = Options(
            schema=described,
            output=os.path.join(directory, layout),
            given={"train": path},
            layouts=(layout,),
            processes=len(os.sched_getaffinity(0)),
        )
        return convert(options)

    blocks = converted("blocks", log)
    return {"blocks": blocks, "rows": converted("rows", log.slice(0, -(-rows // 4))), "parquet": blocks}


def measure(data: dict[str, manifest.Manifest], batch_size: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Rows and time of each of ``repeats`` epochs (building the pipeline included) by case."""

    def batches(input_format: str, training: bool) -> Callable[[int], tf.data.Dataset]:
        return lambda epoch: read_batches(
            data[input_format],
            "train",
            batch_size=batch_size,
            input_format=input_format,
            training=training,
            epoch=epoch,
        )

    def bare(epoch: int) -> tf.data.Dataset:
        del epoch
        of = data["rows"]
        spec = {f"feature:{f.name}": tf.io.FixedLenFeature([], tf.int64) for f in of.schema.features}
        spec |= {f"label:{task.name}": tf.io.FixedLenFeature([], tf.float32) for task in of.schema.tasks}
        spec |= {f"key:{key}": tf.io.FixedLenFeature([], tf.int64) for key in ("group", "item", "row_id")}
        lines = tf.data.TFRecordDataset([shard.path for shard in of.shards("train", "rows")])
        parsed = lines.batch(batch_size).map(
            lambda x: tf.io.parse_example(x, spec), num_parallel_calls=tf.data.AUTOTUNE
        )
        return parsed.prefetch(tf.data.AUTOTUNE)

    cases = {
        f"{source}, {'training' if training else 'evaluation'}": batches(source, training)
        for source in manifest.INPUT_FORMATS
        for training in (True, False)
    } | {"bare parse_example": bare}
    figures: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for epoch in range(repeats + 1):
        for case, make in cases.items():
            start, cpu_start = time.perf_counter(), _cpu_seconds()
            for _ in make(epoch):
                pass
            seconds = time.perf_counter() - start
            time.sleep(0.2)  # processes are counted when they have ended
            cpu_seconds = _cpu_seconds() - cpu_start
            if epoch:
                rows = data[case.split(",")[0] if "," in case else "rows"].rows("train")
                figures[case].append({"rows": rows, "seconds": seconds, "cpu_seconds": cpu_seconds})
    return figures


def _cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    cli.run(main, flags)
