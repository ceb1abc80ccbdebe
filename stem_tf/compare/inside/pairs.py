"""Where tables place the user-item pairs that two tasks disagree about (STEM poster, Fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from stem_tf.compare import figures, measured
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Block, Cell, Details, Figure, Table
from stem_tf.compare.inside.part import TASK, OfArms, Part, shortened

LEAST_ROWS = 50
"""Of contradictory pairs, for two tasks to be shown."""
_SHOWN, _PANELS, _COLUMNS = 3, 12, 4


def part(comparison: Comparison, of_arms: OfArms) -> Part:
    """A table and histograms for the two tasks whose pairs say most; tables of a few more, folded away."""
    heading = "**Contradictory pairs.**"
    found = {name: [tree["distances"] for tree in trees] for name, trees in of_arms.items()}
    measured_arms = {name: trees for name, trees in found.items() if "reason" not in trees[0]}
    if not measured_arms:
        reason = next(iter(found.values()))[0]["reason"]
        return Part("", (f"{heading} Not measured: {reason}.",), {"reason": reason})
    chosen = _chosen(measured_arms)
    data = {"arms": measured_arms, "shown": [list(tasks) for tasks in chosen]}
    if not chosen:
        return Part("", (f"{heading} No two tasks disagree about {LEAST_ROWS} test rows: too few to tell.",), data)
    first = next(iter(measured_arms.values()))[0]
    (a, b), *others = chosen
    blocks: list[Block] = [
        f"{heading} Some pairs of a user and an item get the feedback `{a}` and not `{b}`. A table that both tasks "
        "share has one place for such a user and item; with a table for each task they can be near in one and far in "
        "the other. "
        f"The distance is that of the embeddings of `{first['user']}` and `{first['item']}`, each scaled to length 1, "
        f"in {first['rows']:,} test rows whose user and item occur in train. A network reads more than distances, so "
        "this is a picture of the tables and no proof of what the model makes of them.",
        _table(comparison, measured_arms, a, b),
        _picture(measured_arms, a, b),
    ]
    if others:
        tables = tuple(_table(comparison, measured_arms, *tasks) for tasks in others)
        blocks.append(Details("Other tasks that disagree", tables))
    return Part("", tuple(blocks), data)


def _chosen(arms: OfArms) -> list[tuple[str, str]]:
    """Ordered pairs of tasks, those first whose contradictory rows and other rows are most even."""
    least: dict[tuple[str, str], int] = {}
    for trees in arms.values():
        for pair in trees[0]["pairs"]:
            rest = trees[0]["rows"] - pair["rows"]
            least.setdefault((pair["positive"], pair["negative"]), min(pair["rows"], rest))
    enough = [tasks for tasks, rows in least.items() if rows >= LEAST_ROWS]
    return sorted(enough, key=lambda tasks: -least[tasks])[:_SHOWN]


def _of_tables(trees: Sequence[Mapping[str, Any]], a: str, b: str) -> dict[str, list[tuple[Any, Any]]]:
    """By table that concerns the two tasks: what was found of all pairs and of the contradictory ones, per seed."""
    result: dict[str, list[tuple[Any, Any]]] = {}
    for tree in trees:
        for pair in tree["pairs"]:
            if (pair["positive"], pair["negative"]) != (a, b):
                continue
            for table, found in pair["tables"].items():
                if not table.startswith(TASK) or table in (f"{TASK}{a}", f"{TASK}{b}"):
                    result.setdefault(table, []).append((tree["tables"][table], found))
    return result


def _table(comparison: Comparison, arms: OfArms, a: str, b: str) -> Table:
    of_arms = {name: _of_tables(trees, a, b) for name, trees in arms.items()}
    trials = sum(len(seeds) for of in of_arms.values() for seeds in of.values())
    beyond = NormalDist().inv_cdf(1 - comparison.settings.level / (2 * trials))
    contradictory = max(sum(seeds[0][1]["counts"]) for of in of_arms.values() for seeds in of.values())
    rows = []
    for name, of in of_arms.items():
        for table, seeds in of.items():
            apart = [pair for _, pair in seeds if pair["sd"] and abs(pair["auc"] - 0.5) > beyond * pair["sd"]]
            rows.append(
                (
                    name,
                    table,
                    measured.span([pair["mean"] for _, pair in seeds]),
                    measured.span([whole["mean"] for whole, _ in seeds]),
                    measured.span([pair["auc"] for _, pair in seeds]),
                    Cell(f"{len(apart)} of {len(seeds)}", tone="" if apart else "muted"),
                )
            )
    return Table(
        (
            "arm",
            "table",
            "distance of contradictory pairs",
            "of all pairs",
            "contradictory further apart",
            "told apart",
        ),
        tuple(rows),
        f"{contradictory:,} rows with {a} and without {b}: mean over seeds, and from the lowest to the highest seed. "
        "Contradictory further apart: the probability that such a pair is further apart than another pair; .5 where "
        "the table does not tell them from the rest. On which side of .5 it lies is chance where seeds differ: a "
        "network can read either. Told apart: in how many seeds it differs from .5 by more than other test users "
        f"explain (corrected for the {trials} numbers of this table).",
        left=(1,),
    )


def _picture(arms: OfArms, a: str, b: str) -> Figure:
    panels = [(name, table, seeds) for name, trees in arms.items() for table, seeds in _of_tables(trees, a, b).items()]
    left_out = len(panels) - _PANELS
    panels = panels[:_PANELS]
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = figures.pyplot().subplots(
        rows, columns, figsize=(2.3 * columns, 1.5 * rows + 0.4), squeeze=False, sharex=True, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    edges = next(iter(arms.values()))[0]["edges"]
    seen = np.flatnonzero(np.sum([seeds[0][0]["counts"] for *_, seeds in panels], axis=0))
    for axis, (name, table, seeds) in zip(axes.flat, panels, strict=False):
        for place, label, colour in ((0, "all pairs", "0.75"), (1, "contradictory", figures.COLOURS[1])):
            counts = np.array(seeds[0][place]["counts"])
            axis.stairs(counts / max(counts.sum(), 1), edges, label=label, color=colour, fill=place == 0)
        axis.set_title(f"{shortened(name, 20)}\n{shortened(table, 26)}", fontsize=7)
        axis.set_yticks([])
        axis.set_xlim(edges[seen[0]], edges[seen[-1] + 1])
        axis.tick_params(labelsize=7)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, ncols=2, loc="outside lower center")
    more = f" {left_out} more are in the table." if left_out > 0 else ""
    return Figure(
        figures.svg(figure),
        f"Histograms of the distance of user and item in each table: all pairs, and those with {a} and without {b}",
        f"Distance of user and item, from 0 (same direction) to 2 (opposite): all pairs (grey) and those with {a} and "
        f"without {b} (line), in the first seed's run. A line that is shifted against the grey area shows a table "
        f"that tells these pairs from the rest.{more}",
    )
