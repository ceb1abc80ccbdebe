"""Experiments by name or path, overridden key by key and checked. Does not import TensorFlow."""

from __future__ import annotations

import ast
import difflib
import math
import os
import re
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from stem_tf.configs import base
from stem_tf.configs.base import KEYS, Key
from stem_util.errors import UserError, did_you_mean

OVERRIDE = "config_key"
"""The flag that holds overrides; see :func:`override_flags`."""

_HERE = Path(__file__).parent
_LARGEST = math.ldexp(2.0 - 2.0**-23, 127)  # of float32, in which every number is used


def shipped() -> list[str]:
    """Names of the experiments that come with the package."""
    return sorted(path.stem for path in _HERE.glob("*.py") if path.stem not in ("__init__", "base"))


def override_flags(argv: Sequence[str]) -> list[str]:
    """``--config.model.dim=8`` (or ``--config.model.dim 8``) as ``--config_key=model.dim=8``, wherever it stands.

    absl knows no flags whose names depend on another flag's value.
    """
    result: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name = word.lstrip("-")
        if word == "--":
            return [*result, word, *words]
        if not word.startswith("-") or not name.startswith(("config.", "noconfig.")):
            result.append(word)
            continue
        head, equals, value = name.partition("=")
        negation, _, key = head.partition(".")
        if negation == "noconfig":
            value = "false"
        elif not equals and key in KEYS and isinstance(KEYS[key].default, bool):
            value = "true"
        elif not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        result.append(f"--{OVERRIDE}={key}={value}")
    return result


def load(
    experiment: str | os.PathLike[str] | Mapping[str, Any] | ml_collections.ConfigDict,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    leave_out: Callable[[str], None] | None = None,
) -> ml_collections.ConfigDict:
    """The config of an experiment, complete and checked, read-only.

    Args:
      experiment: the name of a shipped one, the path of a Python file with ``get_config()``, or what that returns.
      overrides: ``key=value`` each, later ones win; or values by key, ``{"model.dim": 8}``.
      leave_out: overrides that would do nothing for the chosen model are left out and told to it, a sentence each;
        refused when not given.

    Raises:
      UserError: no such experiment, a file that fails, an unknown key, a value of the wrong type or out of its range.
    """
    if isinstance(experiment, Mapping | ml_collections.ConfigDict):
        values = _known(experiment, "the config")
    else:
        values = _of_path(_find(os.fspath(experiment)))
    texts = dict(override.partition("=")[::2] for override in overrides) if isinstance(overrides, Sequence) else {}
    given = texts if isinstance(overrides, Sequence) else _flat(overrides)
    for key in given:
        if key not in KEYS:
            raise UserError(f"--config.{key}: the config has no such key{_suggestion(key)}")
    given |= {key: _parse(key, text) for key, text in texts.items()}
    if "model.name" in given:
        # Another model on the experiment's data: what the experiment says to a model of its own is not meant for it.
        values = applying(values, given["model.name"])
        units = values.get("model.expert_units", ())
        if any(isinstance(u, tuple | list) for u in units) and not _applies("model.layers", given["model.name"]):
            values["model.expert_units"] = tuple(width for level in units for width in level)  # levels become layers
    if given.get("model.expert", values.get("model.expert")) != values.get("model.expert"):
        values.pop("model.init_std", None)  # it was for the experiment's own expert
    if leave_out is not None:
        given = _that_act(values, given, leave_out)
    return checked(values | given)


def _of_path(path: Path) -> dict[str, Any]:
    """``{"model.dim": 8, ...}`` of what the ``get_config()`` of a Python file returns."""
    try:
        namespace = runpy.run_path(str(path))
        if "get_config" not in namespace:
            raise UserError(f"{path} has no function get_config()")
        config = namespace["get_config"]()
    except UserError:
        raise
    except Exception as error:  # whatever the user's own file raises
        raise UserError(f"{path}: {_of_file(error, path)}") from error
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() should return a ConfigDict, but returned {type(config).__name__}")
    return _known(config, f"{path}: the config")


def _known(config: Any, what: str) -> dict[str, Any]:
    """``{"model.dim": 8, ...}`` of a config, whose keys should all be known."""
    values = _flat(config)
    unknown = [key for key in values if key not in KEYS]
    if unknown:
        raise UserError(f"{what} has no key '{unknown[0]}'{_suggestion(unknown[0])}")
    return values


def _that_act(values: Mapping[str, Any], given: Mapping[str, Any], leave_out: Callable[[str], None]) -> dict[str, Any]:
    """Those of ``given`` that do something, together with ``values`` and each other."""
    kept = dict(given)
    while True:
        typed = _all_typed({**values, **kept})
        idle = next(((path, why[0]) for path in kept if (why := _idle(path, typed))), None)
        if idle is None:
            return kept
        leave_out(f"--config.{idle[0]} is left out: it {idle[1]}")
        del kept[idle[0]]  # which may leave others without use


def checked(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A read-only config of ``{"model.dim": 8, ...}``; keys that are not there have their defaults.

    Raises:
      UserError: a value of the wrong type or out of its range.
    """
    typed = _all_typed(values)
    typed["data.dir"] = os.path.expanduser(typed["data.dir"])
    if not typed["model.init_std"]:
        typed["model.init_std"] = base.NFWFM_INIT_STD if typed["model.expert"] == "nfwfm" else base.INIT_STD
    for path, value in typed.items():
        _check_range(path, KEYS[path], value)
    _check_together(typed)
    return ml_collections.FrozenConfigDict(base.from_flat(typed))


def _all_typed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {path: _typed(path, key, values.get(path, key.default)) for path, key in KEYS.items()}


def flat(config: Any) -> dict[str, Any]:
    """``{"model.dim": 8, ...}`` of a complete config."""
    values = _flat(config)
    return {path: values[path] for path in KEYS}


def check_names(config: Any, tasks: Sequence[str], features: Sequence[str]) -> None:
    """Refuses tasks and features that a config names and its data has not.

    Raises:
      UserError: such a name, or a task without a number of experts.
    """
    for path, key in KEYS.items():
        value = plain(flat(config)[path])
        if key.by == "task" and isinstance(value, dict):
            named = [*value, *(name for name in value.values() if isinstance(name, str))]
            for name in named:
                if name not in tasks:
                    raise UserError(
                        f"config.{path}: no task '{name}'{did_you_mean(name, tasks)} Tasks: {', '.join(tasks)}"
                    )
            missing = [task for task in tasks if task not in value]
            if missing and path == "model.task_experts":
                raise UserError(f"config.{path} says nothing of the task '{missing[0]}'")
    for name in task_features(config) or ():
        if name not in features:
            raise UserError(
                f"config.model.task_features: no feature '{name}'{did_you_mean(name, features)} "
                f"Features: {', '.join(features)}"
            )


def task_features(config: Any) -> tuple[str, ...] | None:
    """The names in ``config.model.task_features``, or None where it is a word (all, none, user, item, schema)."""
    text = config.model.task_features
    return None if text in ("schema", "all", "none", "user", "item") else tuple(text.replace(" ", "").split(","))


def depth(config: Any) -> int:
    """How many levels of experts the model of ``config`` has."""
    return _depth(config.model.name, config.model.layers)


def _depth(model: str, layers: int) -> int:
    return layers or (2 if model in ("ple", "ml_mmoe") else 1)


def best(config: Any) -> str:
    """Which best weights a run keeps: together, own or by_task."""
    if config.train.best == "auto":
        return "own" if config.model.name == "single_task" else "together"
    return str(config.train.best)


def network_keys(model: str) -> list[str]:
    """Names of the keys of ``config.model`` that are arguments of that model's network."""
    of_the_model = {"name", "dim", "init_std", "task_features", "embedding_dropout"}
    names = [path.removeprefix("model.") for path in KEYS if path.startswith("model.") and _applies(path, model)]
    return [name for name in names if name not in of_the_model]


def of_task(value: Any, task: str, default: Any) -> Any:
    """A task's value of a key that may be given by task; ``default`` for tasks that a mapping does not name."""
    return value.get(task, default) if isinstance(value, Mapping | ml_collections.ConfigDict) else value


def applying(values: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Those of ``{"model.dim": 8, ...}`` that do anything for a model of this name."""
    return {path: value for path, value in values.items() if _applies(path, model)}


def _applies(path: str, model: str) -> bool:
    """Whether a key does anything for a model of this name."""
    only_if = KEYS[path].only_if
    return only_if is None or only_if[0] != "model.name" or model in only_if[1]


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"--config={name}: there is no such file")
        return path
    if name in shipped():
        return _HERE / f"{name}.py"
    raise UserError(
        f"--config={name}: no experiment of that name{did_you_mean(name, shipped())} "
        f"Shipped: {', '.join(shipped())}; one of your own is the path of a .py file"
    )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping | ml_collections.ConfigDict) and path not in KEYS:
            values |= _flat(value, f"{path}.")
        else:
            values[path] = plain(value)
    return values


def plain(value: Any) -> Any:
    """A mapping as a dict, whichever kind of mapping it is."""
    return dict(value.items()) if isinstance(value, Mapping | ml_collections.ConfigDict) else value


def _suggestion(key: str) -> str:
    """The closest key: by its last part (``dim`` for ``model.dim``), by its whole path, else by a similar last part."""
    last = key.rpartition(".")[2]
    by_last: dict[str, str] = {}
    for path in KEYS:
        group, _, name = path.rpartition(".")
        by_last.setdefault(name, path)
        by_last.setdefault(group, group)
    if last in by_last:
        return f"; did you mean '{by_last[last]}'?"
    similar = difflib.get_close_matches(last, by_last, n=1)
    return did_you_mean(key, KEYS) or (
        f"; did you mean '{by_last[similar[0]]}'?" if similar else "; stem-train --help lists them"
    )


def _of_file(error: Exception, path: Path) -> str:
    """What a config file raised, in a sentence; a key that the config has not is named with the line that names it."""
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
    where = f"line {line}: " if line else ""
    text = " ".join(str(error).split())
    if "ml_collections" in Path(frames[-1].filename).parts and isinstance(error, AttributeError | KeyError):
        # Of a key that is written, and of one that is read: the name alone, in as many quotes as it came through.
        named = re.search(r"""Key "(\w+)" does not exist|^\W*(\w+)\W*(?:nDid you mean .*)?$""", text)
        if named:
            key = named[1] or named[2]
            return f"{where}the config has no key '{key}'{_suggestion(key)}"
    return f"{where}{type(error).__name__}: {text}"


def _parse(path: str, text: str) -> Any:
    """The value of ``--config.<path>=<text>``."""
    key = KEYS[path]
    if key.by and ":" in text:
        try:
            return _mapping(text, key.default)
        except (ValueError, SyntaxError):
            raise UserError(f"--config.{path} should be {_kind(key)}, but is '{text}'") from None
    default = key.default
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise UserError(f"--config.{path} should be true or false, but is '{text}'")
    try:
        if isinstance(default, tuple):
            read = ast.literal_eval(text.strip() or "()")
            return read if isinstance(read, tuple | list) else (read,)
        return float(text) if isinstance(default, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(f"--config.{path} should be {_kind(key)}, but is '{text}'") from None


def _mapping(text: str, default: Any) -> dict[str, Any]:
    """``{"click": 2, ...}`` of ``click:2,like:1``, or of a Python literal."""
    if text.strip().startswith("{"):
        return dict(ast.literal_eval(text))
    pairs = [part.rpartition(":") for part in text.split(",")]
    return {
        name.strip(): value.strip() if isinstance(default, str) else ast.literal_eval(value) for name, _, value in pairs
    }


def _kind(key: Key) -> str:
    default = key.default
    if isinstance(default, tuple):
        kind = "whole numbers, as in 256,128"
    else:
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[type(default)]
    if key.by_level:
        kind += " (or a tuple of them, one a level)"
    if key.by:
        example = {str: f"{key.by}:{key.by}"}.get(type(default), f"{key.by}:{default}")
        kind = f"{example},..." if isinstance(default, str) else f"{kind}, or {example},..."
    return kind


def _typed(path: str, key: Key, value: Any) -> Any:
    """``value`` as the default's type: a whole number may stand for a number, a list for a tuple."""
    try:
        if key.by and isinstance(plain(value), dict):
            return {str(name): _typed_level(key, v) for name, v in plain(value).items()}
        if key.by and isinstance(key.default, str) and value:
            raise TypeError
        return _typed_level(key, value)
    except (TypeError, OverflowError):
        raise UserError(f"config.{path} should be {_kind(key)}, but is {value!r}") from None


def _typed_level(key: Key, value: Any) -> Any:
    inner = (int, float) if isinstance(key.default, int | float) else (list, tuple)
    if key.by_level and isinstance(value, list | tuple) and value and all(isinstance(v, inner) for v in value):
        return tuple(_typed_one(key.default, v) for v in value)
    return _typed_one(key.default, value)


def _typed_one(default: Any, value: Any) -> Any:
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or any(type(v) is not int for v in value):
            raise TypeError
        return tuple(value)
    if isinstance(default, float):
        if type(value) not in (int, float):
            raise TypeError
        return float(value)
    if type(value) is not type(default):
        raise TypeError
    return value


def _check_range(path: str, key: Key, value: Any) -> None:
    if key.choices and value not in key.choices:
        raise UserError(
            f"config.{path} should be one of {', '.join(key.choices)}, but is '{value}'"
            f"{did_you_mean(value, key.choices)}"
        )
    if isinstance(key.default, str):
        return
    for number in _numbers(value):
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


def _numbers(value: Any) -> list[Any]:
    """All numbers of a value, however deep in mappings and tuples."""
    if isinstance(value, dict):
        value = tuple(value.values())
    return [n for v in value for n in _numbers(v)] if isinstance(value, tuple) else [value]


def _idle(path: str, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why a key that is not at its default does nothing beside the other ``values``, and the way out; else None."""
    key = KEYS[path]
    if values[path] == key.default:
        return None
    if key.only_if is not None and values[key.only_if[0]] not in key.only_if[1]:
        other, allowed = key.only_if
        return f"would do nothing with config.{other}={values[other]}", f"set that to {' or '.join(map(str, allowed))}"
    if path == "model.released_stacking" and _depth(values["model.name"], values["model.layers"]) == 1:
        return "would do nothing with one layer", "set config.model.layers"
    return None


def _check_together(values: Mapping[str, Any]) -> None:
    for path, key in KEYS.items():
        if why := _idle(path, values):
            default = "nothing" if key.default == "" else key.default
            raise UserError(f"config.{path}={values[path]} {why[0]}; {why[1]}, or leave this at {default}")
    if values["optimizer.schedule"] != "constant" and values["optimizer.decay_steps"] == 0:
        raise UserError(f"config.optimizer.decay_steps should be given for the schedule {values['optimizer.schedule']}")
    _check_levels(values)
    kind, colon, task = values["train.monitor"].partition(":")
    if kind not in ("auc", "loss") or (colon and not task):
        raise UserError(
            f"config.train.monitor should be auc, loss, auc:<task> or loss:<task>, but is '{values['train.monitor']}'"
        )


def _check_levels(values: Mapping[str, Any]) -> None:
    """Numbers and widths of experts fit the number of levels."""
    name = values["model.name"]
    levels = _depth(name, values["model.layers"])
    units = values["model.expert_units"]
    if not units or any(isinstance(u, tuple) and not u for u in units):
        raise UserError("config.model.expert_units should name at least one layer, but is ()")
    for path in ("model.experts", "model.task_experts", "model.shared_experts", "model.expert_units"):
        value = values[path]
        for given in value.values() if isinstance(value, dict) else (value,):
            by_level = isinstance(given, tuple) and (path != "model.expert_units" or isinstance(given[0], tuple))
            if by_level and len(given) != levels:
                raise UserError(f"config.{path}={given} names {len(given)} levels, but {name} has {levels}")
    if not sum(_numbers((values["model.task_experts"], values["model.shared_experts"]))):
        raise UserError("config.model.task_experts and config.model.shared_experts are both 0: there are no experts")
    if values["model.expert"] == "fwfm" and len(units[0] if isinstance(units[0], tuple) else units) > 1:
        raise UserError(f"config.model.expert_units should be one width for experts of kind fwfm, but is {units}")
