"""Directories that are published in a store: readers see a whole publication, whatever happens to its job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from stem_util import copies, owned, stores
from stem_util.errors import JobError, Stopped, UserError
from tests.stores import Proxy, Server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_TRIES", 1)


def another(uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> copies.Copy:
    """The copy of ``uri`` that another machine has."""
    with monkeypatch.context() as patch:
        patch.setenv("STEM_TF_CACHE", str(cache))
        return copies.of(uri, owned.RUN, apart=("evaluation",))


def fill(copy: copies.Copy, **content: str) -> None:
    """Writes files as a job does; an empty content removes a file."""
    owned.claim(copy.path, owned.RUN)
    for name, text in content.items():
        path = copy.path / name
        path.write_text(text) if text else path.unlink()


def seen(copy: copies.Copy) -> dict[str, str]:
    """What a reader gets."""
    return {path.name: path.read_text() for path in copy.fetch().iterdir() if not path.name.startswith(".")}


def test_publications_follow_one_another(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{s3}/runs/one"
    writer, reader = another(uri, tmp_path / "a", monkeypatch), another(uri, tmp_path / "b", monkeypatch)
    with pytest.raises(UserError, match="runs/one is empty: it does not hold a run"):
        reader.fetch()
    writer.prepare()
    fill(writer, config="1", checkpoint="one", log="line 1")
    (writer.path / "evaluation").mkdir()
    (writer.path / "evaluation" / "test.json").write_text("apart")
    writer.publish()
    assert seen(reader) == {"config": "1", "checkpoint": "one", "log": "line 1"}
    before = stores.listing(uri)
    fill(writer, checkpoint="", checkpoint2="two", log="line 2")
    with mock.patch.object(stores, "listing", side_effect=JobError("the store does not answer")):
        writer.publish()  # nothing is deleted
    assert seen(reader) == {"config": "1", "checkpoint2": "two", "log": "line 2"}
    assert before.keys() < stores.listing(uri).keys()
    writer.publish()
    # What has not changed is not uploaded again; what is not used any more is gone.
    after = stores.listing(uri)
    assert {name.partition("/")[2] for name in after.keys() & before.keys() - {copies.COMPLETE}} == {
        "config",
        owned.MARKER,
    }
    assert sorted(name.partition("/")[2] for name in after) == ["", owned.MARKER, "checkpoint2", "config", "log"]


def test_nothing_is_seen_of_an_upload_that_did_not_end(
    s3: str, s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{s3}/run"
    writer, reader = another(uri, tmp_path / "a", monkeypatch), another(uri, tmp_path / "b", monkeypatch)
    writer.prepare()
    fill(writer, small="1", large="x" * 1_000_000)
    with Proxy(s3_server.port) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.cuts = 1_000_000
        with pytest.raises(JobError, match="tried 2 times"):
            writer.publish()
    with pytest.raises(UserError, match="has no _COMPLETE, which is written last: a run is still being uploaded"):
        reader.fetch()
    # The copy is still there, and the same command goes on.
    assert writer.prepare() == writer.path and (writer.path / "small").exists()
    writer.publish()
    assert seen(reader)["small"] == "1"
    # A kill before the last object leaves the publication before.
    fill(writer, small="2")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(stores, "write", mock.Mock(side_effect=Stopped))
        writer.publish()
    assert seen(reader)["small"] == "1"
    # So does a connection that breaks while the last object is written, and the next try publishes.
    write = stores.write
    with Proxy(s3_server.port) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")

        def breaking(uri: str, data: bytes) -> None:
            proxy.after, proxy.cuts = 100, 1_000_000
            write(uri, data)

        patch.setattr(stores, "write", breaking)
        with pytest.raises(JobError, match="_COMPLETE: .*tried 2 times"):
            writer.publish()
    assert seen(reader)["small"] == "1"
    writer.publish()
    assert seen(reader)["small"] == "2"


def test_of_two_writers_the_second_fails(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{s3}/run"
    one, two = another(uri, tmp_path / "a", monkeypatch), another(uri, tmp_path / "b", monkeypatch)
    for number, writer in enumerate((one, two)):
        writer.prepare()
        fill(writer, who=f"writer {number}")
    one.publish()
    with pytest.raises(JobError, match="another job has published at s3://.*/run since this one began"):
        two.publish()
    assert seen(another(uri, tmp_path / "c", monkeypatch)) == {"who": "writer 0"}
    # A later job on the second machine starts from what was published.
    assert two.prepare() and (two.path / "who").read_text() == "writer 0"


def test_a_job_that_was_killed_goes_on_from_its_copy_unless_another_has_published(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{s3}/run"
    here, there = another(uri, tmp_path / "a", monkeypatch), another(uri, tmp_path / "b", monkeypatch)
    here.prepare()
    fill(here, step="1")
    here.publish()
    fill(here, step="2")  # and killed
    assert here.prepare() and (here.path / "step").read_text() == "2"
    assert there.prepare() and (there.path / "step").read_text() == "1"
    fill(there, step="3")
    there.publish()
    assert here.prepare() and (here.path / "step").read_text() == "3"


def test_a_copy_in_use_is_not_changed(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{s3}/run"
    writer = another(uri, tmp_path / "a", monkeypatch)
    writer.prepare()
    fill(writer, step="1")
    writer.publish()
    read = (
        f"from stem_util import copies, owned\npath = copies.local({uri!r}, owned.RUN)\n"
        "print(open(path + '/step').read(), flush=True)\ninput()"
    )
    job = subprocess.Popen([sys.executable, "-c", read], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "1\n"
    reader = copies.of(uri, owned.RUN)
    assert seen(reader) == {"step": "1"}  # the same state may be shared
    fill(writer, step="2")
    writer.publish()
    with pytest.raises(UserError, match="another job works on the copy of s3://.*, which has to change now"):
        reader.fetch()
    job.communicate("\n", timeout=60)
    assert seen(reader) == {"step": "2"}


def test_what_is_refused(s3: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with copies.output(f"{s3}/data", owned.DATA, overwrite=False) as directory:
        owned.claim(directory, owned.DATA)
    with pytest.raises(UserError, match="/data holds converted data, not a run"):
        copies.local(f"{s3}/data", owned.RUN)
    with pytest.raises(UserError, match="/data exists already; --overwrite replaces it"):
        copies.output(f"{s3}/data", owned.DATA, overwrite=False).__enter__()
    stores.write(f"{s3}/notes/readme.txt", b"mine")
    with pytest.raises(UserError, match=r"/notes holds something else \(readme.txt\)"):
        copies.output(f"{s3}/notes", owned.DATA, overwrite=True).__enter__()
    stores.write(f"{s3}/data/{copies.COMPLETE}", b"{")
    with pytest.raises(UserError, match="/data/_COMPLETE is damaged"):
        copies.local(f"{s3}/data", owned.DATA)
    for path, error, problem in (
        ("a", JobError, "an object that _COMPLETE names is missing"),
        ("../a", UserError, "_COMPLETE is damaged"),
    ):
        tree = {"holds": "converted data", "number": 1, "files": {path: {"object": "gone", "bytes": 1, "sha256": ""}}}
        stores.write(f"{s3}/data/{copies.COMPLETE}", json.dumps(tree).encode())
        with pytest.raises(error, match=problem):
            copies.local(f"{s3}/data", owned.DATA)
    assert copies.local(data, owned.DATA) == str(data)
