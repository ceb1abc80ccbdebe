"""How each arm's gates use its experts (PLE Fig. 8), and which experts do nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stem_tf import dead_experts
from stem_tf.compare import figures, measured
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Block, Details, Figure, Table
from stem_tf.compare.inside.part import SHARED, OfArms, Part, heat_map, shortened

_COLUMNS = 3


def part(comparison: Comparison, of_arms: OfArms) -> Part:
    """Heat maps of the first seed's gates, their use of own and shared experts over all seeds, and idle experts."""
    gated = {name: trees for name, trees in of_arms.items() if trees[0]["gates"]}
    if not gated:
        return Part("", ("**Gates.** None of these arms has gates.",))
    idle = [
        (name, tree["seed"], expert, state)
        for name, trees in gated.items()
        for tree in trees
        for expert, state in dead_experts.idle(tree["experts"]).items()
    ]
    blocks: list[Block] = [
        "**Gates.** A gate mixes the outputs of experts, small networks that several tasks may read. Its weights say "
        "whom a task listens to: its own experts, those of other tasks, or the shared ones.",
        _picture(gated),
        Details("Use of own, shared and other experts, over all seeds", (_table(gated),)),
    ]
    if idle:
        blocks.append(
            Table(
                ("arm", "seed", "expert", "state"),
                tuple((name, str(seed), expert, state) for name, seed, expert, state in idle),
                "Experts that do nothing. Dead: all outputs are 0 for every row, and no gradient can revive them. "
                "Unused: no gate gives it 1 % of its weight on average.",
                left=(2, 3),
            )
        )
    arms = list(dict.fromkeys(name for name, *_ in idle))
    finding = f"Some experts of {' and '.join(arms)} do nothing." if idle else "No expert is dead or unused."
    data = {
        name: {"gates": [tree["gates"] for tree in trees], "experts": [tree["experts"] for tree in trees]}
        for name, trees in gated.items()
    }
    return Part(finding, tuple(blocks), data)


def _picture(gated: OfArms) -> Figure:
    columns = min(_COLUMNS, len(gated))
    rows = math.ceil(len(gated) / columns)
    shapes = {name: _matrix(trees[0]["gates"]) for name, trees in gated.items()}
    cells = sum(values.size for values, _, _ in shapes.values())
    height = 1.5 + 0.2 * max(len(readers) for _, readers, _ in shapes.values())
    figure, axes = figures.pyplot().subplots(
        rows, columns, figsize=(3.2 * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(gated) :]:
        axis.set_axis_off()
    for axis, (name, (values, readers, experts)) in zip(axes.flat, shapes.items(), strict=False):
        heat_map(axis, values, readers, experts, high=1.0, cells=cells)
        axis.set_title(shortened(name, 32), fontsize="small")
    return Figure(
        figures.svg(figure),
        "Heat maps of the mean weight that each gate gives each expert, one per arm",
        "Each row is one gate and adds up to 1: how much a task listens, on average over test rows, to each expert. "
        "Empty: the gate does not see this expert. One run per arm, of the first seed: experts without a task are "
        "interchangeable, so that a mean over seeds would say nothing of them.",
    )


def _matrix(gates: Mapping[str, Mapping[str, Any]]) -> tuple[np.ndarray, list[str], list[str]]:
    """Mean weights [gates, experts], with the names of both."""
    known = dict.fromkeys(expert for gate in gates.values() for expert in gate["experts"])
    experts = sorted(known, key=lambda expert: re.fullmatch(rf"{SHARED}( \d+)?", expert) is not None)  # at the end
    values = np.full((len(gates), len(experts)), np.nan)
    for row, gate in enumerate(gates.values()):
        for expert, mean in zip(gate["experts"], gate["mean"], strict=True):
            values[row, experts.index(expert)] = mean
    return values, list(gates), experts


def _table(gated: OfArms) -> Table:
    rows = []
    for name, trees in gated.items():
        for gate in trees[0]["gates"]:
            of_seeds = [tree["gates"][gate] for tree in trees if gate in tree["gates"]]
            own, shared = ([_weight(found, owner) for found in of_seeds] for owner in ("own", "shared"))
            used = [_effective(found["mean"]) for found in of_seeds]
            count = str(len(of_seeds[0]["experts"]))
            rows.append((name, gate, measured.span(own), measured.span(shared), measured.span(used, 1), count))
    return Table(
        ("arm", "gate", "weight of own experts", "of shared experts", "experts in use", "of"),
        tuple(rows),
        "Mean weight that a gate gives its own task's experts and the shared ones; the rest goes to experts of other "
        "tasks. Experts in use: how many the gate would read if it read them equally (the exponential of the entropy "
        "of its mean weights). Mean over seeds, and from the lowest to the highest seed.",
        left=(1,),
    )


def _weight(gate: Mapping[str, Any], owner: str) -> float | None:
    """The weight that a gate gives the experts of its own task, or the shared ones; None where it sees none."""
    name = re.escape(gate["reader"] if owner == "own" else SHARED)
    weights = [
        mean
        for expert, mean in zip(gate["experts"], gate["mean"], strict=True)
        if re.fullmatch(rf"{name}( \d+)?", expert)
    ]
    return sum(weights) if weights else None


def _effective(weights: Sequence[float]) -> float:
    return math.exp(-sum(weight * math.log(weight) for weight in weights if weight > 0))
