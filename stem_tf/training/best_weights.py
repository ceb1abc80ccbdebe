"""Which checkpoints hold a run's best weights, and how the model that was trained gets them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stem_tf.models.ranking_model import RankingModel
from stem_tf.training import assembly
from stem_tf.training.checkpoints import Held, latest, replace_weights
from stem_tf.workdir import Workdir
from stem_util import files
from stem_util.errors import UserError


def names(workdir: Workdir, tasks: Sequence[str], own: bool) -> dict[str, Any]:
    """Names of checkpoints in ``best/``: ``tasks``, one for each where tasks have their own; ``rest``, that of all
    other weights, or None.

    Args:
      workdir: the run's directory.
      tasks: names of its tasks.
      own: whether tasks have only their own weights from epochs of their own.

    Raises:
      UserError: the file that names them is damaged, or there are none.
    """
    path, way_out = workdir.best_epochs, "take --checkpoint=latest"
    if not path.exists():
        if (newest := latest(workdir.best)) is None:
            hint = f", or {way_out}" if latest(workdir.checkpoints) else ""
            raise UserError(f"{workdir.path} has no best checkpoint yet: go on with stem-train{hint}")
        return {"tasks": {}, "rest": newest.rpartition("/")[2]}
    chosen = files.read_json(path, way_out)
    of_task, rest = chosen.get("tasks"), chosen.get("rest")
    if (
        not isinstance(of_task, dict)
        or not all(isinstance(of_task.get(task), str) for task in tasks)
        or not isinstance(rest, str if own else str | None)
    ):
        raise UserError(f"{path} is damaged (it should name a checkpoint for each task); {way_out}")
    return {"tasks": {task: of_task[task] for task in tasks}, "rest": rest}


def distinct(named: Mapping[str, Any]) -> list[str]:
    """The names among what :func:`names` returns, each once."""
    return list(dict.fromkeys(filter(None, [*named["tasks"].values(), named["rest"]])))


def put(
    model: RankingModel, named: Mapping[str, Any], held: Mapping[str, Held], tasks: Sequence[str]
) -> Iterator[list[str]]:
    """Gives the model that was trained the best weights, one set after another; yields the tasks that each one serves.

    Args:
      model: overwritten; it cannot be trained any more.
      named: of :func:`names`.
      held: the checkpoints by name.
      tasks: names of all tasks.
    """
    if not named["tasks"]:
        replace_weights(model, held[named["rest"]])
        yield [*tasks]
    elif named["rest"] is not None:
        assembly.Parts(model, {task: held[name] for task, name in named["tasks"].items()}).put(held[named["rest"]])
        yield [*tasks]
    else:
        for name in distinct(named):
            replace_weights(model, held[name])
            yield [task for task in tasks if named["tasks"][task] == name]
