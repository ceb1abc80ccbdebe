"""Reads YAML strictly: repeated keys are errors, scalars mean what they seem to, and errors name the place.

YAML 1.1 reads ``yes`` as a bool, ``010`` as 8, ``10:30`` as 630 and ``1e-3`` as text. Here scalars follow YAML 1.2's
core schema: ``true`` and ``false`` are bools, decimal numbers are numbers, and everything else is text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from stem_util.errors import UserError, did_you_mean

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_FLOAT_STARTS = list("-+.0123456789")
_MAX_SHOWN = 60


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"(?![-+]?0[0-9])" + _FLOAT.pattern), _FLOAT_STARTS)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 would misread (`yes`), and text that only this reader reads as a number (`1e-3`)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FLOAT_STARTS)


def inline(value: Any) -> str:
    """Plain data as YAML on one line (except for line breaks in texts); :func:`parse` reads it back unchanged."""
    # In a list, because yaml.dump adds a document marker after a bare scalar.
    text = yaml.dump([value], Dumper=_Dumper, sort_keys=False, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.strip()[1:-1]


@dataclass(frozen=True)
class Node:
    """A value of the document, and its place for errors.

    Attributes:
      source: the file.
      path: the keys from the root, joined by dots; empty at the root.
      value: the parsed value.
    """

    source: str
    path: str
    value: Any

    def fail(self, message: str) -> NoReturn:
        """Raises a ``UserError`` that names file and path."""
        path = "".join(letter if letter.isprintable() else "\ufffd" for letter in self.path)  # a message is one line
        raise UserError(": ".join(filter(None, [self.source, path, message])))

    def _expected(self, what: str) -> NoReturn:
        self.fail(f"should be {what}; got {shown(self.value)}")

    def child(self, key: str | int) -> Node:
        path = f"{self.path}[{key}]" if isinstance(key, int) else f"{self.path}.{key}".lstrip(".")
        return Node(self.source, path, self.value[key])

    def mapping(self, what: str = "a mapping, one `key: value` per line") -> dict[str, Node]:
        """The children by key."""
        if not isinstance(self.value, dict):
            self._expected(what)
        for key in self.value:
            if not isinstance(key, str):
                self.fail(f"the key {shown(key)} should be text; put it in quotes")
        return {key: self.child(key) for key in self.value}

    def record(self, required: Mapping[str, str], optional: Collection[str] = (), what: str = "") -> dict[str, Node]:
        """The children of a mapping with known keys.

        Args:
          required: keys that must be there, each with a description of its value, for the error.
          optional: keys that may be there.
          what: what the mapping describes, for the error, as in ``a task``.
        """
        allowed = [*required, *optional]
        children = self.mapping(f"a mapping with the keys {', '.join(allowed)}")
        for key in children:
            if key not in allowed:
                self.fail(f"unknown key {key!r}{f' of {what}' if what else ''}{hint(key, allowed)}")
        for key, meaning in required.items():
            if key not in children:
                self.fail(f"the key {key!r} is missing ({meaning})")
        return children

    def text(self) -> str:
        """Non-empty text."""
        if not isinstance(self.value, str):
            self._expected("text (put it in quotes)" if isinstance(self.value, int | float) else "text")
        if not self.value:
            self.fail("should not be empty")
        return self.value

    def choice(self, allowed: Iterable[str]) -> Any:
        """One of ``allowed``."""
        allowed = list(allowed)
        if self.value not in allowed or not isinstance(self.value, str):
            self.fail(
                f"{shown(self.value)} is not allowed{hint(self.value if isinstance(self.value, str) else '', allowed)}"
            )
        return self.value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            self._expected("true or false")
        return self.value

    def integer(self, minimum: int, maximum: int | None = None) -> int:
        most = math.inf if maximum is None else maximum
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not minimum <= self.value <= most:
            self._expected(f"a whole number of at least {minimum}{f', at most {maximum:,}' if maximum else ''}")
        return self.value

    def number(self, minimum: float = -math.inf) -> float:
        """A finite number."""
        value = self.value
        at_least = "" if minimum == -math.inf else f" of at least {minimum:g}"
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < minimum:
            self._expected(f"a finite number{at_least}")
        return float(value)

    def items(self, what: str) -> list[Node]:
        """The elements of a non-empty list."""
        if not isinstance(self.value, list) or not self.value:
            self._expected(what)
        return [self.child(i) for i in range(len(self.value))]


def shown(value: Any) -> str:
    """The value as a person wrote it, cut if it is long, with its type if that may be the mistake."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a bool)"
    text = repr(value)
    if len(text) > _MAX_SHOWN:
        text = text[: _MAX_SHOWN - 3] + "..."
    kinds: dict[type, str] = {dict: " (a mapping)", list: " (a list)", str: " (text)"}
    return text + kinds.get(type(value), "")


def hint(word: str, allowed: Iterable[str]) -> str:
    """The end of an error: the word that was probably meant, and the words that are allowed."""
    allowed = list(allowed)
    close = did_you_mean(word, allowed)
    return f"{close} Allowed: {', '.join(allowed)}" if close else f"; allowed: {', '.join(allowed)}"


def parse(text: str, source: str) -> Node:
    """The root of a YAML document.

    Raises:
      UserError: the text is not YAML or has a key twice; the message names line and column.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise UserError(f"{source}: is empty")
        _refuse_repeated_keys(root, source, "", set())
        return Node(source, "", loader.construct_document(root))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "YAML"
        why = ", ".join(filter(None, [error.context, error.problem]))
        raise UserError(f"{source}: {place}: {why}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: is not YAML: {error}") from error


def _refuse_repeated_keys(node: yaml.Node, source: str, path: str, seen: set[int]) -> None:
    """PyYAML would silently keep the last of equal keys. ``seen`` is needed where an alias contains its own anchor."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, element in enumerate(node.value):
            _refuse_repeated_keys(element, source, f"{path}[{i}]", seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{source}: line {line}, column {key.start_mark.column + 1}: a key should be text")
            here = f"{path}.{key.value}".lstrip(".")
            if key.value in lines:
                raise UserError(f"{source}: {here}: given twice, on lines {lines[key.value]} and {line}; keep one")
            lines[key.value] = line
            _refuse_repeated_keys(value, source, here, seen)
