"""Files in a store: what URIs may be, what mistakes are answered with, and connections that break."""

from __future__ import annotations

import gzip
import hashlib
import signal
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from stem_util import stores
from stem_util.errors import JobError, Stopped, UserError
from tests.stores import Proxy, Server


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("s4://b/x", "s4:// is not known; a path is local or begins with one of s3://, gs://, hdfs://"),
        ("s3://", "should be s3://BUCKET/PATH"),
        ("hdfs:///x", "should be hdfs://HOST:PORT/PATH"),
        ("s3://b//x", "should be s3://BUCKET/PATH"),
        ("s3://b/x/../y", "should be s3://BUCKET/PATH"),
        ("s3://key:secret@b/x", "credentials do not belong in a URI"),
        ("s3://b/x?region=eu-west-1", "options after a question mark are not read"),
    ],
)
def test_uris_that_are_refused(uri: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        stores.check(uri)
    assert problem in str(caught.value) and "secret" not in str(caught.value)


def test_uris_are_known_by_their_scheme() -> None:
    assert stores.check("gs://b/x/") == "gs://b/x" and stores.check("hdfs://h:8020/x") == "hdfs://h:8020/x"
    assert stores.is_uri("s4://b") and not stores.is_uri("a/b://c") and not stores.is_uri('{"a": "s3://b"}')


@pytest.mark.parametrize(
    ("path", "pattern", "fits"),
    [
        ("day=1/a.parquet", "day=*/*.parquet", True),
        ("day=1/h=2/a.parquet", "day=*/*.parquet", False),
        ("day=1/h=2/a.parquet", "**/*.parquet", True),
        ("a.parquet", "**/*.parquet", True),
        ("day=11/a", "day=1[0-2]/?", True),
        ("day=13/a", "day=1[0-2]/?", False),
    ],
)
def test_patterns(path: str, pattern: str, fits: bool) -> None:
    assert stores.matches(path, pattern) is fits


def test_a_file_there_and_back(s3: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"content" * 1000)
    size, sha256 = stores.put(source, f"{s3}/x/a=1/file")
    assert (size, sha256) == (7000, hashlib.sha256(source.read_bytes()).hexdigest())
    assert list(stores.listing(s3)) == ["x/a=1/file"] and stores.listing(f"{s3}/x")["a=1/file"].bytes == 7000
    assert stores.stamp(f"{s3}/x/a=1/file").mtime_ns > 0
    stores.get(f"{s3}/x/a=1/file", target, sha256)
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(JobError, match="SHA-256 differs.*tried 2 times"):
        stores.get(f"{s3}/x/a=1/file", target, "0" * 64)
    stores.delete(f"{s3}/x/a=1/file")
    stores.delete(f"{s3}/x/a=1/file")
    assert not stores.listing(f"{s3}/x") and stores.read(f"{s3}/x/a=1/file") is None
    with pytest.raises(FileNotFoundError):
        stores.stamp(f"{s3}/x/a=1/file")


def test_keys_of_other_programs(s3: str, s3_server: Server) -> None:
    def put(key: str) -> None:
        address = f"http://127.0.0.1:{s3_server.port}/{s3.removeprefix('s3://')}/{key}"
        urllib.request.urlopen(urllib.request.Request(address, b"", method="PUT"), timeout=10).close()

    for key in ("log/", "log/day=1/", "log/day=1/a%20%2B%2525.csv", "log2/b.csv"):
        put(key)
    assert list(stores.listing(f"{s3}/log")) == ["day=1/a +%25.csv"]  # folders are no files
    put("log//a.csv")
    with pytest.raises(UserError, match="'bucket-[0-9]+/log//a.csv' has an empty name between two slashes"):
        stores.listing(f"{s3}/log")


def test_mistakes_are_one_sentence(s3: str, s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for action in (stores.listing, stores.check_writable):
        with pytest.raises(UserError, match="s3://nowhere/x.*: there is no bucket 'nowhere'"):
            action("s3://nowhere/x")
        with s3_server.denying(), pytest.raises(UserError, match="access is denied; check AWS_ACCESS_KEY_ID"):
            action(f"{s3}/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(JobError, match="NETWORK_CONNECTION.*tried 2 times"):
        stores.listing(f"{s3}/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "ftp://127.0.0.1:9")
    with pytest.raises(UserError, match="address of the store in the environment is wrong .*'ftp'"):
        stores.listing(f"{s3}/x")
    with pytest.raises(UserError, match="hdfs:// needs Java and Hadoop's libhdfs"):
        stores.listing("hdfs://127.0.0.1:9/x")


def test_connections_that_break_in_the_middle(
    s3: str, s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(bytes(range(256)) * 20_000)
    with Proxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.cuts = 2
        _, sha256 = stores.put(source, f"{s3}/whole")
        assert not proxy.cuts
        proxy.cuts = 2
        stores.get(f"{s3}/whole", target, sha256)
        assert not proxy.cuts and target.read_bytes() == source.read_bytes()
        proxy.cuts = 1_000_000
        with pytest.raises(JobError, match="tried 2 times"):
            stores.put(source, f"{s3}/broken")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server.port}")
    assert list(stores.listing(s3)) == ["whole"]


def test_a_packed_file_stays_as_it_is(s3: str, tmp_path: Path) -> None:
    """pyarrow would pack once more what is named .gz."""
    source, target, packed = tmp_path / "a.gz", tmp_path / "b.gz", gzip.compress(b"content")
    source.write_bytes(packed)
    _, sha256 = stores.put(source, f"{s3}/a.gz")
    stores.get(f"{s3}/a.gz", target, sha256)
    assert target.read_bytes() == packed and stores.read(f"{s3}/a.gz") == packed
    assert stores.listing(s3)["a.gz"].bytes == len(packed)


def test_a_signal_leaves_the_old_file_or_the_new_one(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an empty one, which pyarrow writes where an open stream is given up."""

    class Interrupting:
        def open_output_stream(self, *args: Any, **options: Any) -> Any:
            stream = system.open_output_stream(*args, **options)
            signal.raise_signal(signal.SIGTERM)
            return stream

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    stores.write(f"{s3}/x", b"old")
    system, path = stores._open(f"{s3}/x")
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(stores, "_open", lambda uri: (Interrupting(), path))
            stores.write(f"{s3}/x", b"new")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stores.read(f"{s3}/x") == b"new"
