"""The picture of the learning curves, read from the figure that is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from stem_tf import report

RECORDS = [
    {"kind": "train", "epoch": 1, "step": 5, "loss/click": 0.9, "loss/watched": 2.0},
    {"kind": "train", "epoch": 1, "step": 9, "loss/click": 0.7, "loss/watched": 1.5},
    {"kind": "validation", "epoch": 1, "step": 9, "logloss/click": 0.6, "auc/click": 0.7, "mse/watched": 5.6},
    {"kind": "train", "epoch": 2, "step": 18, "loss/click": 0.5, "loss/watched": 1.2},
    {"kind": "validation", "epoch": 2, "step": 18, "logloss/click": 0.65, "auc/click": 0.72, "mse/watched": 5.2},
]


def test_learning_curves_mark_the_kept_epochs_and_tick_whole_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = report.plotting()
    figures: list = []
    with monkeypatch.context() as patched:
        patched.setattr(pyplot, "close", figures.append)
        tasks = {"click": "binary", "watched": "regression"}
        assert report.learning_curves(
            RECORDS, tasks, {"click": 1, "watched": 2}, {"watched": 4.0}, tmp_path / "curves.png"
        )
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    click, watched = figure.axes[:2]
    expected = ((click, 1, [0.7, 0.5], [0.6, 0.65]), (watched, 2, [1.5, 1.2], [1.4, 1.3]))
    for axis, kept, training, validation in expected:
        lines = {line.get_label(): line for line in axis.lines}
        assert list(lines[f"kept: epoch {kept}"].get_xdata()) == [kept, kept]
        (train,) = (line for label, line in lines.items() if label.endswith(", train"))
        assert list(train.get_xdata()) == [1, 2] and list(train.get_ydata()) == training  # an epoch's last line
        (losses,) = (line for label, line in lines.items() if label in ("logloss, validation", "mse, validation"))
        assert list(losses.get_ydata()) == validation
        left, right = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if left <= tick <= right] == [1, 2]
    pyplot.close(figure)
