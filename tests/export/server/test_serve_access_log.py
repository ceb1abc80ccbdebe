"""The access log: its lines, and that neither a full disk nor a lost file stops serving."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from export.server.access_log import AccessLog, request_id
from export.server.observation import Observation
from stem_util.errors import UserError


def _wait(until: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not until():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_call_is_a_line_whatever_it_says(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(str(path), print)
    log.observe(Observation("Predict", model="ranker", version=3, signature="rank", rows=200, seconds=0.0123456))
    evil = 'x"}\n{"code": "OK", \x1b[31m\u2028\ud800'
    log.observe(Observation("Predict", model=evil * 100, text=evil * 100, code=grpc.StatusCode.NOT_FOUND))
    log.close(5)
    assert len(path.read_bytes().split(b"\n")) == 3 and path.read_bytes().isascii()
    first, second = _lines(path)
    assert first["model"] == "ranker" and first["version"] == 3 and first["rows"] == 200 and first["ms"] == 12.346
    assert first["code"] == "OK" and "error" not in first and str(first["time"]).endswith("Z")
    assert second["code"] == "NOT_FOUND" and str(second["error"]).startswith(evil) and len(str(second["error"])) == 256
    assert b"\x1b" not in path.read_bytes() and oct(path.stat().st_mode)[-3:] in ("640", "600")


@pytest.mark.parametrize("given", ["", None, "a b", "a\nb", "é", "x" * 129, b"\x00", "\x7f"])
def test_a_request_id_that_could_harm_is_replaced(given: str | bytes | None) -> None:
    assert len(request_id(given)) == 32 and request_id(given) != request_id(given)


def test_a_request_id_is_kept() -> None:
    assert request_id("1-abc/DEF=") == request_id(b"1-abc/DEF=") == "1-abc/DEF="


def test_a_full_disk_is_said_once_and_serving_goes_on() -> None:
    said: list[str] = []
    log = AccessLog("/dev/full", said.append)
    for _ in range(100):
        log.observe(Observation("Predict"))
        time.sleep(0.0005)
    log.close(5)
    assert said == ["the access log /dev/full cannot be written: No space left on device; lines are lost"]


def test_after_a_full_disk_the_log_says_how_many_lines_were_lost(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "log"
    path.symlink_to("/dev/full")
    log = AccessLog(str(path), said.append)
    for _ in range(3):
        log.observe(Observation("Predict"))
    _wait(lambda: said and not log._queue.qsize())
    path.unlink()
    log.observe(Observation("Predict", request_id="after"))
    log.close(5)
    lines = _lines(path)
    assert int(str(lines[0]["lost"])) >= 3 and lines[1]["request_id"] == "after"
    assert len(said) == 2 and "is written again" in said[1]


def test_a_rotated_file_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.server.access_log._LOOK_SECONDS", 0.0)
    path = tmp_path / "log"
    log = AccessLog(str(path), print)
    log.observe(Observation("Predict", request_id="before"))
    _wait(lambda: path.read_bytes())
    path.rename(tmp_path / "log.1")
    log.observe(Observation("Predict", request_id="after"))
    log.close(5)
    assert [line["request_id"] for line in _lines(path)] == ["after"]
    assert [line["request_id"] for line in _lines(tmp_path / "log.1")] == ["before"]


def test_a_pipe_that_nobody_reads_holds_up_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    log = AccessLog(str(pipe), print)
    for _ in range(12_100):
        log.observe(Observation("Predict"))
    log.close(0.1)
    seen: list[str] = []

    def read() -> None:
        with open(pipe, encoding="utf-8") as file:
            seen.extend(file)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    _wait(lambda: len(seen) > 10_000)
    assert any("lost" in line for line in seen[:4100]), "the queue was full, and says how many lines it could not take"


def test_where_it_cannot_be_opened_the_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--access_log={tmp_path}: Is a directory"):
        AccessLog(str(tmp_path), print)
    with pytest.raises(UserError, match=r"/none/log: No such file or directory"):
        AccessLog(str(tmp_path / "none/log"), print)
