"""Speed of a training step by table size, batch, tasks, experts, precision and optimizer, and of plain Keras.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --group='rows=240k; rows=24M' --group='rows=2.4M; rows=2.4M,keras'

STEM-Net with 8 categorical features, whose ids have power-law popularity, on 8 batches in memory. benchmarks/input.py
measures the input, and benchmarks/train.py compares the whole job with its bare step. Cases of a group take turns in
one process and are compared with the group's first case. A case is KEY=VALUE[,KEY=VALUE]: rows (of all tables), batch,
tasks, K1, K2, precision (float32, bfloat16), tables, slots, xla, and ``keras``: the same network over one Embedding per
feature and table, with tf_keras' own Adam and no L2.

Tables are as in the middle of a run: the last step of a row is up to 3,000 steps ago, and for most rows long ago.

--profile=DIR records one case with tf.profiler, for TensorBoard, and prints where its time goes.
"""

from __future__ import annotations

import collections
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import manifest as manifests
from pipelines import schema_yaml
from pipelines.schema import Feature, Label, Schema, Task
from stem_tf import configs, report
from stem_tf.runtime import quieten_tensorflow
from stem_util import cli, owned
from stem_util.errors import JobError, UserError, did_you_mean

GROUPS = (
    "rows=240k; rows=240k,keras; rows=240k,tables=lazy; rows=240k,tables=dense; rows=240k,tables=adagrad",
    "rows=240k; rows=240k,slots=bfloat16; rows=240k,slots=rowwise",
    "rows=240k; rows=240k,xla=network; rows=240k,xla=step",
    "rows=240k,precision=bfloat16; rows=240k; rows=240k,precision=bfloat16,tables=lazy",
    "rows=2.4M; rows=2.4M,keras; rows=2.4M,precision=bfloat16",
    "rows=240k; rows=24M",
    "rows=240k,tables=lazy; rows=24M,tables=lazy",
    "rows=240k; rows=240k,batch=1024; rows=240k,batch=16384",
    "rows=240k; rows=240k,tasks=4; rows=240k,K1=4; rows=240k,K2=8; rows=240k,K2=8,precision=bfloat16",
)

flags = cli.Flags()

_GROUP = flags.DEFINE_multi_string("group", list(GROUPS), "Cases to compare, separated by ';'. May be repeated.")
_STEPS = flags.DEFINE_integer("steps", 8, "Steps of a turn.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 5, "Turns of each case.", lower_bound=1)
_UNITS = flags.DEFINE_string("units", "512,512,512", "Widths of the experts' layers.")
_PROFILE = flags.DEFINE(cli.PATH, "profile", None, "Directory of a tf.profiler trace of the first case.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")
_ONE = flags.DEFINE(cli.PATH, "one", None, "(Of a process that measures one group: where its figures go.)")

_FEATURES = [f"f{i}" for i in range(8)]
_DIM, _STEP = 16, 3000
CASE = {
    "rows": "240k",
    "batch": "4096",
    "tasks": "2",
    "K1": "1",
    "K2": "1",
    "precision": "float32",
    "tables": "deferred",
    "slots": "float32",
    "xla": "off",
    "keras": "",
}


def main(argv: Sequence[str]) -> None:
    del argv
    groups = [[_case(text) for text in group.split(";")] for group in _GROUP.value]
    if _ONE.value or _PROFILE.value:
        quieten_tensorflow()
        figures = _measure(groups[0])
        if _ONE.value:
            Path(_ONE.value).write_text(json.dumps(figures), encoding="utf-8")
        return
    results = []
    for group in _GROUP.value:
        # One process per group, so that memory that one group has freed does not help the next.
        with tempfile.NamedTemporaryFile() as file:
            options = [f"--{flag.name}={flag.value}" for flag in (_STEPS, _TURNS, _UNITS)]
            command = [
                sys.executable,
                "-m",
                "benchmarks.train_step",
                f"--group={group}",
                f"--one={file.name}",
                *options,
            ]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise JobError(f"{group}: {done.stderr[-2000:]}")
            figures = json.loads(Path(file.name).read_text(encoding="utf-8"))
        results.append(figures)
        print(f"{_table(figures)}\n", flush=True)
    print(f"{len(os.sched_getaffinity(0))} cores; experts {_UNITS.value}, {len(_FEATURES)} features, D = {_DIM}")
    if _JSON.value:
        owned.write_figures(_JSON.value, results)


def _case(text: str) -> dict[str, str]:
    """A case's settings, its name among them."""
    case = dict(CASE)
    for part in text.strip().split(","):
        key, _, value = part.partition("=")
        if key not in case:
            raise UserError(f"--group: no key '{key}'{did_you_mean(key, case) or '.'} Keys: {', '.join(case)}")
        case[key] = value or "yes"
    return case | {"name": text.strip(), "units": _UNITS.value}


def _number(text: str) -> int:
    units = {"k": 1_000, "M": 1_000_000}
    return round(float(text[:-1]) * units[text[-1]]) if text[-1] in units else int(text)


def _table(figures: list[dict[str, Any]]) -> str:
    first = figures[0]["rates"]
    lines = []
    for figure in figures:
        ratio = statistics.median(a / b for a, b in zip(figure["rates"], first, strict=True))
        rate, low, high = statistics.median(figure["rates"]), min(figure["rates"]), max(figure["rates"])
        lines.append(
            [
                figure["name"],
                f"{rate:,.0f}",
                f"{low:,.0f} - {high:,.0f}",
                f"{figure['cpu']:.0f}",
                f"{ratio:.2f}",
                f"{figure['table_mb']:,.0f}",
                f"{figure['distinct']:,.0f}",
            ]
        )
    head = ["case", "samples/s", "least - most", "CPU us a sample", "times first", "tables + slots MB", "distinct rows"]
    return report.table(head, lines)


def _measure(group: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Rates of every turn of every case, in samples/s."""
    figures: list[dict[str, Any]] = []
    turns: list[Callable[[], None]] = []
    for case in group:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        made = batches(case)
        step, table_mb = _keras(case) if case["keras"] else ours(case)
        step(made[0])
        distinct = [sum(len(np.unique(ids)) for ids in batch["features"].values()) for batch in made]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        figures.append(
            {"name": case["name"], "rates": [], "cpu": 0.0, "table_mb": table_mb, "peak_mb": (peak - before) / 1024}
        )
        figures[-1]["distinct"] = statistics.mean(distinct)
        turns.append(_turn(step, made, case, figures[-1]))
    if _PROFILE.value:
        _profile(turns[0], _PROFILE.value)
        return figures
    cpu: list[list[float]] = [[] for _ in group]
    for _ in range(_TURNS.value):
        for turn, seconds in zip(turns, cpu, strict=True):
            start = time.process_time()
            turn()
            seconds.append(time.process_time() - start)
    for case, figure, seconds in zip(group, figures, cpu, strict=True):
        figure["cpu"] = 1e6 * statistics.median(seconds) / (_STEPS.value * int(case["batch"]))
    return figures


def _turn(
    step: Callable[[Any], Any], batches: list[Any], case: dict[str, str], figure: dict[str, Any]
) -> Callable[[], None]:
    def turn() -> None:
        start = time.perf_counter()
        for i in range(_STEPS.value):
            loss = step(batches[i % len(batches)])
        float(loss)
        figure["rates"].append(_STEPS.value * int(case["batch"]) / (time.perf_counter() - start))

    return turn


def _ids(case: dict[str, str]) -> int:
    """Ids of each feature."""
    return _number(case["rows"]) // len(_FEATURES)


def batches(case: dict[str, str]) -> list[Any]:
    """8 batches in memory."""
    import tensorflow as tf

    random, size = np.random.default_rng(0), int(case["batch"])
    tasks = [f"t{i}" for i in range(int(case["tasks"]))]
    # The cube of a uniform draw: a tenth of the ids has almost half of the rows.
    return [
        {
            "features": {f: tf.constant((_ids(case) * random.random(size) ** 3).astype(np.int32)) for f in _FEATURES},
            "labels": {t: tf.constant((random.random(size) < 0.3).astype(np.float32)) for t in tasks},
            "weights": {t: tf.ones(size) for t in tasks},
        }
        for _ in range(8)
    ]


def _manifest(case: dict[str, str], directory: str) -> manifests.Manifest:
    described = Schema(
        name="benchmark",
        features=tuple(Feature(f, "categorical", "user", f, "int64") for f in _FEATURES),
        tasks=tuple(Task(f"t{i}", Label(f"t{i}")) for i in range(int(case["tasks"]))),
    )
    Path(directory, "schema.yaml").write_text(schema_yaml.dumps(described), encoding="utf-8")
    vocabularies = {f: manifests.Vocabulary(_ids(case) - 2, _ids(case) - 2) for f in _FEATURES}
    made = manifests.Manifest(directory, "benchmark", 0, (), {}, {}, vocabularies, {})
    assert made.schema  # read while the directory exists
    return made


def _config(case: dict[str, str], directory: str) -> Any:
    experiment = Path(directory, "paper.py")
    experiment.write_text("from stem_tf.configs.base import get_config\n", encoding="utf-8")
    overrides = [
        f"model.expert_units={case['units']}",
        f"model.task_experts={case['K1']}",
        f"model.shared_experts={case['K2']}",
        f"data.batch_size={case['batch']}",
        f"optimizer.tables={case['tables']}",
        f"train.precision={'mixed_bfloat16' if case['precision'] == 'bfloat16' else 'float32'}",
        f"train.xla={case['xla']}",
    ]
    slots = [f"optimizer.slots={case['slots']}"] if case["slots"] != "float32" else []
    return configs.load(str(experiment), [*overrides, *slots])


def model(case: dict[str, str]) -> Any:
    """The model of a case."""
    from stem_tf import models

    with tempfile.TemporaryDirectory() as directory:
        return models.build(_config(case, directory), _manifest(case, directory))


def ours(case: dict[str, str]) -> tuple[Callable[[Any], Any], float]:
    """The training step, which returns the loss of a batch, and the megabytes of its tables and slots."""
    import tensorflow as tf

    made = model(case)
    (optimizer,) = made.table_optimizers
    if optimizer.defers:
        made.global_step.assign(_STEP)
        last = optimizer.slots[-1]
        last.assign(np.random.default_rng(0).integers(0, _STEP, last.shape[0]).astype(np.int32))
        optimizer.sums.assign(np.repeat(np.arange(optimizer.sums.shape[0])[:, np.newaxis], 2, axis=1))  # never clipped
    train = tf.function(made.train_step)
    size = sum(v.shape.num_elements() * v.dtype.size for v in (optimizer.table, *optimizer.slots))
    return lambda batch: train(batch)["loss"], size / 1e6


def _keras(case: dict[str, str]) -> tuple[Callable[[Any], Any], float]:
    """One Embedding per feature and table, the same network, tf_keras' Adam."""
    import tensorflow as tf

    from stem_tf.layers.embedding import SHARED, task_table
    from stem_tf.models import precision
    from stem_tf.models.stem_net import STEMNet

    tasks = [f"t{i}" for i in range(int(case["tasks"]))]
    tables = [*map(task_table, tasks), SHARED]
    units = tuple(map(int, case["units"].split(",")))
    with precision("mixed_bfloat16" if case["precision"] == "bfloat16" else "float32"):
        k1, k2 = int(case["K1"]), int(case["K2"])
        network = STEMNet(tasks, STEMNet.Hyperparameters(expert_units=units, task_experts=k1, shared_experts=k2))
    embeddings = {t: [tf.keras.layers.Embedding(_ids(case), _DIM, dtype="float32") for _ in _FEATURES] for t in tables}
    optimizer = tf.keras.optimizers.Adam(1e-3)

    @tf.function
    def train(batch: Any) -> Any:
        with tf.GradientTape() as tape:
            h = {
                table: tf.concat([layer(batch["features"][f]) for layer, f in zip(of, _FEATURES, strict=True)], axis=1)
                for table, of in embeddings.items()
            }
            outputs = network(h, training=True)
            losses = [
                tf.reduce_mean(
                    tf.nn.sigmoid_cross_entropy_with_logits(batch["labels"][task], tf.cast(outputs[task], tf.float32))
                )
                for task in tasks
            ]
            loss = tf.add_n(losses)
        layers = [*(layer for of in embeddings.values() for layer in of), network]
        variables = [variable for layer in layers for variable in layer.trainable_variables]
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    return train, 3 * 4 * _ids(case) * len(_FEATURES) * _DIM * len(tables) / 1e6


def _profile(turn: Callable[[], None], directory: str) -> None:
    """Records a turn; prints the operations that take most of the threads' time."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    turn()
    tf.profiler.experimental.start(directory)
    turn()
    tf.profiler.experimental.stop()
    path = max(Path(directory).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
    total: collections.Counter[str] = collections.Counter()
    for plane in space.planes:
        for line in plane.lines:
            ends: list[tuple[int, str]] = []  # of the operations that are open
            for event in sorted(line.events, key=lambda e: (e.offset_ps, -e.duration_ps)):
                name, _, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                while ends and ends[-1][0] <= event.offset_ps:
                    ends.pop()
                # "gradients/mlp/MatMul_1:MatMul", not the functions around it or "Executor::Run".
                if name and kind[:1].isupper() and kind != "Run" and not name.endswith(":"):
                    total[kind] += event.duration_ps
                    if ends:
                        total[ends[-1][1]] -= event.duration_ps
                    ends.append((event.offset_ps + event.duration_ps, kind))
    every = sum(total.values())
    rows = [[kind, f"{ps / 1e9 / _STEPS.value:.1f}", f"{ps / every:.1%}"] for kind, ps in total.most_common(20)]
    print(report.table(["operation", "ms a step", "share"], rows))
    print(f"trace for TensorBoard: {directory}")


if __name__ == "__main__":
    cli.run(main, flags)
