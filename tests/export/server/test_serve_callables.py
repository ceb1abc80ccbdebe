"""What runs a signature is built once for each set of outputs, and before the version that needs it takes over."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorflow_serving.apis import predict_pb2

from export.server import callables
from export.server.callables import Callables, Outputs, Run

RequestFor = Callable[..., predict_pb2.PredictRequest]


class Builds:
    """Counts builds; ``gate`` holds up those of ``held``."""

    def __init__(self, held: Outputs = ()) -> None:
        self.built: list[Outputs] = []
        self.gate, self._held = threading.Event(), held

    def __call__(self, outputs: Outputs) -> Run:
        self.built.append(outputs)
        if outputs == self._held:
            assert self.gate.wait(20)
        return lambda arrays: dict.fromkeys(outputs, arrays[0])


def test_one_build_for_all_who_ask_and_others_are_not_held_up() -> None:
    builds = Builds(held=("a",))
    kept = Callables(builds, ("a", "b"))
    with futures.ThreadPoolExecutor(9) as pool:
        waiting = [pool.submit(kept, ("a",)) for _ in range(8)]
        assert kept(("b",))([np.ones(1)]).keys() == {"b"}
        assert not any(future.done() for future in waiting)
        builds.gate.set()
        assert len({future.result() for future in waiting}) == 1
    assert sorted(builds.built) == [("a",), ("b",)]


def test_a_build_that_fails_is_tried_again() -> None:
    errors = [MemoryError("no")]

    def build(outputs: Outputs) -> Run:
        if errors:
            raise errors.pop()
        return lambda arrays: {}

    kept = Callables(build, ("a",))
    with pytest.raises(MemoryError):
        kept(("a",))
    assert not kept.recent() and kept(("a",))([]) == {}


def test_clients_that_ask_for_ever_new_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("export.server.callables.time.monotonic", lambda: now)
    everything = tuple("abcdefgh")
    sets = [subset for size in range(1, 8) for subset in itertools.combinations(everything, size)]
    builds = Builds()
    kept = Callables(builds, everything)
    kept(everything)
    for subset in sets:
        assert tuple(kept(subset)([np.ones(1)])) == subset
    assert len(builds.built) == callables.LIMIT
    now += callables.IN_USE_SECONDS + 1
    kept(sets[0])
    kept(sets[-1])  # has room now: the place of what was not asked for any more
    kept(sets[1])
    assert builds.built[callables.LIMIT :] == [sets[-1], sets[1]] and len(kept.recent()) == callables.LIMIT


def test_the_next_version_builds_what_is_asked_for_before_it_takes_over(
    start_server: Any, publish: Any, tmp_path: Path, request_for: RequestFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1)
    running = start_server(tmp_path)
    running.versions.poll()
    running.predict(request_for("rank", outputs=("like",), user=[1], item=[[0]]))
    for version in (2, 3):  # asked of version 1 only: handed on by 2
        publish(tmp_path, version)
        running.versions.poll()
    with running.versions.use("ranker", 3) as servable:
        kept = {key: signature._callable.recent().keys() for key, signature in servable._signatures.items()}
        assert kept["rank"] == {("click", "like"), ("like",)} and kept["examples"] == {("click", "like")}
        monkeypatch.setattr(servable._signatures["rank"]._callable, "_build", None)  # nothing is built any more
    assert running.predict(request_for("rank", outputs=("like",), user=[1], item=[[0]]))["like"] == [[2]]


def test_outputs_that_the_next_version_lacks() -> None:
    before, after = Callables(Builds(), ("a", "b")), Callables(builds := Builds(), ("b", "c"))
    for outputs in [("a",), ("b",), ("a", "b")]:
        before(outputs)
    after.prepare(before.recent())
    assert builds.built == [("b",)] and after.recent() == {("b",): before.recent()[("b",)]}
