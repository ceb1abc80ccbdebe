"""Which features each task needs: permutation importance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from stem_tf.compare import figures, measured
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Block, Cell, Details, Figure, Table
from stem_tf.compare.inside.part import OfArms, Part, heat_map, shortened

_MOST, _COLUMNS = 20, 3

Lost = Mapping[str, Mapping[str, Mapping[str, measured.Estimate]]]
"""What is lost, by arm, feature and task."""


def part(comparison: Comparison, of_arms: OfArms) -> Part:
    """Heat maps of binary tasks, one per arm, features of more weight first; all numbers, folded away."""
    level = comparison.settings.level
    lost: Lost = {
        arm: {
            feature: {
                task: measured.estimate(
                    [tree["importance"][feature][task]["lost"] for tree in trees],
                    [_error(tree["importance"][feature][task]) for tree in trees],
                    level,
                )
                for task in trees[0]["importance"][feature]
            }
            for feature in trees[0]["importance"]
        }
        for arm, trees in of_arms.items()
    }
    tasks = {task.name: task.type for task in comparison.tasks}
    binary = [task for task, kind in tasks.items() if kind == "binary"]
    known = dict.fromkeys(name for of in lost.values() for name in of)
    features = sorted(known, key=lambda name: -_most(lost, name, binary))
    rows = [tree["importance_rows"] for trees in of_arms.values() for tree in trees]
    seeds = [len(trees) for trees in of_arms.values()]
    blocks: list[Block] = [
        "**Features.** If a feature's values are shuffled among the rows, a model that needs it gets worse; how much "
        "worse is the feature's importance for a task. Features that can stand in for each other look less important "
        f"than they are together. {_range(rows)} test rows; {_range(seeds)} {'seed' if max(seeds) == 1 else 'seeds'} "
        "per arm."
    ]
    if binary:
        blocks.append(_picture(lost, features[:_MOST], binary, len(features)))
    blocks.append(Details("All numbers", tuple(_table(lost, features, arm, tasks) for arm in lost)))
    data = {arm: [tree["importance"] for tree in trees] for arm, trees in of_arms.items()}
    return Part(_finding(lost, features), tuple(blocks), data)


def _range(numbers: Sequence[int]) -> str:
    """``200``, or ``200 to 1,000`` where arms differ."""
    return " to ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


def _error(found: Mapping[str, float | None]) -> float | None:
    """The standard error over users and shuffles."""
    if found["sd_rows"] is None or found["sd_shuffles"] is None:
        return None
    return math.hypot(found["sd_rows"], found["sd_shuffles"])


def _most(lost: Lost, feature: str, tasks: list[str]) -> float:
    """The largest loss of a feature, over arms and binary tasks."""
    values = [of[feature][task].mean for of in lost.values() if feature in of for task in tasks if task in of[feature]]
    return max((value for value in values if not math.isnan(value)), default=0.0)


def _finding(lost: Lost, features: list[str]) -> str:
    """Which features no arm needs for any task, as far as these rows tell."""
    idle = [
        feature
        for feature in features
        if not any(
            found.mean > 0 and found.differs_from(0)
            for of in lost.values()
            for task, found in of.get(feature, {}).items()
        )
    ]
    if not idle or len(idle) == len(features):
        return ""
    names = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more features" if len(idle) > 5 else "")
    return f"No arm gets worse without {names}, as far as these test rows can tell."


def _picture(lost: Lost, features: list[str], tasks: list[str], count: int) -> Figure:
    columns = min(_COLUMNS, len(lost))
    rows = math.ceil(len(lost) / columns)
    matrices = {
        arm: np.array([[_mean(of, feature, task) for task in tasks] for feature in features])
        for arm, of in lost.items()
    }
    whole = np.array(list(matrices.values()))
    high = float(np.nanmax(whole)) if np.isfinite(whole).any() and np.nanmax(whole) > 0 else 1.0
    size = (1.5 + 0.32 * len(tasks), 1.6 + 0.19 * len(features))
    figure, axes = figures.pyplot().subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(lost) :]:
        axis.set_axis_off()
    for axis, (arm, values) in zip(axes.flat, matrices.items(), strict=False):
        heat_map(axis, np.maximum(values, 0.0), features, tasks, high=high, cells=whole.size)
        axis.set_title(shortened(arm, 32), fontsize="small")
    more = f" The {_MOST} most important of {count} features." if count > len(features) else ""
    return Figure(
        figures.svg(figure),
        "Heat maps of the AUC that each task loses without each feature, one per arm",
        f"AUC that a task (column) loses when a feature (row) is shuffled, mean over seeds.{more}",
    )


def _mean(of: Mapping[str, Mapping[str, measured.Estimate]], feature: str, task: str) -> float:
    found = of.get(feature, {}).get(task)
    return math.nan if found is None else found.mean


def _table(lost: Lost, features: list[str], arm: str, tasks: Mapping[str, str]) -> Table:
    own = [task for task in tasks if task in next(iter(lost[arm].values()))]
    rows: tuple[tuple[str | Cell, ...], ...] = tuple(
        (feature, *(_cell(lost[arm][feature][task]) for task in own)) for feature in features if feature in lost[arm]
    )
    header = tuple(task if tasks[task] == "binary" else f"{task} (MSE)" for task in own)
    return Table(
        ("feature", *header),
        rows,
        f"{arm}: AUC lost (regressions: squared error added), ± its interval over users, shuffles and seeds. Grey: the "
        "interval holds 0.",
    )


def _cell(found: measured.Estimate) -> Cell:
    return Cell(str(found), tone="" if found.differs_from(0) else "muted")
