"""Reads values of config keys, from a command line's text or an experiment's Python, in the key's own type."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

from stem_tf.configs.base import Key, plain
from stem_util.errors import UserError


def parse(path: str, key: Key, text: str | None) -> Any:
    """The value of ``--config.<path>=<text>``; None means ``--config.<path>`` alone, a switch.

    Raises:
      UserError: the text is no value of that key.
    """
    if text is None:
        text = "true" if isinstance(key.default, bool) else ""
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
        kind += " (or a tuple of them, one per level)"
    if key.by:
        kind = f"{key.by}:{key.by},..." if default == "" else f"{kind}, or {key.by}:{default},..."
    return kind


def typed(path: str, key: Key, value: Any) -> Any:
    """``value`` as the default's type: a whole number may be given for a number, a list for a tuple,
    and a numpy scalar for the same in Python.

    Raises:
      UserError: it has another type.
    """
    try:
        if key.by and isinstance(plain(value), dict):
            return {str(name): _typed_level(key, v) for name, v in plain(value).items()}
        if key.by and key.default == "" and value:
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
    if isinstance(value, np.generic):
        value = value.item()
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
