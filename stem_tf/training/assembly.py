"""Assembles weights from several epochs: each task's own from its best epoch, the rest from one, chosen on validation.

A task's tower was trained with the experts of its own epoch and reads those of another one here, so the parts have to
be evaluated together. Every epoch that is kept is tried for the rest, and an assembly is used only if it beats the best
epoch alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from stem_tf import report
from stem_tf.models import snapshots
from stem_tf.models.ranking_model import RankingModel
from stem_tf.training.checkpoints import Held, hold, restore_weights
from stem_tf.training.monitor import Monitor, Results

_TOLERATED = 0.01
"""Share by which a task's loss may grow: tasks read shared weights, so that any change moves all of them a little."""


class Parts:
    """The tasks' own weights, each task's from an epoch of its own, to be put into ``model``.

    Args:
      model: overwritten; it loses its optimizers.
      tasks: the checkpoint of each task.

    Attributes:
      epochs: the epoch of each task's checkpoint, counted from 1.
    """

    def __init__(self, model: RankingModel, tasks: Mapping[str, Held]) -> None:
        self._model = model
        model.end_training()
        self._own: dict[str, list[NDArray]] = {}
        self.epochs = dict.fromkeys(tasks, 0)
        for held in {held.path: held for held in tasks.values()}.values():
            epoch = restore_weights(model, held).epoch
            for task in (task for task, of_task in tasks.items() if of_task.path == held.path):
                self.epochs[task], self._own[task] = epoch, snapshots.take(model, task)

    def put(self, rest: Held) -> int:
        """Gives the model the weights of ``rest``, then each task's own; returns the epoch of ``rest``."""
        epoch = restore_weights(self._model, rest).epoch
        for task, values in self._own.items():
            snapshots.put(self._model, task, values)
        return epoch


@dataclass(frozen=True)
class Choice:
    """The weights that a run serves.

    Attributes:
      tasks: name of the checkpoint that each task's own weights come from.
      rest: name of the checkpoint that all other weights come from; where one epoch is served alone, it is also that of
        every task.
      score: the monitor's score on validation.
      results: metrics on validation, by task.
      by_task: each task's score by its own monitor.
      whole: the monitor's score of the best epoch alone.
      tried: the best score of an assembly; None where all tasks have the same best epoch, so that none was tried.
    """

    tasks: dict[str, str]
    rest: str
    score: float
    results: Results
    by_task: dict[str, float]
    whole: float
    tried: float | None

    @property
    def assembled(self) -> bool:
        """Whether the weights come from several epochs."""
        return {*self.tasks.values()} != {self.rest}

    def as_json(self, after: int) -> dict[str, Any]:
        """The choice as JSON, with the number of epochs that were finished as ``after``; see :func:`read`."""
        return report.finite({"after": after, **dataclasses.asdict(self)})


def read(path: Path, after: int) -> Choice | None:
    """The choice that was made after ``after`` epochs; None where none was made then."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Choice(**found) if found.pop("after") == after else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def choose(
    model: RankingModel,
    directory: Path,
    tasks: Mapping[str, str],
    whole: str,
    evaluate: Callable[[], Results],
    monitor: Monitor,
    of_task: Mapping[str, Monitor],
) -> Choice:
    """Chooses the best of: the epoch ``whole`` alone, and the tasks' own weights with the rest of each kept epoch.

    An assembly is refused where the loss of a task that the monitor does not count grows by more than a hundredth.

    Args:
      model: overwritten.
      directory: directory of the checkpoints.
      tasks: name of the checkpoint of each task's best epoch.
      whole: name of the checkpoint of the epoch that is best for all tasks together.
      evaluate: evaluates the model on validation.
      monitor: scores all tasks together.
      of_task: the monitor of each task alone.
    """

    def choice(own: Mapping[str, str], rest: str, results: Results) -> Choice:
        by_task = {task: watched.value(results) for task, watched in of_task.items()}
        return Choice(dict(own), rest, monitor.value(results), dict(results), by_task, whole_score, None)

    def loses_nowhere(results: Results) -> bool:
        others = [watched for task, watched in of_task.items() if task not in monitor.weights and watched != monitor]
        return all(watched.value(results) <= (1 + _TOLERATED) * watched.value(before) for watched in others)

    with contextlib.ExitStack() as stack:
        held = {name: stack.enter_context(hold(str(directory / name))) for name in {whole, *tasks.values()}}
        Parts(model, {}).put(held[whole])
        before = evaluate()
        whole_score = monitor.value(before)
        found, tried = choice(dict.fromkeys(tasks, whole), whole, before), None
        if len(held) > 1:
            parts = Parts(model, {task: held[name] for task, name in tasks.items()})
            # Where nothing is shared, there is no rest to choose.
            for rest in [whole] if snapshots.own_alone(model) else dict.fromkeys([whole, *tasks.values()]):
                parts.put(held[rest])
                results = evaluate()
                score = monitor.value(results)
                tried = score if monitor.better(score, tried) else tried
                if monitor.better(score, found.score) and loses_nowhere(results):
                    found = choice(tasks, rest, results)
    return dataclasses.replace(found, tried=tried)
