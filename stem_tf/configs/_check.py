"""Checks the values of a config: each by itself, all together, and against the data."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections

from stem_tf.configs import base
from stem_tf.configs._parse import typed
from stem_tf.configs._read import flat, model_of, task_features
from stem_tf.configs.base import KEYS, Key
from stem_util.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from stem_tf.models.registry import Model

_LARGEST = math.ldexp(2.0 - 2.0**-23, 127)  # the largest float32: all numbers are used as float32


def checked(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A read-only config from ``{"model.dim": 8, ...}``; keys that are missing get their defaults.

    Raises:
      UserError: a value of the wrong type or out of its range.
    """
    keys = base.keys(module_of(values))
    values = all_typed(keys, values)
    for path in ("data.dir", "start.run"):
        values[path] = os.path.expanduser(values[path])
    if not values["model.init_std"]:
        values["model.init_std"] = base.NFWFM_INIT_STD if values["model.expert"] == "nfwfm" else base.INIT_STD
    for path, value in values.items():
        check_range(path, keys[path], value)
    _check_together(keys, values)
    return ml_collections.FrozenConfigDict(base.from_flat(values))


def module_of(values: Mapping[str, Any]) -> str:
    """The module of the user's own models that a config names, or ""."""
    return str(typed("model.module", KEYS["model.module"], values.get("model.module", "")))


def all_typed(keys: Mapping[str, Key], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all ``keys`` in their types, with defaults for keys that ``values`` lacks."""
    return {path: typed(path, key, values.get(path, key.default)) for path, key in keys.items()}


def check_names(config: Any, tasks: Sequence[str], features: Sequence[str]) -> None:
    """Refuses tasks and features that a config names and its data lacks.

    Raises:
      UserError: such a name, or a task without a value for a key that the model needs for every task.
    """
    values, own = flat(config), model_of(config).keys
    for path, key in base.keys(config.model.module).items():
        value = values[path]
        if key.by != "task" or not isinstance(value, dict):
            continue
        named = [] if key.choices else [name for name in value.values() if isinstance(name, str)]
        for name in [*value, *named]:
            if name not in tasks:
                raise UserError(
                    f"config.{path}: no task '{name}'{did_you_mean(name, tasks) or '.'} Tasks: {', '.join(tasks)}"
                )
        # Numbers of a loss have defaults for tasks that are not named, those of a model have none.
        missing = [task for task in tasks if task not in value]
        if missing and path.removeprefix("model.") in own and not isinstance(key.default, str):
            raise UserError(f"config.{path} has no value for the task '{missing[0]}'")
    for name in task_features(config) or ():
        if name not in features:
            raise UserError(
                f"config.model.task_features: no feature '{name}'{did_you_mean(name, features) or '.'} "
                f"Features: {', '.join(features)}"
            )


def check_range(path: str, key: Key, value: Any) -> None:
    """Refuses a value outside of its key's choices or bounds.

    Raises:
      UserError: such a value.
    """
    for chosen in (value.values() if isinstance(value, dict) else [value]) if key.choices else ():
        if chosen not in key.choices:
            raise UserError(
                f"config.{path} should be one of {', '.join(key.choices)}, but is '{chosen}'"
                f"{did_you_mean(chosen, key.choices)}"
            )
    if isinstance(key.default, str):
        return
    for number in base.numbers(value):
        for bound, fits, words in (
            (key.low, lambda low, n: n >= low, "at least"),
            (key.above, lambda above, n: n > above, "more than"),
            (key.high, lambda high, n: n <= high, "at most"),
            (key.below, lambda below, n: n < below, "less than"),
        ):
            if bound is not None and not fits(bound, number):  # NaN fits no bound
                raise UserError(f"config.{path} should be {words} {bound:g}, but is {number}")
        if abs(number) > (_LARGEST if isinstance(number, float) else 2**31 - 1):
            kind = "a finite number (float32)" if isinstance(number, float) else "a number of 32 bits"
            raise UserError(f"config.{path} should be {kind}, but is {number}")


def idle(path: str, key: Key, values: Mapping[str, Any], models: Mapping[str, Model]) -> tuple[str, str] | None:
    """Why a key that is not at its default does nothing with the other ``values``, and what to do; else None."""
    if values[path] == key.default:
        return None
    model, own = models[values["model.name"]], path.removeprefix("model.")
    if path not in KEYS and own not in model.keys:
        takers = [name for name, other in models.items() if own in other.keys]
        return f"would do nothing with config.model.name={model.name}", f"set that to {' or '.join(takers)}"
    if key.only_if is not None and not _given(values[key.only_if[0]]) & {*key.only_if[1]}:
        other, allowed = key.only_if
        return f"would do nothing with config.{other}={values[other]}", f"set that to {' or '.join(map(str, allowed))}"
    if key.only_with and not values[key.only_with]:
        return f"would do nothing without config.{key.only_with}", "give that"
    if key.stacked and model.hyperparameters(values).depth == 1:
        return "would do nothing with one layer", "set config.model.layers"
    return None


def _given(value: Any) -> set[Any]:
    """The values of a key that may be given by task."""
    return {*value.values()} if isinstance(value, dict) else {value}


def _check_together(keys: Mapping[str, Key], values: Mapping[str, Any]) -> None:
    models = base.models(values["model.module"])
    for path, key in keys.items():
        if why := idle(path, key, values, models):
            default = "nothing" if key.default == "" else key.default
            raise UserError(f"config.{path}={values[path]} {why[0]}; {why[1]}, or leave this at {default}")
    if values["train.strategy"] == "multi_worker" and values["data.input_format"] == "parquet":
        raise UserError(
            "config.data.input_format=parquet does not go with config.train.strategy=multi_worker: how many rows a part"
            " of the log holds is known only once it is read, and all processes make as many steps; set it to blocks"
        )
    if values["optimizer.schedule"] != "constant" and values["optimizer.decay_steps"] == 0:
        raise UserError(f"config.optimizer.decay_steps should be given for the schedule {values['optimizer.schedule']}")
    model = models[values["model.name"]]
    hyperparameters = model.hyperparameters(values)
    hyperparameters.check()
    for name, key in model.keys.items():
        if key.by_level:
            _check_levels(model, key, f"model.{name}", values[f"model.{name}"], hyperparameters.depth)
    kind, colon, task = values["train.monitor"].partition(":")
    if kind not in ("auc", "loss") or (colon and not task):
        raise UserError(
            f"config.train.monitor should be auc, loss, auc:<task> or loss:<task>, but is '{values['train.monitor']}'"
        )


def _check_levels(model: Model, key: Key, path: str, value: Any, depth: int) -> None:
    """Checks that a key given by level has a value for each of the model's ``depth`` levels."""
    for given in value.values() if isinstance(value, dict) else (value,):
        by_level = isinstance(given, tuple) and (type(key.default) is not tuple or any(type(v) is tuple for v in given))
        if by_level and len(given) != depth:
            raise UserError(f"config.{path}={given} names {len(given)} levels, but {model.name} has {depth}")
