"""Which models a server holds: one from flags, or several from a ModelServerConfig of TensorFlow Serving."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tensorflow_serving.config import model_server_config_pb2

from export.server.policy import LATEST, Policy
from stem_util import stores
from stem_util.errors import UserError

PLATFORM = "tensorflow"
_LARGEST_FILE = 16 << 20


class ConfigError(ValueError):
    """A configuration that cannot be served; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to serve.

    Attributes:
      name: that requests ask for; None: the name in its export.
      base_path: the directory of its versions, or their URI.
      policy: which of them serve.
      labels: version numbers by the names that requests may give instead.
    """

    name: str | None
    base_path: Path | str
    policy: Policy = LATEST
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)


def read(path: Path) -> str:
    """The text of a --model_config_file.

    Raises:
      ConfigError: there is no such file, or it is not text.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"it cannot be read: {error.strerror}") from error
    if len(text) > _LARGEST_FILE:
        raise ConfigError(f"it has more than {_LARGEST_FILE:,} bytes")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error


def parse(text: str) -> model_server_config_pb2.ModelServerConfig:
    """A ModelServerConfig in protobuf's text format.

    Raises:
      ConfigError: the text is not one.
    """
    try:
        return text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    except (text_format.ParseError, DecodeError, ValueError, RecursionError) as error:
        place = re.match(r"(\d+):(\d+) : (.*)", str(error), re.DOTALL)
        why = f"line {place[1]}, column {place[2]}: {place[3]}" if place else str(error) or type(error).__name__
        raise ConfigError(" ".join(why.split())[:500]) from error


def models(config: model_server_config_pb2.ModelServerConfig) -> list[Model]:
    """The models of a list.

    Raises:
      ConfigError: it is not a list of models, or one of them is wrong.
    """
    if config.WhichOneof("config") != "model_config_list":
        raise ConfigError("it holds no model_config_list")
    listed = [_model(entry) for entry in config.model_config_list.config]
    if not listed:
        raise ConfigError("it lists no model")
    names: set[str | None] = set()
    for model in listed:
        if model.name in names:
            raise ConfigError(f"Illegal to list model {model.name} multiple times in config list")
        names.add(model.name)
    return listed


def remarks(config: model_server_config_pb2.ModelServerConfig) -> list[str]:
    """What the server ignores in a list, one line each."""
    return [
        f"{entry.name}: logging_config is ignored: requests are not logged"
        for entry in config.model_config_list.config
        if entry.HasField("logging_config")
    ]


def _model(entry: model_server_config_pb2.ModelConfig) -> Model:
    name = entry.name
    if not name:
        raise ConfigError("a model has no name")
    if not name.isprintable():
        raise ConfigError(f"a model's name is {name!a}, which does not fit in a line")
    if not entry.base_path.isprintable():
        raise ConfigError(f"{name}: base_path is {entry.base_path!a}, which does not fit in a line")
    path = _base_path(name, entry.base_path)
    if entry.model_platform not in ("", PLATFORM):
        raise ConfigError(f"{name}: model_platform {entry.model_platform!r} is not served, but {PLATFORM!r} is")
    if not entry.model_platform and entry.model_type != model_server_config_pb2.TENSORFLOW:
        raise ConfigError(f"{name}: model_platform is missing; it is {PLATFORM!r}")
    policy, labels = _policy(name, entry), dict(sorted(entry.version_labels.items()))
    for label, version in labels.items():
        if not label:
            raise ConfigError(f"{name}: a label of version {version} is empty")
        if not policy.candidates([version]):
            raise ConfigError(f"{name}: label {label} is for version {version}, which the policy does not serve")
    return Model(name, path, policy, labels)


def _base_path(name: str, given: str) -> Path | str:
    if stores.is_uri(given):
        try:
            return stores.check(given)
        except UserError as error:
            raise ConfigError(f"{name}: base_path {error}") from error
    if not Path(given).is_absolute():
        raise ConfigError(f"Expected model {name} to have an absolute path or URI; got base_path()={given or '(none)'}")
    return Path(given)


def _policy(name: str, entry: model_server_config_pb2.ModelConfig) -> Policy:
    given = entry.model_version_policy
    choice = given.WhichOneof("policy_choice")
    if choice == "all":
        return Policy(latest=None)
    if choice == "specific":
        versions = frozenset(given.specific.versions)
        if not versions or min(versions) < 0:
            raise ConfigError(f"{name}: the policy names no version" if not versions else f"{name}: negative version")
        return Policy(latest=None, specific=versions)
    return Policy(latest=max(1, given.latest.num_versions))
