"""A trained run's model, ready to predict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pipelines.errors import JobError, UserError
from pipelines.manifest import Manifest
from stem_tf import configs, models
from stem_tf.checkpoints import is_behind, latest, restore_weights
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
    if checkpoint in ("best", str(workdir.best_epochs)) and workdir.best_epochs.exists():
        return _of_tasks(workdir, config, manifest)
    directories = {"best": workdir.best, "latest": workdir.checkpoints}
    path = checkpoint.removesuffix(".index")
    if checkpoint in directories:
        found = latest(directories[checkpoint])
        if found is None:
            hint = ", or take --checkpoint=latest" if latest(workdir.checkpoints) else ""
            raise UserError(f"{workdir.path} has no {checkpoint} checkpoint yet: go on with stem-train{hint}")
        path = found
    model = models.build(config, manifest, training=config.optimizer.tables == "deferred" and is_behind(path))
    state = restore_weights(model, path)
    return Trained(model, path, state.epoch, state.step)


def _of_tasks(workdir: Workdir, config: Any, manifest: Manifest) -> Trained:
    """The best weights of a run whose tasks have best epochs of their own."""
    try:
        chosen = json.loads(workdir.best_epochs.read_text(encoding="utf-8"))
        tasks_of: dict[str, list[str]] = {}
        for task in manifest.schema.task_names:
            tasks_of.setdefault(chosen["tasks"][task], []).append(task)
        rest = chosen["rest"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise JobError(f"{workdir.best_epochs} is damaged ({error}); take --checkpoint=latest") from None
    epochs: dict[str, int] = {}
    if configs.best(config) == "own":
        model = models.build(config, manifest, training=False)
        own: dict[str, list[NDArray]] = {}
        for name, tasks in tasks_of.items():
            epoch = restore_weights(model, str(workdir.best / name)).epoch
            epochs |= dict.fromkeys(tasks, epoch)
            own |= {task: snapshots.take(model, task) for task in tasks}
        restore_weights(model, str(workdir.best / rest))
        for task, values in own.items():
            snapshots.put(model, task, values)
        return Trained(model, str(workdir.best_epochs), epochs, 0)
    members: list[tuple[RankingModel, list[str]]] = []
    for name, tasks in tasks_of.items():
        members.append((models.build(config, manifest, training=False), tasks))
        epochs |= dict.fromkeys(tasks, restore_weights(members[-1][0], str(workdir.best / name)).epoch)
    if len(members) == 1:
        return Trained(members[0][0], str(workdir.best_epochs), epochs, 0)
    joined = snapshots.Snapshots(members)
    joined.compile(optimizer=[], steps_per_execution=config.train.steps_per_execution)
    return Trained(joined, str(workdir.best_epochs), epochs, 0)
