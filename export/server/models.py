"""The models of a server by name; finds the version that a request asks for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import grpc
from tensorflow_serving.apis import model_pb2
from tensorflow_serving.config import model_server_config_pb2

from export.server import configuration
from export.server.configuration import ConfigError, Model
from export.server.servable import Servable
from export.server.status import StatusError, invalid_argument, not_found
from export.server.versions import Versions, VersionStatus

_RELOAD_SECONDS = 600.0
"""A list whose models take longer to load is given up, so that one that hangs does not keep the next list out."""


class Models:
    """Models by the name that requests ask for.

    Args:
      models: to serve. A model without a name is the only one.
      make: makes the versions of a model; :meth:`start` starts them.
      report: called with a model's name and a line for the operator.
      reloads: whether :meth:`reload` is offered. Its callers can make this process load anything on its disks.
    """

    def __init__(
        self,
        models: Iterable[Model],
        make: Callable[[Model], Versions],
        report: Callable[[str, str], None],
        *,
        reloads: bool = False,
    ) -> None:
        self._make, self._report, self._reloads = make, report, reloads
        self._served = [make(model) for model in models]
        self._reloading, self._stopping = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Loads the models, each in a thread of its own, and goes on looking for versions."""
        for versions in self._served:
            versions.start()

    def wait(self, stopping: threading.Event, *, until_ready: bool) -> list[Model]:
        """Waits until every model serves a version or, without ``until_ready``, until all versions were tried.

        Returns:
          The models that serve no version; with ``until_ready`` there are some only if ``stopping`` was set.
        """
        while True:
            served = self._served
            missing = [versions.model for versions in served if not versions.wait(stopping, until_ready=until_ready)]
            if served is self._served:
                return missing

    def stop(self, timeout: float) -> bool:
        """Ends polling and unloads. False if calls or loads were still running after ``timeout`` seconds."""
        self._stopping.set()
        return _stop(self._served, timeout)

    def loaded(self) -> dict[str, list[int]]:
        """The versions that serve, by model, newest first."""
        return {each.name: sorted(each.serving_versions, reverse=True) for each in self._served if each.name}

    @contextlib.contextmanager
    def use(self, spec: model_pb2.ModelSpec) -> Iterator[Servable]:
        """The version that ``spec`` asks for, held for the length of a call.

        Raises:
          StatusError: INVALID_ARGUMENT, no name or an unknown label; NOT_FOUND, no such model, or the version does not
            serve.
        """
        if not spec.name:
            raise invalid_argument("ModelSpec has no name specified.")
        with contextlib.ExitStack() as held:
            while True:
                versions = self._find(spec.name)
                version = _version(spec, versions)
                try:
                    if versions is None:
                        asked = f"Latest({spec.name})" if version is None else f"Specific({spec.name}, {version})"
                        raise not_found(f"Servable not found for request: {asked}")
                    servable = held.enter_context(versions.use(spec.name, version))
                    break
                except StatusError:
                    now = self._find(spec.name)
                    if now is versions and _version(spec, now) == version:
                        raise
                    # Between finding and using it, another base path took over or the label moved.
            yield servable

    def statuses(self, name: str) -> dict[int, VersionStatus]:
        """All versions of a model that were ever seen, newest first; none for a model that is not served."""
        versions = self._find(name)
        return {} if versions is None else versions.statuses()

    def reload(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        """Changes to the models that ``config`` lists; returns when they serve.

        Raises:
          StatusError: UNIMPLEMENTED, it is not offered; INVALID_ARGUMENT, it is not a list of models, or a wrong one;
            others as :meth:`replace`. Nothing has changed then.
        """
        if not self._reloads:
            raise StatusError(
                grpc.StatusCode.UNIMPLEMENTED,
                "this server was started with one model; it takes lists of models when it was started with a "
                "--model_config_file",
            )
        if config.WhichOneof("config") != "model_config_list":
            raise invalid_argument(
                "ServerModelConfig type not supported by HandleReloadConfigRequest. "
                "Only ModelConfigList is currently supported"
            )
        try:
            models = configuration.models(config)
        except ConfigError as error:
            raise invalid_argument(str(error)) from error
        self.replace(models)
        for line in configuration.remarks(config):
            self._report("models", line)

    def replace(self, models: Sequence[Model]) -> None:
        """Serves ``models`` instead of the earlier ones; returns when each of them serves.

        New models, and those with another base path, are loaded first. Then the whole list takes effect at once.
        Removed models are unloaded when their last call has ended.

        Raises:
          StatusError: UNKNOWN, one of the new models does not load; FAILED_PRECONDITION, a label is for a version that
            does not serve; UNAVAILABLE, another list is being loaded. Nothing has changed then.
        """
        if not self._reloading.acquire(blocking=False):
            raise StatusError(grpc.StatusCode.UNAVAILABLE, "another list of models is being loaded")
        try:
            self._replace(models)
        finally:
            self._reloading.release()

    def _replace(self, models: Sequence[Model]) -> None:
        kept = [
            (model, versions)
            for model in models
            for versions in self._served
            if (versions.name, versions.model.base_path) == (model.name, model.base_path)
        ]
        for model, versions in kept:
            _check_labels(model, versions)
        added = [self._make(model) for model in models if model not in [model for model, _ in kept]]
        end = time.monotonic() + _RELOAD_SECONDS
        try:
            self._load(added, end)
        except BaseException:
            _stop(added, 0)
            raise
        gone = [versions for versions in self._served if versions not in [versions for _, versions in kept]]
        self._served = [versions for _, versions in kept] + added
        for model, versions in kept:
            versions.configure(model)
        _stop(gone, 0)
        for versions in gone:
            if self._find(versions.name) is None:
                self._report(versions.label, "is served no more")
        for _, versions in kept:
            versions.wait(self._stopping, until_ready=False, seconds=end - time.monotonic())

    def _load(self, added: Sequence[Versions], end: float) -> None:
        for versions in added:
            versions.start()
        ready = [versions.wait(self._stopping, until_ready=False, seconds=end - time.monotonic()) for versions in added]
        failed = [versions for versions, serves in zip(added, ready, strict=True) if not serves]
        if failed:
            reasons = ", ".join(f"{{name: {versions.label}{_reason(versions)}}}" for versions in failed)
            raise StatusError(
                grpc.StatusCode.UNKNOWN, f"{len(failed)} model(s) did not become available: {{{reasons}}}"
            )
        for versions in added:
            _check_labels(versions.model, versions)

    def _find(self, name: str | None) -> Versions | None:
        return next((versions for versions in self._served if versions.name == name), None)


def _version(spec: model_pb2.ModelSpec, versions: Versions | None) -> int | None:
    choice = spec.WhichOneof("version_choice")
    if choice == "version_label":
        if versions is None or spec.version_label not in versions.model.labels:
            raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
        return versions.model.labels[spec.version_label]
    return int(spec.version.value) if choice == "version" else None


def _check_labels(model: Model, versions: Versions) -> None:
    serving = versions.serving_versions
    for version in model.labels.values():
        if version not in serving:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"Request to assign label to version {version} of model {model.name}, "
                "which is not currently available for inference",
            )


def _reason(versions: Versions) -> str:
    for version, status in versions.statuses().items():
        if status.text:
            return f" version: {version} due to error: {status.text}"
    return f" base_path: {versions.model.base_path} holds no version"


def _stop(stopped: Sequence[Versions], timeout: float) -> bool:
    end = time.monotonic() + timeout
    for versions in stopped:
        versions.stop(0)
    return all(versions.stop(max(0.0, end - time.monotonic())) for versions in stopped)
