"""Why arms differ: what gates, tables and features do inside the trained models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stem_tf.compare import measured
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Block, Section
from stem_tf.compare.inside import features, gates, pairs, tables
from stem_tf.compare.inside.part import Part

_PARTS: Mapping[str, Callable[[Comparison, Mapping[str, Sequence[Mapping[str, Any]]]], Part]] = {
    "gates": gates.part,
    "pairs": pairs.part,
    "tables": tables.part,
    "features": features.part,
}


_TITLE = "Why: what the models do inside"


def section(comparison: Comparison) -> Section:
    """How gates use experts, where tables place contradictory pairs, how much of them is used, what features matter."""
    lead = (
        "What the trained models do inside: which experts each task reads, where the tables place users and items that "
        "two tasks disagree about, how much of its space each table uses, and which features each task needs."
    )
    of_arms = {name: trees for name, arm in comparison.arms.items() if (trees := measured.of_runs(arm))}
    if not of_arms:
        return Section("why", _TITLE, f"{lead} None of these runs was measured.", data={})
    parts = {name: part(comparison, of_arms) for name, part in _PARTS.items()}
    blocks: list[Block] = [block for part in parts.values() for block in part.blocks]
    if without := [name for name in comparison.arms if name not in of_arms]:
        blocks.append(f"Not measured: {', '.join(without)}.")
    found = " ".join(part.finding for part in parts.values() if part.finding)
    data = {name: part.data for name, part in parts.items()}
    return Section("why", _TITLE, f"{lead} {found}".strip(), tuple(blocks), data)
