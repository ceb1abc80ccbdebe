"""The rules of the gate: YAML, as in rules.yaml beside this file, which holds the defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pipelines import yaml_reader
from pipelines.schema import Schema, Task
from pipelines.yaml_reader import Node, hint
from stem_util.errors import UserError

Bounds = Mapping[str, Any]
"""The bounds of one rule by key; None where a bound is switched off."""
_MOST_RESAMPLES = 100_000  # more would be a slip: they are held in memory


def _not_negative(node: Node) -> float:
    return node.number(minimum=0)


def _doubt(node: Node) -> str:
    return str(node.choice(("refuse", "publish")))


_Reader = Callable[[Node], Any]
_COMPARED: dict[str, _Reader] = {"margin": _not_negative, "in_doubt": _doubt}
_MOST = {"at_most": _not_negative}
_OF_TASKS: dict[str, dict[str, _Reader]] = {
    "auc": _COMPARED | {"at_least": _not_negative},
    "logloss": _COMPARED | _MOST,
    "mse": _COMPARED | _MOST,
    "calibration_error": _COMPARED | _MOST,
    "predicted_over_observed": _COMPARED | {"at_least": _not_negative} | _MOST,
    "score_drift": dict.fromkeys(("psi", "mean", "quantiles"), _not_negative),
}
"""The keys of each rule about a task."""
METRICS = {
    "binary": ("auc", "logloss", "calibration_error", "predicted_over_observed"),
    "regression": ("mse", "predicted_over_observed"),
}
"""The rules about metrics that a task of each type can have."""
_OF_FEATURES: dict[str, dict[str, _Reader]] = {
    "unknown_ids": dict.fromkeys(("margin", "at_most", "served_at_most"), _not_negative)
}
_OF_VERSIONS: dict[str, dict[str, _Reader]] = {
    "size": {"times": _not_negative, "at_most_mb": _not_negative},
    "latency": {"times": _not_negative, "at_most_ms": _not_negative},
}
_ALL = _OF_TASKS | _OF_FEATURES | _OF_VERSIONS


@dataclass(frozen=True)
class Rules:
    """What a candidate has to hold. A rule that is switched off has no bounds.

    Attributes:
      source: the file.
      level: intervals hold all but this share of what chance allows.
      resamples: how often users are drawn.
      bounds: by rule.
      tasks: by task, the rules that differ for it.
      features: by feature.
    """

    source: str
    level: float
    resamples: int
    bounds: Mapping[str, Bounds]
    tasks: Mapping[str, Mapping[str, Bounds]]
    features: Mapping[str, Mapping[str, Bounds]]

    def of_task(self, task: Task) -> dict[str, Bounds]:
        """The rules about a task, without those that are switched off."""
        own = self.tasks.get(task.name, {})
        rules = {name: own.get(name, self.bounds[name]) for name in _of_type(task.type)}
        return {name: bounds for name, bounds in rules.items() if bounds}

    def of_feature(self, feature: str) -> Bounds:
        """The bounds on the share of unknown ids of a feature."""
        return self.features.get(feature, {}).get("unknown_ids", self.bounds["unknown_ids"])

    def tree(self) -> dict[str, Any]:
        """The rules as plain data."""
        return {
            "file": self.source,
            "level": self.level,
            "resamples": self.resamples,
            **{name: dict(bounds) for name, bounds in self.bounds.items()},
            **{key: {n: dict(own) for n, own in getattr(self, key).items()} for key in ("tasks", "features")},
        }


def default_text() -> str:
    """The file of the default rules."""
    return resources.files("export").joinpath("gate").joinpath("rules.yaml").read_text("utf-8")


def load(path: str | None, schema: Schema) -> Rules:
    """Reads a file of rules, or the default ones.

    Args:
      path: the file; None for the defaults.
      schema: of the run's data, which has the tasks and features.

    Raises:
      UserError: no such file, or the first mistake in it, with its place.
    """
    default = yaml_reader.parse(default_text(), "the default rules")
    before = {name: _bounds(node, name, {}) for name, node in default.mapping().items() if name in _ALL}
    root = default if path is None else _read(path)
    fields = root.record({}, [*default.mapping(), "tasks", "features"], "the rules")
    bounds = {name: _bounds(fields[name], name, old) if name in fields else old for name, old in before.items()}
    level = fields.get("level", default.child("level"))
    if not 0 < level.number() < 0.5:
        level.fail("should be between 0 and .5; .05 stands for intervals of 95 %")
    return Rules(
        root.source,
        level.number(),
        fields.get("resamples", default.child("resamples")).integer(100, _MOST_RESAMPLES),
        bounds,
        _own(fields.get("tasks"), {task.name: _of_type(task.type) for task in schema.tasks}, bounds),
        _own(fields.get("features"), {f.name: _OF_FEATURES for f in schema.features if f.has_vocabulary}, bounds),
    )


def _of_type(kind: str) -> dict[str, dict[str, _Reader]]:
    return {name: _OF_TASKS[name] for name in (*METRICS[kind], "score_drift")}


def _read(path: str) -> Node:
    try:
        return yaml_reader.parse(Path(path).read_text("utf-8"), path)
    except OSError as error:
        raise UserError(
            f"--rules={path}: {error.strerror}; stem-publish --print_rules shows the default ones"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"--rules={path} is not UTF-8 text (byte {error.start})") from error


def _off(node: Node) -> bool:
    return isinstance(node.value, str) and node.value == "off"


def _bounds(node: Node, rule: str, before: Bounds) -> Bounds:
    """The bounds of a rule: those of the file over those before it."""
    if _off(node):
        return {}
    fields = node.record({}, _ALL[rule], f"the rule {rule!r}")
    found = {key: None if _off(child) else _ALL[rule][key](child) for key, child in fields.items()}
    if found.get("in_doubt", "refuse") is None:
        fields["in_doubt"].fail("should be 'refuse' or 'publish'; `margin: off` switches the comparison off")
    return {**before, **found}


def _own(
    node: Node | None, keys: Mapping[str, Mapping[str, Any]], bounds: Mapping[str, Bounds]
) -> dict[str, dict[str, Bounds]]:
    """The rules of single tasks or features, which may be switched off as a whole.

    Args:
      node: of the file, if it has any.
      keys: the rules that each task or feature can have.
      bounds: of all.
    """
    found: dict[str, dict[str, Bounds]] = {}
    if node is None:
        return found
    for name, child in node.mapping().items():
        if name not in keys:
            node.fail(f"{name!r} is not in the data, or no rule is about it{hint(name, keys)}")
        if _off(child):
            found[name] = dict.fromkeys(keys[name], {})
            continue
        fields = child.record({}, keys[name], repr(name))
        found[name] = {rule: _bounds(rule_node, rule, bounds[rule]) for rule, rule_node in fields.items()}
    return found
