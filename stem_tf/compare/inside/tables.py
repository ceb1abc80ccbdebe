"""How much of its space each table uses: information abundance (Guo et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stem_tf.compare import figures, measured
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Block, Details, Figure, Table
from stem_tf.compare.inside.part import TASK, OfArms, Part, shortened

Abundance = Sequence[Mapping[str, Any]]
"""What `stem_tf.compare.embeddings.abundance` returns."""


def part(comparison: Comparison, of_arms: OfArms) -> Part:
    """Bars for each arm's own and shared tables; every table and feature, folded away."""
    found = {name: [tree["abundance"] for tree in trees] for name, trees in of_arms.items()}
    if not any(trees[0] for trees in found.values()):
        return Part("", ("**Tables.** No feature has ids, so there is no table to look at.",))
    bars = [
        (arm, kind, [mean for tree in trees if (mean := _mean(tree, kind)) is not None])
        for arm, trees in found.items()
        for kind in dict.fromkeys(_kind(entry["table"]) for entry in trees[0])
    ]
    bars = [bar for bar in bars if bar[2]]
    blocks: list[Block] = [
        "**Tables.** An embedding of D numbers can point in D directions. Where all embeddings of a table lie near a "
        "line, the table has collapsed: more numbers would not help it. Information abundance, the sum of a table's "
        "singular values over the largest one, counts the directions in use: from 1 (collapsed) to D (all alike). "
        "Every value that occurs in train counts once, however often it occurs.",
        *([_picture(comparison, bars)] if bars else []),
        Details("Each table and feature", (_table(found),)),
    ]
    return Part(_finding(found), tuple(blocks), found)


def _finding(found: Mapping[str, Sequence[Abundance]]) -> str:
    entries = [entry for trees in found.values() for tree in trees for entry in tree if entry["abundance"] is not None]
    if not entries:
        return ""
    most = sorted({entry["most"] for entry in entries})
    low, high = (f(entry["abundance"] for entry in entries) for f in (min, max))
    of = f"{most[0]}" if len(most) == 1 else f"{most[0]} to {most[-1]}"
    return f"Tables use {low:.1f} to {high:.1f} of their {of} directions."


def _kind(table: str) -> str:
    return "tables of tasks" if table.startswith(TASK) else f"{table.partition(':')[0].partition(',')[0]} table"


def _mean(tree: Abundance, kind: str) -> float | None:
    """Mean abundance over tables of a kind and features."""
    values = [entry["abundance"] for entry in tree if _kind(entry["table"]) == kind and entry["abundance"] is not None]
    return float(np.mean(values)) if values else None


def _picture(comparison: Comparison, bars: Sequence[tuple[str, str, Sequence[float]]]) -> Figure:
    figure, axis = figures.pyplot().subplots(figsize=(6.4, 0.6 + 0.24 * len(bars)), layout="constrained")
    styles = figures.styles(comparison.arms)
    places = np.arange(len(bars))
    means = [float(np.mean(values)) for *_, values in bars]
    lines = [[mean - min(values), max(values) - mean] for mean, (*_, values) in zip(means, bars, strict=True)]
    axis.barh(
        places,
        means,
        xerr=np.transpose(lines).tolist(),
        color=[styles[arm][0] for arm, *_ in bars],
        error_kw={"capsize": 2, "elinewidth": 0.8},
        height=0.7,
    )
    axis.set_yticks(places, [f"{shortened(arm)}, {kind}" for arm, kind, _ in bars], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1, color="0.4", linestyle=":", linewidth=0.8)
    axis.set_xlabel("directions in use", fontsize=8)
    axis.tick_params(labelsize=7)
    return Figure(
        figures.svg(figure),
        "Bars: how many directions each arm's tables use",
        "Information abundance, mean over features (and over tasks); the line goes from the lowest to the highest "
        "seed. The dotted line is a table that has collapsed. Longer is richer; but a rich table is not yet a good "
        "one: a table that has not learned anything is as rich as its random start.",
    )


def _table(found: Mapping[str, Sequence[Abundance]]) -> Table:
    rows = []
    for arm, trees in found.items():
        for place, entry in enumerate(trees[0]):
            used = measured.span([tree[place]["abundance"] for tree in trees if place < len(tree)])
            rows.append((arm, entry["table"], entry["feature"], f"{entry['rows']:,}", used, str(entry["most"])))
    return Table(
        ("arm", "table", "feature", "values", "directions in use", "of at most"),
        tuple(rows),
        "Information abundance: mean over seeds, and from the lowest to the highest seed.",
        left=(1, 2),
    )
