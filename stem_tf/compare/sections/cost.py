"""What each arm costs: memory, work per row, time of a request, speed of training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from stem_tf import report
from stem_tf.compare import figures, measured
from stem_tf.compare.comparison import Arm, Comparison
from stem_tf.compare.document import Block, Figure, Section, Table

Costs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Costs of the measured runs, by arm."""


def section(comparison: Comparison) -> Section:
    """A table of costs, and a picture of the mean AUC over memory."""
    costs: Costs = {
        name: [tree["cost"] for tree in trees]
        for name, arm in comparison.arms.items()
        if (trees := measured.of_runs(arm))
    }
    lead = "What each arm needs in memory and in time."
    if not costs:
        return Section("cost", "Cost: memory and time", f"{lead} None of these runs was measured.", data={"arms": {}})
    reference = next((name for name in costs if name == comparison.single), next(iter(costs)))
    serving = {name: _serving(of[0]) for name, of in costs.items()}
    largest = max(serving, key=lambda name: serving[name])
    if largest != reference:
        lead += (
            f" {largest} takes the most memory to serve, {report.size(serving[largest])}, which is "
            f"{_times(serving[largest], serving[reference])} times that of {reference}."
        )
    candidates = costs[reference][0]["request"]["candidates"]
    slower = [name for name, of in costs.items() if _request(of)[1] > _request(costs[reference])[2]]
    if len(costs) > 1:
        lead += (
            f" A request of {candidates} candidates takes longer with {' and '.join(slower)} than with {reference}."
            if slower
            else f" These times show no arm to be slower than {reference} in a request of {candidates} candidates."
        )
    references = [name for name in costs if name in (reference, comparison.incumbent)]
    blocks: list[Block] = [_table(costs, references)]
    blocks += _worth(comparison, serving)
    if without := [name for name in comparison.arms if name not in costs]:
        blocks.append(f"Not measured: {', '.join(without)}.")
    return Section("cost", "Cost: memory and time", lead, tuple(blocks), {"reference": reference, "arms": dict(costs)})


def _table(costs: Costs, references: Sequence[str]) -> Table:
    """One row per arm; its memory also as multiples of each of the references'."""
    candidates = costs[references[0]][0]["request"]["candidates"]
    rows = []
    for name, of in costs.items():
        one = of[0]
        request, low, high = _request(of)
        speeds = [cost["samples_per_second"] for cost in of if cost["samples_per_second"]]
        rows.append(
            (
                name,
                f"{one['parameters']['tables']:,}",
                f"{one['parameters']['network']:,}",
                report.size(_serving(one)),
                *(_times(_serving(one), _serving(costs[reference][0]), 2) for reference in references),
                report.size(sum(one["bytes"].values()) + one["slots"]),
                f"{one['multiply_adds']:,}",
                f"{request:.1f} ({low:.1f} to {high:.1f})",
                f"{statistics.median(speeds):,.0f}" if speeds else "-",
            )
        )
    return Table(
        (
            "arm",
            "parameters in tables",
            "in the network",
            "memory to serve",
            *(f"times {reference}" for reference in references),
            "memory to train",
            "multiply-adds per row",
            "ms per request",
            "rows per second in training",
        ),
        tuple(rows),
        "Memory to serve: all weights in float32. To train: one set of weights and what the optimizer keeps beside it, "
        f"without gradients. A request scores {candidates} candidates for one user "
        "inside the process that trained the model, without a network: the median, and from the lowest to the highest "
        "quartile of the runs. Times depend on what else the machine did.",
    )


def _worth(comparison: Comparison, serving: Mapping[str, float]) -> list[Block]:
    """The mean AUC over memory, of the arms that predict all tasks; nothing where there are fewer than two."""
    aucs = {
        name: [auc for run in comparison.arms[name].runs if (auc := run.metrics("test")["mean_auc"]) is not None]
        for name in serving
        if _whole(comparison, comparison.arms[name])
    }
    aucs = {name: values for name, values in aucs.items() if values}
    if len(aucs) < 2:
        return []
    figure, axis = figures.pyplot().subplots(figsize=(6.4, 3.2), layout="constrained")
    from matplotlib import ticker

    for name, (colour, marker) in figures.styles(comparison.arms).items():
        if name not in aucs:
            continue
        found = measured.estimate(aucs[name], None, comparison.settings.level)
        error = None if len(aucs[name]) == 1 else [found.half]
        megabytes = serving[name] / 1e6
        axis.errorbar([megabytes], [found.mean], yerr=error, fmt=marker, color=colour, capsize=3, label=name)
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_xlabel("memory to serve, MB")
    axis.set_ylabel("mean test AUC")
    return [
        Figure(
            figures.svg(figure),
            "The mean test AUC of each arm over the memory that it needs",
            "Is the memory worth it? Arms further up are better, arms further left are smaller. Bars: the interval "
            "over seeds, where there are several; what other test users would change stands in the verdicts above.",
        )
    ]


def _whole(comparison: Comparison, arm: Arm) -> bool:
    return set(arm.tasks) == {task.name for task in comparison.tasks}


def _serving(cost: Mapping[str, Any]) -> float:
    return float(sum(cost["bytes"].values()) * cost["sets"])


def _request(costs: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Median over runs of a request's ms, the lowest of their lower quartiles, the highest of their upper ones."""
    requests = [cost["request"] for cost in costs]
    return (
        statistics.median(request["ms"] for request in requests),
        min(request["ms_low"] for request in requests),
        max(request["ms_high"] for request in requests),
    )


def _times(value: float, reference: float, digits: int = 1) -> str:
    return f"{value / reference:.{digits if value / reference < 10 else 0}f}"
