"""The work directory of a run: everything that later stages and a resumed job need.

.stem-tf         says that this is a run
config.json      the config, complete
schema.yaml, manifest.json, vocabulary/     what the run was trained on
checkpoints/     the last checkpoints of the whole training state
best/            weights of the best epoch, or of each task's best epoch (epochs.json names each task's), and what was
                 fitted to calibrate their scores (calibration.json)
before-1/        best weights and metrics from before the run lost its checkpoints and started over
metrics.jsonl    one JSON object per line: training losses, validation metrics
tensorboard/     the same for TensorBoard
report.json, learning_curves.png            at the end
evaluation/      metrics and predictions of a split, by stem-evaluate
inspection/      how the gates use the experts, by stem-inspect
comparison/      what stem-compare measured in the model

A work directory in a store is a local copy, which is published after each checkpoint (see `stem_util.copies`). What
other jobs write is published by itself, so that a run may be evaluated while it is trained.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf import configs
from stem_util import copies, files, owned, stores
from stem_util.errors import UserError, did_you_mean, naming_full_disk
from stem_util.files import write_atomically, write_json

FREE_KEYS = (
    "data.dir",
    "train.calibration",
    "train.checkpoint_every",
    "train.log_every",
    "train.negatives_kept",
    "train.patience",
    "train.peer_timeout",
    "train.strategy",
)
"""Config keys that may change when a run goes on: they do not change the numbers of its epochs, up to rounding, only
how many there are, and what is made of its scores in the end. ``train.epochs`` may be raised."""

_LOCK = ".lock"
_CHECKPOINT = re.compile(r"ckpt-(\d+)\.(?:index|data-.*)")


_APART = {"evaluation": owned.EVALUATIONS, "inspection": owned.INSPECTIONS}
"""What other jobs than training write."""


class Workdir:
    """Paths and files of one run.

    Args:
      place: its directory, or the URI of one.

    Attributes:
      place: the directory or URI, as users know it.
      path: the directory, or the local copy of what the URI names.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        uri = os.fspath(place) if stores.is_uri(place) else ""
        self._copy = copies.of(uri, owned.RUN, apart=(*_APART, "comparison")) if uri else None
        self.path = self._copy.path if self._copy else Path(place)
        self.place = self._copy.uri if self._copy else str(self.path)
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.best_epochs = self.best / "epochs.json"
        self.calibration = self.best / "calibration.json"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report.json"
        self.learning_curves = self.path / "learning_curves.png"
        self.evaluation = self.path / "evaluation"
        self.inspection = self.path / "inspection"
        self.comparison = self.path / "comparison"
        self.measures = self.comparison / "measures.json"
        self.metrics = self.path / "metrics.jsonl"
        self._config = self.path / "config.json"

    @classmethod
    def fetched(cls, place: str | os.PathLike[str]) -> Workdir:
        """The work directory at a path, or an up-to-date copy of the one at a URI; raises as `copies.Copy.fetch`."""
        workdir = cls(place)
        if workdir._copy is not None:
            workdir._copy.fetch()
            for name in _APART:
                if (part := workdir._part(name)).published() is not None:
                    part.fetch()
        return workdir

    def publish(self) -> None:
        """Publishes the run as it is now if it is in a store; raises as `copies.Copy.publish`."""
        if self._copy is not None:
            self._copy.publish()

    @contextlib.contextmanager
    def writing(self, directory: Path) -> Iterator[None]:
        """Publishes what another job than training writes to `evaluation` or `inspection`, when it has done so.

        Raises: as `copies.Copy.prepare` and `copies.Copy.publish`.
        """
        if self._copy is None or directory not in [self.path / name for name in _APART]:
            yield
            return
        part = self._part(directory.name)
        part.prepare()
        yield
        part.publish()

    def named(self, path: Path) -> str:
        """A path in the work directory, as users know it."""
        return f"{self.place}/{path.relative_to(self.path)}" if path.is_relative_to(self.path) else str(path)

    def _part(self, name: str) -> copies.Copy:
        return copies.of(f"{self.place}/{name}", _APART[name], path=self.path / name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other jobs from training in the same directory; the lock ends with the process.

        A run in a store is fetched first, and published when the context ends without an error.

        Raises:
          UserError: another job holds the lock, or the directory holds something else than a run.
          JobError: a store does not answer, or another job has published the run since.
        """
        if self._copy is not None:
            self._copy.prepare()
        owned.claim(self.path, owned.RUN)
        with open(self.path / _LOCK, "a+") as file:
            if not files.try_lock(file.fileno()):
                file.seek(0)
                raise UserError(f"{self.path} is in use by another job (process {file.read().strip()})")
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
        self.publish()

    def locked_by(self) -> str | None:
        """The process that trains in the directory now; None where none does."""
        try:
            with open(self.path / _LOCK) as file:
                return None if files.try_lock(file.fileno(), shared=True) else file.read().strip()
        except OSError:
            return None

    def prepare(self, config: Any, manifest: Manifest) -> str:
        """Starts a new run here, or checks that the run here has this config and this data.

        Files without a checkpoint are not a run yet: the job failed at once, or was killed early.

        Returns:
          A warning where the checkpoints of a run are gone, so that it starts over; else "".

        Raises:
          UserError: the run that is here has another config or other data, or has lost its config.
        """
        started, warning = has_checkpoints(self.checkpoints), ""
        if started and not self._config.exists():
            raise UserError(
                f"{self.path} holds checkpoints, but its {self._config.name} is gone: put it back, or train in another "
                "--workdir"
            )
        if started:
            self._check_config(configs.flat(config))
            self.check_data(manifest)
        else:
            warning = self._set_aside()
            for directory in (self.checkpoints, self.best, self.path / "vocabulary"):
                shutil.rmtree(directory, ignore_errors=True)
            manifest.check()
            data = Path(manifest.data_dir)
            for name in (manifests.FILENAME, "schema.yaml"):
                write_atomically(self.path / name, (data / name).read_bytes())
            (self.path / "vocabulary").mkdir()
            for path in sorted((data / "vocabulary").glob("*.parquet")):
                _link_or_copy(path, self.path / "vocabulary" / path.name)
            files.sync_tree(self.path / "vocabulary")
        write_json(self._config, configs.flat(config))
        return warning

    def _set_aside(self) -> str:
        """Moves the best weights and metrics of an earlier run aside; returns a warning that says so, or ""."""
        evaluated = any(record["kind"] == "validation" for record in self.read_metrics())
        if not evaluated and not (self.best.is_dir() and any(self.best.iterdir())):
            return ""
        aside = next(path for i in itertools.count(1) if not (path := self.path / f"before-{i}").exists())
        aside.mkdir()
        for path in (self.best, self.metrics, self.report):
            if path.exists():
                path.rename(aside / path.name)
        return (
            f"{self.path} has no checkpoint to go on from: training starts over; the best weights and metrics so far "
            f"are in {aside}"
        )

    def is_of(self, manifest: Manifest) -> bool:
        """Whether the run was trained on the data of ``manifest``, going by its copy of the file."""
        ours, theirs = self.path / manifests.FILENAME, Path(manifest.data_dir) / manifests.FILENAME
        return ours.exists() and ours.read_bytes() == theirs.read_bytes()

    def check_data(self, manifest: Manifest) -> None:
        """Checks that ``manifest`` is the manifest of the run's data, and that the data and the run's copies are whole.

        Raises:
          UserError: other data, or a file that is missing or has changed.
        """
        if not self.is_of(manifest):
            theirs = Path(manifest.data_dir) / manifests.FILENAME
            try:
                manifests.load(str(self.path))
            except UserError as error:
                why, way_out = str(error).partition("; ")[0], f"copy {theirs} there, if the run was trained on that"
                raise UserError(f"{why}; {way_out}, or train in another --workdir") from None
            raise UserError(
                f"{manifest.data_dir} is other data than {self.path} was trained on (another {manifests.FILENAME}): "
                "give the directory of that conversion (--config.data.dir, or --data of stem-evaluate), or train in "
                "another --workdir"
            )
        manifest.check()
        manifest.check_copies(str(self.path))

    def manifest(self, config: Any, moved_to: str | None) -> Manifest:
        """The manifest of the run's data.

        Args:
          config: the run's config.
          moved_to: where the data has moved to, or None.

        Raises:
          UserError: no data, or others than the run's.
        """
        try:
            manifest = configs.data(config, moved_to)
        except UserError as error:
            hint = "" if moved_to else "; if the data of the run has moved, give --data=DIR"
            raise UserError(f"{error}{hint}") from None
        self.check_data(manifest)
        return manifest

    def data(self, config: Any, moved_to: str | None, split: str) -> Manifest:
        """The manifest of the run's data, of which ``split`` can be read.

        Raises:
          UserError: as `manifest`; no such split, or no rows in it.
        """
        manifest = self.manifest(config, moved_to)
        if split not in manifest.splits:
            known = manifest.splits
            raise UserError(
                f"--split={split}: no such split{did_you_mean(split, known) or '.'} Splits: {', '.join(known)}"
            )
        if not manifest.rows(split):
            raise UserError(f"--split={split} has no rows in {manifest.data_dir}")
        return manifest

    def config(self) -> Any:
        """The run's config.

        Raises:
          UserError: there is no run here, or its config is damaged.
        """
        if not self._config.exists():
            raise UserError(f"{self.path} holds no run (no config.json); stem-train writes one")
        return configs.checked(self._read_config())

    def data_checksum(self) -> str:
        """SHA-256 of the manifest of the run's data, in hexadecimal."""
        return manifests.checksum(self.path)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        with naming_full_disk(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; leaves out lines that are not whole, such as one that a kill cut off."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        return [record for line in lines if (record := _record(line)) is not None]

    def sync_metrics(self) -> None:
        """Flushes metrics.jsonl to the disk, so that no checkpoint outlives the lines written before it."""
        if self.metrics.exists():
            files.sync(self.metrics)

    def rewind_metrics(self, epoch: int, step: int) -> None:
        """Drops lines that were written after a checkpoint: those of later steps, and evaluations of unfinished epochs.

        Args:
          epoch: epochs finished, evaluation included.
          step: steps done in all epochs.
        """
        kept = [
            record
            for record in self.read_metrics()
            if record["step"] <= step and (record["kind"] == "train" or record["epoch"] <= epoch)
        ]
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def _read_config(self) -> dict[str, Any]:
        way_out = "train in another --workdir, or write the keys that the run was started with into it"
        values = files.read_json(self._config, way_out)
        unknown = set(values) - set(configs.keys(values.get("model.module", "")))
        if unknown:
            raise UserError(f"{self._config} has unknown keys ({', '.join(sorted(unknown))}): another version wrote it")
        return values

    def _check_config(self, new: dict[str, Any]) -> None:
        old = configs.flat(configs.checked(self._read_config()))
        changed = {key for key in new if new[key] != old[key] and key not in FREE_KEYS}
        if new["train.epochs"] > old["train.epochs"]:
            changed.discard("train.epochs")
        if changed:
            differences = "; ".join(f"{key}: {old[key]} -> {new[key]}" for key in sorted(changed))
            raise UserError(
                f"{self.path} holds a run with another config ({differences}): train in another --workdir, or give the "
                f"old values (these may change: {', '.join(FREE_KEYS)}; train.epochs may be raised)"
            )


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        whole = record["kind"] in ("train", "validation") and type(record["epoch"]) is type(record["step"]) is int
    except (ValueError, TypeError, KeyError):
        return None
    return dict(record) if whole else None


def numbers(directory: Path) -> set[int]:
    """Numbers of the checkpoints in a directory, incomplete ones included."""
    names = os.listdir(directory) if directory.is_dir() else []
    return {int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name))}


def has_checkpoints(directory: Path) -> bool:
    """Whether a directory ever held a finished checkpoint, even one that is damaged now.

    The first checkpoint counts once it has its index: without one, a job was killed while it wrote it.
    """
    found = numbers(directory)
    return bool(found - {1}) or (directory / "ckpt-1.index").exists()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # vocabularies can be large and are never written again
    except OSError:
        shutil.copyfile(source, target)
