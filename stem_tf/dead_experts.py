"""Which experts of a model do nothing. No TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from stem_tf import report

UNUSED = 0.01
"""An expert that no gate gives this mean weight is not used."""

Experts = Mapping[str, Mapping[str, Any]]
"""Experts by name, as :func:`stem_tf.inspection.utilisation` returns them."""


def idle(experts: Experts) -> dict[str, Literal["dead", "unused"]]:
    """The experts that add nothing to any mixture: those whose outputs are 0, and those that no gate gives weight.

    HoME (Wang et al., KDD 2025) found both in a production MMoE.
    """
    found: dict[str, Literal["dead", "unused"]] = {}
    for name, expert in experts.items():
        if expert["zeros"] == 1:
            found[name] = "dead"
        elif expert["weight"] < UNUSED:
            found[name] = "unused"
    return found


def sentences(experts: Experts) -> list[str]:
    """A sentence for each expert that does nothing."""
    text = {
        "dead": (
            "is dead: its outputs are 0 for every row, so it gets no gradient and cannot recover; a smaller "
            "config.optimizer.learning_rate may keep it alive"
        ),
        "unused": (
            f"is not used: no gate gives it even {report.percent(UNUSED)} of its weight, on average; the model may do "
            "as well with fewer experts"
        ),
    }
    return [f"expert '{name}' {text[state]}" for name, state in idle(experts).items()]
