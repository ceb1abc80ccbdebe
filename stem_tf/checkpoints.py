"""Checkpoints of a run: the whole training state, and the weights of the best epoch.

Both have the layout ``{"model": ..., "state": ...}``, so that predictions can be made from either. A checkpoint counts
once the small file that names it is replaced, after its data is written: a kill at any moment leaves the last one
whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import tensorflow as tf

from pipelines.errors import JobError, UserError, message
from stem_tf.models.base import RankingModel


class Best(TypedDict):
    """Of one task: its best epoch, that epoch's score, and how many epochs since then were not better."""

    best_epoch: int
    best_score: float | None
    without_gain: int


@dataclass
class RunState:
    """Where a run stands, beside the model's variables.

    Attributes:
      epoch: epochs finished, evaluation included.
      step: steps done of the epoch ``epoch`` (counted from 0); all of them when only its evaluation is missing.
      best_epoch: the best one so far (counted from 0), or -1.
      best_score: its score.
      without_gain: epochs in a row that were not better.
      by_task: the same three by task, where each task has best weights of its own.
      stopped: why training has ended, or "".
      losses: the epoch's mean losses so far, as the last step reported them.
      samples, seconds: rows trained on and the time that took, without each process's first execution.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_score: float | None = None
    without_gain: int = 0
    by_task: dict[str, Best] = field(default_factory=dict)
    stopped: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0


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
      directory: of the checkpoints; holds the last ``keep``.
      model: a built model.
      state: saved beside it, and overwritten by :meth:`restore`.
      weights_only: leave out optimizer state, counters and running metrics.
      keep: how many to keep.
    """

    def __init__(
        self, directory: Path, model: RankingModel, state: RunState, *, weights_only: bool = False, keep: int = 2
    ) -> None:
        saved = tf.train.Checkpoint(**model.weight_parts) if weights_only else model
        self._model, self._weights_only = model, weights_only
        self._checkpoint = tf.train.Checkpoint(model=saved, state=_Json(state))
        self._directory = directory
        for leftover in directory.glob("*_temp"):  # of a job that was killed while it wrote
            shutil.rmtree(leftover)
        self._manager = tf.train.CheckpointManager(self._checkpoint, str(directory), max_to_keep=keep)

    def save(self) -> str:
        """Writes a checkpoint and returns its path.

        Raises:
          JobError: the loss is no longer finite (nothing is written), or writing failed.
        """
        return self._written(self._manager.save)

    def save_as(self, name: str) -> None:
        """Writes the checkpoint ``name``, which stays until :meth:`keep_only`; raises as :meth:`save`."""
        self._written(lambda: self._checkpoint.write(str(self._directory / name)))

    def keep_only(self, names: Collection[str]) -> None:
        """Deletes the checkpoints of :meth:`save_as` that are not among ``names``."""
        for path in self._directory.glob("epoch-*"):
            if path.name.partition(".")[0] not in names:
                path.unlink(missing_ok=True)

    def _written(self, write: Callable[[], Any]) -> str:
        check_finite(self._model)
        if self._weights_only:
            self._model.catch_up()
        try:
            return str(write())
        except tf.errors.OpError as error:
            raise JobError(f"{self._directory}: a checkpoint could not be written ({message(error)})") from error

    def restore(self) -> str | None:
        """Restores model and state from the last checkpoint; returns its path, or None where there is none."""
        path = latest(Path(self._manager.directory))
        if path is not None:
            _read(self._checkpoint.restore, path)
        return path


def latest(directory: Path) -> str | None:
    """The last checkpoint of a directory whose files are there."""
    try:
        found = tf.train.get_checkpoint_state(str(directory))
    except tf.errors.OpError:
        found = None
    paths = list(found.all_model_checkpoint_paths) if found else []
    return next((path for path in reversed(paths) if tf.io.gfile.exists(f"{path}.index")), None)


def is_behind(path: str) -> bool:
    """Whether a checkpoint holds tables with their slots: their rows may have steps to make up for."""
    try:
        return any("/table_optimizers/" in name for name, _ in tf.train.list_variables(path))
    except (tf.errors.OpError, ValueError):  # missing or damaged: reading it says so
        return False


def restore_weights(model: RankingModel, path: str) -> RunState:
    """Restores what predictions depend on from either kind of checkpoint; returns the state of its run.

    A model built for training is brought up to date with its slots, and then loses them.

    Raises:
      UserError: there is no such checkpoint.
      JobError: it is damaged, or of another model.
    """
    if not tf.io.gfile.exists(f"{path}.index"):
        raise UserError(f"{path}: there is no such checkpoint (no {path}.index)")
    state = RunState()
    parts: dict[str, Any] = dict(model.weight_parts)
    if model.table_optimizers:
        parts |= {"table_optimizers": model.table_optimizers, "global_step": model.global_step}
    _read(tf.train.Checkpoint(model=tf.train.Checkpoint(**parts), state=_Json(state)).read, path)
    model.catch_up()
    model.table_optimizers = []
    return state


def check_finite(model: RankingModel) -> None:
    """Raises JobError naming step and task of the first loss or gradient that was not finite."""
    step = int(model.first_bad_step.numpy())
    if step < 0:
        return
    task = int(model.first_bad_task.numpy())
    what = "the gradient" if task < 0 else f"the loss of task '{model.tasks[task].name}'"
    raise JobError(
        f"{what} is not finite at step {step + 1:,}: the last checkpoint is from before that. Lower "
        "config.optimizer.learning_rate, warm up, or clip (config.optimizer.clip_norm), in a new --workdir"
    )


def _read(read: Callable[[str], Any], path: str) -> None:
    try:
        read(path).assert_existing_objects_matched().expect_partial()
    except (tf.errors.OpError, AssertionError, ValueError, IndexError, RuntimeError) as error:  # of three layers of TF
        why: Any = error.message if isinstance(error, tf.errors.OpError) else error
        raise JobError(
            f"{path}: the checkpoint is damaged, or of another version of the model ({str(why).splitlines()[0]}). "
            f"Delete {path}.* to go on from the one before it, if there is one"
        ) from error
