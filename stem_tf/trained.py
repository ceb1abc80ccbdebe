"""A trained run's model, ready to predict."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from pipelines.manifest import Manifest
from stem_tf import configs, models
from stem_tf.models import snapshots
from stem_tf.models.predictor import Predictor
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training import assembly
from stem_tf.training.checkpoints import Held, hold, is_behind, latest, restore_weights
from stem_tf.workdir import Workdir
from stem_util import files
from stem_util.errors import UserError

_TRIES = 20
"""How often to look for checkpoints while a job replaces them."""
_BYTES_AT_A_TIME = 16 << 20


@dataclass(frozen=True)
class Trained:
    """A model and where its weights come from.

    Attributes:
      model: compiled for prediction.
      checkpoint: path of the checkpoint, or of the file that names one for each task.
      epoch: epochs finished; by task where each task has weights of its own best epoch.
      step: steps done in an epoch that was not finished.
    """

    model: Predictor
    checkpoint: str
    epoch: int | dict[str, int]
    step: int

    def fingerprint(self) -> str:
        """SHA-256 of the weights as they are now: the same for equal weights, wherever they come from."""
        digest = hashlib.sha256()
        for name, part in self.model.weight_parts.items():
            for number, weight in enumerate(part.weights):
                digest.update(f"{name} {number} {weight.dtype.name} {weight.shape}".encode())
                values = weight if weight.shape.rank else weight[tf.newaxis]
                rows = max(1, _BYTES_AT_A_TIME // max(1, weight.dtype.size * math.prod(values.shape[1:])))
                for start in range(0, values.shape[0], rows):
                    digest.update(values[start : start + rows].numpy().tobytes())
        return digest.hexdigest()


def load(workdir: Workdir, config: Any, manifest: Manifest, checkpoint: str) -> Trained:
    """The model of a run with the weights of a checkpoint: ``best``, ``latest``, or a path without its suffix.

    Raises:
      UserError: there is no such checkpoint (yet).
      JobError: it is damaged, or of another model.
    """
    if checkpoint in ("best", str(workdir.best_epochs)) and workdir.best_epochs.exists():
        return _of_tasks(workdir, config, manifest)
    directories = {"best": workdir.best, "latest": workdir.checkpoints}

    def find() -> str:
        if checkpoint not in directories:
            return checkpoint.removesuffix(".index")
        found = latest(directories[checkpoint])
        if found is None:
            hint = ", or take --checkpoint=latest" if latest(workdir.checkpoints) else ""
            raise UserError(f"{workdir.path} has no {checkpoint} checkpoint yet: go on with stem-train{hint}")
        return found

    with _held(lambda: [find()]) as (held,):
        training = config.optimizer.tables == "deferred" and is_behind(held)
        model = models.build(config, manifest, training=training)
        state = restore_weights(model, held)
    return Trained(model, held.path, state.epoch, state.step)


@contextlib.contextmanager
def _held(find: Callable[[], list[str]]) -> Iterator[list[Held]]:
    """Opens the checkpoints that ``find`` names; tries again where a training job has just replaced one of them.

    Raises:
      UserError: there is no such checkpoint.
    """
    with contextlib.ExitStack() as stack:
        for left in reversed(range(_TRIES)):
            paths = find()
            with contextlib.ExitStack() as trying:
                try:
                    held = [trying.enter_context(hold(path)) for path in paths]
                except (FileNotFoundError, NotADirectoryError):
                    if left and paths != find():
                        continue
                    missing = next((path for path in paths if not os.path.exists(f"{path}.index")), paths[0])
                    raise UserError(f"{missing}: there is no such checkpoint (no {missing}.index)") from None
                stack.enter_context(trying.pop_all())
                break
        yield held


def _of_tasks(workdir: Workdir, config: Any, manifest: Manifest) -> Trained:
    """The model of a run that keeps a best epoch for each task, with the best weights."""
    chosen: dict[str, Any] = {}

    def find() -> list[str]:
        chosen.update(_chosen(workdir, manifest, configs.best(config) == "own"))
        return [str(workdir.best / name) for name in _names(chosen)]

    with _held(find) as held:
        by_name = dict(zip(_names(chosen), held, strict=True))
        tasks_of: dict[str, list[str]] = {}
        for task in manifest.schema.task_names:
            tasks_of.setdefault(chosen["tasks"][task], []).append(task)
        epochs: dict[str, int] = {}
        if configs.best(config) == "own":
            model = models.build(config, manifest, training=False)
            parts = assembly.Parts(model, {task: by_name[name] for task, name in chosen["tasks"].items()})
            rest = parts.put(by_name[chosen["rest"]])
            same = {*parts.epochs.values()} == {rest}
            return Trained(model, str(workdir.best_epochs), rest if same else parts.epochs, 0)
        members: list[tuple[RankingModel, list[str]]] = []
        for name, tasks in tasks_of.items():
            members.append((models.build(config, manifest, training=False), tasks))
            epochs |= dict.fromkeys(tasks, restore_weights(members[-1][0], by_name[name]).epoch)
    if len(members) == 1:
        return Trained(members[0][0], str(workdir.best_epochs), epochs, 0)
    return Trained(snapshots.Snapshots(members), str(workdir.best_epochs), epochs, 0)


def _chosen(workdir: Workdir, manifest: Manifest, own: bool) -> dict[str, Any]:
    """Reads epochs.json: ``tasks``, a checkpoint for each; ``rest``, the one with all weights of no task, or None."""
    path, way_out = workdir.best_epochs, "take --checkpoint=latest"
    chosen = files.read_json(path, way_out)
    tasks, rest = chosen.get("tasks"), chosen.get("rest")
    if (
        not isinstance(tasks, dict)
        or not all(isinstance(tasks.get(task), str) for task in manifest.schema.task_names)
        or not isinstance(rest, str if own else str | None)
    ):
        raise UserError(f"{path} is damaged (it should name a checkpoint for each task); {way_out}")
    return {"tasks": {task: tasks[task] for task in manifest.schema.task_names}, "rest": rest}


def _names(chosen: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(filter(None, [*chosen["tasks"].values(), chosen["rest"]])))
