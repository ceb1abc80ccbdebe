"""MTL gain: how much better each arm is than Single-Task on each task, beside what papers print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from stem_tf.compare import effects, figures, published
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Block, Cell, Figure, Section, Table
from stem_tf.compare.effects import MEAN, Effect, Key
from stem_tf.compare.published import Published

Effects = Mapping[tuple[str, Key], Effect]
NO_SINGLE = "No arm trains each task alone (`single_task`), so there is nothing to measure a gain against."
NO_OTHER = "No other arm has a task in common with Single-Task."
_PANELS = 9


def section(comparison: Comparison) -> Section:
    """The second section."""
    title = "Gain over Single-Task"
    found = effects.effects(comparison, comparison.single) if comparison.single else {}
    if not found:
        return Section("gain", title, NO_OTHER if comparison.single else NO_SINGLE)
    blocks: list[Block] = [_heat_map(comparison, found), _figure(comparison, found)]
    table = published.of_data(comparison.manifest.schema.name)
    if table is not None:
        blocks += _beside(comparison, found, table)
    return Section(
        key="gain",
        title=title,
        lead=_lead(found),
        blocks=tuple(blocks),
        data={
            "single": comparison.single,
            "gains": [
                {
                    "arm": effect.arm,
                    "task": effect.task,
                    "gain": effect.difference.estimate,
                    "low": effect.difference.low,
                    "high": effect.difference.high,
                    "verdict": effect.verdict,
                }
                for effect in found.values()
            ],
            "published": _published_data(table),
        },
    )


def _lead(found: Effects) -> str:
    gains = [effect for effect in found.values() if effect.task is not MEAN]
    up, down = (sum(effect.verdict == verdict for effect in gains) for verdict in ("better", "worse"))
    text = (
        f"Of {len(gains)} gains over Single-Task (each arm on each task), {_are(up)} above 0 beyond chance and "
        f"{_are(down)} below 0 beyond chance (negative transfer)."
    )
    means = [effect for effect in found.values() if effect.task is MEAN]
    if means:
        best = max(means, key=lambda effect: effect.difference.estimate)
        text += (
            f" On the mean AUC, {best.arm} has the highest gain, {best.shown()} ({best.interval()}, {best.verdict})."
        )
    return text


def _are(count: int) -> str:
    return "none is" if not count else "1 is" if count == 1 else f"{count} are"


def _heat_map(comparison: Comparison, found: Effects) -> Table:
    keys = effects.columns(comparison, found)
    # AUCs share a scale of colour; each error has its own unit.
    largest: dict[str, float] = {}
    for (_, task), effect in found.items():
        unit = "AUC" if effect.auc else str(task)
        largest[unit] = max(largest.get(unit, 0.0), abs(effect.difference.estimate))

    def cell(arm: str, task: Key) -> Cell:
        effect = found.get((arm, task))
        if effect is None:
            return Cell("-", "muted")
        gain, high = effect.difference.estimate, effect.difference.high
        scale = largest["AUC" if effect.auc else str(task)]
        half = "" if math.isnan(high) else f" \N{PLUS-MINUS SIGN} {effects.number(high - gain, auc=effect.auc)}"
        return Cell(f"{effect.shown()}{half}", effect.tone, gain / scale if scale else 0.0, effect.interval())

    arms = dict.fromkeys(arm for arm, _ in found)
    return Table(
        ("arm", *(effects.heading(comparison, task) for task in keys)),
        tuple((arm, *(cell(arm, task) for task in keys)) for arm in arms),
        f"Gain over {comparison.single} on test \N{PLUS-MINUS SIGN} half of the interval: AUC less Single-Task's, and "
        "for an error Single-Task's less the arm's, so that above 0 is always better. The colour is the gain, the "
        "sign before it the verdict after correction for the number of comparisons.",
    )


def _figure(comparison: Comparison, found: Effects) -> Figure:
    keys = effects.columns(comparison, found)
    shown = keys[-_PANELS:] if len(keys) > _PANELS else keys
    arms = list(dict.fromkeys(arm for arm, _ in found))
    styles = figures.styles(comparison.arms)
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    size = (3.1 * columns + 1, (0.28 * len(arms) + 0.75) * rows)
    figure, axes = figures.pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for place, (axis, task) in enumerate(zip(axes.flat, shown, strict=False)):
        axis.axvline(0, color="0.5", linewidth=0.8)
        for height, arm in enumerate(arms):
            effect = found.get((arm, task))
            if effect is None:
                continue
            (colour, marker), difference = styles[arm], effect.difference
            filled = colour if effect.verdict != "undecided" else "white"
            axis.plot([difference.low, difference.high], [height, height], color=colour, linewidth=1.5)
            axis.plot(difference.estimate, height, marker, color=colour, markerfacecolor=filled, markersize=5)
        axis.set_title(effects.heading(comparison, task), fontsize="small")
        axis.set_yticks(range(len(arms)), arms if place % columns == 0 else [""] * len(arms), fontsize="small")
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize="x-small")
        axis.locator_params(axis="x", nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
    caption = (
        "Each point is an arm's gain on a task, the line its interval; right of the grey line is better than "
        "Single-Task. A filled point is decided after correction for the number of comparisons."
    )
    if len(shown) < len(keys):
        caption += f" The last {len(shown)} of {len(keys)} columns of the table are drawn."
    return Figure(figures.svg(figure), "gains with intervals, one panel per task", caption)


def _beside(comparison: Comparison, found: Effects, table: Published) -> list[Block]:
    """Our gains beside the published ones, for the tasks of the published table."""
    tasks = [task for task in effects.columns(comparison, found) if task is not MEAN and table.place(task) is not None]
    if not tasks:
        return []
    by_model: dict[str, list[str]] = {}
    for name, ours in comparison.arms.items():
        if name != comparison.single:
            by_model.setdefault(ours.model, []).append(name)
    rows: list[tuple[str | Cell, ...]] = []
    for model in table.aucs:
        if model == "single_task":
            continue
        for arm in by_model.get(model, [""]):
            cells: list[str | Cell] = []
            for task in tasks:
                effect = found.get((arm, task))
                gain = table.gain(model, task)
                cells.append(
                    Cell(effect.shown(), effect.tone, hint=effect.interval()) if effect else Cell("-", "muted")
                )
                cells.append("-" if gain is None else effects.number(gain, sign=True))
            rows.append((arm or Cell(f"{model} (not run)", "muted"), *cells))
    header = ("arm", *(name for task in tasks for name in (f"{task}, here", f"{task}, paper")))
    caption = (
        f"Gains here beside those of {table.source}, from its AUCs. The paper prints neither intervals nor seeds, and "
        "its split and settings may differ from yours."
    )
    blocks: list[Block] = [Table(header, tuple(rows), f"{caption} {table.note}".strip())]
    single = comparison.measured.runs[comparison.single or ""]
    levels = [
        f"{task} {effects.number(single[task].mean)} here and {effects.number(printed)} in the paper"
        for task in tasks
        if task in single and (printed := table.auc("single_task", task)) is not None
    ]
    blocks.append(f"Single-Task's AUC: {'; '.join(levels)}.")
    return blocks


def _published_data(table: Published | None) -> Mapping[str, object] | None:
    if table is None:
        return None
    tasks: Sequence[str] = [names[0] for names in table.tasks]
    return {"source": table.source, "auc": {m: dict(zip(tasks, v, strict=True)) for m, v in table.aucs.items()}}
