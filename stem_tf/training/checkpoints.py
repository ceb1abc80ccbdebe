"""Checkpoints of a run: the whole training state, and the weights of the best epoch.

Both have the layout ``{"model": ..., "state": ...}``, so that predictions can be made from either. A checkpoint is
written beside the others and flushed to the disk, then its files are renamed, the index last: it counts once it has its
index. A kill or a power cut at any moment leaves the one before it whole. No other file names the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import tensorflow as tf

from stem_tf.models.ranking_model import RankingModel
from stem_tf.training.non_finite import check_finite
from stem_tf.workdir import has_checkpoints, numbers
from stem_util import files
from stem_util.errors import JobError, message

_FILE = re.compile(r"((?:ckpt|epoch)-\d+(?:-\d+)?)\..+")
_BESIDE = ".stem-tf-writing"
_LEFTOVER = re.compile(r"(ckpt|epoch)-\d+_temp")
"""Directories that earlier versions left when a job was killed while it wrote a checkpoint."""


class Best(TypedDict):
    """One task's best epoch, that epoch's score, and how many epochs since then were not better."""

    best_epoch: int
    best_score: float | None
    without_gain: int


@dataclass
class RunState:
    """Where a run stands, beside the model's variables.

    Attributes:
      epoch: epochs finished, evaluation included.
      step: steps done in the epoch ``epoch`` (counted from 0); all of them when only its evaluation is missing.
      best_epoch: the best one so far (counted from 0), or -1.
      best_score: its score.
      without_gain: epochs in a row that were not better.
      by_task: the same three values by task, where each task has best weights of its own.
      stopped: why training has ended, or "".
      losses: the epoch's mean losses so far, as the last step reported them.
      parts: the parts that the epoch's rows are dealt out to.
      samples, seconds: rows trained on, and the time for them, without the first execution of each process.
      ancestor: what the run went on from, see :func:`stem_tf.training.start.start`; {} for a run that did not.
      first_step: steps of the optimizers that were done before the run's first one.
      first_epoch: epochs before the run's first one, as decaying weights of the losses count them.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_score: float | None = None
    without_gain: int = 0
    by_task: dict[str, Best] = field(default_factory=dict)
    stopped: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    parts: int = 1
    samples: int = 0
    seconds: float = 0.0
    ancestor: dict[str, Any] = field(default_factory=dict)
    first_step: int = 0
    first_epoch: int = 0


class _Json(tf.train.experimental.PythonState):
    """Carries a :class:`RunState` inside a checkpoint."""

    def __init__(self, state: RunState) -> None:
        self.state = state

    def serialize(self) -> str:
        return json.dumps(dataclasses.asdict(self.state))

    def deserialize(self, string_value: bytes) -> None:
        for name, value in json.loads(string_value).items():
            setattr(self.state, name, value)


class Checkpoints:
    """Saves and restores a model and the state of its run.

    Args:
      directory: directory of the checkpoints; one job at a time writes there.
      model: a built model.
      state: state of the run, saved beside the model and overwritten by :meth:`restore`.
      weights_only: leave out optimizer state, counters and running metrics.
      keep: how many to keep.
      writes: whether this process writes. One that does not takes part in what changes the model before it is saved.
      remote: whether other processes hold variables of the model: they write and read the files by their paths.

    Attributes:
      damaged: paths of newer checkpoints that :meth:`restore` passed over.
    """

    def __init__(
        self,
        directory: Path,
        model: RankingModel,
        state: RunState,
        *,
        weights_only: bool = False,
        keep: int = 2,
        writes: bool = True,
        remote: bool = False,
    ) -> None:
        saved = tf.train.Checkpoint(**model.weight_parts) if weights_only else model
        self._model, self._weights_only = model, weights_only
        self._checkpoint = tf.train.Checkpoint(model=saved, state=_Json(state))
        self._directory, self._keep, self._writes, self._remote = directory, keep, writes, remote
        self.damaged: list[str] = []

    def save(self) -> str:
        """Writes a checkpoint under the next number and returns its path.

        Raises:
          JobError: the loss is no longer finite (nothing is written), or writing failed.
        """
        name = f"ckpt-{max(numbers(self._directory), default=0) + 1}"
        self._write(name)
        damaged = {Path(path).name for path in self.damaged}
        whole = [path.stem for path in _indices(self._directory) if path.stem not in damaged]
        self._delete({f"ckpt-{number}" for number in numbers(self._directory)} - set(whole[: self._keep]))
        return str(self._directory / name)

    def save_as(self, name: str) -> str:
        """Writes a checkpoint that stays until :meth:`keep_only`; raises as :meth:`save`.

        Returns:
          Its name: ``name``, or ``name`` and a number where there is one already, which stays whole.
        """
        taken = self._names()
        name = next(n for n in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))) if n not in taken)
        self._write(name)
        return name

    def newest(self, name: str) -> str:
        """Name of the last checkpoint that :meth:`save_as` wrote for ``name``; ``name`` where none is left."""
        written = [n for n in self._names() if n == name or n.startswith(f"{name}-")]
        return max(written, key=lambda n: (len(n), n), default=name)

    def keep_only(self, names: Collection[str]) -> None:
        """Deletes the checkpoints of :meth:`save_as` that are not among ``names``."""
        self._delete({name for name in self._names() if name.startswith("epoch-")} - set(names))

    def restore(self) -> str | None:
        """Restores model and state from the newest checkpoint that can be read; returns its path, None without any.

        Raises:
          JobError: there are checkpoints, and none can be read.
        """
        self.damaged, reasons = [], []
        for index in _indices(self._directory):
            path = str(index.with_suffix(""))
            try:
                with held_checkpoint(path, remote=self._remote) as held:
                    _read(self._checkpoint.read, held)
                return path
            except JobError as error:
                self.damaged.append(path)
                reasons.append(error)
        if has_checkpoints(self._directory):
            why = f": {reasons[0]}" if reasons else ""
            raise JobError(f"none of the checkpoints in {self._directory} is whole{why}; train in another --workdir")
        return None

    def _names(self) -> set[str]:
        """Names of the checkpoints in the directory, incomplete ones included."""
        if not self._directory.is_dir():
            return set()
        return {found[1] for entry in os.listdir(self._directory) if (found := _FILE.fullmatch(entry))}

    def _write(self, name: str) -> None:
        """Adds a checkpoint under a new name. It counts once its index, the last of its files, is in its place."""
        check_finite(self._model)
        if self._weights_only:
            self._model.catch_up()
        if not self._writes:
            return
        beside = files.make_directory(self._directory) / _BESIDE
        shutil.rmtree(beside, ignore_errors=True)  # of a job that was killed while it wrote
        beside.mkdir()
        try:
            self._write_beside(beside, name)
            files.sync_tree(beside)
            for index in (False, True):
                for path in beside.iterdir():
                    if (path.suffix == ".index") == index:
                        os.replace(path, self._directory / path.name)
                files.sync(self._directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _write_beside(self, directory: Path, name: str) -> None:
        with files.literal(directory) as literal:
            try:
                self._checkpoint.write(f"{literal}/{name}")
            except tf.errors.OpError as error:
                why = message(error).replace(literal, str(directory))
                raise JobError(
                    f"{self._directory}: a checkpoint could not be written ({why}); the same command goes on from the "
                    "one before"
                ) from error

    def _delete(self, names: Collection[str]) -> None:
        """Deletes checkpoints, and what earlier versions left beside them."""
        if not self._writes:
            return
        for entry in sorted(os.listdir(self._directory), reverse=True):  # indices first: what has one is whole
            path, found = self._directory / entry, _FILE.fullmatch(entry)
            if found and found[1] in names:
                path.unlink(missing_ok=True)
            elif entry == "checkpoint":  # TensorFlow's own file of names
                path.unlink()
            elif _LEFTOVER.fullmatch(entry):
                shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Held:
    """A checkpoint whose files are open: it can be read whatever its name, and even once a job has deleted it.

    Attributes:
      path: the path that users know.
      readable: a path that TensorFlow can read while the checkpoint is held.
    """

    path: str
    readable: str


@contextlib.contextmanager
def hold(path: str) -> Iterator[Held]:
    """Opens the files of a checkpoint.

    Raises:
      FileNotFoundError: there is none, or it has just been deleted.
    """
    directory, name = os.path.split(os.path.abspath(path))
    with contextlib.ExitStack() as stack:
        links = stack.enter_context(tempfile.TemporaryDirectory())
        # The index is deleted first, and opened last: where it is still there, all the data was opened.
        present = [entry for entry in os.listdir(directory) if entry.startswith((f"{name}.index", f"{name}.data-"))]
        for entry in sorted({f"{name}.index", *present}):
            descriptor = os.open(os.path.join(directory, entry), os.O_RDONLY)
            stack.callback(os.close, descriptor)
            os.symlink(f"/proc/self/fd/{descriptor}", os.path.join(links, entry.replace(name, "held", 1)))
        yield Held(path, f"{stack.enter_context(files.literal(links))}/held")


def held_checkpoint(path: str, *, remote: bool) -> contextlib.AbstractContextManager[Held]:
    """Opens a checkpoint that nobody deletes meanwhile; raises as :func:`hold`.

    ``remote``: for processes that share its file system, not its open files.
    """
    return contextlib.nullcontext(Held(path, os.path.abspath(path))) if remote else hold(path)


def latest(directory: Path) -> str | None:
    """The newest checkpoint of a directory whose files are there."""
    for index in _indices(directory):
        if index.stat().st_size and any(index.parent.glob(f"{index.stem}.data-*")):
            return str(index.with_suffix(""))
    return None


def _indices(directory: Path) -> list[Path]:
    """Indices of the checkpoints that :meth:`Checkpoints.save` wrote, the newest first."""
    paths = [directory / f"ckpt-{number}.index" for number in sorted(numbers(directory), reverse=True)]
    return [path for path in paths if path.exists()]


def is_behind(held: Held) -> bool:
    """Whether a checkpoint holds tables with their slots: rows may then have missed steps to make up for."""
    try:
        return any("/table_optimizers/" in name for name, _ in tf.train.list_variables(held.readable))
    except (tf.errors.OpError, ValueError):  # damaged; reading it will raise
        return False


def restore_weights(model: RankingModel, held: Held) -> RunState:
    """Restores what predictions depend on from either kind of checkpoint; returns the state of its run.

    A model built for training is brought up to date with its slots, and then loses them.

    Raises:
      JobError: it is damaged, or of another model.
    """
    state = RunState()
    parts: dict[str, Any] = dict(model.weight_parts)
    if model.table_optimizers:
        parts |= {"table_optimizers": model.table_optimizers, "global_step": model.global_step}
        parts |= {} if model.schedule_start is None else {"schedule_start": model.schedule_start}
    read_into(parts, held, state)
    model.catch_up()
    model.end_training()
    return state


def replace_weights(model: RankingModel, held: Held) -> None:
    """Gives a model that was trained the weights of a checkpoint that holds nothing else; it cannot be trained on.

    Raises:
      JobError: it is damaged, or of another model.
    """
    if not any(optimizer.remote for optimizer in model.table_optimizers):  # these read the rows, too
        model.end_training()
    weights = tf.train.Checkpoint(**model.weight_parts)
    _read(tf.train.Checkpoint(model=weights, state=_Json(RunState())).read, held)


def read_into(parts: Mapping[str, Any], held: Held, state: RunState) -> None:
    """Restores parts of a model, by the names of its attributes, and the state of the run.

    Raises:
      JobError: the checkpoint is damaged, or of another model.
    """
    _read(tf.train.Checkpoint(model=tf.train.Checkpoint(**parts), state=_Json(state)).read, held)


def _read(read: Callable[[str], Any], held: Held) -> None:
    try:
        read(held.readable).assert_existing_objects_matched().expect_partial()
    except tf.errors.UnavailableError:  # a process that holds variables is gone
        raise
    except (tf.errors.OpError, AssertionError, ValueError, IndexError, RuntimeError) as error:  # of three layers of TF
        why = message(error) if isinstance(error, tf.errors.OpError) else next(iter(str(error).splitlines()), "")
        raise JobError(
            f"{held.path}: the checkpoint is damaged, or of another version of the model "
            f"({why.replace(held.readable, held.path)})"
        ) from error
