"""Every model on one data set: test AUC over seeds with the trivial answers, parameters, and training speed.

    python -m benchmarks.zoo --data=kuairand --output=runs/zoo
    python -m benchmarks.zoo --data=census --output=runs/zoo --models=stem_net,mmoe --seeds=0

``kuairand`` is the bundled sample with its five binary tasks and its four features, ``census`` Census-Income as its
recipe makes it. Every model trains with the settings of the data set's shipped experiment, which
were chosen for STEM-Net, and stops once for all tasks (Single-Task once per task). A finished run is not trained again:
the same command continues where it was stopped.

--what=speed prints samples/s of each model's training step compared with STEM-Net's, in turns, without input and logs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import manifest as manifests
from pipelines import schema_yaml
from pipelines.manifest import Manifest
from stem_tf import configs, report
from stem_tf.configs.base import models
from stem_tf.workdir import Workdir
from stem_util import cli, owned
from stem_util.errors import UserError
from stem_util.files import write_json

flags = cli.Flags()

_DATA = flags.DEFINE_enum("data", "kuairand", ["kuairand", "census"], "Which data set.")
_OUTPUT = flags.DEFINE(cli.PATH, "output", "runs/zoo", "Where converted data and runs are kept.")
_MODELS = flags.DEFINE_list("models", [], "Which models, all if not given.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs.")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of the config, for all models.")
_WHAT = flags.DEFINE_enum("what", "auc", ["auc", "speed"], "What is measured.")
_STEPS = flags.DEFINE_integer("steps", 30, "Steps of each turn of --what=speed.", lower_bound=1)

_DATASETS = Path(__file__).parent.parent / "datasets"

CHAINS = {
    "kuairand": "long_view:click,comment:long_view,profile_enter:comment,like:profile_enter",
    "census": "income:never_married",
}
"""ESMM and AITM need an order of the tasks. Neither log has a natural one: this is the schema's."""

GIVES = {"kuairand": "like:click,comment:click,profile_enter:click", "census": "income:never_married"}

_EXPERIMENT = {"kuairand": "kuairand_sample", "census": "census_income"}


def config_of(model: str, manifest: Manifest, seed: int = 0) -> Any:
    """The data set's shipped experiment with another model; MMoEs get as many experts as STEM-Net has, T + 1."""
    overrides = [f"data.dir={manifest.data_dir}", f"model.name={model}", f"seed={seed}", "train.best=auto"]
    keys = models()[model].keys
    if "experts" in keys:
        overrides.append(f"model.experts={len(manifest.schema.tasks) + 1}")
    if "follows" in keys:
        overrides.append(f"model.follows={CHAINS[_DATA.value]}")
    if "gives" in keys:
        overrides.append(f"model.gives={GIVES[_DATA.value]}")
    if model == "sluice" and _DATA.value == "census":
        overrides.append("model.expert_units=256,256")  # its layers must have one width
    return configs.load(_EXPERIMENT[_DATA.value], [*overrides, *_SET.value])


def main(argv: Sequence[str]) -> None:
    del argv
    known = models()
    if unknown := [model for model in _MODELS.value if model not in known]:
        raise UserError(f"--models: no model '{unknown[0]}'. Models: {', '.join(known)}")
    chosen = _MODELS.value or list(known)
    output = Path(_OUTPUT.value)
    data = converted(_DATA.value, output)
    manifest = manifests.load(str(data))
    if _WHAT.value == "speed":
        _speed(chosen, manifest, output)
        return
    results: dict[str, list[dict[str, Any]]] = {}
    for model in chosen:
        for seed in _SEEDS.value:
            results.setdefault(model, []).append(_run(model, int(seed), manifest, output))
            print(f"{model}, seed {seed}: {_line(results[model][-1])}", file=sys.stderr, flush=True)
    print(_table(manifest, results))


def converted(data: str, output: Path) -> Path:
    """The data set's directory, converted before unless it is there."""
    directory = output / "data" / data
    if (directory / manifests.FILENAME).exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    if data == "census":
        job = ["pipelines.jobs.recipe", "census_income", f"--raw={_DATASETS / 'census_income'}"]
    else:
        whole = schema_yaml.load("kuairand_sample")
        binary = tuple(task for task in whole.tasks if task.type == "binary")
        path = output / "data" / "kuairand_binary.yaml"
        path.write_text(schema_yaml.dumps(dataclasses.replace(whole, tasks=binary)), encoding="utf-8")
        job = [
            "pipelines.jobs.convert",
            str(_DATASETS / "kuairand_sample" / "log.parquet"),
            f"--schema={path}",
            "--split=time",
            "--split_column=time_ms",
        ]
    subprocess.run([sys.executable, "-m", *job, f"--output={directory}"], check=True)
    return directory


def _run(model: str, seed: int, manifest: Manifest, output: Path) -> dict[str, Any]:
    """Trains one model with one seed and evaluates it on test, or reads what an earlier call found."""
    workdir = Workdir(output / f"{_DATA.value}-{model}-{seed}")
    done = workdir.path / "zoo.json"
    config = config_of(model, manifest, seed)
    values = json.loads(json.dumps(configs.flat(config)))
    if done.exists() and (found := json.loads(done.read_text()))["config"] == values:
        return dict(found)
    import tensorflow as tf

    from stem_tf import trained
    from stem_tf.evaluation import predictions, scoring, trivial
    from stem_tf.training.trainer import Trainer

    owned.check(workdir.path, owned.RUN)
    shutil.rmtree(workdir.path, ignore_errors=True)
    tf.keras.backend.clear_session()
    start = time.monotonic()
    with workdir.locked():
        workdir.prepare(config, manifest)
        trainer = Trainer(config, manifest, workdir, say=lambda line: None)
        trainer.run()
    best = trained.load(workdir, config, manifest, "best")
    predicted = scoring.predict(best.model, manifest, "test", config.data, desc="test")
    results = predictions.evaluate(predicted, manifest)
    answers = trivial.load(output / f"{_DATA.value}-trivial.npz", manifest, config.data)
    keys = [key for key in ("group", "item") if getattr(manifest.schema, key)]
    found = {
        "config": values,
        "auc": {task: metrics["auc"] for task, metrics in results.items()},
        "trivial": {
            key: trivial.compare(manifest.schema.tasks, predicted, answers.scores(key, predicted)) for key in keys
        },
        "epoch": best.epoch,
        "epochs": trainer.state.epoch,
        "parameters": trainer.parameters(),
        "samples_per_second": trainer.state.samples / trainer.state.seconds,
        "seconds": time.monotonic() - start,
    }
    write_json(done, found)
    return found


def _line(found: Mapping[str, Any]) -> str:
    aucs = ", ".join(f"{task} {report.number(auc)}" for task, auc in found["auc"].items())
    mean = report.number(float(np.mean(list(found["auc"].values()))))
    return f"{aucs}; mean {mean}; epoch {found['epoch']}, {found['seconds']:.0f} s"


def _table(manifest: Manifest, results: Mapping[str, list[dict[str, Any]]]) -> str:
    """Mean over the seeds and half the range, one line per model, then the trivial answers."""
    tasks = manifest.schema.task_names

    def cell(values: Sequence[float]) -> str:
        spread = (max(values) - min(values)) / 2
        return f"{report.number(float(np.mean(values)))} ±{report.number(spread)}"

    lines = []
    for model, runs in results.items():
        means = [float(np.mean([run["auc"][task] for task in tasks])) for run in runs]
        tables, network = runs[0]["parameters"]
        cells = [cell([run["auc"][task] for run in runs]) for task in tasks]
        lines.append([model, *cells, cell(means), f"{tables + network:,}", ""])
    for key, answer in next(iter(results.values()))[0]["trivial"].items():
        values = [answer[task] for task in tasks]
        column = getattr(manifest.schema, key)
        lines.append([f"per {column}", *map(report.number, values), report.number(float(np.mean(values))), "", ""])
    return report.table(["test AUC", *tasks, "mean", "parameters", ""], lines)


def _speed(chosen: Sequence[str], manifest: Manifest, output: Path) -> None:
    """Samples/s of each model's step on one batch in memory; each model takes turns with STEM-Net."""
    import tensorflow as tf

    from pipelines.batches.dataset import read_batches
    from stem_tf import models

    def turn(model: str) -> Callable[[], float]:
        config = config_of(model, manifest)
        built = models.build(config, manifest)
        reading: dict[str, Any] = {"batch_size": config.data.batch_size, "input_format": "blocks", "on_corrupt": "fail"}
        batch = next(iter(read_batches(manifest, "train", training=True, seed=0, epoch=0, start_step=0, **reading)))
        step = tf.function(built.train_step)
        for _ in range(3):
            step(batch)

        def measure() -> float:
            start = time.perf_counter()
            for _ in range(_STEPS.value):
                loss = step(batch)["loss"]
            float(loss)
            return float(_STEPS.value * config.data.batch_size / (time.perf_counter() - start))

        return measure

    stem_net, lines, found = turn("stem_net"), [], {}
    for model in chosen:
        other = turn(model)
        pairs = [(stem_net(), other()) for _ in range(3)]
        own = statistics.median(speed for _, speed in pairs)
        ratio = statistics.median(speed / reference for reference, speed in pairs)
        found[model] = {"samples_per_second": own, "ratio": ratio, "turns": pairs}
        lines.append([model, f"{own:,.0f}", f"{ratio:.2f}", ""])
    write_json(output / f"{_DATA.value}-speed.json", found)
    print(report.table(["model", "samples/s", "times STEM-Net's", ""], lines))


if __name__ == "__main__":
    cli.run(main, flags)
