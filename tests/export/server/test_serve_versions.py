"""Versions come, go, fail and roll back, while calls go on."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tensorflow_serving.apis import get_model_status_pb2, predict_pb2

from export.server.limits import Limits

RequestFor = Callable[..., predict_pb2.PredictRequest]


@pytest.fixture
def ask(request_for: RequestFor) -> Callable[..., float]:
    """``ask(running)``: the score of user 1, item 0, which is the weight of the version that answers."""

    def click(running: Any, version: int | None = None) -> float:
        request = request_for(user=[1], item=[0])
        if version is not None:
            request.model_spec.version.value = version
        return float(running.predict(request)["click"][0])

    return click


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.001)


def error_of(running: Any, version: int) -> tuple[int, str]:
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "ranker"
    request.model_spec.version.value = version
    (status,) = running.model.GetModelStatus(request, timeout=20).model_version_status
    return status.status.error_code, status.status.error_message


def test_before_the_first_version(start_server: Any, publish: Any, tmp_path: Path, ask: Any) -> None:
    running = start_server(tmp_path / "later")
    running.versions.poll()
    assert running.health_of("") == running.health_of("tensorflow.serving.PredictionService") == "NOT_SERVING"
    with pytest.raises(grpc.RpcError, match=r"Servable not found for request: Latest\(ranker\)"):
        ask(running)
    with pytest.raises(grpc.RpcError, match="Could not find any versions of model ranker"):
        running.states()
    (tmp_path / "later").mkdir()
    publish(tmp_path / "later", 3, 3.0)
    running.versions.poll()
    assert running.health_of("") == "SERVING" and ask(running) == 3


def test_newer_versions_take_over_and_a_deleted_one_rolls_back(
    start_server: Any, publish: Any, tmp_path: Path, ask: Any
) -> None:
    publish(tmp_path, 1, 1.0)
    publish(tmp_path, 2, 2.0)
    for name in (".9.partial", "export-5", "5a"):
        (tmp_path / name).mkdir()
    (tmp_path / "77").write_text("a file")
    running = start_server(tmp_path)
    running.versions.poll()
    assert ask(running) == ask(running, 2) == 2
    assert running.states() == [(2, "AVAILABLE")]
    publish(tmp_path, 10, 3.0)
    running.versions.poll()
    assert ask(running) == 3
    assert running.states() == [(10, "AVAILABLE"), (2, "END")]
    with pytest.raises(grpc.RpcError, match=r"Servable not found for request: Specific\(ranker, 2\)"):
        ask(running, 2)
    shutil.rmtree(tmp_path / "10")
    running.versions.poll()
    assert ask(running) == 2
    assert running.states() == [(10, "END"), (2, "AVAILABLE")]
    assert not running.reports


def test_calls_in_flight_end_on_the_version_they_began_on(
    start_server: Any, publish: Any, tmp_path: Path, ask: Any, request_for: RequestFor
) -> None:
    publish(tmp_path, 1, 1.0)
    running = start_server(tmp_path)
    running.versions.poll()
    slow = running.prediction.Predict.future(request_for("slow", turns=np.int64(300_000)), timeout=60)
    wait_for(lambda: list(running.versions._calls.values()) == [1])
    with running.versions.use("ranker", None) as held:
        publish(tmp_path, 2, 2.0)
        running.versions.poll()
        assert ask(running) == 2
        assert running.states() == [(2, "AVAILABLE"), (1, "UNLOADING")]
        response = slow.result()
        assert response.model_spec.version.value == 1 and response.outputs["turn"].int64_val == [300_000]
        signature = held.signature("serving_default")
        feeds = signature.read(request_for(user=[1], item=[0]).inputs, ["click"], Limits())
        assert signature.run(feeds.arrays, feeds.wanted)["click"].tolist() == [1]
        running.versions.poll()
        assert running.states() == [(2, "AVAILABLE"), (1, "UNLOADING")]
    running.versions.poll()
    assert running.states() == [(2, "AVAILABLE"), (1, "END")]


def test_half_a_version_never_serves_and_serves_when_it_is_whole(
    start_server: Any, publish: Any, tmp_path: Path, ask: Any
) -> None:
    publish(tmp_path, 1, 1.0)
    running = start_server(tmp_path)
    running.versions.poll()
    whole = publish(tmp_path, 1000, 2.0).rename(tmp_path / "whole")
    half = tmp_path / "2"
    half.mkdir()
    for _ in range(3):
        running.versions.poll()
    assert running.reports == ["version 2 does not load, version 1 goes on serving: saved_model.pb is missing"]
    shutil.copy(whole / "saved_model.pb", half)
    for _ in range(3):
        running.versions.poll()
    assert ask(running) == 1 and running.health_of("") == "SERVING"
    assert running.states() == [(2, "END"), (1, "AVAILABLE")]
    assert len(running.reports) == 2 and "variables" in running.reports[1]
    code, text = error_of(running, 2)
    assert code != 0 and "variables" in text
    shutil.copytree(whole / "variables", half / "variables")
    running.versions.poll()
    assert ask(running) == 2 and error_of(running, 2) == (0, "")


def test_files_that_differ_from_the_manifest(start_server: Any, publish: Any, tmp_path: Path, ask: Any) -> None:
    publish(tmp_path, 1, 1.0)
    path = publish(tmp_path, 2, 2.0)
    names = ["saved_model.pb", "variables/variables.index", "card.md"]
    digests = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names[:2]} | {"card.md": "0"}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": digests}))
    running = start_server(tmp_path)
    running.versions.poll()
    assert ask(running) == 1
    assert running.reports == [
        "version 2 does not load, no version serves: card.md, listed in manifest.json, is missing"
    ]
    (path / "card.md").write_text("# other")
    running.versions.poll()
    assert ask(running) == 1 and "card.md is not the file of manifest.json" in running.reports[1]
    digests["card.md"] = hashlib.sha256(b"# other").hexdigest()
    (path / "manifest.json").write_text("{")
    running.versions.poll()
    assert ask(running) == 1 and "manifest.json is not a manifest" in running.reports[2]
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": digests}))
    running.versions.poll()
    assert ask(running) == 2


def test_warm_up_is_a_gate(start_server: Any, publish: Any, tmp_path: Path, ask: Any, request_for: RequestFor) -> None:
    good, bad = request_for("rank", user=[1], item=[[1, 2]]), request_for("rank", user=[1])
    loaded = publish(tmp_path, 1, 1.0, [good, good])
    running = start_server(tmp_path)
    running.versions.poll()
    assert ask(running) == 1
    publish(tmp_path, 2, 2.0, [good, bad])
    running.versions.poll()
    assert ask(running) == 1
    (report,) = running.reports
    assert "warmup_requests, record 2: input size does not match signature: 1!=2" in report
    records = tmp_path / "2/assets.extra/tf_serving_warmup_requests"
    records.write_bytes((loaded / "assets.extra/tf_serving_warmup_requests").read_bytes()[:-3])
    running.versions.poll()
    assert ask(running) == 1 and "the file ends inside a record" in running.reports[-1]
    publish(tmp_path, 3, 3.0, [good] * 1001)
    running.versions.poll()
    assert ask(running) == 1 and "more than 1000 records" in running.reports[-1]


def test_a_version_that_fails_is_tried_ever_more_seldom(
    start_server: Any, publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1, 1.0)
    running = start_server(tmp_path)
    running.versions.poll()
    (tmp_path / "2").mkdir()
    now, tries, load = time.monotonic(), [], running.versions._load

    def counted(path: Path, name: str, version: int) -> Any:
        tries.append(now)
        return load(path, name, version)

    monkeypatch.setattr(running.versions, "_load", counted)
    monkeypatch.setattr("export.server.versions.time.monotonic", lambda: now)
    start = now
    for _ in range(300):
        running.versions.poll()
        now += 1
    assert [round(at - start) for at in tries] == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]
    assert len(running.reports) == 1


def test_what_serves_goes_on_when_everything_is_deleted(
    start_server: Any, publish: Any, tmp_path: Path, ask: Any
) -> None:
    publish(tmp_path, 1, 1.0)
    running = start_server(tmp_path)
    running.versions.poll()
    shutil.rmtree(tmp_path / "1")
    for _ in range(3):
        running.versions.poll()
    assert ask(running) == 1
    assert running.reports == ["version 1 was deleted and no other one loads: it goes on serving from memory"]
    tmp_path.rename(tmp_path.with_name("moved"))
    running.versions.poll()
    assert ask(running) == 1


def test_versions_change_under_load(start_server: Any, publish: Any, tmp_path: Path, ask: Callable[..., float]) -> None:
    publish(tmp_path, 1, 1.0)
    running = start_server(tmp_path)
    running.versions.start()
    seen: set[float] = set()
    end = time.monotonic() + 30
    for version in (2, 3, 4):
        publish(tmp_path, version, float(version % 2 + 1))
        while running.versions.serving != version:
            if running.versions.serving is not None:
                seen.add(ask(running))
            assert time.monotonic() < end
    assert seen <= {1.0, 2.0}
    assert [state for _, state in running.states()].count("AVAILABLE") == 1
