"""What a model gives beside the tasks' scores: outputs that are computed from scores and features, each with a name.

`of` is the one list of them. The exported graph, the check of an export, its card and its manifest, stem-predict and
the server's counts go through it and know no output by its name. Evaluation measures the one to rank by, and
stem-predict orders items by it unless it is told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import expression, ranking
from pipelines.expression import Formula
from pipelines.schema import Schema
from stem_util.errors import UserError

RANKING_SCORE = "ranking_score"
"""The name of the score to rank by. `stem_client`, which imports no other package, has it again."""


@dataclass(frozen=True)
class Output:
    """An output of every signature, float32 of the shape of the tasks' scores, always finite.

    Attributes:
      name: of the output.
      meaning: what it is, as a phrase.
      formula: of scores by task, raw values of numeric features and constants.
      constants: named numbers in the formula.
      features: the features in the formula.
      tasks: the tasks in the formula.
    """

    name: str
    meaning: str
    formula: Formula
    constants: Mapping[str, float]
    features: tuple[str, ...]
    tasks: tuple[str, ...]

    def values(self, scores: Mapping[str, NDArray], features: Mapping[str, NDArray]) -> NDArray[np.float32]:
        """The output in NumPy, float32, from scores by task and raw features of one shape.

        A feature that is NaN or infinite is missing. Denormal numbers count as 0, as in a graph.
        """
        numbers = {name: _known(features[name]) for name in self.features}
        numbers |= {name: _normal(scores[name]) for name in self.tasks}
        return expression.finished(expression.values(self.formula, {**self.constants, **numbers}))

    @property
    def text(self) -> str:
        """The formula on one line, with its constants: ``click^a * like, a = 2``."""
        constants = "".join(f", {name} = {value:g}" for name, value in self.constants.items())
        return f"{' '.join(self.formula.text.split())}{constants}"

    def described(self) -> dict[str, Any]:
        """What a manifest says of it, as plain data."""
        return {
            "name": self.name,
            "meaning": self.meaning,
            "text": self.text,
            "steps": [list(step) for step in self.formula.steps],
            "constants": dict(self.constants),
            "features": list(self.features),
            "tasks": list(self.tasks),
        }


def _known(x: NDArray) -> NDArray:
    return np.where(np.isfinite(x), _normal(x), np.nan)


def _normal(x: NDArray) -> NDArray:
    return np.where(np.abs(x) < expression.SMALLEST, 0.0, x)


def of(schema: Schema) -> tuple[Output, ...]:
    """The outputs of a model of this schema, beside its tasks.

    Raises:
      UserError: a task has the name of an output.
    """
    found = tuple(output for make in _MAKERS if (output := make(schema)) is not None)
    names = {task.lower(): task for task in schema.task_names}
    for output in found:
        if output.name.lower() in names:
            raise UserError(
                f"schema {schema.name}: the task '{names[output.name.lower()]}' has the name of an output of the "
                f"model ({output.meaning}); give the task another name"
            )
    return found


def _ranking_score(schema: Schema) -> Output | None:
    if schema.ranking is None:
        return None
    formula = ranking.score(schema.ranking, schema.features, schema.tasks)
    return Output(
        RANKING_SCORE,
        "the score to rank by",
        formula,
        MappingProxyType({parameter.name: parameter.value for parameter in schema.ranking.parameters}),
        tuple(feature.name for feature in schema.features if feature.name in formula.names),
        tuple(name for name in schema.task_names if name in formula.names),
    )


_MAKERS: tuple[Callable[[Schema], Output | None], ...] = (_ranking_score,)
