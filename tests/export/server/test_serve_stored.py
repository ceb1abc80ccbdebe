"""Versions at a URI: whole ones are copied and served, and what goes wrong in the store changes nothing that serves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import stored
from stem_util import stores
from tests.stores import Server


@pytest.fixture
def upload(publish: Any, s3: str, tmp_path: Path) -> Callable[[int, float], str]:
    """``upload(version, weight)`` to ``s3/models``, as stem-export does; the version's URI."""
    (tmp_path / "local").mkdir()

    def put(version: int, weight: float) -> str:
        path = publish(tmp_path / "local", version, weight)
        (path / ".stem-tf").write_text("{}")
        names = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        digests = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
        (path / "manifest.json").write_text(json.dumps({"files": digests, "model": "ranker"}))
        return stored.upload(path, f"{s3}/models")

    return put


def test_versions_come_and_go(
    start_server: Any, upload: Any, s3: str, s3_server: Server, tmp_path: Path, request_for: Any
) -> None:
    def weight() -> float:
        return float(running.predict(request_for(user=[1], item=[0]))["click"][0])

    upload(1, 1.0)
    running = start_server(f"{s3}/models")
    running.versions.poll()
    assert weight() == 1 and running.states() == [(1, "AVAILABLE")]

    second = upload(2, 2.0)
    stores.write(f"{s3}/models/9/variables/variables.index", b"an upload goes on")
    running.versions.poll()
    assert weight() == 2 and running.states() == [(2, "AVAILABLE"), (1, "END")] and not running.reports

    with s3_server.denying():
        running.versions.poll()
    assert weight() == 2
    (line,) = running.reports
    assert line.startswith(f"cannot list {s3}/models (") and "access is denied" in line
    assert line.endswith("which is tried again; version 2 goes on serving")
    running.reports.clear()

    weights = f"{upload(4, 4.0)}/variables/variables.data-00000-of-00001"
    good = stores.read(weights)
    assert good is not None
    stores.write(weights, good[:-1])
    running.versions.poll()
    (line,) = running.reports
    assert weight() == 2 and line.startswith("version 4 does not load, version 2 goes on serving: ")
    assert "SHA-256 differs" in line
    stores.write(weights, good)  # tried again at once
    running.versions.poll()
    assert weight() == 4

    copies = stored.copy_of(second).parent
    assert {path.name for path in copies.iterdir()} == {"1", "2", "4"}
    stores.delete_below(f"{s3}/models/4")
    stores.delete_below(second)
    running.versions.poll()
    assert weight() == 1 and [path.name for path in copies.iterdir()] == ["1"]
