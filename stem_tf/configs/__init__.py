"""Experiments by name or path, overridden key by key and checked. Does not import TensorFlow."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from pipelines.errors import UserError, did_you_mean
from stem_tf.configs import base
from stem_tf.configs.base import KEYS, Key

OVERRIDE = "config_key"
"""The flag that holds overrides; see :func:`override_flags`."""

_HERE = Path(__file__).parent


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


def load(name: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of an experiment, complete and checked, read-only.

    Args:
      name: a shipped experiment, or the path of a Python file with ``get_config()``.
      overrides: ``key=value`` each, later ones win.

    Raises:
      UserError: no such experiment, a file that fails, an unknown key, a value of the wrong type or out of its range.
    """
    path = _find(name)
    try:
        namespace = runpy.run_path(str(path))
        if "get_config" not in namespace:
            raise UserError(f"{path} has no function get_config()")
        config = namespace["get_config"]()
    except UserError:
        raise
    except Exception as error:  # whatever the user's own file raises
        raise UserError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() should return a ConfigDict, but returned {type(config).__name__}")
    values = _flat(config)
    unknown = [key for key in values if key not in KEYS]
    if unknown:
        raise UserError(f"{path}: the config has no key '{unknown[0]}'{did_you_mean(unknown[0], KEYS)}")
    for override in overrides:
        key, _, text = override.partition("=")
        if key not in KEYS:
            raise UserError(f"--config.{key}: the config has no such key{_suggestion(key)}")
        values[key] = _parse(key, text)
    return checked(values)


def checked(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A read-only config of ``{"model.dim": 8, ...}``; keys that are not there have their defaults.

    Raises:
      UserError: a value of the wrong type or out of its range.
    """
    typed = {path: _typed(path, key, values.get(path, key.default)) for path, key in KEYS.items()}
    for path, value in typed.items():
        _check_range(path, KEYS[path], value)
    _check_together(typed)
    return ml_collections.FrozenConfigDict(base.from_flat(typed))


def flat(config: Any) -> dict[str, Any]:
    """``{"model.dim": 8, ...}`` of a complete config."""
    values = _flat(config)
    return {path: values[path] for path in KEYS}


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
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            values |= _flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def _suggestion(key: str) -> str:
    """The closest key: by its whole path, else by its last part (``dim`` for ``model.dim``)."""
    last = key.rpartition(".")[2]
    same = [path for path in KEYS if path.rpartition(".")[2] == last]
    if same:
        return f"; did you mean '{same[0]}'?"
    return did_you_mean(key, KEYS) or "; stem-train --help lists them"


def _parse(path: str, text: str) -> Any:
    """The value of ``--config.<path>=<text>``."""
    default = KEYS[path].default
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
            text = text.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]").strip(" ,")
            return ast.literal_eval(f"({text},)") if text else ()
        return float(text) if isinstance(default, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(f"--config.{path} should be {_kind(default)}, but is '{text}'") from None


def _kind(default: Any) -> str:
    if isinstance(default, tuple):
        return "whole numbers, as in 256,128"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[type(default)]


def _typed(path: str, key: Key, value: Any) -> Any:
    """``value`` as the default's type: a whole number may stand for a number, a list for a tuple."""
    default = key.default
    if isinstance(default, tuple):
        whole = isinstance(value, list | tuple) and all(type(v) is int for v in value)
        fits, value = whole, tuple(value) if whole else value
    elif isinstance(default, float):
        fits = type(value) in (int, float)
        value = float(value) if fits else value
    else:
        fits = type(value) is type(default)
    if not fits:
        raise UserError(f"config.{path} should be {_kind(default)}, but is {value!r}")
    return value


def _check_range(path: str, key: Key, value: Any) -> None:
    if key.choices and value not in key.choices:
        raise UserError(
            f"config.{path} should be one of {', '.join(key.choices)}, but is '{value}'"
            f"{did_you_mean(value, key.choices)}"
        )
    for number in value if isinstance(value, tuple) else (value,):
        for bound, fits, words in (
            (key.low, lambda low, n: n >= low, "at least"),
            (key.above, lambda above, n: n > above, "more than"),
            (key.high, lambda high, n: n <= high, "at most"),
            (key.below, lambda below, n: n < below, "less than"),
        ):
            if bound is not None and not fits(bound, number):  # NaN fits no bound
                raise UserError(f"config.{path} should be {words} {bound:g}, but is {number}")


def _check_together(values: Mapping[str, Any]) -> None:
    for path, key in KEYS.items():
        if key.only_if is not None and values[path] != key.default:
            other, allowed = key.only_if
            if values[other] not in allowed:
                raise UserError(
                    f"config.{path}={values[path]} would do nothing with config.{other}={values[other]}; "
                    f"set that to {' or '.join(map(str, allowed))}, or leave this at {key.default}"
                )
    if values["optimizer.schedule"] != "constant" and values["optimizer.decay_steps"] == 0:
        raise UserError(f"config.optimizer.decay_steps should be given for the schedule {values['optimizer.schedule']}")
    if values["model.task_experts"] + values["model.shared_experts"] == 0:
        raise UserError("config.model.task_experts and config.model.shared_experts are both 0: there are no experts")
    if not values["model.expert_units"]:
        raise UserError("config.model.expert_units should name at least one layer, but is ()")
    if values["model.released_stacking"] and values["model.layers"] == 1:
        raise UserError("config.model.released_stacking would do nothing with one layer; set config.model.layers")
    kind, colon, task = values["train.monitor"].partition(":")
    if kind not in ("auc", "loss") or (colon and not task):
        raise UserError(
            f"config.train.monitor should be auc, loss, auc:<task> or loss:<task>, but is '{values['train.monitor']}'"
        )
