"""The models that a server holds, by name: which version of which one a request asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import grpc
from tensorflow_serving.apis import model_pb2
from tensorflow_serving.config import model_server_config_pb2

from export.server.servable import Servable
from export.server.status import StatusError, invalid_argument, not_found
from export.server.versions import Versions, VersionStatus


class Models:
    """Versions by the name that requests ask for."""

    def __init__(self, versions: Mapping[str, Versions]) -> None:
        self._versions = dict(versions)

    def use(self, spec: model_pb2.ModelSpec) -> contextlib.AbstractContextManager[Servable]:
        """The version that ``spec`` asks for, held for the length of a call.

        Raises:
          StatusError: INVALID_ARGUMENT, no name or an unknown label; NOT_FOUND, no such model, or the version does not
            serve.
        """
        if not spec.name:
            raise invalid_argument("ModelSpec has no name specified.")
        choice = spec.WhichOneof("version_choice")
        if choice == "version_label":
            raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
        version = spec.version.value if choice == "version" else None
        versions = self._versions.get(spec.name)
        if versions is None:
            asked = f"Latest({spec.name})" if version is None else f"Specific({spec.name}, {version})"
            raise not_found(f"Servable not found for request: {asked}")
        return versions.use(spec.name, version)

    def statuses(self, name: str) -> dict[int, VersionStatus]:
        """Every version of a model that was ever seen, newest first; none of a model that is not served."""
        versions = self._versions.get(name)
        return {} if versions is None else versions.statuses()

    def loaded(self) -> dict[str, list[int]]:
        """The versions that serve, by model."""
        return {name: versions.serving_versions for name, versions in self._versions.items()}

    def reload(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        """Serves what ``config`` lists from now on.

        Raises:
          StatusError: it is no list of models, or this server was started with one model.
        """
        if config.WhichOneof("config") != "model_config_list":
            raise invalid_argument(
                "ServerModelConfig type not supported by HandleReloadConfigRequest. "
                "Only ModelConfigList is currently supported"
            )
        raise StatusError(
            grpc.StatusCode.UNIMPLEMENTED,
            "stem-serve serves the one model it was started with; TensorFlow Serving reloads lists of models",
        )
