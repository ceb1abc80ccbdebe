"""The best epoch and the end of patience, of all tasks and of each, worked out by hand."""

from __future__ import annotations

from stem_tf.training import early_stopping
from stem_tf.training.checkpoints import RunState
from stem_tf.training.monitor import Monitor

AUC, LOSS = Monitor("auc", {"click": 1.0}), Monitor("loss", {"watched": 1.0})


def test_patience_counts_epochs_in_a_row_that_are_not_better() -> None:
    state = RunState()
    better = [early_stopping.note_epoch(state, epoch, score, AUC) for epoch, score in enumerate([0.6, 0.5, 0.7, 0.7])]
    assert better == [True, False, True, False]
    assert (state.best_epoch, state.best_score, state.without_gain) == (2, 0.7, 1)
    assert early_stopping.why_stop(state, patience=1) == "1 epoch without a better score"
    assert early_stopping.why_stop(state, patience=2) == early_stopping.why_stop(state, patience=0) == ""


def test_a_run_of_best_weights_by_task_stops_when_no_task_has_patience_left() -> None:
    state, monitors = RunState(), {"click": AUC, "watched": LOSS}
    improved = [
        early_stopping.note_tasks(state, epoch, {"click": {"auc": auc}, "watched": {"mse": mse}}, monitors, patience=1)
        for epoch, (auc, mse) in enumerate([(0.6, 0.3), (0.5, 0.2), (0.9, 0.2)])
    ]
    assert improved == [["click", "watched"], ["watched"], []]  # the third epoch comes too late for click
    assert {task: best["best_epoch"] for task, best in state.by_task.items()} == {"click": 0, "watched": 1}
    assert early_stopping.why_stop(state, patience=1) == "1 epoch without a better score for any task"
    state.by_task["watched"]["without_gain"] = 0
    assert early_stopping.why_stop(state, patience=1) == ""
