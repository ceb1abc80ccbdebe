"""Versions in a store appear whole: ``saved_model.pb`` comes last, and two exports never mix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from export import publish, stored
from stem_util import copies, owned, stores
from stem_util.errors import JobError, UserError


def make(place: str, content: str = "weights") -> str:
    """Exports a version without a model in it, with the steps of stem-export."""
    with stored.staging(place) as output:
        with publish.publishing(output) as (version, directory):
            (directory / "variables").mkdir()
            (directory / "variables" / "data").write_text(content)
            (directory / "saved_model.pb").write_text("graph")
            names = ["saved_model.pb", "variables/data"]
            digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}
            (directory / "manifest.json").write_text(json.dumps({"files": digests}))
        return stored.upload(output / str(version), place)


def test_versions_follow_one_another(s3: str, tmp_path: Path) -> None:
    base = f"{s3}/models/feed"
    with pytest.raises(UserError, match="models/feed holds no exported model"):
        stored.fetched(base)
    assert make(base) == f"{base}/1" and make(base, "better") == f"{base}/2"
    assert (stored.fetched(base) / "variables" / "data").read_text() == "better"
    first = stored.fetched(f"{base}/1")
    assert (first / "variables" / "data").read_text() == "weights" and not publish.damage(first)
    (first / "variables" / "data").write_text("damaged")
    assert (stored.fetched(f"{base}/1") / "variables" / "data").read_text() == "weights"
    stores.delete_below(f"{base}/2")
    assert stored.fetched(base) == first
    assert make(base) == f"{base}/3"  # a number is not used again
    assert make(str(tmp_path / "local")) == str(tmp_path / "local" / "1")  # a path stays a path


def test_saved_model_comes_last(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, seen = f"{s3}/models", []
    write: Callable[[str, bytes], None] = stores.write

    def spy(uri: str, data: bytes) -> None:
        seen.append((uri.removeprefix(f"{base}/"), set(stores.listing(base))))
        write(uri, data)

    monkeypatch.setattr(stores, "write", spy)
    make(base)
    name, before = seen[-1]
    assert name == "1/saved_model.pb"
    assert {"1/manifest.json", "1/variables/data", f"1/{owned.MARKER}"} <= before


def test_an_upload_that_fails_leaves_no_version(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, put = f"{s3}/models", stores.put

    def broken(source: Path, uri: str) -> tuple[int, str]:
        if uri.endswith("variables/data"):
            raise JobError("the connection broke")
        return put(source, uri)

    with monkeypatch.context() as patch, pytest.raises(JobError, match="the connection broke"):
        patch.setattr(stores, "put", broken)
        make(base)
    assert not [name for name in stores.listing(base) if name.startswith("1/")]
    assert make(base) == f"{base}/2"


def test_of_two_exports_with_one_number_one_fails(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = f"{s3}/models"
    staging = stored.staging(base)
    with staging as output:
        assert make(base) == f"{base}/1"  # another job, meanwhile
        (output / "1").mkdir()
        with pytest.raises(JobError, match="another job exports version 1 to s3://.*/models: run this one again"):
            stored.upload(output / "1", base)
    assert not publish.damage(stored.fetched(base))


def test_what_is_refused(s3: str) -> None:
    with copies.output(f"{s3}/data", owned.DATA, overwrite=False) as directory:
        owned.claim(directory, owned.DATA)
    with pytest.raises(UserError, match="holds converted data or a run, not exported versions"):
        make(f"{s3}/data")
    stores.write(f"{s3}/half/1/variables/data", b"its upload was killed")
    with pytest.raises(UserError, match="half holds no exported model: neither saved_model.pb nor a version with one"):
        stored.fetched(f"{s3}/half")
    assert make(f"{s3}/half") == f"{s3}/half/2"
    stores.write(f"{s3}/other/1/saved_model.pb", b"")
    with pytest.raises(UserError, match="other/1/manifest.json is no manifest of stem-export"):
        stored.fetched(f"{s3}/other")
    stores.write(f"{s3}/other/1/manifest.json", json.dumps({"files": {"../x": ""}}).encode())
    with pytest.raises(UserError, match="a file is outside"):
        stored.fetched(f"{s3}/other/1")
