"""Speed of AUC and grouped AUC compared with scikit-learn's roc_auc_score, and the memory that they use.

    python -m benchmarks.evaluate --rows=1000000,10000000,30000000

Scores are float32 probabilities: random ones (few ties), and the same rounded to 1/1000 (all tied). Groups follow a
power law. Every row of the table is measured in a separate process.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stem_util import cli, owned

flags = cli.Flags()

_ROWS = flags.DEFINE_list("rows", ["1000000", "10000000", "30000000"], "Rows of a split.")
_RATES = flags.DEFINE_list("rates", ["0.01", "0.3"], "Shares of positives.")
_GROUPS = flags.DEFINE_integer("groups", 1_000_000, "Groups.")
_SKLEARN_ROWS = flags.DEFINE_integer("sklearn_rows", 10_000_000, "scikit-learn is left out above as many rows.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the results to this file.")
_ONE = flags.DEFINE_string("one", None, "Internal: the case that this process measures.")


def _measured(call: Callable[[], float]) -> dict[str, float]:
    """The result of a call, its seconds, CPU seconds, and peak memory above that before the call."""
    before = _peak(reset=True)
    started, used = time.perf_counter(), time.process_time()
    value = call()
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    return {"value": value, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": _peak() - before}


def _peak(reset: bool = False) -> int:
    """Largest resident size since the last reset, in bytes."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def _case(rows: int, rate: float, levels: int, groups: int, sklearn_rows: int) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    from stem_tf.evaluation import metrics

    rng = np.random.default_rng(0)
    labels = (rng.random(rows) < rate).astype(np.float32)
    logits = rng.standard_normal(rows, np.float32) + labels + np.float32(np.log(rate))
    scores = 1 / (1 + np.exp(-logits))
    del logits
    if levels:
        scores = np.round(scores * levels) / np.float32(levels)
    keys = (float(groups) ** rng.random(rows)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    metrics.grouped_auc(labels[:1000], scores[:1000], keys[:1000])
    result: dict[str, Any] = {"rows": rows, "rate": rate, "levels": levels}
    result["auc"] = _measured(lambda: metrics.auc(labels, scores))
    result["grouped_auc"] = _measured(lambda: metrics.grouped_auc(labels, scores, keys))
    if rows <= sklearn_rows:
        result["sklearn"] = _measured(lambda: float(roc_auc_score(labels, scores)))
        result["difference"] = abs(result["auc"]["value"] - result["sklearn"]["value"])
    return result


def main(argv: Sequence[str]) -> None:
    del argv
    if _ONE.value:
        print(json.dumps(_case(*json.loads(_ONE.value))))
        return
    what = ("auc", "grouped_auc", "sklearn")
    print(f"{'':29}" + "".join(f"{name:>30}" for name in ("AUC", "grouped AUC", "scikit-learn")) + f"{'AUC':>12}")
    columns = f"{'rows/s':>12}{'a CPU s':>12}{'B/row':>6}"
    print(f"{'rows':>12}{'positives':>10}{'ties':>7}{columns * len(what)}{'difference':>12}")
    results = []
    for rows, rate, levels in itertools.product(map(int, _ROWS.value), map(float, _RATES.value), (0, 1000)):
        case = json.dumps([rows, rate, levels, _GROUPS.value, _SKLEARN_ROWS.value])
        command = [sys.executable, "-m", "benchmarks.evaluate", f"--one={case}"]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        results.append(result)
        cells = [f"{rows:>12,}{rate:>10}{'all' if levels else 'few':>7}"]
        for found in (result.get(name) for name in what):
            cells.append(f"{'-':>12}{'-':>12}{'-':>6}" if found is None else _cells(rows, found))
        print("".join(cells) + f"{result.get('difference', float('nan')):>12.0e}", flush=True)
    if _JSON.value:
        owned.write_figures(_JSON.value, results)


def _cells(rows: int, found: dict[str, float]) -> str:
    by_second, by_cpu_second = rows / found["seconds"], rows / found["cpu_seconds"]
    return f"{by_second:>12,.0f}{by_cpu_second:>12,.0f}{found['peak_bytes'] / rows:>6.0f}"


if __name__ == "__main__":
    cli.run(main, flags)
