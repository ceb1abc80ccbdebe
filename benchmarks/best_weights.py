"""Compares ways of train.best: one epoch for all tasks, parts of several epochs together, each task's own epoch.

    python -m benchmarks.best_weights --output=runs/best_weights
    python -m benchmarks.best_weights --data=DIR --set=optimizer.l2=1e-4 --output=runs/best_weights_of_mine

Without --data two logs are used: the bundled KuaiRand sample, and that of stem-recipe contradictory, whose two tasks
(28 % and 1.6 % positive) share 30 % of the variance of users' tastes. There is one run per seed, whose epochs are
combined in every way, so that all ways have the same weights.

``best rest`` is what train.best=own does: it takes the rest of the epoch that fits the tasks' own parts best, if that
beats ``together``. ``rest of the best`` takes the rest of the best epoch without a test, as earlier versions did.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines import manifest as manifests
from stem_tf import configs, report
from stem_tf.runtime import quieten_tensorflow
from stem_tf.workdir import Workdir
from stem_util import cli
from stem_util.errors import JobError
from stem_util.files import write_json

flags = cli.Flags()

_DATA = flags.DEFINE_string("data", None, "Converted data; the sample and a generated log when not given.")
_OUTPUT = flags.DEFINE_string("output", "runs/best_weights", "Where runs and data are kept.")
_ROWS = flags.DEFINE_integer("rows", 600_000, "Rows of the generated log.", lower_bound=10_000)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs.")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of the config, for all runs.")

WAYS = ("together", "rest of the best", "best rest", "by_task")
_SAMPLE = Path(__file__).parent.parent / "datasets" / "kuairand_sample" / "log.parquet"
_SETTINGS = [
    "data.batch_size=2048", "model.init_std=0", "model.expert_units=64", "optimizer.tables=deferred",
    "optimizer.learning_rate=1e-3", "optimizer.l2=1e-5",
]  # fmt: skip


def main(argv: Sequence[str]) -> None:
    del argv
    quieten_tensorflow()
    output = Path(_OUTPUT.value)
    if _DATA.value:
        logs = {Path(_DATA.value).name: (_DATA.value, _SETTINGS)}
    else:
        sample = (str(_SAMPLE), "--schema=kuairand_sample", "--split=time", "--split_column=time_ms")
        generated = ("contradictory", f"--rows={_ROWS.value}")
        logs = {
            "kuairand_sample": (_made(output / "kuairand_sample", "convert", *sample), []),
            "contradictory": (_made(output / "contradictory", "recipe", *generated), _SETTINGS),
        }
    rows = []
    for name, (data, settings) in logs.items():
        found = [_run(output / f"run-{name}-{seed}", data, [*settings, f"seed={seed}"]) for seed in _SEEDS.value]
        for split in ("validation", "test"):
            for way in WAYS:
                means = [of[way][split]["mean"] for of in found]
                spread = (max(means) - min(means)) / 2
                by_task = [statistics.mean(of[way][split][task] for of in found) for task in found[0][way][split]]
                cells = [report.number(statistics.mean(means)), report.number(spread)]
                rows.append([name, split, way, *cells, " ".join(map(report.number, by_task[1:]))])
    print(report.table(["log", "split", "best weights", "mean AUC", "±", "by task"], rows))


def _run(path: Path, data: str, settings: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """AUC by way, split, and task or ``mean``."""
    from stem_tf import models
    from stem_tf.evaluation import predictions, scoring
    from stem_tf.training import assembly
    from stem_tf.training.checkpoints import hold
    from stem_tf.training.trainer import Trainer

    done = path.with_suffix(".json")
    if done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    config = configs.load("kuairand_sample", [f"data.dir={data}", "train.best=own", *settings, *_SET.value])
    manifest, workdir = manifests.load(data), Workdir(path)
    shutil.rmtree(path, ignore_errors=True)
    with workdir.locked():
        workdir.prepare(config, manifest)
        trainer = Trainer(config, manifest, workdir, say=lambda line: None)
        trainer.run()
    model = models.build(config, manifest, training=False)
    state, choice = trainer.state, trainer.choice
    assert choice is not None
    best = {task: f"epoch-{own['best_epoch'] + 1}" for task, own in state.by_task.items()}
    whole = f"epoch-{state.best_epoch + 1}"

    def scored(tasks: dict[str, str], rest: str) -> dict[str, dict[str, float]]:
        with contextlib.ExitStack() as stack:
            held = {
                name: stack.enter_context(hold(str(workdir.best / name)))
                for name in dict.fromkeys([rest, *tasks.values()])
            }
            assembly.Parts(model, {task: held[name] for task, name in tasks.items()}).put(held[rest])
        found = {}
        for split in ("validation", "test"):
            results = predictions.evaluate(scoring.predict(model, manifest, split, config.data, desc=split), manifest)
            found[split] = {task: values["auc"] for task, values in results.items() if "auc" in values}
        return found

    ways = {
        "together": scored({}, whole),
        "rest of the best": scored(best, whole),
        "best rest": scored(choice.tasks, choice.rest),
    }
    epochs = {name: scored({}, name) for name in dict.fromkeys(best.values())}
    ways["by_task"] = {
        split: {task: epochs[best[task]][split][task] for task in aucs} for split, aucs in ways["together"].items()
    }
    for of_way in ways.values():
        for split, aucs in of_way.items():
            of_way[split] = {"mean": statistics.mean(aucs.values()), **aucs}
    write_json(done, ways)
    print(
        f"{path.name}: best {best}, whole {whole}, chosen {choice.tasks} with {choice.rest}",
        file=sys.stderr,
        flush=True,
    )
    return ways


def _made(data: Path, job: str, *arguments: str) -> str:
    """Converted data, made by a job unless they are there."""
    if not (data / manifests.FILENAME).exists():
        command = [sys.executable, "-m", f"pipelines.jobs.{job}", *arguments, f"--output={data}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise JobError(f"{job} failed: {done.stderr}")
    return str(data)


if __name__ == "__main__":
    cli.run(main, flags)
