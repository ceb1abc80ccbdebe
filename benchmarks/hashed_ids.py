"""What collisions of hashed ids cost: the bundled sample with vocabularies, and with hashes into fewer and fewer rows.

    python -m benchmarks.hashed_ids --output=runs/hashed_ids

Users and videos are hashed, with one hash and with two, into R V buckets each, V the number of distinct users or
videos in train and R of --ratios. ``alike`` is the share of these that share all their rows with another one, as
expected (`pipelines.hashed_ids.alike`) and as counted. Test AUC is the mean over tasks and seeds; the difference from
vocabularies is that of the same seeds. A finished run is not trained again.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import stem_tf
from pipelines import hashed_ids, schema_yaml, vocabulary
from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from pipelines.schema import Hash, Schema
from stem_tf import report
from stem_util import cli, owned

flags = cli.Flags()

_OUTPUT = flags.DEFINE(cli.PATH, "output", "runs/hashed_ids", "Where data and runs are kept.")
_RATIOS = flags.DEFINE_list("ratios", ["16", "4", "1", "0.2", "0.05", "0.01"], "Buckets per distinct value.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")

_SAMPLE = Path(__file__).parent.parent / "datasets" / "kuairand_sample" / "log.parquet"
_HASHED = ("user_id", "video_id")


def main(argv: Sequence[str]) -> None:
    del argv
    output, plain = Path(_OUTPUT.value), schema_yaml.load("kuairand_sample")
    whole = _converted(plain, output / "vocabulary")
    sizes = {name: whole.vocabularies[name].size for name in _HASHED}
    base = [_test_auc(output / "vocabulary", whole, seed) for seed in _SEEDS.value]
    figures = [{"ids": "vocabulary", "rows": sum(sizes.values()), "test": base}]
    rows = [["vocabulary", f"{sum(sizes.values()):,}", "0", "0", report.number(statistics.mean(base)), ""]]
    for ratio in _RATIOS.value:
        for hashes in (1, 2):
            by = {name: Hash(int(size * float(ratio)), hashes) for name, size in sizes.items()}
            directory = output / f"{hashes}-{ratio}"
            made = _converted(_with(plain, by), directory)
            tests = [_test_auc(directory, made, seed) for seed in _SEEDS.value]
            buckets = sum(part.buckets for part in by.values())
            expected = sum(sizes[name] * hashed_ids.alike(sizes[name], by[name]) for name in _HASHED)
            counted = sum(_alike(whole, name, by[name]) for name in _HASHED)
            shares = [part / sum(sizes.values()) for part in (expected, counted)]
            differences = [test - of for test, of in zip(tests, base, strict=True)]
            name = f"{ratio} V buckets, {hashes} hash{'es' if hashes > 1 else ''}"
            figures.append({"ids": name, "rows": buckets, "alike": shares, "test": tests})
            spread = (max(differences) - min(differences)) / 2
            cells = [report.number(statistics.mean(tests)), f"{statistics.mean(differences):+.4f} ±{spread:.4f}"]
            rows.append([name, f"{buckets:,}", *(f"{share:.2%}" for share in shares), *cells])
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print(f"seeds {', '.join(_SEEDS.value)}; ±: half the range")
    print(report.table(["ids", "rows", "alike: expected", "counted", "test AUC", "difference"], rows))
    if _JSON.value:
        owned.write_figures(_JSON.value, figures)


def _with(schema: Schema, by: dict[str, Hash]) -> Schema:
    features = (dataclasses.replace(feature, hash=by.get(feature.name)) for feature in schema.features)
    return dataclasses.replace(schema, features=tuple(features))


def _converted(schema: Schema, directory: Path) -> Manifest:
    data = directory / "data"
    if (data / manifests.FILENAME).exists():
        return manifests.load(str(data))
    directory.mkdir(parents=True, exist_ok=True)
    return stem_tf.convert(_SAMPLE, schema, data, split="time", split_column="time_ms", layouts=["blocks"])


def _test_auc(directory: Path, data: Manifest, seed: str) -> float:
    run = stem_tf.train("kuairand_sample", data, directory / f"run-{seed}", overrides={"seed": int(seed)}, say=None)
    return float(run.evaluate()["mean_auc"])


def _alike(whole: Manifest, name: str, by: Hash) -> int:
    """How many of a feature's distinct values share all their rows with another one."""
    values = vocabulary.load(whole.vocabulary_path(name))["value"].combine_chunks()
    rows = np.sort(hashed_ids.ids(hashed_ids.codes(values), by).reshape(-1, by.hashes), axis=1)
    _, counts = np.unique(rows, axis=0, return_counts=True)
    return int(counts[counts > 1].sum())


if __name__ == "__main__":
    cli.run(main, flags)
