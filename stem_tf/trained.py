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
from stem_tf.layers.embedding import rows_between
from stem_tf.layers.initializers import to_be_read
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
                    part = rows_between(values, start, min(start + rows, values.shape[0]))
                    digest.update(part.numpy().tobytes())
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
    named: dict[str, Any] = {}

    def find() -> list[str]:
        named.update(_named(workdir, config, manifest, checkpoint))
        return best_weights.distinct(named)

    fitted = None
    with _held(find) as found, to_be_read():
        held = {one.path: one for one in found}
        path = str(workdir.best_epochs) if named["tasks"] else named["rest"]
        if calibrated and calibration.methods(config, manifest.schema):
            weights = calibration.identity(named, {name: one.readable for name, one in held.items()})
            fitted = _fitted(workdir, config, manifest, weights, path)
        if named["tasks"]:
            model, epoch = _assembled(config, manifest, named, held)
            trained = Trained(model, path, epoch, 0, fitted)
        else:
            one = held[path]
            training = config.optimizer.tables == "deferred" and is_behind(one)
            model = models.build(config, manifest, training=training)
            state = restore_weights(model, one)
            trained = Trained(model, path, state.epoch, state.step, fitted)
    tasks = fitted["tasks"] if fitted else {}
    trained.model.calibrate({task: calibrator(of_task) for task, of_task in tasks.items() if "why" not in of_task})
    return trained


def _named(workdir: Workdir, config: Any, manifest: Manifest, checkpoint: str) -> dict[str, Any]:
    """The checkpoints that are asked for, as `best_weights.names` returns them, but their paths.

    Raises:
      UserError: there is none (yet).
    """
    if checkpoint in ("best", str(workdir.best_epochs)):
        named = best_weights.names(workdir, manifest.schema.task_names, configs.best(config) == "own")
        paths = {name: str(workdir.best / name) for name in best_weights.distinct(named)}
        return {"tasks": {task: paths[name] for task, name in named["tasks"].items()}, "rest": paths.get(named["rest"])}
    if checkpoint != "latest":
        return {"tasks": {}, "rest": checkpoint.removesuffix(".index")}
    if (newest := latest(workdir.checkpoints)) is None:
        raise UserError(f"{workdir.path} has no latest checkpoint yet: go on with stem-train")
    return {"tasks": {}, "rest": newest}


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


def _assembled(
    config: Any, manifest: Manifest, named: dict[str, Any], held: dict[str, Held]
) -> tuple[Predictor, int | dict[str, int]]:
    """The model of a run that keeps a best epoch for each task, with the best weights; their epoch, or each task's."""
    if named["rest"] is not None:
        whole = models.build(config, manifest, training=False)
        parts = assembly.Parts(whole, {task: held[path] for task, path in named["tasks"].items()})
        rest = parts.put(held[named["rest"]])
        return whole, rest if {*parts.epochs.values()} == {rest} else parts.epochs
    members: list[tuple[RankingModel, list[str]]] = []
    epochs: dict[str, int] = {}
    for path in best_weights.distinct(named):
        tasks = [task for task, of_task in named["tasks"].items() if of_task == path]
        members.append((models.build(config, manifest, training=False), tasks))
        epochs |= dict.fromkeys(tasks, restore_weights(members[-1][0], held[path]).epoch)
    return (members[0][0] if len(members) == 1 else snapshots.Snapshots(members)), epochs
