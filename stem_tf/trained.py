"""A trained run's model, ready to predict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipelines.errors import JobError, UserError
from pipelines.manifest import Manifest
from stem_tf import models
from stem_tf.checkpoints import latest, restore_weights
from stem_tf.models import snapshots
from stem_tf.models.base import Predictor, RankingModel
from stem_tf.workdir import Workdir


@dataclass(frozen=True)
class Trained:
    """A model and where its weights come from.

    Attributes:
      model: compiled for prediction.
      checkpoint: path of the checkpoint, or of the file that names one for each task.
      epoch: epochs finished; by task where tasks have their own.
      step: steps done of an epoch that was not finished.
    """

    model: Predictor
    checkpoint: str
    epoch: int | dict[str, int]
    step: int


def load(workdir: Workdir, config: Any, manifest: Manifest, checkpoint: str) -> Trained:
    """The model of a run with the weights of a checkpoint: ``best``, ``latest``, or a path without its suffix.

    Raises:
      UserError: there is no such checkpoint (yet).
      JobError: it is damaged, or of another model.
    """
    if checkpoint in ("best", str(workdir.best_by_task)) and workdir.best_by_task.exists():
        return _by_task(workdir, config, manifest)
    directories = {"best": workdir.best, "latest": workdir.checkpoints}
    path = checkpoint.removesuffix(".index")
    if checkpoint in directories:
        found = latest(directories[checkpoint])
        if found is None:
            hint = ", or take --checkpoint=latest" if latest(workdir.checkpoints) else ""
            raise UserError(f"{workdir.path} has no {checkpoint} checkpoint yet: go on with stem-train{hint}")
        path = found
    model = models.build(config, manifest, training=False)
    state = restore_weights(model, path)
    return Trained(model, path, state.epoch, state.step)


def _by_task(workdir: Workdir, config: Any, manifest: Manifest) -> Trained:
    try:
        chosen = json.loads(workdir.best_by_task.read_text(encoding="utf-8"))
        tasks_of: dict[str, list[str]] = {}
        for task in manifest.schema.task_names:
            tasks_of.setdefault(chosen[task], []).append(task)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise JobError(f"{workdir.best_by_task} is damaged ({error}); take --checkpoint=latest") from None
    members: list[tuple[RankingModel, list[str]]] = []
    epochs: dict[str, int] = {}
    own: dict[str, Any] = {}
    for name, tasks in tasks_of.items():
        model = models.build(config, manifest, training=False)
        state = restore_weights(model, str(workdir.best / name))
        epochs |= dict.fromkeys(tasks, state.epoch)
        if snapshots.shares_nothing(model):
            own |= {task: snapshots.take(model, task) for task in tasks}
            members = [(model, [])]  # any will do: all its weights are replaced
        else:
            members.append((model, tasks))
    if own:
        for task, values in own.items():
            snapshots.put(members[0][0], task, values)
        return Trained(members[0][0], str(workdir.best_by_task), epochs, 0)
    if len(members) == 1:
        return Trained(members[0][0], str(workdir.best_by_task), epochs, 0)
    joined = snapshots.Snapshots(members)
    joined.compile(optimizer=[], steps_per_execution=config.train.steps_per_execution)
    return Trained(joined, str(workdir.best_by_task), epochs, 0)
