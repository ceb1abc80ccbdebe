"""Test AUC of STEM-Net with each table optimizer: dense, deferred, lazy and row-wise.

    python -m benchmarks.quality --data=DIR --output=runs/quality
    python -m benchmarks.quality --replay

Without --data a log of users and items is generated: only ids, most of them rare, and two binary labels. Each run is
made by the real training job (experts 256-128, gates and towers 64, D = 16, batch 4096, lr 1e-3, patience 1), one per
mode, L2 and seed. A finished run is not trained again.

--replay gives the row gradients of a dense run (power-law ids, a decaying learning rate, active clipping) to the other
modes, and prints the distance of their tables from the dense one's, relative to its norm.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import manifest as manifests
from pipelines import schema_yaml
from pipelines.schema import Feature, Label, Schema, Task
from stem_tf import configs, report
from stem_tf.runtime import quieten_tensorflow
from stem_tf.workdir import Workdir
from stem_util import cli, owned
from stem_util.errors import JobError
from stem_util.files import write_json

flags = cli.Flags()

_DATA = flags.DEFINE(cli.PATH, "data", None, "Converted data; generated when not given.")
_OUTPUT = flags.DEFINE(cli.PATH, "output", "runs/quality", "Where runs (and generated data) are kept.")
_ROWS = flags.DEFINE_integer("rows", 800_000, "Rows of the generated log.", lower_bound=10_000)
_MODES = flags.DEFINE_list("modes", ["dense", "deferred", "lazy"], "config.optimizer.tables.")
_L2 = flags.DEFINE_list("l2", ["1e-6", "1e-4"], "config.optimizer.l2.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs.")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of the config, for all runs.")
_REPLAY = flags.DEFINE_bool("replay", False, "Tables given the same gradients instead of models.")
_STEPS = flags.DEFINE_integer("steps", 5000, "Steps of --replay.", lower_bound=2)
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")

_SETTINGS = ["model.expert_units=256,128", "model.gate_units=64", "model.tower_units=64"]


def main(argv: Sequence[str]) -> None:
    del argv
    quieten_tensorflow()
    figures = _replays() if _REPLAY.value else _runs()
    if _JSON.value:
        owned.write_figures(_JSON.value, figures)


def _runs() -> list[dict[str, Any]]:
    output = Path(_OUTPUT.value)
    data = _DATA.value or str(_generated(output))
    manifest = manifests.load(data)
    results = []
    for l2 in _L2.value:
        for seed in _SEEDS.value:
            for mode in _MODES.value:
                workdir = Workdir(output / f"{mode}-{l2}-{seed}")
                results.append({"mode": mode, "l2": l2, "seed": seed, **_run(mode, l2, seed, manifest, workdir)})
                last = results[-1]
                print(f"{mode}, L2 {l2}, seed {seed}: {last['test']:.4f}", file=sys.stderr, flush=True)
    rows = []
    for l2 in _L2.value:
        for mode in _MODES.value:
            of = [r for r in results if (r["mode"], r["l2"]) == (mode, l2)]
            tests = [r["test"] for r in of]
            epochs = [[r["validation"][i] for r in of if i < len(r["validation"])] for i in range(8)]
            cells = [report.number(statistics.mean(e)) if len(e) == len(of) else "" for e in epochs]
            spread = (max(tests) - min(tests)) / 2
            seconds = statistics.median(r["seconds"] for r in of)
            rows.append(
                [l2, mode, f"{report.number(statistics.mean(tests))} ±{report.number(spread)}", f"{seconds:.0f}"]
            )
            rows[-1] += cells
    print(f"{data}, mean over the tasks; seeds {', '.join(_SEEDS.value)}; seconds of training, evaluation left out")
    head = ["L2", "tables", "test AUC", "seconds", *(f"epoch {i}" for i in range(1, 9))]
    print(report.table(head, rows))
    return results


def _run(mode: str, l2: str, seed: str, manifest: manifests.Manifest, workdir: Workdir) -> dict[str, Any]:
    """Test AUC at the best epoch, validation AUC by epoch."""
    from stem_tf import trained
    from stem_tf.evaluation import metrics, predictions, scoring
    from stem_tf.training.trainer import Trainer

    done = workdir.path / "quality.json"
    if done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    experiment = workdir.path.parent / "experiment.py"
    experiment.parent.mkdir(parents=True, exist_ok=True)
    experiment.write_text("from stem_tf.configs.base import get_config\n", encoding="utf-8")
    overrides = [f"data.dir={manifest.data_dir}", f"optimizer.tables={mode}", f"optimizer.l2={l2}", f"seed={seed}"]
    config = configs.load(str(experiment), [*overrides, *_SETTINGS, *_SET.value])
    owned.check(workdir.path, owned.RUN)
    shutil.rmtree(workdir.path, ignore_errors=True)
    with workdir.locked():
        workdir.prepare(config, manifest)
        trainer = Trainer(config, manifest, workdir, say=lambda line: None)
        trainer.run()
    found = trained.load(workdir, config, manifest, "best")
    predicted = scoring.predict(found.model, manifest, "test", config.data, desc="test")
    test = metrics.mean_auc(predictions.evaluate(predicted, manifest))
    validation = [r["score"] for r in workdir.read_metrics() if r["kind"] == "validation"]
    result = {"test": test, "validation": validation, "seconds": trainer.state.seconds}
    write_json(done, result)
    return result


def _generated(output: Path) -> Path:
    """A log whose labels depend on the pair, converted."""
    data = output / "data"
    if (data / manifests.FILENAME).exists():
        return data
    output.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    users, items, rows = 20_000, 15_000, _ROWS.value
    user = (users * random.random(rows) ** 3).astype(np.int64)
    item = (items * random.random(rows) ** 3).astype(np.int64)
    columns: dict[str, Any] = {"user_id": pa.array(user), "item_id": pa.array(item)}
    of_user, of_item = random.normal(size=(users, 8)), random.normal(size=(items, 8))
    for name, rate in (("cart", -1.0), ("buy", -3.0)):
        mix = random.normal(size=(8, 8)) / 8
        logit = np.einsum("ri,ij,rj->r", of_user[user], mix, of_item[item]) + of_item[item, 0] / 2 + rate
        columns[name] = pa.array((random.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int64))
    with tempfile.TemporaryDirectory() as scratch:
        log, schema = Path(scratch) / "log.parquet", Path(scratch) / "schema.yaml"
        pq.write_table(pa.table(columns), log)
        features = tuple(Feature(f"{side}_id", "categorical", side, f"{side}_id", "int64") for side in ("user", "item"))
        tasks = tuple(Task(name, Label(name)) for name in ("cart", "buy"))
        schema.write_text(schema_yaml.dumps(Schema(name="pairs", features=features, tasks=tasks)), encoding="utf-8")
        arguments = [str(log), f"--schema={schema}", f"--output={data}", "--split=random", "--layouts=blocks"]
        job = subprocess.run(
            [sys.executable, "-m", "pipelines.jobs.convert", *arguments], capture_output=True, text=True, check=False
        )
    if job.returncode:
        raise JobError(f"pipelines.jobs.convert failed: {job.stderr}")
    return data


def _replays() -> list[dict[str, Any]]:
    """Distances of the tables of each mode from the dense one's, by L2 and step."""
    results = [figures for l2 in _L2.value for figures in _replay(float(l2))]
    print(f"{_STEPS.value:,} steps; distance from dense Adam's table, % of its norm")
    steps = sorted({r["step"] for r in results})
    rows = []
    for l2 in _L2.value:
        for mode in _MODES.value:
            of = [r for r in results if (r["mode"], r["l2"]) == (mode, float(l2))]
            if of:
                cells = [f"{100 * r['distance']:.2f}" for r in of]
                rows.append([l2, mode, *cells, f"{of[-1]['clipped']:.0%}", f"{of[-1]['scale_difference']:.0e}"])
    print(report.table(["L2", "tables", *(f"step {i:,}" for i in steps), "steps clipped", "scales differ by"], rows))
    return results


def _replay(l2: float) -> list[dict[str, Any]]:
    """Trains STEM-Net with dense Adam and gives each step's row gradients to every mode's own table."""
    import random as seeds

    import tensorflow as tf

    from stem_tf.layers.distinct import deduplicate
    from stem_tf.layers.embedding import Embeddings, Field
    from stem_tf.layers.transforms import InputTransform
    from stem_tf.models.ranking_model import RankingModel
    from stem_tf.models.stem_net import STEMNet
    from stem_tf.training import preparation
    from stem_tf.training.learning_rate import Schedule
    from stem_tf.training.preparation import Training
    from stem_tf.training.table_optimizers import TABLE_OPTIMIZERS

    seeds.seed(0)
    ids, batch_size, names = 30_000, 1024, ("user", "item")
    features = tuple(Feature(name, "categorical", "user", name, "int64") for name in names)
    tasks = tuple(Task(name, Label(name)) for name in ("cart", "buy"))
    hyper = STEMNet.Hyperparameters(expert_units=(64, 32), gate_units=(), tower_units=(32,))
    network = STEMNet([task.name for task in tasks], hyper)
    fields = [Field(name, rows=ids) for name in names]
    embeddings = Embeddings(fields, 16, network.tables, train_tables=False)
    model = RankingModel(tasks, InputTransform(features, {}), embeddings, network)
    model.build_weights()
    schedule = Schedule(1e-3, "cosine", warmup_steps=100, decay_steps=_STEPS.value, final_fraction=0.1)
    preparation.prepare(model, Training(schedule, "dense", l2=l2))
    differentiate = model.training_step.differentiate
    (packed,) = embeddings.groups
    optimizers = {"dense": model.table_optimizers[0]}
    for mode in _MODES.value:
        if mode != "dense":
            copy = Embeddings(fields, 16, network.tables, train_tables=False).groups[0]
            copy.table.assign(packed.table)
            optimizers[mode] = TABLE_OPTIMIZERS[mode](copy, l2, schedule, clips=True)
    clip_norm = tf.Variable(1e9)

    @tf.function(autograph=False)
    def train(batch: dict[str, Any], step: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        (positions,) = embeddings.ids(batch["inputs"])
        distinct, inverse = deduplicate(positions)
        spaces = {task.name: tf.constant(float(batch_size)) for task in tasks}
        found = differentiate(batch, [packed.look_up(positions)], spaces, tf.constant([0, 0]))
        by_row = tf.math.unsorted_segment_sum(found.looked_up[0], inverse, tf.size(distinct))
        scales = {}
        for mode, optimizer in optimizers.items():
            table = optimizer.gradient(optimizer.read(distinct, step, batch_size * 2), by_row)
            norm = tf.linalg.global_norm([found.network, table.values])
            scales[mode] = clip_norm / tf.maximum(norm, clip_norm)
            optimizer.apply(table._replace(values=table.values * scales[mode]), step + 1, scales[mode])
        model.network_optimizer.apply(found.network * scales["dense"], step + 1)
        return tf.linalg.global_norm([found.network]), scales

    random = np.random.default_rng(0)
    of = {name: random.normal(size=(ids, 4)) for name in names}
    norms, clipped, results = [], 0, []
    difference = dict.fromkeys(optimizers, 0.0)
    for step in range(_STEPS.value):
        drawn = {name: (ids * random.random(batch_size) ** 3).astype(np.int32) for name in names}
        affinity = (of["user"][drawn["user"]] * of["item"][drawn["item"]]).sum(axis=1)
        labels = {
            task.name: (random.random(batch_size) < 1 / (1 + np.exp(-affinity + shift))).astype(np.float32)
            for task, shift in zip(tasks, (0.0, 2.0), strict=True)
        }
        batch = {
            "inputs": {name: tf.constant(value) for name, value in drawn.items()},
            "labels": {name: tf.constant(value) for name, value in labels.items()},
            "weights": {task.name: tf.ones(batch_size) for task in tasks},
        }
        norm, scales = train(batch, tf.constant(step, tf.int64))
        norms.append(float(norm))
        if step + 1 == 200:  # from here on gradients are clipped: the larger half of the present ones
            clip_norm.assign(statistics.median(norms[100:]))
        clipped += float(scales["dense"]) < 1.0
        for mode, scale in scales.items():
            difference[mode] = max(difference[mode], abs(float(scale) / float(scales["dense"]) - 1.0))
        if (step + 1) % max(_STEPS.value // 5, 1) == 0:
            dense = packed.table.numpy()
            for mode, optimizer in optimizers.items():
                everything = tf.range(packed.rows)
                now = optimizer.read(everything, tf.constant(step + 1, tf.int64)).w.numpy().reshape(dense.shape)
                results.append(
                    {
                        "l2": l2,
                        "mode": mode,
                        "step": step + 1,
                        "distance": float(np.linalg.norm(now - dense) / np.linalg.norm(dense)),
                        "clipped": clipped / (step + 1),
                        "scale_difference": difference[mode],
                    }
                )
            print(f"L2 {l2}, step {step + 1:,} of {_STEPS.value:,}", file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    cli.run(main, flags)
