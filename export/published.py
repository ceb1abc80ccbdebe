"""Loads a version that `export.exporter` published as services load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from export import publish
from pipelines import manifest as manifests
from pipelines import outputs, schema_yaml
from stem_util import files
from stem_util.errors import JobError, UserError, message

Arrays = Mapping[str, np.ndarray]
Call = Callable[[Arrays], dict[str, np.ndarray]]


def find(directory: Path) -> Path:
    """Returns ``directory`` if it is a version, else the newest version in it.

    Raises:
      UserError: it is no version and holds none, or was not published by `export.exporter`.
    """
    if not directory.is_dir():
        raise UserError(f"--model={directory}: no such directory")
    version = publish.version_at(directory)
    if version is None:
        raise UserError(
            f"--model={directory} holds no exported model: neither {publish.GRAPH} nor a version (a directory with "
            "a number for a name), as stem-export publishes them"
        )
    for name in (publish.GRAPH, "schema.yaml", manifests.FILENAME):
        if not (version / name).exists():
            raise UserError(f"--model: {version / name} is missing; models are exported by stem-export")
    return version


class Published:
    """One published version.

    Args:
      directory: the version, or the directory above it, as given to ``--model``.

    Attributes:
      directory: the version's directory.
      schema: the schema of the data that the model was trained on.
      tasks: names of the tasks.
      outputs: names of the outputs that are made of their scores.

    Raises:
      UserError: as in `find`; or the files are not those that were published (the server refuses such a version, too).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = find(directory)
        if why := publish.damage(self.directory):
            raise UserError(f"--model={self.directory} is not the version that was published: {why}")
        self.schema = schema_yaml.load(self.directory / "schema.yaml")
        self.tasks = self.schema.task_names
        self.outputs = tuple(output.name for output in outputs.of(self.schema))
        self._calls: dict[str, Call] = {}

    @property
    def name(self) -> str:
        """The model and its version, in words."""
        tree = self.manifest()
        return f"{tree['model']} version {tree['version']}"

    @property
    def ranks(self) -> bool:
        """Whether it has the signature ``rank``."""
        return not self.manifest()["why_no_rank"]

    def signature(self, name: str) -> Call:
        """Returns a function from tensors by feature to scores by task and output; it raises JobError if the model
        fails.

        Raises:
          UserError: the model has no such signature.
          JobError: the model cannot be loaded.
        """
        if name == "rank" and (why := self.manifest()["why_no_rank"]):
            raise UserError(f"{self.directory} does not rank: {why}")
        import tensorflow as tf

        if not self._calls:
            # On the CPU, so that scores are the server's: a GPU would round float32 products to TF32.
            tf.config.experimental.enable_tensor_float_32_execution(False)
            for gpu in tf.config.get_visible_devices("GPU"):
                tf.config.experimental.set_memory_growth(gpu, True)
            try:
                with files.literal(self.directory) as path:
                    self._calls = _load(path)
            # A damaged directory raises all kinds of errors: OpError, OSError, ValueError, DecodeError ...
            except Exception as error:
                raise JobError(f"{self.directory} cannot be loaded: {_first_line(error)}") from error
        call = self._calls[name]

        def guarded(arrays: Arrays) -> dict[str, np.ndarray]:
            try:
                return call(arrays)
            except tf.errors.OpError as error:
                raise JobError(f"{self.directory} failed: {message(error)}") from error

        return guarded

    def manifest(self) -> dict[str, Any]:
        """Its manifest.json.

        Raises:
          UserError: it is damaged.
        """
        path, way_out = self.directory / manifests.FILENAME, "export the model again"
        tree = files.read_json(path, way_out)
        for key in ("model", "version", "why_no_rank"):
            if key not in tree:
                raise UserError(f"{path} is damaged (it has no '{key}'); {way_out}")
        return tree


def _load(directory: str) -> dict[str, Call]:
    """The signatures of a SavedModel by name, as functions of arrays that run in a TF1 session, as in services."""
    import tensorflow as tf

    session = tf.compat.v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        meta = tf.compat.v1.saved_model.load(session, [tf.saved_model.SERVING], directory)

    def call(signature: Any) -> Call:
        names = list(signature.inputs)
        run = session.make_callable(
            {task: info.name for task, info in signature.outputs.items()},
            [signature.inputs[name].name for name in names],
        )
        return lambda arrays: run(*(arrays[name] for name in names))

    return {key: call(signature) for key, signature in meta.signature_def.items() if signature.inputs}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
