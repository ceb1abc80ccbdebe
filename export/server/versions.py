"""The versions of one model: the newest ones that load serve. Incomplete, damaged or deleted ones never do.

A poll looks at the integer directories of the base path, newest first, until as many serve as the policy asks for. One
at a URI is copied to this machine first. Each version that loads serves at once. If there is then one too many, it is
unloaded when its last call has ended. So deleting the newest version rolls back to the next one. A version that does
not load changes nothing; it is tried again after longer and longer waits, or at once when its files have changed.

The polling thread loads and unloads. A call only counts itself in and out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import grpc
from tensorflow_serving.apis import get_model_status_pb2

from export import publish
from export.server.configuration import Model
from export.server.directories import Fingerprint, versions_at
from export.server.policy import Policy
from export.server.servable import Servable, free_memory, one_line
from export.server.status import not_found
from stem_util.errors import JobError, UserError

_State = get_model_status_pb2.ModelVersionStatus
_LONGEST_WAIT = 60.0
_UNNAMED = "ranker"
"""The name of a model that neither a flag nor an export names; `stem-export` has the same default."""


@dataclasses.dataclass
class _Failure:
    """The files of a version that does not load, and when to try it again."""

    files: Fingerprint
    message: str
    wait: float
    due: float


@dataclasses.dataclass
class VersionStatus:
    """The state of a version that was seen, with the gRPC code and text of its failure."""

    state: int  # a value of ModelVersionStatus.State
    code: int = grpc.StatusCode.OK.value[0]
    text: str = ""


class Versions:
    """Loads, serves and unloads the versions of one model.

    Args:
      model: its base path, whose integer directories are versions, and which of them serve. If it has no name, it gets
        the name in the first version that loads, or else in the newest that has one.
      load: loads a version to serve under a name. Any exception is that version's failure.
      poll_seconds: time between two looks at the directory.
      report: called with the model's name and a line for the operator when a version fails or is gone.
      on_serving: called when a version begins to serve, with it, the latest version before it and the seconds that
        loading took.
    """

    def __init__(
        self,
        model: Model,
        load: Callable[[Path, str, int], Servable],
        *,
        poll_seconds: float,
        report: Callable[[str, str], None],
        on_serving: Callable[[Servable, int | None, float], None],
    ) -> None:
        self.model, self.name, self._load = model, model.name, load
        self._place = versions_at(model.base_path)
        self._poll_seconds, self._on_serving = poll_seconds, on_serving
        self._report = lambda line: report(self.label, line)
        self._lock = threading.Lock()
        self._serving: dict[int, Servable] = {}
        self._calls: dict[Servable, int] = {}  # of those that serve, and of those to unload
        self._statuses: dict[int, VersionStatus] = {}
        self._failures: dict[int, _Failure] = {}
        self._said: set[str] = set()
        self._other_names: set[str] = set()
        self._tried, self._ready = threading.Event(), threading.Event()
        self._stopping, self._wake = threading.Event(), threading.Event()
        self._due = 0.0  # the time of the next poll
        self._thread = threading.Thread(target=self._watch, name="versions", daemon=True)

    def start(self) -> None:
        """Polls in a thread of its own."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Stops serving; each version is unloaded when its last call has ended, and then the thread ends.

        Returns:
          False if a load or a call was still running after ``timeout`` seconds.
        """
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is None:
            self._retire(self.serving_versions)
            self._unload_idle()
            return not self._calls
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def configure(self, model: Model) -> None:
        """Changes policy and labels to those of ``model``, with the same name and base path; see :meth:`wait`."""
        self.model, self.name = model, model.name
        self._tried = threading.Event()  # after the model: a poll takes them in the other order
        self._due = 0.0
        self._wake.set()

    @contextlib.contextmanager
    def use(self, name: str, version: int | None) -> Iterator[Servable]:
        """The servable of ``version`` (None: the latest that serves), held for the length of a call.

        Raises:
          StatusError: that version does not serve.
        """
        with self._lock:
            servable = self._serving.get(max(self._serving, default=0) if version is None else version)
            if servable is None:
                asked = f"Latest({name})" if version is None else f"Specific({name}, {version})"
                raise not_found(f"Servable not found for request: {asked}")
            self._calls[servable] += 1
        try:
            yield servable
        finally:
            with self._lock:
                self._calls[servable] -= 1
                last = not self._calls[servable] and self._serving.get(servable.version) is not servable
            if last:
                self._wake.set()

    def statuses(self) -> dict[int, VersionStatus]:
        """Every version that was ever seen, newest first."""
        with self._lock:
            return {version: dataclasses.replace(self._statuses[version]) for version in sorted(self._statuses)[::-1]}

    @property
    def serving(self) -> int | None:
        """The latest version that serves."""
        return max(self.serving_versions, default=None)

    @property
    def serving_versions(self) -> list[int]:
        """The versions that serve."""
        with self._lock:
            return list(self._serving)

    @property
    def label(self) -> str:
        """The model in messages."""
        return self.name or str(self.model.base_path)

    def wait(self, stopping: threading.Event, *, until_ready: bool, seconds: float = math.inf) -> bool:
        """Waits until every version was tried once or, with ``until_ready``, until one serves; True if one serves."""
        end = time.monotonic() + seconds
        done = self._ready if until_ready else self._tried
        while not done.wait(0.05) and time.monotonic() < end:
            if stopping.is_set() or self._stopping.is_set():
                break
        return self._ready.is_set()

    def poll(self) -> None:
        """Reads the directory once, and loads and unloads versions."""
        tried, model = self._tried, self.model
        self._unload_idle()
        said: set[str] = set()
        try:
            listing = self._place.listing()
        except (OSError, UserError, JobError) as error:
            # The disk or store may be away for a moment, or descriptors may have run out: the versions are still there.
            why = error.strerror if isinstance(error, OSError) else error
            said.add(f"cannot list {model.base_path} ({why}), which is tried again; {self._goes_on()}")
        else:
            said.update(listing.ignored)
            for version in sorted((model.policy.specific or frozenset()) - listing.versions.keys()):
                said.add(f"version {version} is to be served, but {model.base_path} does not hold it")
            for version in [version for version in self._failures if version not in listing.versions]:
                del self._failures[version]
            kept = self._keep(listing.versions, model.policy)
            if self._stopping.is_set():
                return
            if kept:
                self._retire([version for version in self.serving_versions if version not in kept])
            elif self._serving:
                said.add(self._orphans(listing.versions))
        for line in sorted(said - self._said):
            self._report(line)
        self._said = said
        self._unload_idle()
        tried.set()

    def _watch(self) -> None:
        said = ""
        while True:
            self._wake.clear()
            if self._stopping.is_set():
                break
            try:
                if time.monotonic() < self._due:
                    self._unload_idle()
                else:
                    self._due = time.monotonic() + self._poll_seconds
                    self.poll()
            except Exception:
                # A bug in our code must end neither serving nor polling.
                text = traceback.format_exc()
                if text != said:
                    self._report(f"internal error: {text}")
                said = text
                self._tried.set()
            self._wake.wait(max(0.0, self._due - time.monotonic()))
        self._retire(self.serving_versions)
        while self._calls:
            self._wake.clear()
            self._unload_idle()
            self._wake.wait(self._poll_seconds)

    def _keep(self, found: dict[int, Path], policy: Policy) -> list[int]:
        """Loads missing versions; returns those that should go on serving."""
        kept: list[int] = []
        for version in policy.candidates(found):
            if len(kept) == policy.latest or self._stopping.is_set():
                break
            if version in self._serving or self._try(version, found[version]):
                kept.append(version)
        return kept

    def _try(self, version: int, path: Path) -> bool:
        """Loads a version unless it failed a short time ago; True if it serves now."""
        files, failure = self._place.fingerprint(path), self._failures.get(version)
        if failure is not None and failure.files == files and time.monotonic() < failure.due:
            return False
        self._set(version, _State.LOADING)
        start = time.monotonic()
        if message := self._load_and_serve(version, path, start):
            free_memory()
            self._failed(version, files, message)
            return False
        self._failures.pop(version, None)
        return True

    def _load_and_serve(self, version: int, path: Path, start: float) -> str:
        """Loads a version; returns why it does not load, or "" if it serves now."""
        before, servable = self.serving, None
        try:
            self._place.fetch(path)
            name = self.name or self._name_of(path)
            servable = self._load(path, name, version)
            if before is not None:
                servable.prepare(self._serving[before])
        except Exception as error:
            # Any exception is this version's failure, and the others go on.
            if servable is not None:
                servable.close()
            return one_line(error)
        self.name = name
        self._compare_names(version, path)
        with self._lock:
            self._calls[servable] = 0
            self._serving[version] = servable
            self._statuses[version] = VersionStatus(_State.AVAILABLE)
        self._ready.set()
        self._on_serving(servable, before, time.monotonic() - start)
        return ""

    def _name_of(self, path: Path) -> str:
        """The name in the version's manifest, or else in the newest version that has one."""
        found = self._place.listing().versions
        paths = (path, *(found[version] for version in self.model.policy.candidates(found)))
        return next(filter(None, map(publish.model_of, paths)), _UNNAMED)

    def _compare_names(self, version: int, path: Path) -> None:
        other = publish.model_of(path)
        if other not in ("", self.name) and other not in self._other_names:
            self._other_names.add(other)
            self._report(f"version {version} was exported as {other!r}, and is served as {self.name!r}")

    def _failed(self, version: int, files: Fingerprint, message: str) -> None:
        last = self._failures.get(version)
        same = last is not None and last.files == files
        wait = min(_LONGEST_WAIT, last.wait * 2) if last is not None and same else max(self._poll_seconds, 1.0)
        self._failures[version] = _Failure(files, message, wait, time.monotonic() + wait)
        self._set(version, _State.END, grpc.StatusCode.UNKNOWN.value[0], message)
        if last is None or last.message != message:
            self._report(f"version {version} does not load, {self._goes_on()}: {message}")

    def _goes_on(self) -> str:
        return "no version serves" if self.serving is None else f"version {self.serving} goes on serving"

    def _orphans(self, found: Collection[int]) -> str:
        what = "is not among those asked for" if self.serving in found else "was deleted"
        return f"version {self.serving} {what} and no other one loads: it goes on serving from memory"

    def _retire(self, versions: Iterable[int]) -> None:
        """Takes versions out of service for new calls."""
        with self._lock:
            for version in versions:
                del self._serving[version]
                self._statuses[version] = VersionStatus(_State.UNLOADING)

    def _unload_idle(self) -> None:
        """Unloads versions that no longer serve and have no calls."""
        with self._lock:
            idle = [x for x, calls in self._calls.items() if not calls and self._serving.get(x.version) is not x]
            for servable in idle:
                del self._calls[servable]
        if not idle:
            return
        while idle:
            servable = idle.pop()
            servable.close()
            with self._lock:
                if self._statuses[servable.version].state == _State.UNLOADING:
                    self._statuses[servable.version] = VersionStatus(_State.END)
        del servable
        free_memory()

    def _set(self, version: int, state: int, code: int = 0, text: str = "") -> None:
        with self._lock:
            self._statuses[version] = VersionStatus(state, code, text)
