"""Whatever loading a version raises is that version's failure: it is said and released, and the others go on."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import shutil
import socket
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

from export.server.configuration import Model
from export.server.policy import Policy
from export.server.servable import Servable

RequestFor = Callable[..., predict_pb2.PredictRequest]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that polls see, in the first place."""
    now = [1000.0]
    monkeypatch.setattr("export.server.versions.time.monotonic", lambda: now[0])
    return now


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """In it, open() fails with EMFILE."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RecursionError("too deep"), ZeroDivisionError("x"), AssertionError("a\nb"), StopIteration()],
)
def test_any_exception_of_the_newest_leaves_the_one_before(
    start_server: Any, publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    publish(tmp_path, 1, 1.0)
    publish(tmp_path, 2, 2.0)
    running = start_server(tmp_path)
    load = running.versions._load

    def failing(path: Path, name: str, version: int) -> Servable:
        if version == 2:
            raise error
        return load(path, name, version)

    monkeypatch.setattr(running.versions, "_load", failing)
    running.versions.poll()
    assert running.states() == [(2, "END"), (1, "AVAILABLE")]
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    assert running.reports == [f"version 2 does not load, no version serves: {text}"]


def test_a_version_that_fails_again_and_again_leaves_nothing(
    start_server: Any, publish: Any, tmp_path: Path, request_for: RequestFor, clock: list[float], monkeypatch: Any
) -> None:
    sessions: weakref.WeakSet[tf.compat.v1.Session] = weakref.WeakSet()

    class Session(tf.compat.v1.Session):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            sessions.add(self)

    publish(tmp_path, 1, 1.0)
    running = start_server(tmp_path)
    running.versions.poll()
    publish(tmp_path, 2, 2.0, [request_for(user=[1])])
    monkeypatch.setattr(tf.compat.v1, "Session", Session)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        clock[0] += 61
        running.versions.poll()
        assert not sessions
    assert len(running.reports) == 1 and len(os.listdir("/proc/self/fd")) == descriptors


def test_what_the_next_version_cannot_prepare_is_its_failure(
    start_server: Any, publish: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    publish(tmp_path, 1, 1.0)
    running = start_server(tmp_path)
    running.versions.poll()
    publish(tmp_path, 2, 2.0)
    closed: list[int] = []
    monkeypatch.setattr(Servable, "prepare", lambda self, before: 1 / 0)
    monkeypatch.setattr(Servable, "close", lambda self: closed.append(self.version))
    running.versions.poll()
    assert running.states() == [(2, "END"), (1, "AVAILABLE")] and closed == [2]


def test_unloaded_versions_are_freed(start_server: Any, publish: Any, tmp_path: Path, request_for: RequestFor) -> None:
    publish(tmp_path, 1, 1.0)
    running = start_server(tmp_path)
    running.versions.poll()
    with running.versions.use("ranker", 1) as servable:
        held = [weakref.ref(servable), weakref.ref(servable._session), weakref.ref(servable._session.graph)]
        running.predict(request_for("rank", outputs=("like",), user=[1], item=[[0]]))
        publish(tmp_path, 2, 2.0)
        running.versions.poll()
    del servable
    gc.disable()  # freed by the poll, and not by a collection that happens to run
    try:
        assert held[1]() is not None  # the end of a call frees nothing
        running.versions.poll()
        assert [reference() for reference in held] == [None, None, None]
    finally:
        gc.enable()


def test_directory_that_cannot_be_listed(start_server: Any, publish: Any, tmp_path: Path, monkeypatch: Any) -> None:
    base = tmp_path / "base"
    base.mkdir()
    publish(base, 1, 1.0)
    running = start_server(base)
    running.versions.poll()
    base.rename(tmp_path / "away")
    for _ in range(3):
        running.versions.poll()
    (line,) = running.reports
    assert line == f"cannot list {base} (No such file or directory), which is tried again; version 1 goes on serving"
    (tmp_path / "away").rename(base)
    publish(base, 2, 2.0)
    running.versions.poll()
    with no_descriptors():
        running.versions.poll()
    assert running.reports[1:] == [
        f"cannot list {base} (Too many open files), which is tried again; version 2 goes on serving"
    ]
    assert running.versions.serving == 2


def test_descriptors_that_run_out_while_a_version_loads(
    start_server: Any, publish: Any, tmp_path: Path, monkeypatch: Any, clock: list[float]
) -> None:
    publish(tmp_path, 1, 1.0)
    running = start_server(tmp_path)
    running.versions.poll()
    publish(tmp_path, 2, 2.0)
    load = running.versions._load

    def without(path: Path, name: str, version: int) -> Servable:
        with no_descriptors():
            return load(path, name, version)

    monkeypatch.setattr(running.versions, "_load", without)
    running.versions.poll()
    assert running.states() == [(2, "END"), (1, "AVAILABLE")] and "Too many open files" in running.reports[0]
    monkeypatch.setattr(running.versions, "_load", load)
    clock[0] += 2
    running.versions.poll()
    assert running.versions.serving == 2


def _fifo(version: Path) -> None:
    os.mkfifo(version / "manifest.json")


def _listed_fifo(version: Path) -> None:
    (version / "manifest.json").write_text('{"files": {"pipe": "0"}}')
    os.mkfifo(version / "pipe")


def _socket(version: Path) -> None:
    here = os.getcwd()
    os.chdir(version)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind("manifest.json")
    finally:
        os.chdir(here)


def _directory(version: Path) -> None:
    (version / "manifest.json").mkdir()


def _variables_fifo(version: Path) -> None:
    (version / "variables/variables.index").unlink()
    os.mkfifo(version / "variables/variables.index")


def _link_to_nothing(version: Path) -> None:
    (version / "variables/variables.index").unlink()
    (version / "variables/variables.index").symlink_to("nowhere")


def _manifest(text: str) -> Callable[[Path], object]:
    return lambda version: (version / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_fifo, "manifest.json is not a file"),
        (_listed_fifo, "pipe is not a file"),
        (_socket, "manifest.json is not a file"),
        (lambda version: os.mkfifo(version / "a\nb\udc80"), "'a\\nb\\udc80' is not a file"),
        (lambda version: (version / "saved_model.pb").write_bytes(b"\x0a\xff\x00\x1b["), "saved_model.pb"),
        (_directory, "manifest.json cannot be read: it is not a file"),
        (_variables_fifo, "variables/variables.index is not a file"),
        (_link_to_nothing, "variables/variables.index cannot be read: No such file or directory"),
        (
            _manifest('{"files": {"../1/saved_model.pb": "0"}}'),
            "../1/saved_model.pb is not below the version's directory",
        ),
        (_manifest('{"files": {"/etc/passwd": "0"}}'), "/etc/passwd is not below the version's directory"),
        (_manifest('{"files": {"variables": "0"}}'), "variables cannot be read: it is not a file"),
        (_manifest('{"files": {"a\\u0000": "0"}}'), "is not a manifest: embedded null byte"),
        (_manifest(json.dumps({"files": {"a" * 5000: "0"}})), "cannot be read: File name too long"),
        (_manifest('{"files": {"a\\nb": "0"}}'), "'a\\nb', listed in manifest.json, is missing"),
        (_manifest('{"files": ["a"]}'), "is not a manifest: "),
        (_manifest('{"files": 7}'), "is not a manifest: "),
        (_manifest("[" * 100_000), "is not a manifest: "),
        (_manifest(" " * ((16 << 20) + 1)), "is not a manifest: it has more than 16,777,216 bytes"),
    ],
)
def test_hostile_directories(
    start_server: Any, publish: Any, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    publish(tmp_path, 1, 1.0)
    damage(publish(tmp_path, 2, 2.0))
    running = start_server(tmp_path)
    running.versions.poll()
    assert running.states() == [(2, "END"), (1, "AVAILABLE")]
    (line,) = running.reports
    assert message in line and line.isprintable() and len(line) < 600


def test_a_directory_deleted_while_it_loads(start_server: Any, publish: Any, tmp_path: Path, monkeypatch: Any) -> None:
    publish(tmp_path, 1, 1.0)
    publish(tmp_path, 2, 2.0)
    running = start_server(tmp_path)
    load = tf.compat.v1.saved_model.load

    def deleted(session: Any, tags: Any, path: str) -> Any:
        shutil.rmtree(tmp_path / "2", ignore_errors=True)
        return load(session, tags, path)

    monkeypatch.setattr(tf.compat.v1.saved_model, "load", deleted)
    running.versions.poll()
    assert running.states() == [(2, "END"), (1, "AVAILABLE")] and "version 2 does not load" in running.reports[0]


def test_numbers_that_are_no_versions_or_twice_the_same(start_server: Any, publish: Any, tmp_path: Path) -> None:
    publish(tmp_path, 3, 3.0).rename(tmp_path / "0003")
    publish(tmp_path, 2, 2.0)
    for name in ("99999999999999999999", "9223372036854775808", "02", "9" * 200, "٣"):
        (tmp_path / name).mkdir()
    running = start_server(tmp_path)
    for _ in range(2):
        running.versions.poll()
    assert running.versions.serving == 3 and len(running.reports) == 4
    assert f"{tmp_path}/02 is ignored: {tmp_path}/2 is version 2, too" in running.reports
    assert f"{tmp_path}/99999999999999999999 is not a version: the largest is 9223372036854775807" in running.reports


def test_a_symbolic_link_is_a_version(start_server: Any, publish: Any, tmp_path: Path) -> None:
    for name in ("base", "builds"):
        (tmp_path / name).mkdir()
    publish(tmp_path / "builds", 5, 5.0)
    (tmp_path / "base/1").symlink_to("../builds/5")
    (tmp_path / "base/2").symlink_to("../builds/nothing")
    running = start_server(tmp_path / "base")
    running.versions.poll()
    assert running.versions.serving == 1 and not running.reports


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_permissions(start_server: Any, publish: Any, tmp_path: Path) -> None:
    file = publish(tmp_path, 1, 1.0) / "variables/variables.index"
    file.chmod(0)
    running = start_server(tmp_path)
    running.versions.poll()
    assert running.versions.serving is None and "ermission denied" in running.reports[0]
    file.chmod(0o600)  # is tried at once, although its time and size are as they were
    running.versions.poll()
    assert running.versions.serving == 1


def test_a_bug_of_ours_does_not_end_polling(start_server: Any, publish: Any, tmp_path: Path, monkeypatch: Any) -> None:
    publish(tmp_path, 1, 1.0)
    running = start_server(tmp_path)
    monkeypatch.setattr(running.versions._place, "listing", lambda: 1 / 0)
    running.versions._poll_seconds = 0.01
    running.versions.start()
    running.versions.wait(running.versions._stopping, until_ready=False)
    monkeypatch.undo()
    assert running.versions.wait(running.versions._stopping, until_ready=True)
    (line,) = running.reports
    assert line.startswith("internal error: ") and "ZeroDivisionError" in line


@pytest.mark.parametrize(
    ("policy", "serving", "after"),
    [
        (Policy(), [5], [4]),
        (Policy(latest=2), [4, 5], [2, 4]),
        (Policy(latest=None), [1, 2, 4, 5], [1, 2, 4]),
        (Policy(latest=None, specific=frozenset({1, 3, 5, 9})), [1, 5], [1]),
        (Policy(latest=None, specific=frozenset({5})), [5], [5]),  # the last one is not unloaded
    ],
)
def test_policies(
    start_server: Any, publish: Any, tmp_path: Path, policy: Policy, serving: list[int], after: list[int]
) -> None:
    for version in (1, 2, 4, 5):
        publish(tmp_path, version, float(version))
    (tmp_path / "3").mkdir()
    running = start_server(tmp_path)
    running.versions.model = Model("ranker", tmp_path, policy)
    running.versions.poll()
    assert sorted(running.versions.serving_versions) == serving
    for version in serving:
        with running.versions.use("ranker", version) as servable:
            assert servable.version == version
    with running.versions.use("ranker", None) as servable:
        assert servable.version == serving[-1]
    shutil.rmtree(tmp_path / "5")
    running.versions.poll()
    assert sorted(running.versions.serving_versions) == after
