"""What other packages read from a complete config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_collections

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf.configs import base
from stem_tf.configs.base import KEYS

if TYPE_CHECKING:
    from stem_tf.models.registry import Model


def flat(config: Any) -> dict[str, Any]:
    """``{"model.dim": 8, ...}`` of a complete config."""
    keys = base.keys(config.model.module)
    values = base.to_flat(config, keys)
    return {path: values[path] for path in keys}


def model_of(config: Any) -> Model:
    """The model that ``config.model.name`` names."""
    return base.models(config.model.module)[config.model.name]


def task_features(config: Any) -> tuple[str, ...] | None:
    """The names in ``config.model.task_features``, or None where it is a word (all, none, user, item, ids, schema)."""
    text = config.model.task_features
    return None if text in ("schema", "all", "none", "user", "item", "ids") else tuple(text.replace(" ", "").split(","))


def best(config: Any) -> str:
    """Which best weights a run keeps: together, own or by_task."""
    if config.train.best == "auto":
        return "together" if model_of(config).network.shares else "own"
    return str(config.train.best)


def reading(data: Any) -> dict[str, Any]:
    """What ``config.data`` says to :func:`~pipelines.batches.dataset.read_batches` and ``count_batches``."""
    return {"batch_size": data.batch_size, "input_format": data.input_format, "on_corrupt": data.on_corrupt}


def data(config: Any, directory: str | None = None) -> Manifest:
    """The manifest of a run's data, with the tasks that ``config.data.tasks`` chooses.

    Args:
      config: a complete config.
      directory: where the data are; ``config.data.dir`` by default.

    Raises:
      UserError: there are no converted data, or they lack a task.
    """
    names = [name.strip() for name in config.data.tasks.split(",") if name.strip()]
    return manifests.load(directory or config.data.dir).of_tasks(names)


def of_task(value: Any, task: str, default: Any) -> Any:
    """A task's value of a key that may be given by task; ``default`` for tasks that a mapping does not name."""
    return value.get(task, default) if isinstance(value, Mapping | ml_collections.ConfigDict) else value


def applying(values: Mapping[str, Any], model: str, module: str = "") -> dict[str, Any]:
    """Those values of ``{"model.dim": 8, ...}`` whose keys a model of this name has."""
    own = base.models(module)[model].keys
    return {path: value for path, value in values.items() if path in KEYS or path.removeprefix("model.") in own}
