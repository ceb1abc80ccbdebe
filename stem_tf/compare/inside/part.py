"""What the parts of the section "Why" have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_tf import report
from stem_tf.compare.document import Block

OfArms = Mapping[str, Sequence[Mapping[str, Any]]]
"""Measures of each arm's runs, as `stem_tf.compare.measured.of_runs` returns them; at least one per arm."""

SHARED, TASK = "shared", "task:"
"""Names of the shared table and experts, and what a task's table begins with: those of `stem_tf.layers.embedding`."""

_LABELLED = 400
"""A heat map with more cells is drawn without numbers."""


@dataclass(frozen=True)
class Part:
    """A part of the section.

    Attributes:
      finding: a sentence for the section's lead, or "".
      blocks: the evidence.
      data: the same as JSON.
    """

    finding: str
    blocks: tuple[Block, ...]
    data: Mapping[str, Any] = field(default_factory=dict)


def heat_map(
    axis: Any, values: NDArray, rows: Sequence[str], columns: Sequence[str], *, high: float, cells: int, digits: int = 2
) -> None:
    """Draws values [rows, columns] from 0 (white) to ``high``; NaN stays empty.

    Args:
      axis: matplotlib's.
      values: the numbers.
      rows, columns: their names.
      high: the value of the darkest colour.
      cells: of all heat maps of the figure; many are drawn without numbers.
      digits: of the numbers.
    """
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1.3 * high, aspect="auto", interpolation="nearest")
    axis.set_xticks(range(len(columns)), [shortened(name) for name in columns], rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(rows)), [shortened(name) for name in rows], fontsize=7)
    axis.tick_params(length=0)
    if cells > _LABELLED:
        return
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            axis.text(
                column, row, report.number(float(value), digits), ha="center", va="center", fontsize=6, color="black"
            )


def shortened(name: str, most: int = 24) -> str:
    """A name that fits beside a picture."""
    return name if len(name) <= most else f"{name[: most - 3]}..."
