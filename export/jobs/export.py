"""Publishes a trained run as the next version of a model that services can load.

    stem-export --workdir=RUN --output=DIR

writes DIR/<version>: a TensorFlow SavedModel that takes raw values, with its vocabularies, warm-up requests, a manifest
and a card (card.md). Before anything is published, a fresh process loads it as TensorFlow Serving does and must
reproduce the trainer's scores on validation rows through every signature.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from export import card, publish, raw
from pipelines import manifest as manifests
from pipelines import schema_yaml, vocabulary
from pipelines.log import source
from pipelines.manifest import Manifest
from pipelines.schema import Schema
from stem_tf import configs, report
from stem_tf.runtime import quieten_tensorflow
from stem_tf.training import learning
from stem_tf.workdir import Workdir
from stem_util import cli, files, owned
from stem_util.errors import JobError, UserError, message
from stem_util.progress import Progress
from stem_util.version import __version__

if TYPE_CHECKING:
    from export.tables import Kind, StoredTable
    from stem_tf.trained import Trained

FORMAT = 1
CHECKED_ROWS = 100_000
"""Rows of the validation split that the check scores, at most: the first ones."""
TOLERANCES = {"float32": 1e-5, "mixed_bfloat16": 3e-2}
"""Largest difference from the trainer's scores by precision. ``rank`` rounds the request's and the candidates' share of
a first layer before it adds them. Measured on the bundled sample: up to 4e-7 in float32, up to 8e-3 in bfloat16, whose
numbers have 8 bits; the other signatures stay within 1e-7 in both."""

flags = cli.Flags()

_WORKDIR = flags.DEFINE(cli.PATH, "workdir", None, "Directory of the run, as given to stem-train.", required=True)
_OUTPUT = flags.DEFINE(
    cli.PATH, "output", None, "Directory of the model's versions; the new one is its next number.", required=True
)
_CHECKPOINT = flags.DEFINE(cli.PATH, "checkpoint", "best", "best, latest, or the path of one without its suffix.")
_DATA = flags.DEFINE(cli.PATH, "data", None, "The run's converted data, where it has moved since.")
_NAME = flags.DEFINE_string("name", "ranker", "The model's name, as services will ask for it.")
_TABLES = flags.DEFINE_enum(
    "tables",
    "float32",
    ["float32", "bfloat16", "int8"],
    "How embedding tables are stored: bfloat16 takes half the bytes, int8 about a third; what that costs is printed.",
)


def main(argv: Sequence[str]) -> None:
    del argv
    workdir, output = Workdir(_WORKDIR.value), Path(_OUTPUT.value)
    config = workdir.config()
    manifest = _data(workdir, config, _DATA.value)
    if output.resolve() in (workdir.path.resolve(), Path(manifest.data_dir).resolve()):
        raise UserError(f"--output={output} is the run or its data; give a directory of its own")
    if not _NAME.value:
        raise UserError("--name is empty")

    quieten_tensorflow()
    import tensorflow as tf

    # The graph is the same everywhere, and on a CPU float32 products are float32: a GPU would round them to TF32.
    tf.config.set_visible_devices([], "GPU")
    with manifests.in_use(manifest.data_dir):
        directory, tree = export(workdir, config, manifest, _CHECKPOINT.value, output, _NAME.value, _TABLES.value)
    _say(workdir, directory, tree)


def export(
    workdir: Workdir,
    config: Any,
    manifest: Manifest,
    checkpoint: str,
    output: Path,
    name: str,
    tables: Kind = "float32",
) -> tuple[Path, dict[str, Any]]:
    """Publishes a checkpoint as the next version under ``output``; returns the version's directory and manifest.

    Args:
      workdir: of the run.
      config: its config.
      manifest: of its data.
      checkpoint: ``best``, ``latest`` or a path.
      output: directory of the versions.
      name: of the model.
      tables: how its tables are stored.

    Raises:
      UserError: no such checkpoint, ``output`` is no directory or in use.
      JobError: the exported model does not reproduce the trainer's scores, or could not be written.
    """
    import tensorflow as tf

    from stem_tf import trained

    found = trained.load(workdir, config, manifest, checkpoint)
    try:
        with publish.publishing(output) as (version, directory), tempfile.TemporaryDirectory() as scratch:
            job = _Export(workdir, config, manifest, name, version, found, tables)
            tree = job.build(directory, Path(scratch))
    except tf.errors.OpError as error:
        raise JobError(f"{output}: the export could not be written ({message(error)})") from error
    return output / str(version), tree


def _data(workdir: Workdir, config: Any, moved_to: str | None) -> Manifest:
    """The manifest of the run's data, which must hold raw validation rows for the check."""
    try:
        manifest = manifests.load(moved_to or config.data.dir)
    except UserError as error:
        hint = "" if moved_to else "; if the data of the run has moved, give --data=DIR"
        raise UserError(f"{error}{hint}") from None
    workdir.check_data(manifest)
    if not manifest.rows("validation"):
        raise UserError(
            f"the validation split of {manifest.data_dir} has no rows, so that an export could not be checked against "
            "the trainer; convert with a validation split, and train on that"
        )
    if not any(_raw(manifest).glob("*.parquet")):
        raise UserError(f"{_raw(manifest)} is gone: the raw rows that the export is checked on; convert the log again")
    manifest.check_raw("validation")
    return manifest


def _raw(manifest: Manifest) -> Path:
    return Path(manifest.data_dir) / "raw" / "validation"


class _Export:
    """One version in the making.

    Args:
      workdir: of the run.
      config: its config.
      manifest: of its data.
      name: of the model.
      version: the version's number.
      trained: what is exported. Its tables are given the values that are stored.
      tables: how they are stored.
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
        self._metrics = self._test_metrics()

    @property
    def schema(self) -> Schema:
        return self.manifest.schema

    def build(self, directory: Path, scratch: Path) -> dict[str, Any]:
        """Fills ``directory`` with everything a version holds; returns its manifest.

        Raises:
          JobError: the exported model does not reproduce the trainer's scores.
        """
        from export import graph, warmup

        vocabularies = self._write_vocabularies(scratch)
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
        # Without the marker: a version copied as DIR/* is whole.
        written = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != owned.MARKER)
        tree["files"] = {str(path.relative_to(directory)): _sha256(path) for path in written}
        files.write_json(directory / manifests.FILENAME, tree)
        return files.read_json(directory / manifests.FILENAME, "export the model again")

    def _store(self) -> tuple[list[StoredTable], dict[str, Any]]:
        """The tables as they are saved, and what the manifest says of them: size, and what rounding costs."""
        from export import tables

        told: dict[str, Any] = {"stored": self.tables, "float32_bytes": tables.exact_size(self.trained.model)}
        rounded = self.tables != "float32"
        split = "test" if self.manifest.rows("test") else "validation"
        before = self._quality(split, "float32") if rounded else {}
        stored = tables.store(self.trained.model, self.tables)
        told["bytes"] = tables.size(stored)
        if rounded:
            after = self._quality(split, self.tables)
            told["cost"] = {"split": split, "rows": self.manifest.rows(split)}
            told["cost"]["tasks"] = {task: before[task] | after[task] for task in before}
        return stored, told

    def _quality(self, split: str, kind: str) -> dict[str, dict[str, Any]]:
        """The trainer's AUC or MSE on a split by task, under the name ``kind``; None where there is none."""
        from stem_tf.evaluation import predictions

        scored = predictions.predict(
            self.trained.model, self.manifest, split, self.config.data, desc=f"{split}, {kind} tables"
        )
        results = report.finite(predictions.evaluate(scored, self.manifest))
        metric = {task.name: "auc" if task.type == "binary" else "mse" for task in self.schema.tasks}
        return {task: {"metric": metric[task], kind: values[metric[task]]} for task, values in results.items()}

    def _write_vocabularies(self, scratch: Path) -> dict[str, Path]:
        """Assets by feature name. SavedModel copies them, so they are written outside of it first."""
        from export import vocabulary_asset

        paths = {}
        for name, sizes in self.manifest.vocabularies.items():
            values = vocabulary.load(manifests.vocabulary_path(str(self.workdir.path), name))["value"]
            if len(values) != sizes.size:
                raise JobError(
                    f"{self.workdir.path}: the vocabulary of '{name}' has {len(values):,} values, not {sizes.size:,}"
                )
            paths[name] = scratch / f"{name}.vocabulary"
            vocabulary_asset.write(values, paths[name])
        return paths

    def _sample(self, rows: int) -> dict[str, Any]:
        """The first raw rows of the validation split as tensors of ``serving_default``."""
        schema = raw.without_outcomes(self.schema)
        log = source.open_log(sorted(map(str, _raw(self.manifest).glob("*.parquet"))))
        found, _, _ = next(raw.read(log, schema, []))
        return {name: values[:rows] for name, values in raw.tensors(schema, found).items()}

    def _check(self, directory: Path, scratch: Path) -> dict[str, Any]:
        """Compares the saved model with the trainer in a fresh process: rows, worst differences, tolerance."""
        from stem_tf.evaluation import predictions

        trained = predictions.predict(
            self.trained.model, self.manifest, "validation", self.config.data, desc="predict", limit=CHECKED_ROWS
        )
        predictions.evaluate(trained, self.manifest)  # refuses scores that are not numbers
        columns = {f"score_{task}": pa.array(scores) for task, scores in trained.scores.items()}
        pq.write_table(pa.table({"row_id": pa.array(trained.row_id)} | columns), scratch / "predictions.parquet")
        tolerance = TOLERANCES[self.config.train.precision]
        task = {
            "directory": str(directory.resolve()),  # the check runs elsewhere
            "raw": str(_raw(self.manifest)),
            "predictions": str(scratch / "predictions.parquet"),
            "features": _features(self.schema),
            "tasks": self.schema.task_names,
            "tolerance": tolerance,
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
            },
            "schema": dataclasses.asdict(self.schema),
            "signatures": signatures,
            "why_no_rank": why_no_rank,
            "vocabularies": {
                name: {"size": manifest.vocabularies[name].size, "sha256": _sha256(path)}
                for name, path in vocabularies.items()
            },
            "tables": tables,
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

    def _test_metrics(self) -> dict[str, Any] | None:
        """What stem-evaluate found for these weights; None where it has not been run on them.

        Raises:
          UserError: the file is damaged.
        """
        path = self.workdir.path / "evaluation" / "test.json"
        if not path.exists():
            return None
        way_out = "run stem-evaluate again"
        found = files.read_json(path, way_out)
        if found.get("weights") != self._weights:
            return None
        try:
            tasks = {task: dict(found["tasks"][task]) for task in self.schema.task_names}
            return {"rows": int(found["rows"]), "mean_auc": found["mean_auc"], "tasks": tasks}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error!r}); {way_out}") from None


def _features(schema: Schema) -> list[dict[str, Any]]:
    keys = ("name", "kind", "side", "column", "dtype", "separator", "length", "max_length")
    return [{key: getattr(feature, key) for key in keys} for feature in schema.features]


def _run_check(scratch: Path, rows: int) -> None:
    """Runs check.py, by its path and away from this project's packages."""
    command = [sys.executable, "-P", str(Path(__file__).resolve().parents[1] / "check.py"), str(scratch / "check.json")]
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


def _say(workdir: Workdir, directory: Path, tree: dict[str, Any]) -> None:
    checked = tree["check"]
    rows = f"{checked['rows']:,} validation rows"
    if checked["rows"] < checked["rows_of_split"]:
        rows = f"the first {rows} of {checked['rows_of_split']:,}"
    worst = ", ".join(f"{signature} {difference:.0e}" for signature, difference in checked["worst"].items())
    weights = _megabytes((directory / "variables").iterdir())
    values = sum(entry["size"] for entry in tree["vocabularies"].values())
    print(f"{tree['model']} version {tree['version']}: {tree['run']['checkpoint']}")
    print(f"checked in a fresh process on {rows}; worst differences from the trainer: {worst}")
    if "cost" in tree["tables"]:
        sentence, head, lines = card.cost(tree["tables"])
        print(f"{sentence}\n{report.table(head, lines)}")
    if tree["why_no_rank"]:
        print(f"no signature 'rank': {tree['why_no_rank']}")
    for task, why in tree["run"]["untrained"].items():
        print(f"warning: the task '{task}' was not trained ({why}): its scores mean nothing", file=sys.stderr)
    if tree["test_metrics"] is None:
        print(f"no test metrics: run stem-evaluate --workdir={shlex.quote(str(workdir.path))} before exporting")
    print(
        f"written: {directory}, {_megabytes(directory.rglob('*')):.1f} MB ({weights:.1f} MB of weights, {values:,} raw "
        f"values in vocabularies); its card is {directory / 'card.md'}"
    )
    base = shlex.quote(str(directory.parent))
    print(f"next: stem-serve --model_base_path={base}  # under the name {shlex.quote(tree['model'])}")
    print(f"next: stem-deploy --model={base} --output=deploy  # files to operate it: limits, alerts, a runbook")


def _megabytes(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def run() -> None:
    """Console script ``stem-export``."""
    cli.run(main, flags, memory="a run with a smaller config.model.dim")


if __name__ == "__main__":
    run()
