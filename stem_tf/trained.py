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
from stem_tf.models.calibrators import calibrator
from stem_tf.models.predictor import Predictor
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training import assembly, best_weights, calibration
from stem_tf.training.checkpoints import Held, hold, is_behind, latest, restore_weights
from stem_tf.workdir import Workdir
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
      calibration: what `stem_tf.training.calibration.read` found for these weights, if the model is calibrated.
    """

    model: Predictor
    checkpoint: str
    epoch: int | dict[str, int]
    step: int
    calibration: dict[str, Any] | None = None

    def fingerprint(self) -> str:
        """SHA-256 of the weights and calibrators as they are now: the same for equal ones, wherever they come from."""
        digest = hashlib.sha256()
        if self.model.calibrators:
            digest.update(repr(sorted(self.model.calibrators.items())).encode())
        for name, part in self.model.weight_parts.items():
            for number, weight in enumerate(part.weights):
                digest.update(f"{name} {number} {weight.dtype.name} {weight.shape}".encode())
                values = weight if weight.shape.rank else weight[tf.newaxis]
                rows = max(1, _BYTES_AT_A_TIME // max(1, weight.dtype.size * math.prod(values.shape[1:])))
                for start in range(0, values.shape[0], rows):
                    digest.update(values[start : start + rows].numpy().tobytes())
        return digest.hexdigest()


def load(workdir: Workdir, config: Any, manifest: Manifest, checkpoint: str, *, calibrated: bool = True) -> Trained:
    """The model of a run with the weights of a checkpoint: ``best``, ``latest``, or a path without its suffix.

    Args:
      workdir: the run.
      config: its config.
      manifest: manifest of its data.
      checkpoint: which weights.
      calibrated: give the model the calibrators that ``config.train.calibration`` asks for.

    Raises:
      UserError: there is no such checkpoint (yet), or no calibrators were fitted for it.
      JobError: it is damaged, or of another model.
    """
    calibrated = calibrated and bool(calibration.methods(config, manifest.schema))
    if checkpoint in ("best", str(workdir.best_epochs)) and workdir.best_epochs.exists():
        return _of_tasks(workdir, config, manifest, calibrated)
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
        weights = calibration.identity({"tasks": {}, "rest": ""}, {"": held.readable})
        fitted = _fitted(workdir, config, manifest, weights, held.path) if calibrated else None
        training = config.optimizer.tables == "deferred" and is_behind(held)
        model = models.build(config, manifest, training=training)
        state = restore_weights(model, held)
    return _calibrated(Trained(model, held.path, state.epoch, state.step, fitted))


def _fitted(
    workdir: Workdir, config: Any, manifest: Manifest, weights: dict[str, Any], checkpoint: str
) -> dict[str, Any]:
    """The calibrators that were fitted for the weights of a checkpoint.

    Raises:
      UserError: none were, or the file is damaged.
    """
    fitted = calibration.read(workdir.calibration, weights, calibration.asked(config, manifest.schema))
    if fitted is None:
        asked = configs.plain(config.train.calibration)
        raise UserError(
            f"no calibrators were fitted for {checkpoint} (config.train.calibration={asked}): stem-train fits them for "
            "the best weights, when training has ended; go on with it and take --checkpoint=best, or let "
            "stem-evaluate, stem-export or stem-publish give scores as they are (--nocalibrated)"
        )
    return fitted


def _calibrated(found: Trained) -> Trained:
    """Gives the model its calibrators."""
    tasks = found.calibration["tasks"] if found.calibration else {}
    found.model.calibrate({task: calibrator(fitted) for task, fitted in tasks.items() if "why" not in fitted})
    return found


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


def _of_tasks(workdir: Workdir, config: Any, manifest: Manifest, calibrated: bool) -> Trained:
    """The model of a run that keeps a best epoch for each task, with the best weights."""
    chosen: dict[str, Any] = {}

    def find() -> list[str]:
        chosen.update(best_weights.names(workdir, manifest.schema.task_names, configs.best(config) == "own"))
        return [str(workdir.best / name) for name in best_weights.distinct(chosen)]

    with _held(find) as held:
        by_name, path = dict(zip(best_weights.distinct(chosen), held, strict=True)), str(workdir.best_epochs)
        weights = calibration.identity(chosen, {name: one.readable for name, one in by_name.items()})
        fitted = _fitted(workdir, config, manifest, weights, path) if calibrated else None
        tasks_of: dict[str, list[str]] = {}
        for task in manifest.schema.task_names:
            tasks_of.setdefault(chosen["tasks"][task], []).append(task)
        epochs: dict[str, int] = {}
        if configs.best(config) == "own":
            whole = models.build(config, manifest, training=False)
            parts = assembly.Parts(whole, {task: by_name[name] for task, name in chosen["tasks"].items()})
            rest = parts.put(by_name[chosen["rest"]])
            same = {*parts.epochs.values()} == {rest}
            return _calibrated(Trained(whole, path, rest if same else parts.epochs, 0, fitted))
        members: list[tuple[RankingModel, list[str]]] = []
        for name, tasks in tasks_of.items():
            members.append((models.build(config, manifest, training=False), tasks))
            epochs |= dict.fromkeys(tasks, restore_weights(members[-1][0], by_name[name]).epoch)
    model = members[0][0] if len(members) == 1 else snapshots.Snapshots(members)
    return _calibrated(Trained(model, path, epochs, 0, fitted))
