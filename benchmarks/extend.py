"""Extending converted data with large vocabularies: generates them and a day's log, and measures the real job.

    python -m benchmarks.extend --ids=2000000,20000000

The data have two features, one of int64 and one of text, each with half of the ids and a tenth as many rare values. The
log has 80 % old values, 10 % rare ones and 10 % new ones. The job runs alone (without --extend), with it, and with
--forget=30d too, for which a third of the old values are due. Printed: seconds of the whole job, CPU seconds, and peak
memory of all its processes together, without mapped files.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.convert import measure
from pipelines import integrity, manifest
from pipelines.manifest import Growth, Manifest, Vocabulary, history_path
from stem_util import cli, owned

flags = cli.Flags()

_IDS = flags.DEFINE_list("ids", ["2000000", "20000000"], "Ids of both features together, one size after another.")
_ROWS = flags.DEFINE_integer("rows", 1_000_000, "Rows of the new log.")
_PROCESSES = flags.DEFINE_integer("processes", 2, "Worker processes.")
_DIRECTORY = flags.DEFINE(cli.PATH, "directory", None, "Where to work; a temporary directory by default.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the results to this file.")

_FEATURES = ("number", "text")
_DAY = 86_400
_TODAY = 1_700_000_000
_SCHEMA = """name: generated
time: when
features:
  number: {kind: categorical, side: user, dtype: int64, min_count: 2}
  text: {kind: categorical, side: item, dtype: string, min_count: 2}
tasks:
  label: {label: {column: label}}
"""


def _values(feature: str, ranks: np.ndarray) -> pa.Array:
    spread = ranks.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    if feature == "number":
        return pa.array(spread.view(np.int64))
    return pa.array(np.char.mod("item-%d", ranks).tolist(), pa.string())


def _write_log(path: Path, ranks: np.ndarray, today: int) -> None:
    columns: dict[str, Any] = {feature: _values(feature, ranks) for feature in _FEATURES}
    columns |= {"label": np.arange(len(ranks)) % 2, "when": np.sort(today + np.arange(len(ranks)) % _DAY)}
    pq.write_table(pa.table(columns), path, row_group_size=1 << 18)


def _fill(done: Manifest, size: int, rare: int) -> None:
    """Replaces the vocabularies of small data by generated ones."""
    rng = np.random.default_rng(0)
    vocabularies, history = {}, {}
    for feature in _FEATURES:
        known, others = (_values(feature, np.arange(*ends)) for ends in ((1, 1 + size), (1 + size, 1 + size + rare)))
        known, others = (values if feature == "number" else values.cast(pa.binary()) for values in (known, others))
        times = (_TODAY - rng.integers(1, 45 * _DAY, size + rare)) * 10**6
        seen = np.ones(size + rare, np.int32)
        counts = np.sort(rng.zipf(1.5, size).clip(2, 10**6))[::-1]
        pq.write_table(pa.table({"value": known, "count": counts}), done.vocabulary_path(feature))
        table = pa.table({"conversion": seen[:size], "time": times[:size]})
        pq.write_table(table, history_path(done.data_dir, "seen", feature))
        columns = {"value": others, "count": np.ones(rare, np.int64), "conversion": seen[size:], "time": times[size:]}
        pq.write_table(pa.table(columns), history_path(done.data_dir, "rare", feature))
        vocabularies[feature] = Vocabulary(size, size + rare)
        history[feature] = Growth(size, 0, 0, rare)
    files = {path: integrity.recorded(os.path.join(done.data_dir, path)) for path in done.files}
    manifest.save(dataclasses.replace(done, vocabularies=vocabularies, history=history, files=files))


def _job(log: Path, schema: Path, output: Path, *arguments: str) -> dict[str, Any]:
    """Runs the job; what was measured."""
    command = [sys.executable, "-m", "pipelines.jobs.convert", f"--train={log}", "--validation_share=0"]
    command += [f"--schema={schema}", f"--output={output}", "--layouts=blocks", f"--processes={_PROCESSES.value}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, _, anonymous = measure([*command, *arguments])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_anonymous_bytes": anonymous}


def extend(ids: int) -> list[dict[str, Any]]:
    """Extends data with so many ids; what was measured."""
    size, rows, rng = ids // len(_FEATURES), _ROWS.value, np.random.default_rng(1)
    rare = size // 10
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as directory:
        log, schema, data = (Path(directory) / name for name in ("log.parquet", "schema.yaml", "data"))
        schema.write_text(_SCHEMA, encoding="utf-8")
        _write_log(log, np.arange(1, 100), _TODAY - 2 * _DAY)
        _job(log, schema, data)
        _fill(manifest.load(str(data)), size, rare)
        parts = ((0, size, 8), (size, size + rare, 1), (size + rare, size + rare + rows // 20, 1))
        ranks = [1 + rng.integers(low, high, rows * tenths // 10) for low, high, tenths in parts]
        _write_log(log, rng.permutation(np.concatenate(ranks)), _TODAY)
        for name, arguments in {
            "alone": [],
            "--extend": [f"--extend={data}"],
            "--extend --forget=30d": [f"--extend={data}", "--forget=30d"],
        }.items():
            output = Path(directory) / f"extended-{len(results)}"
            measured = _job(log, schema, output, *arguments)
            history = manifest.load(str(output)).history.values()
            sums = {key: sum(getattr(each, key) for each in history) for key in ("new", "evicted", "reassigned")}
            results.append({"ids": ids, "rows": rows, "job": name, **measured, **sums})
    return results


def main(argv: Sequence[str]) -> None:
    del argv
    results = []
    print(f"{'ids':>11}  {'job':21}  seconds  CPU seconds  peak MB  {'new':>9}  {'evicted':>9}  reassigned", flush=True)
    for ids in map(int, _IDS.value):
        for one in extend(ids):
            results.append(one)
            print(
                f"{one['ids']:>11,}  {one['job']:21}  {one['seconds']:>7}  {one['cpu_seconds']:>11}"
                f"  {one['peak_anonymous_bytes'] / 1e6:>7,.0f}"
                f"  {one['new']:>9,}  {one['evicted']:>9,}  {one['reassigned']:>10,}",
                flush=True,
            )
    if _JSON.value:
        owned.write_figures(_JSON.value, results)


if __name__ == "__main__":
    cli.run(main, flags)
