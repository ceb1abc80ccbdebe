"""One score to rank by: the block ``ranking`` of a schema, or of a YAML file of its own.

::

    ranking:
      score: click^a * long_view^b * log1p(default(duration_ms, 0))    # a formula: pipelines.expression
      gain: click + 2 * like                                            # what a shown item was worth, of labels
      parameters:
        a: 1                                                            # fixed
        b: {value: 0.5, low: 0, high: 4}                                # searched; log: true on a logarithmic scale

A product of powered scores is the ranking function of PLE (Tang et al., RecSys 2020), Eq. 1. In ``score`` a task's name
is its score, in ``gain`` its label; a label outside the task's sample space counts 0. A feature's name is its value in
the log, before any transform; a value that is missing or not finite is one that is missing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from pipelines import expression, yaml_reader
from pipelines.expression import Formula, Mistake
from pipelines.schema import Feature, Parameter, Ranking, Schema, Task
from pipelines.yaml_reader import Node
from stem_util.errors import UserError

_KEYS = {"score": "a formula, as in click^2 * like"}
_OPTIONAL = ("gain", "parameters")
_SUFFIXES = (".yaml", ".yml")


def read(node: Node, features: Sequence[Feature], tasks: Sequence[Task]) -> Ranking:
    """Reads the block.

    Raises:
      UserError: the first mistake, with its place.
    """
    fields = node.record(_KEYS, _OPTIONAL, "a ranking")
    parameters = {}
    if "parameters" in fields:
        taken = {feature.name: "feature" for feature in features} | {task.name: "task" for task in tasks}
        for name, child in fields["parameters"].mapping("a mapping from names to numbers").items():
            if name in taken:
                child.fail(f"a {taken[name]} is named {name!r} already; give the parameter another name")
            if not expression.is_name(name):
                child.fail(f"{name!r} cannot be a parameter's name; use letters, digits and '_', a letter first")
            parameters[name] = _parameter(name, child)
    ranking = Ranking(
        fields["score"].text(),
        fields["gain"].text() if "gain" in fields else None,
        tuple(parameters.values()),
    )
    used = _checked(fields["score"], lambda: score(ranking, features, tasks)).names
    for name in parameters:
        if name not in used:
            fields["parameters"].child(name).fail("is not in the formula of score; use it there or leave it out")
    if "gain" in fields:
        _checked(fields["gain"], lambda: gain(ranking, features, tasks))
    return ranking


def _checked(node: Node, parse: Callable[[], Formula]) -> Formula:
    try:
        return parse()
    except Mistake as mistake:
        node.fail(str(mistake))


def _parameter(name: str, node: Node) -> Parameter:
    if not isinstance(node.value, dict):
        return Parameter(name, node.number())
    required = {"value": "a number", "low": "the range's lower end", "high": "the range's upper end"}
    fields = node.record(required, ("log",), "a parameter")
    value, low, high = (fields[key].number() for key in required)
    log = "log" in fields and fields["log"].flag()
    if low >= high:
        fields["high"].fail(f"{high:g} should be above low, {low:g}")
    if not low <= value <= high:
        fields["value"].fail(f"{value:g} should be between low and high, {low:g} and {high:g}")
    if log and low <= 0:
        fields["low"].fail(f"{low:g} should be above 0 on a logarithmic scale")
    return Parameter(name, value, (low, high), log)


def score(ranking: Ranking, features: Sequence[Feature], tasks: Sequence[Task]) -> Formula:
    """The formula of the score.

    Raises:
      Mistake: it cannot be read, or names no task.
    """
    return _formula(ranking.score, "scores", features, tasks, [parameter.name for parameter in ranking.parameters])


def gain(ranking: Ranking, features: Sequence[Feature], tasks: Sequence[Task]) -> Formula:
    """The formula of the gain.

    Raises:
      Mistake: it cannot be read, or names no task.
    """
    text = ranking.gain
    if text is None:
        named = [task for task in tasks if task.name in score(ranking, features, tasks).names]
        binary = [task for task in named if task.type == "binary"]
        text = " + ".join(task.name for task in binary or named)
    return _formula(text, "labels", features, tasks, ())


def _formula(
    text: str, of: str, features: Sequence[Feature], tasks: Sequence[Task], parameters: Collection[str]
) -> Formula:
    names = {task.name: "is a feature and a task; rename one of them to use it in a formula" for task in tasks}
    numbers = [feature.name for feature in features if feature.kind == "numeric"]
    others = {
        feature.name: names.get(
            feature.name, f"is a {feature.kind} feature; a formula takes numeric features and {of} of tasks"
        )
        for feature in features
        if feature.name in names or feature.kind != "numeric"
    }
    known = [name for name in (*names, *numbers, *parameters) if name not in others]
    formula = expression.parse(text, known, others, numbers)
    if not any(name in names for name in formula.names):
        raise Mistake(f"names no task, so that it does not depend on {of}; tasks: {', '.join(names)}")
    return formula


def fields(ranking: Ranking) -> dict[str, Any]:
    """The block as plain data, which :func:`read` reads back; defaults are left out."""
    tree: dict[str, Any] = {"score": ranking.score}
    if ranking.gain is not None:
        tree["gain"] = ranking.gain
    if ranking.parameters:
        tree["parameters"] = {parameter.name: _fields(parameter) for parameter in ranking.parameters}
    return tree


def _fields(parameter: Parameter) -> Any:
    if parameter.range is None:
        return parameter.value
    tree = {"value": parameter.value, "low": parameter.range[0], "high": parameter.range[1]}
    return tree | {"log": True} if parameter.log else tree


def text(ranking: Ranking) -> str:
    """The block as YAML, as in a schema."""
    tree = fields(ranking)
    parameters = tree.pop("parameters", {})
    lines = ["ranking:", *(f"  {key}: {yaml_reader.inline(value)}" for key, value in tree.items())]
    lines += ["  parameters:"] * bool(parameters)
    lines += [f"    {yaml_reader.inline(name)}: {yaml_reader.inline(value)}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"


def replaced(schema: Schema, given: str) -> Schema:
    """The schema with another ranking.

    Args:
      schema: as it is.
      given: a YAML file with the block ``ranking``; or a formula for ``score``, with the gain and the parameters of the
        schema's own ranking.

    Raises:
      UserError: no such file, or a mistake in it.
    """
    if given.endswith(_SUFFIXES) or os.path.isfile(given):
        try:
            block = Path(given).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--ranking={given}: cannot be read ({getattr(error, 'strerror', error)})") from None
        root = yaml_reader.parse(block, given).record({"ranking": "a block with the key score"}, (), "a ranking's file")
        return dataclasses.replace(schema, ranking=read(root["ranking"], schema.features, schema.tasks))
    before = schema.ranking or Ranking("")
    ranking = dataclasses.replace(before, score=given)
    try:
        used = score(ranking, schema.features, schema.tasks).names
        gain(ranking, schema.features, schema.tasks)
    except Mistake as mistake:
        raise UserError(f"--ranking: {mistake}") from None
    parameters = tuple(parameter for parameter in before.parameters if parameter.name in used)
    return dataclasses.replace(schema, ranking=dataclasses.replace(ranking, parameters=parameters))


def for_tasks(schema: Schema) -> Schema:
    """The schema without its ranking if that needs a task that is not among the schema's."""
    if schema.ranking is None:
        return schema
    try:
        score(schema.ranking, schema.features, schema.tasks)
        gain(schema.ranking, schema.features, schema.tasks)
    except Mistake:
        return dataclasses.replace(schema, ranking=None)
    return schema
