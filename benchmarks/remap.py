"""What it costs to go on from a run on other data (docs/every_day.md): time and memory by the rows of the tables.

    python -m benchmarks.remap --rows=2000000,20000000

For each size a process writes a run of one feature with so many values, in a checkpoint with all of its training state;
another one, which is measured, goes on from it. A twentieth of the values is gone and their ids are others' now, and as
many new ones follow. Time is that of finding rows by value, of the whole start (which does so, too), and of the
checkpoint that makes it durable. Memory is what the start took at most beyond a model that is ready to train.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import manifest as manifests
from pipelines import schema_yaml, vocabulary
from pipelines.manifest import Manifest, Split, TaskCounts, Vocabulary
from pipelines.schema import Feature, Label, Schema, Task
from stem_tf import configs, report
from stem_tf.runtime import start_tensorflow
from stem_tf.workdir import Workdir
from stem_util import cli, owned

flags = cli.Flags()

_ROWS = flags.DEFINE_list("rows", ["2000000", "20000000"], "Values of the feature.")
_DIM = flags.DEFINE_integer("dim", 4, "Width of an embedding; a row has one for each of two tasks and a shared one.")
_TABLES = flags.DEFINE_string("tables", "deferred", "config.optimizer.tables.")
_STRINGS = flags.DEFINE_bool("strings", False, "Values are text of 20 bytes rather than integers.")
_DIRECTORY = flags.DEFINE(cli.PATH, "directory", None, "Where the runs lie meanwhile; a temporary one if not given.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")


def main(argv: Sequence[str]) -> None:
    del argv
    figures = []
    for rows in map(int, _ROWS.value):
        with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as directory:
            case = (Path(directory), rows, _DIM.value, _TABLES.value, _STRINGS.value)
            _apart(_write, *case)
            figures.append({"rows": rows, "dim": _DIM.value, "tables": _TABLES.value} | _apart(_go_on, *case))
    header = ["rows", "table, MB", "rows by value, s", "start, s", "its checkpoint, s", "copies of the table", ""]
    cells = [
        [
            f"{of['rows']:,}",
            f"{of['table'] / 1e6:,.0f}",
            *(f"{of[key]:.1f}" for key in ("matching", "start", "checkpoint")),
            report.number(of["memory"] / of["table"], 2),
            "",
        ]
        for of in figures
    ]
    print(report.table(header, cells))
    if _JSON.value:
        owned.write_figures(_JSON.value, figures)


def _apart(function: Any, *arguments: Any) -> Any:
    """What ``function`` returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _data(directory: Path, values: np.ndarray, strings: bool) -> Manifest:
    """Converted data without records: one feature with these values."""
    feature = Feature("id", "categorical", "user", "id", "string" if strings else "int64")
    schema = Schema("made", (feature,), tuple(Task(name, Label(name)) for name in ("click", "buy")))
    (directory / "vocabulary").mkdir(parents=True)
    kept = pa.array(values).cast(pa.string()).cast(pa.binary()) if strings else pa.array(values)
    table = pa.table({"value": kept, "count": np.ones(len(values), np.int64)})
    pq.write_table(table, manifests.vocabulary_path(str(directory), "id"))
    (directory / "schema.yaml").write_text(schema_yaml.dumps(schema), encoding="utf-8")
    counts = {task.name: TaskCounts(1, 0.5) for task in schema.tasks}
    splits = {name: Split(1, counts, {"id": 0.0}, {}) for name in manifests.SPLITS}
    made = Manifest(str(directory), "made", 0, (), {}, splits, {"id": Vocabulary(len(values), len(values))}, {})
    manifests.save(made)
    return manifests.load(str(directory))


def _values(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The values before, and after: a twentieth of the ids given to others, and as many behind them."""
    before = np.random.default_rng(0).permutation(rows) + 10**19 // 2
    changed = np.random.default_rng(1).choice(rows, rows // 20, replace=False)
    after = np.concatenate([before, np.arange(rows // 20) - 10**9])
    after[changed] = np.arange(len(changed)) + 1
    return before, after


def _config(data: Manifest, dim: int, tables: str, **more: Any) -> Any:
    return configs.checked({"data.dir": data.data_dir, "model.dim": dim, "optimizer.tables": tables, **more})


def _write(directory: Path, rows: int, dim: int, tables: str, strings: bool) -> None:
    start_tensorflow()
    from stem_tf import models
    from stem_tf.training.checkpoints import Checkpoints, RunState

    data = _data(directory / "before", _values(rows)[0], strings)
    config, workdir = _config(data, dim, tables), Workdir(directory / "run")
    with workdir.locked():
        workdir.prepare(config, data)
        Checkpoints(workdir.checkpoints, models.build(config, data), RunState(epoch=1)).save()


def _go_on(directory: Path, rows: int, dim: int, tables: str, strings: bool) -> dict[str, float]:
    start_tensorflow()
    from stem_tf import models, start_from
    from stem_tf.training import remap, start
    from stem_tf.training.checkpoints import Checkpoints, RunState

    data = _data(directory / "after", _values(rows)[1], strings)
    config = _config(data, dim, tables, **{"start.run": str(directory / "run")})
    model, state = models.build(config, data), RunState()
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    ready = _peak()
    began = time.perf_counter()
    found = start_from.find(config.start.run)
    remap.remap(found.manifest, found.values, data, lambda name: vocabulary.load(data.vocabulary_path(name))["value"])
    matched = time.perf_counter()
    start.start(model, state, config, data, print)
    done = time.perf_counter()
    memory = _peak() - ready
    checkpoints = Checkpoints(directory / "after" / "checkpoints", model, state)
    checkpoints.save()
    return {
        "table": model.embeddings.groups[0].rows * model.embeddings.groups[0].width * 4,
        "matching": matched - began,
        "start": done - matched,
        "checkpoint": time.perf_counter() - done,
        "memory": memory,
    }


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    cli.run(main, flags)
