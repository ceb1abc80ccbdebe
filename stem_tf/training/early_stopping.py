"""The rule of early stopping: which epoch is best for all tasks and for each, and whether patience has ended."""

from __future__ import annotations

from collections.abc import Mapping

from stem_tf.training.checkpoints import RunState
from stem_tf.training.monitor import Monitor, Results


def note_epoch(state: RunState, epoch: int, score: float, monitor: Monitor) -> bool:
    """Notes in ``state`` whether an epoch (counted from 0) is the best so far, and returns it."""
    better = monitor.better(score, state.best_score)
    if better:
        state.best_epoch, state.best_score, state.without_gain = epoch, score, 0
    else:
        state.without_gain += 1
    return better


def note_tasks(
    state: RunState, epoch: int, results: Results, monitors: Mapping[str, Monitor], patience: int
) -> list[str]:
    """Like :func:`note_epoch` for each task by its own monitor; returns the tasks whose best epoch this is so far.

    A task whose patience has ended keeps the best epoch that it has: it would have stopped if it had trained alone.
    """
    improved = []
    for task, monitor in monitors.items():
        best = state.by_task.setdefault(task, {"best_epoch": -1, "best_score": None, "without_gain": 0})
        if patience and best["without_gain"] >= patience:
            continue
        score = monitor.value(results)
        if monitor.better(score, best["best_score"]):
            state.by_task[task] = {"best_epoch": epoch, "best_score": score, "without_gain": 0}
            improved.append(task)
        else:
            best["without_gain"] += 1
    return improved


def why_stop(state: RunState, patience: int) -> str:
    """Why no epoch should follow, in words; "" where one should, or where ``patience`` is 0.

    In a run that keeps best weights for each task, the patience of every task has to end.
    """
    without_gain = min((best["without_gain"] for best in state.by_task.values()), default=state.without_gain)
    if not patience or without_gain < patience:
        return ""
    epochs, each = "epochs" if without_gain > 1 else "epoch", " for any task" if state.by_task else ""
    return f"{without_gain} {epochs} without a better score{each}"
