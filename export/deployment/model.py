"""The facts of an exported version, and the limits of a server that fit it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import publish, published, warmup
from pipelines import manifest as manifests
from pipelines import schema_yaml, tfrecord
from pipelines.schema import Schema
from stem_util import files
from stem_util.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,38}[A-Za-z0-9])?")
"""A model's name, which becomes part of paths, labels and names in a cluster."""
_WAY_OUT = "export the model again"


@dataclass(frozen=True)
class Model:
    """A version of a model.

    Attributes:
      name: the name under which it was exported.
      version: the number of its directory, which servers use, or else the number under which it was exported.
      others: the other versions in the same directory.
      schema: the schema of its data.
      weight_bytes: size of its weights and graph on the disk.
      vocabulary_bytes: size of its vocabularies on the disk.
      inputs: by signature, the shape of each input; None for an axis that a request chooses.
      warm_up: by signature, the size of the first axis of each warm-up request.
    """

    name: str
    version: int
    others: tuple[int, ...]
    schema: Schema
    weight_bytes: int
    vocabulary_bytes: int
    inputs: Mapping[str, Mapping[str, tuple[int | None, ...]]]
    warm_up: Mapping[str, tuple[int, ...]]

    @property
    def ranks(self) -> bool:
        return "rank" in self.inputs

    @property
    def open_lists(self) -> list[str]:
        """Features whose lists may have any length: their inner axis is not fixed."""
        rows = self.inputs.get("serving_default", {})
        return sorted(name for name, shape in rows.items() if None in shape[1:])

    @property
    def most_warm_up_rows(self) -> int:
        return max((size for sizes in self.warm_up.values() for size in sizes), default=1)


def read(directory: Path) -> Model:
    """Reads a version, or the newest one of a directory of versions; does not load it.

    Raises:
      UserError: stem-export did not publish it, it is damaged, or its name does not fit paths and labels.
    """
    path = published.find(directory)
    tree = files.read_json(path / manifests.FILENAME, _WAY_OUT)
    name, version = tree.get("model"), tree.get("version")
    if not isinstance(name, str) or not isinstance(version, int):
        raise UserError(f"{path / manifests.FILENAME} is damaged (it names no model and version); {_WAY_OUT}")
    if not _NAME.fullmatch(name):
        raise UserError(
            f"the model's name {name!r} does not fit paths, labels and a cluster's names (at most 40 letters, digits, "
            "and between them -, _ and dots): export it with another --name"
        )
    if damage := publish.damage(path):
        raise UserError(f"{path}: {damage}; {_WAY_OUT}")
    return Model(
        name,
        int(path.name) if path.name.isascii() and path.name.isdigit() else version,
        tuple(other for other in publish.versions(path.parent) if str(other) != path.name),
        schema_yaml.load(path / "schema.yaml"),
        _bytes(path, "saved_model.pb") + _bytes(path, "variables/*"),
        _bytes(path, "assets/*"),
        signature_inputs(path),
        warm_up_rows(path / warmup.IN_A_VERSION),
    )


def _bytes(path: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in path.glob(pattern))


def signature_inputs(path: Path) -> dict[str, dict[str, tuple[int | None, ...]]]:
    """The shape of each input of each signature of a SavedModel."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    try:
        saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    except DecodeError as error:
        raise UserError(f"{path / 'saved_model.pb'} cannot be read ({error}); {_WAY_OUT}") from None
    graph = next((graph for graph in saved.meta_graphs if "serve" in graph.meta_info_def.tags), None)
    if graph is None:
        raise UserError(f"{path / 'saved_model.pb'} holds nothing to serve; {_WAY_OUT}")
    return {
        key: {name: _shape(info.tensor_shape) for name, info in signature.inputs.items()}
        for key, signature in graph.signature_def.items()
        if signature.inputs
    }


def _shape(proto: Any) -> tuple[int | None, ...]:
    return tuple(dim.size if dim.size >= 0 else None for dim in proto.dim)


def warm_up_rows(path: Path) -> dict[str, tuple[int, ...]]:
    """The size of the first axis of each request of a warm-up file, by signature."""
    sizes: dict[str, list[int]] = {}
    try:
        for request in warmup.read(path):
            first = [tensor.tensor_shape.dim[0].size for tensor in request.inputs.values() if tensor.tensor_shape.dim]
            sizes.setdefault(request.model_spec.signature_name or "serving_default", []).append(max(first, default=0))
    except tfrecord.CorruptRecord as error:
        raise UserError(f"{error}; {_WAY_OUT}") from None
    return {signature: tuple(found) for signature, found in sizes.items()}


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
      cores: cores that the server may use.
      max_rows: rows of the largest call: users of `rank`, rows of `serving_default` and `examples`.
      execution_rows: rows that TensorFlow runs at once if calls are joined; a larger call is split.
      max_calls: calls that run or wait.
    """

    cores: int
    max_rows: int
    execution_rows: int
    max_calls: int

    def __post_init__(self) -> None:
        if self.execution_rows > self.max_rows:
            raise UserError(
                f"--execution_rows={self.execution_rows} is more than --max_rows={self.max_rows}, the largest call"
            )

    @property
    def enqueued_batches(self) -> int:
        """Room for one batch per waiting call, and for the parts of the largest call."""
        return self.max_calls + -(-self.max_rows // self.execution_rows)

    @property
    def grpc_threads(self) -> int:
        """One thread per call, and some for health, status and metadata."""
        return self.max_calls + 4 * self.cores


def limits(model: Model, *, cores: int, max_rows: int | None, execution_rows: int, max_calls: int | None) -> Limits:
    """Limits under which the model loads, since its warm-up requests count as calls.

    Raises:
      UserError: a warm-up request has more than ``max_rows`` rows.
    """
    needed = model.most_warm_up_rows
    if max_rows is not None and max_rows < needed:
        raise UserError(
            f"--max_rows={max_rows}: a warm-up request of {model.name} version {model.version} has {needed} rows, and "
            f"TensorFlow Serving does not load a version whose warm-up fails; give --max_rows={needed} or more"
        )
    return Limits(cores, max_rows or max(1024, needed), execution_rows, max_calls or 64 * cores)
