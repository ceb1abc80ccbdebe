"""The seesaw: what an arm gains on one task against what it gains on another (PLE Fig. 3)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from stem_tf.compare import effects, figures
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Block, Cell, Details, Figure, Section, Table
from stem_tf.compare.effects import MEAN, Effect
from stem_tf.compare.sections.gain import NO_OTHER, NO_SINGLE

Gains = Mapping[tuple[str, str], Effect]
Pair = tuple[str, str]
_SHOWN, _FOLDED = 3, 9
"""Pairs of tasks that are drawn at once, and that are folded away; the table has every arm and task."""


def section(comparison: Comparison) -> Section:
    """The third section."""
    title = "Seesaw: does one task pay for another?"
    found = effects.effects(comparison, comparison.single) if comparison.single else {}
    gains = {(arm, task): effect for (arm, task), effect in found.items() if task is not MEAN}
    if not gains:
        return Section("seesaw", title, NO_OTHER if comparison.single else NO_SINGLE)
    pairs = _pairs(comparison, gains)
    blocks: list[Block] = []
    if pairs:
        blocks.append(_figure(comparison, gains, pairs[:_SHOWN]))
    blocks.append(_table(gains))
    folded = pairs[_SHOWN : _SHOWN + _FOLDED]
    if folded:
        drawn = [folded[i : i + _SHOWN] for i in range(0, len(folded), _SHOWN)]
        left = len(pairs) - _SHOWN - len(folded)
        summary = "Other pairs of tasks" + (f" ({left} more pairs, which differ least, are not drawn)" if left else "")
        blocks.append(Details(summary, tuple(_figure(comparison, gains, part) for part in drawn)))
    return Section(
        key="seesaw",
        title=title,
        lead=_lead(gains),
        blocks=tuple(blocks),
        data={
            "pairs": [list(pair) for pair in pairs],
            "arms": {arm: {verdict: _tasks(gains, arm, verdict) for verdict in effects.TONES} for arm in _arms(gains)},
        },
    )


def _arms(gains: Gains) -> list[str]:
    return list(dict.fromkeys(arm for arm, _ in gains))


def _tasks(gains: Gains, arm: str, verdict: str) -> list[str]:
    return [task for (of, task), effect in gains.items() if of == arm and effect.verdict == verdict]


def _lead(gains: Gains) -> str:
    seesaws = [arm for arm in _arms(gains) if _tasks(gains, arm, "better") and _tasks(gains, arm, "worse")]
    lost = [arm for arm in _arms(gains) if _tasks(gains, arm, "worse")]
    if seesaws:
        parts = [
            f"{arm} gains on {effects.listed(_tasks(gains, arm, 'better'))} and loses on "
            f"{effects.listed(_tasks(gains, arm, 'worse'))}"
            for arm in seesaws
        ]
        text = f"A seesaw beyond chance: {'; '.join(parts)}."
    else:
        text = (
            "No arm is above Single-Task on one task and below it on another beyond chance: no seesaw is established."
        )
    if lost:
        return f"{text} Below Single-Task on a task beyond chance: {effects.listed(lost)}."
    return f"{text} No arm is below Single-Task on any task beyond chance."


def _pairs(comparison: Comparison, gains: Gains) -> list[Pair]:
    """The pairs of tasks that some arm has both of, those first between which arms' gains differ most.

    Gains are compared in units of their half interval, as AUC and errors have different ones.
    """

    def size(effect: Effect) -> float:
        half = effect.difference.high - effect.difference.estimate
        return effect.difference.estimate / half if half > 0 else 0.0

    tasks = [task.name for task in comparison.tasks]
    differ: dict[Pair, float] = {}
    for one, other in itertools.combinations(tasks, 2):
        arms = [arm for arm in _arms(gains) if (arm, one) in gains and (arm, other) in gains]
        if arms:
            differ[one, other] = max(abs(size(gains[arm, one]) - size(gains[arm, other])) for arm in arms)
    return sorted(differ, key=lambda pair: -differ[pair])


def _figure(comparison: Comparison, gains: Gains, pairs: Sequence[Pair]) -> Figure:
    size = (3.4 * len(pairs) + 0.2, 3.6)
    figure, axes = figures.pyplot().subplots(1, len(pairs), figsize=size, squeeze=False, layout="constrained")
    styles = figures.styles(comparison.arms)
    lines = {}
    for axis, (one, other) in zip(axes.flat, pairs, strict=True):
        axis.axvline(0, color="0.5", linewidth=0.8)
        axis.axhline(0, color="0.5", linewidth=0.8)
        for arm in _arms(gains):
            across, up = gains.get((arm, one)), gains.get((arm, other))
            if across is None or up is None:
                continue
            (colour, marker), x, y = styles[arm], across.difference, up.difference
            cross = {"color": colour, "linewidth": 0.9, "alpha": 0.7}
            axis.plot([x.low, x.high], [y.estimate] * 2, **cross)
            axis.plot([x.estimate] * 2, [y.low, y.high], **cross)
            lines[arm] = axis.plot(x.estimate, y.estimate, marker, color=colour, markersize=6)[0]
        axis.set_xlabel(f"gain on {one}", fontsize="small")
        axis.set_ylabel(f"gain on {other}", fontsize="small")
        axis.tick_params(labelsize="x-small")
        axis.locator_params(nbins=5)
        across_limits, up_limits = axis.get_xlim(), axis.get_ylim()
        axis.axvspan(across_limits[0], 0, color="0.93", zorder=0)
        axis.axhspan(up_limits[0], 0, color="0.93", zorder=0)
        axis.set_xlim(across_limits)
        axis.set_ylim(up_limits)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    names = effects.listed([f"{one} against {other}" for one, other in pairs])
    return Figure(
        figures.svg(figure),
        f"gains over Single-Task of each arm: {names}",
        f"Each point is an arm, its cross the intervals of both gains. In the white quarter both tasks are better than "
        f"Single-Task; in the grey part at least one is worse. A cross that reaches over the grey lines could lie on "
        f"the other side by chance. Single-Task ({comparison.single}) is where they meet.",
    )


def _table(gains: Gains) -> Table:
    tasks = list(dict.fromkeys(task for _, task in gains))
    rows: list[tuple[str | Cell, ...]] = []
    for arm in _arms(gains):
        better, worse = _tasks(gains, arm, "better"), _tasks(gains, arm, "worse")
        cells = []
        for task in tasks:
            effect = gains.get((arm, task))
            if effect is None:
                cells.append(Cell("-", "muted"))
            else:
                shade = -1.0 if effect.verdict == "worse" else -0.3 if effect.difference.estimate < 0 else None
                cells.append(Cell(effect.shown(), effect.tone, shade, effect.interval()))
        pattern = (
            "seesaw" if better and worse else "loses" if worse else "gains" if better else Cell("undecided", "unsure")
        )
        rows.append((arm, *cells, pattern))
    return Table(
        ("arm", *tasks, "pattern"),
        tuple(rows),
        "Gains over Single-Task. Shaded: below Single-Task, strongly where that is beyond chance (degeneration, marked "
        "grey in the PLE paper's Tables 1 and 2), lightly where it could be chance.",
        left=(len(tasks) + 1,),
    )
