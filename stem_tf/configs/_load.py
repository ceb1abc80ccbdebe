"""Finds an experiment, and applies the overrides of a command line.

Not ml_collections.config_flags: it reads sys.argv alone (no --flagfile), takes no mappings by task or table, and its
messages name neither the closest key nor the range.
"""

from __future__ import annotations

import difflib
import os
import re
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from stem_tf.configs import base
from stem_tf.configs._check import all_typed, check_range, checked, idle, module_of
from stem_tf.configs._parse import parse
from stem_tf.configs._read import applying
from stem_tf.configs.base import KEYS, Key
from stem_util.errors import UserError, did_you_mean

OVERRIDE = "config_key"
"""The flag that holds overrides; see :func:`override_flags`."""

_HERE = Path(__file__).parent


def shipped() -> list[str]:
    """Names of the experiments that come with the package."""
    return sorted(path.stem for path in _HERE.glob("[!_]*.py") if path.stem != "base")


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
        negation, _, override = name.partition(".")
        if negation == "noconfig":
            override = f"{override.partition('=')[0]}=false"
        elif "=" not in override and words and not words[0].startswith("--"):
            override = f"{override}={words.pop(0)}"
        result.append(f"--{OVERRIDE}={override}")
    return result


def load(
    experiment: str | os.PathLike[str] | Mapping[str, Any] | ml_collections.ConfigDict,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    leave_out: Callable[[str], None] | None = None,
) -> ml_collections.ConfigDict:
    """The config of an experiment, complete and checked, read-only.

    Args:
      experiment: the name of a shipped one, the path of a Python file with ``get_config()``, or what that returns.
      overrides: ``key=value`` each, or ``key`` alone to switch it on, later ones win; or values by key,
        ``{"model.dim": 8}``.
      leave_out: called with a sentence for each override that would do nothing for the chosen model and is left out;
        without it, such overrides are refused.

    Raises:
      UserError: no such experiment, a file that fails, an unknown key, a value of the wrong type or out of its range.
    """
    if isinstance(experiment, Mapping | ml_collections.ConfigDict):
        config, what = experiment, "the config"
    else:
        path = _find(os.fspath(experiment))
        config, what = _run(path), f"{path}: the config"
    module = _module(config, overrides)
    keys = base.keys(module)
    values = base.to_flat(config, keys)
    unknown = [key for key in values if key not in keys]
    if unknown:
        raise UserError(f"{what} has no key '{unknown[0]}'{_suggestion(unknown[0], keys)}")
    given = _given(overrides, keys)
    if "model.name" in given:
        check_range("model.name", keys["model.name"], given["model.name"])
        values = _for_another_model(values, given["model.name"], module)
    if given.get("model.expert", values.get("model.expert")) != values.get("model.expert"):
        values.pop("model.init_std", None)  # it was for the experiment's own expert
    if leave_out is not None:
        given = _that_act(keys, values, given, leave_out)
    return checked(values | given)


def _module(config: Any, overrides: Sequence[str] | Mapping[str, Any]) -> str:
    """The module of the user's own models. It is read before all other keys, because it adds keys."""
    known = {"model.module": KEYS["model.module"]}
    return module_of(base.to_flat(config, known) | _given(overrides, known, others=True))


def _given(
    overrides: Sequence[str] | Mapping[str, Any], keys: Mapping[str, Key], others: bool = False
) -> dict[str, Any]:
    """The values that ``overrides`` give to ``keys``; ``others`` ignores unknown keys instead of refusing them."""
    if isinstance(overrides, Sequence):
        texts = {key: text if equals else None for key, equals, text in (o.partition("=") for o in overrides)}
    else:
        texts = base.to_flat(overrides, keys)
    given = {}
    for key, value in texts.items():
        if key in keys:
            given[key] = parse(key, keys[key], value) if isinstance(overrides, Sequence) else value
        elif not others:
            raise UserError(f"--config.{key}: the config has no such key{_suggestion(key, keys)}")
    return given


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"--config={name}: there is no such file")
        return path
    if name in shipped():
        return _HERE / f"{name}.py"
    raise UserError(
        f"--config={name}: no experiment of that name{did_you_mean(name, shipped()) or '.'} "
        f"Shipped: {', '.join(shipped())}; one of your own is the path of a .py file"
    )


def _run(path: Path) -> Mapping[str, Any] | ml_collections.ConfigDict:
    """What ``get_config()`` of a file returns."""
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
    return config


def _for_another_model(values: Mapping[str, Any], name: str, module: str) -> dict[str, Any]:
    """An experiment's values for another model on its data, without those for keys that the other model lacks."""
    values = applying(values, name, module)
    units = values.get("model.expert_units", ())
    if any(isinstance(u, tuple | list) for u in units) and "layers" not in base.models(module)[name].keys:
        values["model.expert_units"] = tuple(width for level in units for width in level)  # levels become layers
    return values


def _that_act(
    keys: Mapping[str, Key], values: Mapping[str, Any], given: Mapping[str, Any], leave_out: Callable[[str], None]
) -> dict[str, Any]:
    """Those of ``given`` that do something, together with ``values`` and each other."""
    kept = dict(given)
    while True:
        typed = all_typed(keys, {**values, **kept})
        models = base.models(typed["model.module"])
        useless = next(((path, why[0]) for path in kept if (why := idle(path, keys[path], typed, models))), None)
        if useless is None:
            return kept
        leave_out(f"--config.{useless[0]} is left out: it {useless[1]}")
        del kept[useless[0]]  # other overrides may do nothing without this one


def _suggestion(key: str, keys: Mapping[str, Key]) -> str:
    """The closest key: by its last part (``dim`` for ``model.dim``), by its whole path, else by a similar last part."""
    last = key.rpartition(".")[2]
    groups = {group: group for group in (path.rpartition(".")[0] for path in keys)}
    by_last: dict[str, str] = {}
    for path in keys:
        by_last.setdefault(path.rpartition(".")[2], path)
    by_last |= groups
    if last in by_last:
        return f"; did you mean '{by_last[last]}'?"
    similar = difflib.get_close_matches(last, groups, n=1, cutoff=0.8) or difflib.get_close_matches(last, by_last, n=1)
    return did_you_mean(key, keys) or (
        f"; did you mean '{by_last[similar[0]]}'?" if similar else "; stem-train --help lists them"
    )


def _of_file(error: Exception, path: Path) -> str:
    """What a config file raised, in a sentence with the line; for an unknown key it suggests the closest one."""
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
    where = f"line {line}: " if line else ""
    text = " ".join(str(error).split())
    if "ml_collections" in Path(frames[-1].filename).parts and isinstance(error, AttributeError | KeyError):
        # The text says that a written key does not exist, or is only the name of a read key, in any number of quotes.
        named = re.search(r"""Key "(\w+)" does not exist|^\W*(\w+)\W*(?:nDid you mean .*)?$""", text)
        if named:
            key = named[1] or named[2]
            return f"{where}the config has no key '{key}'{_suggestion(key, base.keys())}"
    return f"{where}{type(error).__name__}: {text}"
