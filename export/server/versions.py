"""The directory of versions: the newest one that loads serves; what is half there, broken or deleted never does.

A poll looks at the integer directories of the base path, newest first, down to the one that serves. The first that
loads takes over; the one before is unloaded when its last call has ended. So a deleted newest version rolls back to the
next one, and a version that does not load leaves things as they are; it is tried again, ever more seldom, or at once
when its files have changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from tensorflow_serving.apis import get_model_status_pb2

from export.server.directories import fingerprint, version_directories
from export.server.servable import LoadError, Servable
from export.server.status import not_found
from pipelines.errors import JobError

_State = get_model_status_pb2.ModelVersionStatus
_LONGEST_WAIT = 60.0


@dataclasses.dataclass
class _Failure:
    """What a version that does not load looked like, and when to look at it again."""

    files: tuple[tuple[str, int, int], ...]
    message: str
    wait: float
    due: float


@dataclasses.dataclass
class VersionStatus:
    """A version that was seen: its state, and the gRPC code and text of what kept it from serving."""

    state: int  # a value of ModelVersionStatus.State
    code: int = grpc.StatusCode.OK.value[0]
    text: str = ""


class Versions:
    """Loads, serves and unloads the versions of one model.

    Args:
      base_path: the directory whose integer directories are versions.
      load: makes a version ready to serve, or raises LoadError, JobError or OSError.
      poll_seconds: time between two looks at the directory.
      report: called with one line about what an operator should know: a version that fails, or is gone.
      on_serving: called each time a version takes over, with it, the one before and the seconds that loading took.
    """

    def __init__(
        self,
        base_path: Path,
        load: Callable[[Path, int], Servable],
        *,
        poll_seconds: float,
        report: Callable[[str], None],
        on_serving: Callable[[Servable, int | None, float], None],
    ) -> None:
        self._base_path, self._load, self._poll_seconds = base_path, load, poll_seconds
        self._report, self._on_serving = report, on_serving
        self._lock = threading.Lock()
        self._current: Servable | None = None
        self._calls: dict[Servable, int] = {}
        self._statuses: dict[int, VersionStatus] = {}
        self._failures: dict[int, _Failure] = {}
        self._orphan: int | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="versions", daemon=True)

    def start(self) -> None:
        """Polls in a thread of its own."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Ends polling and unloads. False if a load was still running after ``timeout`` seconds."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
        self._switch(None)
        return True

    @contextlib.contextmanager
    def use(self, name: str, version: int | None) -> Iterator[Servable]:
        """The servable of ``version`` (None: the one that serves), held for the length of a call.

        Raises:
          StatusError: that version does not serve.
        """
        with self._lock:
            servable = self._current
            if servable is None or version not in (None, servable.version):
                asked = f"Latest({name})" if version is None else f"Specific({name}, {version})"
                raise not_found(f"Servable not found for request: {asked}")
            self._calls[servable] += 1
        try:
            yield servable
        finally:
            with self._lock:
                self._calls[servable] -= 1
                last = servable is not self._current and not self._calls[servable]
            if last:
                self._unload(servable)

    def statuses(self) -> dict[int, VersionStatus]:
        """Every version that was ever seen, newest first."""
        with self._lock:
            return {version: dataclasses.replace(self._statuses[version]) for version in sorted(self._statuses)[::-1]}

    @property
    def serving(self) -> int | None:
        """The version that serves."""
        current = self._current
        return None if current is None else current.version

    def poll(self) -> None:
        """Looks once at the directory and does what follows from it."""
        try:
            found = version_directories(self._base_path)
        except OSError:
            return  # A file system that is away for a moment says nothing about versions.
        for version in [version for version in self._failures if version not in found]:
            del self._failures[version]
        for version in sorted(found, reverse=True):
            if version == self.serving:
                break
            if self._stopping.is_set() or self._try(version, found[version]):
                break
        self._report_orphan(found)

    def _watch(self) -> None:
        while not self._stopping.is_set():
            try:
                self.poll()
            except Exception:
                # A bug of ours must end neither serving nor the search for versions.
                traceback.print_exc()
            self._stopping.wait(self._poll_seconds)

    def _try(self, version: int, path: Path) -> bool:
        """Loads a version unless it failed a short time ago; True if it serves now."""
        files, failure = fingerprint(path), self._failures.get(version)
        if failure is not None and failure.files == files and time.monotonic() < failure.due:
            return False
        self._set(version, _State.LOADING)
        start = time.monotonic()
        try:
            servable = self._load(path, version)
            if self._current is not None:
                servable.prepare(self._current)
        except (LoadError, JobError, OSError) as error:
            self._failed(version, files, " ".join(str(error).split()))
            return False
        self._failures.pop(version, None)
        before = self.serving
        self._switch(servable)
        self._on_serving(servable, before, time.monotonic() - start)
        return True

    def _failed(self, version: int, files: tuple[tuple[str, int, int], ...], message: str) -> None:
        last = self._failures.get(version)
        same = last is not None and last.files == files
        wait = min(_LONGEST_WAIT, last.wait * 2) if last is not None and same else max(self._poll_seconds, 1.0)
        self._failures[version] = _Failure(files, message, wait, time.monotonic() + wait)
        self._set(version, _State.END, grpc.StatusCode.UNKNOWN.value[0], message)
        if last is None or last.message != message:
            goes_on = "no version serves" if self.serving is None else f"version {self.serving} goes on serving"
            self._report(f"version {version} does not load, {goes_on}: {message}")

    def _report_orphan(self, found: dict[int, Path]) -> None:
        serving = self.serving
        if serving is None or serving in found:
            self._orphan = None
        elif serving != self._orphan:
            self._orphan = serving
            self._report(f"version {serving} was deleted and no other one loads: it goes on serving from memory")

    def _switch(self, servable: Servable | None) -> None:
        """Lets ``servable`` serve from the next call on, and unloads the one before as soon as it is idle."""
        with self._lock:
            before, self._current = self._current, servable
            if servable is not None:
                self._calls[servable] = 0
                self._statuses[servable.version] = VersionStatus(_State.AVAILABLE)
            if before is not None:
                self._statuses[before.version] = VersionStatus(_State.UNLOADING)
            idle = before is not None and not self._calls[before]
        if before is not None and idle:
            self._unload(before)

    def _unload(self, servable: Servable) -> None:
        servable.close()
        with self._lock:
            del self._calls[servable]
            if self._statuses[servable.version].state == _State.UNLOADING:
                self._statuses[servable.version] = VersionStatus(_State.END)

    def _set(self, version: int, state: int, code: int = 0, text: str = "") -> None:
        with self._lock:
            self._statuses[version] = VersionStatus(state, code, text)
