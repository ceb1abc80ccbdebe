"""What ``stem-train --help`` prints about the config's keys."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from stem_tf.configs.base import Key, keys, models


def describe(module: str = "") -> str:
    """All keys with their defaults, and the models by name. Imports TensorFlow.

    Args:
      module: a module that registers models of your own.

    Raises:
      UserError: see :func:`stem_tf.configs.base.models`.
    """
    known = models(module)
    rows = []
    for path, key in keys(module).items():
        takers = [name for name, model in known.items() if path.removeprefix("model.") in model.keys]
        rows.append((f"{path}={_shown(key.default)}", _help(key, takers if len(takers) < len(known) / 2 else [])))
    named = [(name, model.what) for name, model in known.items()]
    return "\n".join([*_columns(rows), "\nModels, --config.model.name=NAME:", *_columns(named)])


def _help(key: Key, only: Sequence[str]) -> str:
    words = [key.help]
    if key.by and key.default != "":
        words.append(f"one value, or by {key.by}: NAME:VALUE,NAME:VALUE")
    if only:
        words.append(f"only for {', '.join(only)}")
    if key.only_if is not None:
        other, allowed = key.only_if
        words.append(f"only for {other}={', '.join(allowed)}")
    if key.only_with:
        words.append(f"only with {key.only_with}")
    return "; ".join(words)


def _columns(rows: Sequence[tuple[str, str]], wide: int = 118) -> list[str]:
    """Two columns as lines of text, the second one wrapped."""
    width = max(len(first) for first, _ in rows)
    lines = []
    for first, second in rows:
        start, *rest = textwrap.wrap(second, wide - width - 4)
        lines += [f"  {first:<{width}}  {start}", *(f"{'':{width + 4}}{line}" for line in rest)]
    return lines


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
