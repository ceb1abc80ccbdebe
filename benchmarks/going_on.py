"""What going on from yesterday's run is worth (docs/every_day.md): the bundled sample in two halves by time.

    python -m benchmarks.going_on --output=runs/going_on

The second half is trained alone, and from a run of the first half: from its last state, and from its best weights. Both
halves are converted by themselves, each with a split by time, so that their vocabularies differ. Test AUC is the mean
over tasks and seeds, on the newest tenth of the second half. A finished run is not trained again.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import stem_tf
from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf import report
from stem_util import cli, owned

flags = cli.Flags()

_OUTPUT = flags.DEFINE(cli.PATH, "output", "runs/going_on", "Where data and runs are kept.")
_LOG = flags.DEFINE(cli.PATH, "log", None, "A log in Parquet; the bundled sample if not given.")
_SCHEMA = flags.DEFINE(cli.PATH, "schema", "kuairand_sample", "Its schema.")
_CONFIG = flags.DEFINE(cli.PATH, "config", "kuairand_sample", "The experiment.")
_TIME = flags.DEFINE_string("time", "time_ms", "The column to order by.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Seeds of the runs.")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE, a config key of all runs.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")

_SAMPLE = Path(__file__).parent.parent / "datasets" / "kuairand_sample" / "log.parquet"


def main(argv: Sequence[str]) -> None:
    del argv
    log = pq.read_table(_LOG.value or _SAMPLE).sort_by(_TIME.value)
    halves = [_converted(log[: len(log) // 2], "first"), _converted(log[len(log) // 2 :], "second")]
    found: dict[str, list[float]] = {}
    for seed in _SEEDS.value:
        before = _trained(halves[0], f"first-{seed}", seed)
        for name, more in {
            "the second half alone": {},
            "from the last state of the first": {"start.run": before.workdir.place},
            "from the best weights of the first": {"start.run": before.workdir.place, "start.checkpoint": "best"},
        }.items():
            run = _trained(halves[1], f"{name.replace(' ', '_')}-{seed}", seed, **more)
            found.setdefault(name, []).append(float(run.evaluate()["mean_auc"]))
    rows = [
        [name, *(report.number(auc) for auc in aucs), report.number(statistics.mean(aucs)), ""]
        for name, aucs in found.items()
    ]
    print(report.table(["trained on", *(f"seed {seed}" for seed in _SEEDS.value), "mean", ""], rows))
    if _JSON.value:
        owned.write_figures(_JSON.value, found)


def _converted(log: pa.Table, name: str) -> Manifest:
    data = Path(_OUTPUT.value) / name
    if (data / manifests.FILENAME).exists():
        return manifests.load(str(data))
    data.parent.mkdir(parents=True, exist_ok=True)
    return stem_tf.convert(log, _SCHEMA.value, data, split="time", split_column=_TIME.value, layouts=["blocks"])


def _trained(data: Manifest, name: str, seed: str, **more: Any) -> stem_tf.Run:
    changes = dict(pair.split("=", 1) for pair in _SET.value)
    given = {key: float(value) if "." in value else int(value) for key, value in changes.items()}
    overrides = {"seed": int(seed)} | given | more
    return stem_tf.train(_CONFIG.value, data, Path(_OUTPUT.value) / name, overrides=overrides, say=None)


if __name__ == "__main__":
    cli.run(main, flags)
