"""One set of weights of several epochs: each task's own of its best one, the rest of another; chosen on validation.

A task's tower was trained with the experts of its own epoch, and hears others here: what the parts reach together is
known when they have been evaluated together. So every epoch that is kept is tried for the rest, and what does not beat
the best epoch as a whole is not taken.
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
"""Of a task's loss: tasks hear each other, and change a little with whatever changes."""


class Parts:
    """The tasks' own weights, each of an epoch of its own, to be put into ``model``.

    Args:
      model: overwritten; it loses its optimizers.
      tasks: a checkpoint by task.

    Attributes:
      epochs: by task, counted from 1.
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
        """Gives the model the rest of a checkpoint and each task's own weights; the rest's epoch."""
        epoch = restore_weights(self._model, rest).epoch
        for task, values in self._own.items():
            snapshots.put(self._model, task, values)
        return epoch


@dataclass(frozen=True)
class Choice:
    """What a run serves.

    Attributes:
      tasks: by task the name of the checkpoint whose own weights it has.
      rest: name of the one that has the rest; the same for all tasks where an epoch is served as it was.
      score: on validation, of the monitor.
      results: on validation, by task.
      by_task: each task's score by its own monitor.
      whole: of the best epoch as it was, the same score.
      tried: the best score that parts of several epochs reached; None where all are of one.
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
        """Whether the parts are of several epochs."""
        return {*self.tasks.values()} != {self.rest}

    def as_json(self, after: int) -> dict[str, Any]:
        """``after`` so many epochs; see :func:`read`."""
        return report.finite({"after": after, **dataclasses.asdict(self)})


def read(path: Path, after: int) -> Choice | None:
    """What was chosen after so many epochs; None where nothing was."""
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
    """The best of: the epoch ``whole`` as it was, and the tasks' own weights with the rest of each epoch that is kept.

    A task that the monitor does not count, whose own measure is its loss, may not lose by it.

    Args:
      model: overwritten.
      directory: of the checkpoints.
      tasks: by task the name of its best epoch's checkpoint.
      whole: name of the checkpoint of the epoch that is best for all.
      evaluate: the model on validation.
      monitor: of all tasks.
      of_task: of each.
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
            # Where nothing is shared, the rest is nothing.
            for rest in [whole] if snapshots.own_alone(model) else dict.fromkeys([whole, *tasks.values()]):
                parts.put(held[rest])
                results = evaluate()
                score = monitor.value(results)
                tried = score if monitor.better(score, tried) else tried
                if monitor.better(score, found.score) and loses_nowhere(results):
                    found = choice(tasks, rest, results)
    return dataclasses.replace(found, tried=tried)
