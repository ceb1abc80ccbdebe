"""AUC by day of a model that goes on, of one that is trained from scratch on all days so far, and of a frozen one.

    python -m benchmarks.every_day --output=runs/every_day_benchmark
    python -m benchmarks.every_day --log=LOG.parquet --date=date --schema=my.yaml --config=my.py --output=DIR

The log is cut by the values of the column --date; the first day holds all but the last --days - 1 of them. Every model
is measured on all rows of a day before it learns them. Validation is a random tenth of what a model is trained on.
Every step is an ordinary job; one that is done is not done again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stem_tf import report
from stem_tf.evaluation import metrics
from stem_util import cli
from stem_util.errors import JobError
from stem_util.files import write_json

flags = cli.Flags()

_LOG = flags.DEFINE(cli.PATH, "log", "datasets/kuairand_sample/log.parquet", "A Parquet log.")
_DATE = flags.DEFINE_string("date", "date", "The column that the log is cut by.")
_SCHEMA = flags.DEFINE_string("schema", "kuairand_sample", "The log's schema.")
_CONFIG = flags.DEFINE_string("config", "kuairand_sample", "The experiment.")
_KEYS = flags.DEFINE_list("keys", [], "Config keys of all runs, KEY=VALUE.")
_GOING_ON = flags.DEFINE_list("going_on", [], "Config keys of the runs that go on, KEY=VALUE.")
_OUTPUT = flags.DEFINE(cli.PATH, "output", "runs/every_day_benchmark", "Directory for logs, data and runs.")
_DAYS = flags.DEFINE_integer("days", 8, "How many days there are; the last is only measured on.", lower_bound=3)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each kind.", lower_bound=1)
_JSON = flags.DEFINE(cli.PATH, "json", None, "Where to write the figures.")

SCRATCH, GOES_ON, FROZEN = "from scratch", "goes on", "frozen"
ARMS = (SCRATCH, GOES_ON, FROZEN)
Figures = dict[tuple[int, str, int], tuple[float, float]]
"""By day, arm and seed: the mean AUC on the day, and the seconds that its training took."""


def main(argv: Sequence[str]) -> None:
    del argv
    output = Path(_OUTPUT.value)
    logs = _cut(output / "logs")
    days = [path.stem for path in logs]
    figures: Figures = {}
    for day in range(1, len(logs)):
        first = _converted(output / "first", logs[:1], logs[1])
        whole = grown = first
        if day > 1:
            whole = _converted(output / f"whole-{day}", logs[:day], logs[day])
            before = output / f"grown-{day - 1}" if day > 2 else first
            grown = _converted(output / f"grown-{day}", logs[day - 1 : day], logs[day], before)
        for seed in range(_SEEDS.value):
            frozen = last = fresh = _run(output / f"run-first-{seed}", first, seed)
            if day > 1:
                last = output / f"run-grown-{day - 1}-{seed}" if day > 2 else frozen
                last = _run(output / f"run-grown-{day}-{seed}", grown, seed, last)
                fresh = _run(output / f"run-whole-{day}-{seed}", whole, seed)
            figures[day, SCRATCH, seed] = _evaluated(fresh), _seconds(fresh)
            figures[day, GOES_ON, seed] = _evaluated(last), _seconds(last)
            figures[day, FROZEN, seed] = _of_export(frozen, output / f"served-{seed}", logs[day], fresh), 0.0
        print(_table({key: of for key, of in figures.items() if key[0] == day}, days), flush=True)
    print(f"\n{_table(figures, days)}")
    if _JSON.value:
        write_json(_JSON.value, [[days[day], arm, seed, *of] for (day, arm, seed), of in figures.items()])


def _cut(folder: Path) -> list[Path]:
    """Writes a file for each day."""
    table = pq.read_table(_LOG.value)
    dates = sorted(table[_DATE.value].unique().to_pylist())
    cut = len(dates) - _DAYS.value + 1
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for group in [dates[:cut], *([date] for date in dates[cut:])]:
        paths.append(folder / f"{group[-1]}.parquet")
        if not paths[-1].exists():
            pq.write_table(
                table.filter(pc.is_in(table[_DATE.value], pc.cast(group, table[_DATE.value].type))), paths[-1]
            )
    return paths


def _job(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise JobError(f"{module} {' '.join(arguments)}: {done.stderr.strip()}")


def _converted(output: Path, train: Sequence[Path], test: Path, before: Path | None = None) -> Path:
    """Converts logs to train on, with the next day's as test."""
    if not output.exists():
        given = [f"--train={','.join(map(str, train))}", "--validation_share=.1", f"--test={test}"]
        more = [f"--extend={before}"] if before else []
        _job("pipelines.jobs.convert", *given, f"--schema={_SCHEMA.value}", f"--output={output}", *more)
    return output


def _run(workdir: Path, data: Path, seed: int, before: Path | None = None) -> Path:
    """Trains a run; one that is finished only says so."""
    if not (workdir / "report.json").exists():
        keys = [*_KEYS.value, *(_GOING_ON.value if before else []), f"data.dir={data}", f"seed={seed}"]
        words = [f"--config={_CONFIG.value}", f"--workdir={workdir}", *(f"--config.{key}" for key in keys)]
        started = time.monotonic()
        _job("stem_tf.jobs.train", *words, *([f"--from={before}"] if before else []))
        write_json(workdir / "seconds.json", {"seconds": time.monotonic() - started})
    return workdir


def _seconds(workdir: Path) -> float:
    return float(json.loads((workdir / "seconds.json").read_text())["seconds"])


def _evaluated(workdir: Path) -> float:
    """The mean AUC of a run on the day after its own."""
    path = workdir / "evaluation" / "test.json"
    if not path.exists():
        _job("stem_tf.jobs.evaluate", f"--workdir={workdir}", "--split=test")
    return float(json.loads(path.read_text())["mean_auc"])


def _of_export(run: Path, served: Path, log: Path, other: Path) -> float:
    """The mean AUC of a run on a log that it has no data of, with the labels of another run's evaluation there."""
    scores = served.with_name(f"{served.name}-{log.stem}.parquet")
    if not served.exists():
        _job("export.jobs.export", f"--workdir={run}", f"--output={served}")
    if not scores.exists():
        _job("export.jobs.predict", str(log), f"--model={served}", f"--output={scores}")
    scored = pq.read_table(scores).sort_by("row")
    labelled = pq.read_table(other / "evaluation" / "test.parquet").sort_by("row_id")
    tasks = json.loads((other / "evaluation" / "test.json").read_text())["tasks"]
    aucs = []
    for task in (task for task, of in tasks.items() if "auc" in of):
        labels = labelled[f"label_{task}"].to_numpy()
        inside = ~np.isnan(labels)
        aucs.append(metrics.auc(labels[inside], scored[f"score_{task}"].to_numpy()[inside]))
    return statistics.mean(aucs)


def _table(figures: Figures, days: Sequence[str]) -> str:
    head = ["day", *ARMS, f"{GOES_ON} - {SCRATCH}", "seconds from scratch", "seconds going on", ""]
    lines = []
    for day in sorted({day for day, _, _ in figures}):
        of = {arm: [value for (d, a, _), value in figures.items() if (d, a) == (day, arm)] for arm in ARMS}
        auc = {arm: [value for value, _ in values] for arm, values in of.items()}
        apart = [ours - theirs for ours, theirs in zip(auc[GOES_ON], auc[SCRATCH], strict=True)]
        took = [f"{statistics.mean(s for _, s in of[arm]):.0f}" for arm in (SCRATCH, GOES_ON)]
        means = [report.number(statistics.mean(auc[arm])) for arm in ARMS]
        lines.append([days[day], *means, report.number(statistics.mean(apart)), *took, ""])
    return report.table(head, lines)


if __name__ == "__main__":
    cli.run(main, flags)
