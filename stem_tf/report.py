"""Output for people: tables as text, numbers, learning curves as a picture. Does not import TensorFlow."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stem_util.files import replace_file


def warn(sentence: str) -> None:
    """Prints a warning to the user."""
    print(f"warning: {sentence}", file=sys.stderr)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table as text. The first and last column are left-aligned, the others right-aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    last = len(header) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def number(value: float | None, digits: int = 4) -> str:
    """Formats ``.7321``; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "-"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def percent(share: float) -> str:
    """Formats ``12 %``, ``.4 %``. Shares above 0 are never shown as 0 %, and shares below 1 never as 100 %."""
    if not 0.0005 <= share <= 0.9995:
        return {0.0: "0 %", 1.0: "100 %"}.get(share, "<.1 %" if share < 0.5 else ">99.9 %")
    return f"{number(100 * share, 0 if 0.01 <= share <= 0.99 else 1)} %"


def size(count: float) -> str:
    """Formats a number of bytes: ``817 kB``, ``1.2 GB``."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.{1 if count < 9.95 else 0}f} {unit}"
    return f"{count / 1000:.1f} GB"


def age(epoch: int | Mapping[str, int], step: int) -> str:
    """Says how far weights are trained: ``epoch 3``, ``epoch 4, step 120``, or each task's best epoch."""
    if isinstance(epoch, Mapping):
        return "each task's best epoch: " + ", ".join(f"{task} {number}" for task, number in epoch.items())
    return f"epoch {epoch}" if not step else f"epoch {epoch + 1}, step {step:,}"


def finite(tree: Any) -> Any:
    """Replaces NaN and infinities by None in a tree of mappings and lists, for JSON."""
    if isinstance(tree, Mapping):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def plotting() -> Any:
    """Returns matplotlib.pyplot, for files without a display; None if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def learning_curves(
    records: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, str],
    kept: Mapping[str, int],
    variances: Mapping[str, float],
    path: Path,
) -> bool:
    """Draws losses and AUC by epoch, one panel per task, with a line at the epoch whose weights are kept.

    Args:
      records: lines of metrics.jsonl.
      tasks: ``binary`` or ``regression`` by task.
      kept: the epoch whose weights are kept, by task, counted from 1; 0 where there is none.
      variances: variances of standardised labels, by task; the errors of these tasks are divided by them, as in
        training.
      path: the PNG file to write.

    Returns:
      False if matplotlib is not installed.
    """
    pyplot = plotting()
    if pyplot is None:
        return False
    from matplotlib import ticker

    train = {record["epoch"]: record for record in records if record["kind"] == "train"}  # an epoch's last line
    validation = {record["epoch"]: record for record in records if record["kind"] == "validation"}
    columns = min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    size = (4.4 * columns, 3.4 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis, (task, kind) in zip(axes.flat, tasks.items(), strict=False):
        loss = "logloss" if kind == "binary" else "mse"
        losses = {epoch: record.get(f"{loss}/{task}") for epoch, record in validation.items()}
        losses = {epoch: value and value / variances.get(task, 1.0) for epoch, value in losses.items()}
        axis.plot(list(train), [r.get(f"loss/{task}") for r in train.values()], marker=".", label=f"{loss}, train")
        axis.plot(list(losses), list(losses.values()), marker=".", label=f"{loss}, validation")
        if kept[task]:
            axis.axvline(kept[task], color="0.6", linestyle=":", label=f"kept: epoch {kept[task]}")
        axis.set_title(task)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_ylabel(f"{loss}, standardised label" if task in variances else loss)
        handles, labels = axis.get_legend_handles_labels()
        if kind == "binary":
            right = axis.twinx()
            aucs = [record.get(f"auc/{task}") for record in validation.values()]
            right.plot(list(validation), aucs, "k--", label="AUC, validation")
            right.set_ylabel("AUC")
            handles, labels = handles + right.get_legend_handles_labels()[0], [*labels, "AUC, validation"]
        # Below the panel, because inside it would cover lines.
        axis.legend(
            handles, labels, fontsize="x-small", frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2)
        )
    with replace_file(path) as beside:
        figure.savefig(beside, format="png", dpi=110)
    pyplot.close(figure)
    return True
