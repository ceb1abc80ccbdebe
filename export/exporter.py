"""Makes the next version of an exported model from a trained run, checks it and publishes it.

A version holds a TensorFlow SavedModel that takes raw values, its vocabularies, warm-up requests, a manifest and a
card. Before it is published, a fresh process loads it as TensorFlow Serving does and must reproduce the trainer's
scores on validation rows through every signature.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from export import card, graph, publish, raw, vocabulary_asset, warmup
from export import tables as stored_tables
from export.preconditions import validation_rows
from export.tables import Kind, StoredTable
from pipelines import manifest as manifests
from pipelines import outputs, schema_yaml, vocabulary
from pipelines.log import source
from pipelines.manifest import Manifest
from pipelines.schema import Schema
from stem_tf import configs, report
from stem_tf import trained as runs
from stem_tf.evaluation import predictions, scoring
from stem_tf.runtime import exact_products
from stem_tf.trained import Trained
from stem_tf.training import learning
from stem_tf.workdir import Workdir
from stem_util import files, owned
from stem_util.errors import JobError, UserError, message
from stem_util.progress import Progress
from stem_util.version import __version__

FORMAT = 1
CHECKED_ROWS = 100_000
"""The check scores the first rows of the validation split, at most so many."""
TOLERANCES = {"float32": 1e-5, "mixed_bfloat16": 3e-2}
"""The largest allowed difference from the trainer's scores, by precision. ``rank`` rounds the request's and the
candidates' share of a first layer before it adds them: on the bundled sample its scores differ by up to 4e-7 in
float32, and by up to 8e-3 in bfloat16, which has 8 significant bits. Other signatures stay within 1e-7 in both. A
calibrator that rises more steeply than the sigmoid magnifies differences, and what is allowed with them."""


def export(
    workdir: Workdir,
    config: Any,
    manifest: Manifest,
    checkpoint: str,
    output: Path,
    name: str,
    tables: Kind = "float32",
    *,
    calibrated: bool = True,
    newest: int | None = None,
    judge: Callable[[Path, Trained], None] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Publishes a checkpoint as the next version under ``output``; returns the version's directory and manifest.

    Args:
      workdir: the run.
      config: the run's config.
      manifest: manifest of its data, from `export.preconditions.check`.
      checkpoint: ``best``, ``latest`` or a path.
      output: directory of the versions.
      name: the model's name.
      tables: how its tables are stored.
      calibrated: calibrated scores, where the run's config asks for them.
      newest: the version that has to be the newest one when this one is published; 0 for none.
      judge: called with the version's directory before it is published, and the run's model. It may add files, which
        the manifest then lists, and raise, so that nothing is published.

    Raises:
      UserError: there is no such checkpoint, no calibrators for it, or ``output`` is no directory or is in use.
      JobError: the exported model does not reproduce the trainer's scores, or could not be written.
    """
    with manifests.in_use(manifest.data_dir), exact_products():
        found = runs.load(workdir, config, manifest, checkpoint, calibrated=calibrated)
        try:
            with publish.publishing(output, newest) as (version, directory), tempfile.TemporaryDirectory() as scratch:
                job = _Export(workdir, config, manifest, name, version, found, tables)
                tree = job.build(directory, Path(scratch))
                if judge is not None:
                    judge(directory, found)
                    tree = _sealed(directory, tree)
        except tf.errors.OpError as error:
            raise JobError(f"{output}: the export could not be written ({message(error)})") from error
    return output / str(version), tree


class _Export:
    """Builds one version.

    Args:
      workdir: the run.
      config: the run's config.
      manifest: manifest of its data.
      name: the model's name.
      version: the version's number.
      trained: the model to export. Its tables are set to the values that are stored.
      tables: how the tables are stored.
    """

    def __init__(
        self,
        workdir: Workdir,
        config: Any,
        manifest: Manifest,
        name: str,
        version: int,
        trained: Trained,
        tables: Kind,
    ) -> None:
        self.workdir, self.config, self.manifest = workdir, config, manifest
        self.name, self.version, self.trained, self.tables = name, version, trained, tables
        self._weights = trained.fingerprint()  # before tables are rounded
        self._metrics = test_metrics(workdir, manifest.schema, self._weights)

    @property
    def schema(self) -> Schema:
        return self.manifest.schema

    def build(self, directory: Path, scratch: Path) -> dict[str, Any]:
        """Fills ``directory`` with all files of a version; returns its manifest.

        Raises:
          JobError: the exported model does not reproduce the trainer's scores.
        """
        vocabularies = write_vocabularies(self.workdir, self.manifest, scratch)
        stored, told = self._store()
        module = graph.ServingModule(self.schema, self.trained.model, vocabularies, stored)
        module.save(directory)
        signatures = ["serving_default", "rank", "examples"]
        if graph.why_no_rank(self.schema):
            signatures.remove("rank")
        extra = directory / "assets.extra"
        extra.mkdir()
        rows = self._sample(max(warmup.CANDIDATES))
        warmup.write(extra / warmup.FILENAME, self.name, self.schema, rows, signatures)
        (directory / "schema.yaml").write_text(schema_yaml.dumps(self.schema), encoding="utf-8")
        outcome = self._check(directory, scratch)
        tree = self._manifest(vocabularies, told, signatures, graph.why_no_rank(self.schema), outcome)
        (directory / "card.md").write_text(card.text(tree, self.schema, rows), encoding="utf-8")
        return _sealed(directory, tree | {"files": {}})

    def _store(self) -> tuple[list[StoredTable], dict[str, Any]]:
        """The tables in stored form, and their entry in the manifest: size, and the cost of rounding."""
        told: dict[str, Any] = {"stored": self.tables, "float32_bytes": stored_tables.exact_size(self.trained.model)}
        rounded = self.tables != "float32"
        split = "test" if self.manifest.rows("test") else "validation"
        before = self._quality(split, "float32") if rounded else {}
        stored = stored_tables.store(self.trained.model, self.tables)
        told["bytes"] = stored_tables.size(stored)
        if rounded:
            after = self._quality(split, self.tables)
            told["cost"] = {"split": split, "rows": self.manifest.rows(split)}
            told["cost"]["tasks"] = {task: before[task] | after[task] for task in before}
        return stored, told

    def _quality(self, split: str, kind: str) -> dict[str, dict[str, Any]]:
        """The trainer's AUC or MSE on a split by task, under the key ``kind``; None where it is not defined."""
        scored = scoring.predict(
            self.trained.model, self.manifest, split, self.config.data, desc=f"{split}, {kind} tables"
        )
        results = report.finite(predictions.evaluate(scored, self.manifest))
        metric = {task.name: "auc" if task.type == "binary" else "mse" for task in self.schema.tasks}
        return {task: {"metric": metric[task], kind: values[metric[task]]} for task, values in results.items()}

    def _sample(self, rows: int) -> dict[str, Any]:
        """The first raw rows of the validation split as tensors of ``serving_default``."""
        schema = raw.without_outcomes(self.schema)
        log = source.open_log(sorted(map(str, validation_rows(self.manifest).glob("*.parquet"))))
        found, _, _ = next(raw.read(log, schema, []))
        return {name: values[:rows] for name, values in raw.tensors(schema, found).items()}

    def _check(self, directory: Path, scratch: Path) -> dict[str, Any]:
        """Compares the saved model with the trainer in a fresh process; returns rows, worst differences, tolerance."""
        trained = scoring.predict(
            self.trained.model, self.manifest, "validation", self.config.data, desc="predict", limit=CHECKED_ROWS
        )
        predictions.evaluate(trained, self.manifest)  # refuses NaN scores
        columns = {f"score_{task}": pa.array(scores) for task, scores in trained.scores.items()}
        pq.write_table(pa.table({"row_id": pa.array(trained.row_id)} | columns), scratch / "predictions.parquet")
        tolerance = TOLERANCES[self.config.train.precision]
        steepness = {task: max(1.0, one.steepness) for task, one in self.trained.model.calibrators.items()}
        task = {
            "directory": str(directory.resolve()),  # the check runs in another directory
            "raw": str(validation_rows(self.manifest)),
            "predictions": str(scratch / "predictions.parquet"),
            "features": features(self.schema),
            "tasks": self.schema.task_names,
            "outputs": [output.described() for output in outputs.of(self.schema)],
            "tolerances": {task: tolerance * steepness.get(task, 1.0) for task in self.schema.task_names},
            "result": str(scratch / "result.json"),
        }
        files.write_json(scratch / "check.json", task)
        _run_check(scratch, len(trained.row_id))
        outcome = json.loads((scratch / "result.json").read_text(encoding="utf-8"))
        if "mismatch" in outcome:
            raise JobError(
                f"the exported model does not reproduce the trainer's scores, so nothing was published: "
                f"{outcome['mismatch']}"
            )
        return outcome | {"tolerance": tolerance}

    def _manifest(
        self,
        vocabularies: dict[str, Path],
        tables: dict[str, Any],
        signatures: list[str],
        why_no_rank: str,
        outcome: dict[str, Any],
    ) -> dict[str, Any]:
        manifest = self.manifest
        programs = ("tensorflow", "tf-keras", "tensorflow-recommenders", "numpy", "pyarrow")
        return {
            "format": FORMAT,
            "model": self.name,
            "version": self.version,
            "created_by": f"stem-tf {__version__}",
            "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in programs},
            "run": {
                "workdir": str(self.workdir.path.resolve()),
                "experiment": self.config.experiment,
                "checkpoint": self.trained.checkpoint,
                "epoch": self.trained.epoch,
                "step": self.trained.step,
                "untrained": learning.untrained(self.config, manifest),
                "weights": self._weights,
                "config": configs.flat(self.config),
            },
            "data": {
                "dir": manifest.data_dir,
                "name": manifest.name,
                "manifest_sha256": self.workdir.data_checksum(),
                "rows": {split: manifest.rows(split) for split in manifests.SPLITS},
                "numerics": {name: dataclasses.asdict(of) for name, of in manifest.numerics.items()},
                "label_scales": {task: dataclasses.asdict(scale) for task, scale in manifest.label_scales.items()},
            },
            "schema": dataclasses.asdict(self.schema),
            "signatures": signatures,
            "outputs": [output.described() for output in outputs.of(self.schema)],
            "why_no_rank": why_no_rank,
            "vocabularies": {
                name: {"size": manifest.vocabularies[name].size, "sha256": _sha256(path)}
                for name, path in vocabularies.items()
            },
            "tables": tables,
            "calibration": (self.trained.calibration or {"tasks": {}})["tasks"],
            "test_metrics": self._metrics,
            "check": {
                "split": "validation",
                "rows": outcome["rows"],
                "rows_of_split": manifest.rows("validation"),
                "tolerance": outcome["tolerance"],
                "worst": {signature: max(tasks.values()) for signature, tasks in outcome["worst"].items()},
                "worst_by_task": outcome["worst"],
            },
        }


def _sealed(directory: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a version, with the SHA-256 of the files that it does not list yet; returns it."""
    # The marker is hidden and not listed, so that a version copied as DIR/* is whole.
    names = [name for name in owned.entries(directory) if name != manifests.FILENAME]
    tree["files"] = {name: tree["files"].get(name) or _sha256(directory / name) for name in names}
    files.write_json(directory / manifests.FILENAME, tree)
    return files.read_json(directory / manifests.FILENAME, "export the model again")


def write_vocabularies(workdir: Workdir, manifest: Manifest, directory: Path) -> dict[str, Path]:
    """Writes the assets of a run's vocabularies into ``directory``; returns their paths by feature.

    The directory is outside the SavedModel, which gets copies.

    Raises:
      JobError: the size of a vocabulary differs from the manifest.
    """
    paths = {}
    for name, sizes in manifest.vocabularies.items():
        values = vocabulary.load(manifests.vocabulary_path(str(workdir.path), name))["value"]
        if len(values) != sizes.size:
            raise JobError(f"{workdir.path}: the vocabulary of '{name}' has {len(values):,} values, not {sizes.size:,}")
        paths[name] = directory / f"{name}.vocabulary"
        vocabulary_asset.write(values, paths[name])
    return paths


def test_metrics(workdir: Workdir, schema: Schema, weights: str) -> dict[str, Any] | None:
    """The metrics of stem-evaluate on the test split for these weights; None if it has not been run on them.

    Args:
      workdir: the run.
      schema: the schema of its data.
      weights: the fingerprint of the weights.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir.evaluation / "test.json"
    if not path.exists():
        return None
    way_out = "run stem-evaluate again"
    found = files.read_json(path, way_out)
    if found.get("weights") != weights:
        return None
    try:
        tasks = {task: dict(found["tasks"][task]) for task in schema.task_names}
        return {"rows": int(found["rows"]), "mean_auc": found["mean_auc"], "tasks": tasks}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {way_out}") from None


def features(schema: Schema) -> list[dict[str, Any]]:
    """The features in the form that `export.check` reads, which imports no other module of this project."""
    keys = ("name", "kind", "side", "column", "dtype", "separator", "length", "max_length")
    return [{key: getattr(feature, key) for key in keys} for feature in schema.features]


def _run_check(scratch: Path, rows: int) -> None:
    """Runs check.py by its path, so that it cannot import this project's packages."""
    command = [sys.executable, "-P", str(Path(__file__).resolve().with_name("check.py")), str(scratch / "check.json")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
    with (
        open(scratch / "stderr", "w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=scratch, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            with Progress(rows, unit="rows", desc="check") as progress:
                for line in process.stdout:
                    progress.update(int(line))
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        if code:
            errors.seek(0)
            last = [line for line in errors.read().splitlines() if line.strip()][-1:]
            raise JobError(
                f"the exported model could not be checked, so nothing was published: the process that loads it ended "
                f"with exit code {code} ({' '.join(last) or 'it said nothing: killed from outside, or out of memory'})"
            )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
