"""Zones: where on the log two tasks pull against each other, and what each arm wins or loses there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stem_tf import report
from stem_tf.compare import figures
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Block, Cell, Details, Figure, Section, Table
from stem_tf.compare.zones import BUCKETS, EVERY_MRF, Lift, Pair, Zones, zones

TITLE = "Where on the log: zones of two tasks"
SHOWN = 3
"""How many pairs of tasks stand on the page unfolded: those whose lifts are the least likely to be chance."""

_COMPARABLE = 1  # the cell


def section(comparison: Comparison) -> Section:
    """Lifts over Single-Task by zone, for each pair of tasks; see `stem_tf.compare.zones`."""
    if comparison.single is None or len(comparison.arms) < 2:
        return _without("There is no Single-Task arm to compare with, so there are no zones: add an arm `single_task`.")
    found = Zones(comparison)
    if not found.pairs:
        return _without("Zones need two tasks, one of them binary, that Single-Task predicts.")
    cells = zones(comparison.settings)
    lifts = found.lifts(found.pairs, cells)
    if not lifts:
        return _without("No other arm predicts a binary task that Single-Task predicts, so there are no zones.")
    rows = {pair: found.rows(pair, cells).tolist() for pair in found.pairs}
    pairs = sorted(found.pairs, key=lambda pair: _least_likely(lifts, pair))
    decided = {lift.pair for lift in lifts if _decided(lift, comparison)}
    shown = [pair for pair in pairs if pair in decided][:SHOWN] or pairs[:1]
    by_mrf = found.lifts(shown, EVERY_MRF)
    blocks: list[Block] = [*_explained(comparison)]
    for pair in shown:
        blocks += _tables(pair, lifts, rows[pair], comparison, alike=True)
        blocks.append(_figure(pair, by_mrf, comparison))
        own = _tables(pair, lifts, rows[pair], comparison, alike=False)
        blocks.append(
            Details(f"{_named(pair)}: the same in zones that Single-Task draws alone, as in the paper", tuple(own))
        )
    rest = [
        block
        for pair in pairs
        if pair not in shown
        for block in _tables(pair, lifts, rows[pair], comparison, alike=True)
    ]
    if rest:
        blocks.append(Details(f"The other {len(pairs) - len(shown)} pairs of tasks", tuple(rest)))
    return Section(
        key="zones",
        title=TITLE,
        lead=_lead(lifts, comparison),
        blocks=tuple(blocks),
        data={
            "buckets": BUCKETS,
            "pairs": [
                {"tasks": pair, "rows": dict(zip(("first", "comparable", "second", "between"), count, strict=True))}
                for pair, count in rows.items()
            ],
            "zones": [{"zone": ("first", "comparable", "second")[lift.cell]} | _json(lift) for lift in lifts],
            "by_mrf": [{"mrf": lift.cell - (BUCKETS - 1)} | _json(lift) for lift in by_mrf],
        },
    )


def _without(why: str) -> Section:
    return Section(key="zones", title=TITLE, lead=why)


def _named(pair: Pair) -> str:
    return f"{pair[0]} and {pair[1]}"


def _decided(lift: Lift, comparison: Comparison) -> bool:
    return lift.alike and lift.p < comparison.settings.level


def _least_likely(lifts: Sequence[Lift], pair: Pair) -> float:
    """The smallest p of a pair's lifts."""
    ps = [lift.difference.p for lift in lifts if lift.pair == pair and lift.alike and lift.difference]
    return min([p for p in ps if not np.isnan(p)], default=2.0)


def _lead(lifts: Sequence[Lift], comparison: Comparison) -> str:
    compared = [lift for lift in lifts if lift.alike and not np.isnan(lift.p)]
    if not compared:
        return (
            "Nothing can be said about zones: they hold too few rows of each class, or no arm has several seeds, so "
            "that no difference can be told from chance."
        )
    decided = [lift for lift in compared if _decided(lift, comparison)]
    if not decided:
        return (
            f"In no zone is an arm better or worse than Single-Task by more than chance: {len(compared):,} comparisons "
            "of a task in a zone, corrected for their number."
        )
    said = []
    for arm in comparison.arms:
        for word, sign in (("better", 1), ("worse", -1)):
            of = [lift for lift in decided if lift.arm == arm and sign * (lift.auc - lift.single) > 0]
            if of:
                inside = sum(lift.cell == _COMPARABLE for lift in of)
                places = [f"{inside} comparable zone{'s' if inside > 1 else ''}"] if inside else []
                if len(of) > inside:
                    places.append(f"{len(of) - inside} where one task overwhelms the other")
                said.append(f"`{arm}` is {word} in {' and '.join(places)}")
    return (
        f"Beyond chance: {len(decided):,} of {len(compared):,} differences from Single-Task, by task and zone. "
        f"{'; '.join(said)}."
    )


def _explained(comparison: Comparison) -> tuple[str, ...]:
    settings = comparison.settings
    regressions = [task.name for task in comparison.tasks if task.type != "binary"]
    only = (
        f" {', '.join(f'`{name}`' for name in regressions)}: no AUC, so only the predicted value plays a part."
        if regressions
        else ""
    )
    return (
        "**How rows get into zones.** For two tasks, every test row is put into one of ten buckets of equally many "
        "rows by how likely the first task's feedback is predicted to be, and into one of ten by the second's. Where "
        f"the two buckets are at most {settings.comparable} apart, the tasks are **comparable** on this row; where one "
        f"is {settings.overwhelming} or more above the other, this task **overwhelms**. The STEM paper has these zones "
        f"but no thresholds: {settings.comparable} and {settings.overwhelming} are this report's (`--comparable`, "
        f"`--overwhelming`).{only}",
        "**Who predicts matters.** In the paper Single-Task does. The rows of a zone then look alike to Single-Task, "
        "so that its AUC among them falls, while a rival with other errors still tells them apart. In simulations of "
        "two equally good models the rival seems better by .02 to .03 where a task overwhelms and worse by .01 where "
        "both are comparable: the picture of the paper's Figure 1 without any transfer between tasks. So what counts "
        "here are zones that Single-Task and the arm draw together, by the sum of their ranks. Equally good models are "
        "then equal in each zone; where one is better, overwhelming zones show it larger than it is.",
    )


def _tables(
    pair: Pair, lifts: Sequence[Lift], rows: Sequence[int], comparison: Comparison, *, alike: bool
) -> list[Block]:
    """One table for each binary task of the pair."""
    blocks: list[Block] = []
    header = (f"{pair[0]} overwhelms", "comparable", f"{pair[1]} overwhelms")
    for task in pair:
        of = {
            (lift.arm, lift.cell): lift for lift in lifts if (lift.pair, lift.task, lift.alike) == (pair, task, alike)
        }
        arms = list(dict.fromkeys(arm for arm, _ in of))
        if not arms:
            continue
        body: list[tuple[str | Cell, ...]] = []
        if not alike:
            first = [of[arms[0], cell] for cell in range(3)]
            body.append(("rows", *(Cell(f"{lift.rows:,}", "muted") for lift in first)))
            body.append(("positives", *(Cell(f"{lift.positives:,}", "muted") for lift in first)))
            body.append(("AUC of Single-Task", *(report.number(lift.single) for lift in first)))
        body += [(arm, *(_cell(of[arm, cell], comparison) for cell in range(3))) for arm in arms]
        drawn = "drawn by Single-Task and the arm together" if alike else "drawn by Single-Task alone"
        caption = f"AUC of {task} less Single-Task's, with intervals, in zones of {_named(pair)} {drawn}."
        if alike:
            caption += f" Test rows in them: {rows[0]:,}, {rows[1]:,} and {rows[2]:,}; in between: {rows[3]:,}."
        blocks.append(Table((f"AUC of {task}", *header), tuple(body), caption))
    return blocks


def _cell(lift: Lift, comparison: Comparison) -> Cell:
    difference = lift.difference
    if difference is None:
        few = lift.too_few
        return Cell(f"no{few[1:]}" if few.startswith("0 ") else f"only {few}", "muted", hint=f"{lift.rows:,} rows")
    if np.isnan(lift.p):
        return Cell(f"{_signed(difference.estimate)} (too few users or seeds)", "unsure")
    text = f"{_signed(difference.estimate)} ({_signed(difference.low)} to {_signed(difference.high)})"
    hint = (
        f"AUC {report.number(lift.auc)} against {report.number(lift.single)}; {lift.rows:,} rows, {lift.positives:,} "
        f"positive; p {lift.p:.2g}"
    )
    if not lift.alike:
        return Cell(text, hint=hint)
    if not _decided(lift, comparison):
        return Cell(text, "unsure", hint=hint)
    return Cell(text, "good" if difference.estimate > 0 else "bad", hint=hint)


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + report.number(value)


def _figure(pair: Pair, lifts: Sequence[Lift], comparison: Comparison) -> Figure:
    """Lift by MRF as in STEM Fig. 5: a row of two panels for each binary task of the pair."""
    tasks = [task for task in pair if any((lift.pair, lift.task) == (pair, task) for lift in lifts)]
    settings, last = comparison.settings, BUCKETS - 1
    figure, axes = figures.pyplot().subplots(
        len(tasks), 2, figsize=(9, 2.9 * len(tasks)), squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for line, task in zip(axes, tasks, strict=True):
        for axis, alike in zip(line, (True, False), strict=True):
            axis.axhline(0, color="0.4", linewidth=0.8)
            axis.axvspan(-settings.comparable - 0.5, settings.comparable + 0.5, color="0.93")
            for side in (-1, 1):
                axis.axvline(side * (settings.overwhelming - 0.5), color="0.6", linewidth=0.8, linestyle=":")
            for arm, (colour, marker) in figures.styles(comparison.arms).items():
                chosen = [
                    lift for lift in lifts if (lift.pair, lift.task, lift.arm, lift.alike) == (pair, task, arm, alike)
                ]
                if not chosen:
                    continue
                x = np.array([lift.cell - last for lift in chosen])
                y, low, high = (
                    np.array([getattr(lift.difference, name) if lift.difference else np.nan for lift in chosen])
                    for name in ("estimate", "low", "high")
                )
                axis.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
                axis.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1.2, label=arm)
            axis.set_title(f"{task}; drawn by {'both' if alike else 'Single-Task alone'}", fontsize="medium")
            axis.set_xlim(-last - 0.5, last + 0.5)
            axis.set_xticks(range(-last, last + 1, 3))
        shown = [
            lift.difference.estimate for lift in lifts if (lift.pair, lift.task) == (pair, task) and lift.difference
        ]
        most = 1.5 * np.nanmax(np.abs(shown), initial=0.01)
        line[0].set_ylim(-most, most)
        line[0].set_ylabel("AUC less Single-Task's")
    for axis in axes[-1]:
        axis.set_xlabel(f"bucket of {pair[0]} less bucket of {pair[1]}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    return Figure(
        figures.svg(figure),
        alt=f"Lines of the AUC over Single-Task of each arm, by the difference of the buckets of {_named(pair)}.",
        caption=(
            f"From left to right, rows on which {pair[1]} is expected far more to rows on which {pair[0]} is. Grey: "
            "comparable; outside the dotted lines one task overwhelms. Shades are intervals of each point by itself: "
            "where they hold 0, it may be chance. No point: too few rows of a class."
        ),
    )


def _json(lift: Lift) -> dict[str, Any]:
    difference = lift.difference
    return {
        "tasks": lift.pair,
        "task": lift.task,
        "arm": lift.arm,
        "drawn_by": "both" if lift.alike else "single",
        "rows": lift.rows,
        "positives": lift.positives,
        "negatives": lift.negatives,
        "single_auc": lift.single,
        "auc": lift.auc,
        "lift": None if difference is None else difference.estimate,
        "low": None if difference is None else difference.low,
        "high": None if difference is None else difference.high,
        "p": None if difference is None else difference.p,
        "p_holm": lift.p,
        "too_few": lift.too_few,
    }
