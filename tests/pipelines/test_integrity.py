"""Files that change, or do not, while they are read; data that nobody replaces meanwhile."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import integrity, manifest, schema_yaml
from pipelines.batches.dataset import read_batches
from pipelines.convert import conversion
from pipelines.convert.conversion import convert
from pipelines.convert.options import Options
from pipelines.integrity import File, Watch
from pipelines.manifest import Manifest
from stem_util.errors import UserError

SCHEMA = """
name: small
group: user
features:
  user: {kind: categorical, side: user, dtype: int64}
  x: {kind: numeric, side: context}
tasks:
  click: {label: {column: click}}
"""


def _options(log: Path, output: Path, **more: Any) -> Options:
    return Options(schema=schema_yaml.loads(SCHEMA, "small"), log=str(log), output=str(output), split="random", **more)


def _write_log(path: Path, shift: int = 0) -> None:
    random = np.random.default_rng(0)
    user = (random.integers(20, size=400) + shift) % 20
    pq.write_table(pa.table({"user": user, "x": np.zeros(400), "click": random.integers(2, size=400)}), path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    _write_log(directory / "log.parquet")
    convert(_options(directory / "log.parquet", directory / "data"))
    return directory


@pytest.fixture
def data(converted: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(converted / "data", tmp_path / "data")
    return tmp_path / "data"


def _flip(path: Path) -> None:
    """Another byte in the middle; size and time stay."""
    content, before = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_watch_reads_what_it_has_not_seen(tmp_path: Path) -> None:
    path, reads = tmp_path / "file", []

    def look(read: bool = True, size: int = 3) -> None:
        def same() -> bool:
            reads.append(path.read_bytes())
            return reads[-1] == b"abc"

        watch.check(str(path), size, same, read=read, way_out="restore it")

    watch = Watch()
    path.write_bytes(b"abc")
    look()
    look()
    assert reads == [b"abc"]
    os.utime(path, ns=(1, 1))  # touched, copied, restored: read again, and the same
    look()
    assert len(reads) == 2
    path.write_bytes(b"abd")
    with pytest.raises(UserError, match=r"file has changed since .* \(its checksum differs\): restore it"):
        look()
    path.write_bytes(b"ab")
    with pytest.raises(UserError, match=r"\(2 bytes, 3 then\)"):
        look()
    path.unlink()
    with pytest.raises(UserError, match="file is missing: restore it"):
        look()
    watch = Watch()
    path.write_bytes(b"abd")
    look(read=False)  # too large to be read at the first look: its size has to do
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="its checksum differs"):
        look(read=False)


def test_locks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()

    def hold(exclusive: bool) -> None:
        with integrity.locked(str(path), exclusive=exclusive, why="in use"):
            pass

    with integrity.locked(str(path), exclusive=False, why=""):
        hold(exclusive=False)
        with pytest.raises(UserError, match="^in use$"):
            hold(exclusive=True)
    with integrity.locked(str(path), exclusive=True, why=""), pytest.raises(UserError, match="^in use$"):
        hold(exclusive=False)
    hold(exclusive=True)


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(integrity._NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "file").touch()
    with integrity.locked(str(tmp_path / "file"), exclusive=False, why=""):
        pass


def test_what_the_manifest_knows(converted: Path) -> None:
    found = manifest.load(str(converted / "data"))
    assert sorted(found.files) == [
        "history/rare/user.parquet",
        "history/seen/user.parquet",
        "raw/test/part-00000.parquet",
        "raw/validation/part-00000.parquet",
        "schema.yaml",
        "vocabulary/user.parquet",
    ]
    path = converted / "data" / "schema.yaml"
    assert found.files["schema.yaml"] == File(path.stat().st_size, integrity.crc32c(str(path)))
    (source,) = found.sources
    log = converted / "log.parquet"
    assert (source.mtime_ns, source.crc32c) == (log.stat().st_mtime_ns, integrity.crc32c(str(log)))
    found.check([shard for split in manifest.SPLITS for shard in found.shards(split, "blocks")])
    for split in ("validation", "test"):
        found.check_raw(split)


def _read(found: Manifest) -> None:
    read_batches(found, "train", batch_size=8, training=True)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("schema.yaml", lambda found: found.schema),
        ("schema.yaml", _read),
        ("vocabulary/user.parquet", _read),
        ("raw/test/part-00000.parquet", lambda found: found.check_raw("test")),
    ],
)
@pytest.mark.parametrize(
    "damage", [_flip, Path.unlink, lambda path: os.truncate(path, 20), lambda path: os.truncate(path, 0)]
)
def test_damage_is_noticed(
    data: Path, name: str, use: Callable[[Manifest], object], damage: Callable[[Path], object]
) -> None:
    found = manifest.load(str(data))
    damage(data / name)
    with pytest.raises(UserError, match=f"{name} (is missing|has changed since .*): restore it, or convert"):
        use(found)


def test_a_flipped_byte_anywhere_in_a_manifest(data: Path) -> None:
    path = data / "manifest.json"
    content = path.read_bytes()
    for place in np.linspace(0, len(content) - 2, 60).astype(int):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            found = manifest.load(str(data))
        except UserError as error:
            assert "convert again" in str(error)
        else:  # white space became other white space
            assert found == manifest.load(str(data)) and json.loads(damaged) == json.loads(content)


def test_manifests_of_the_version_before(data: Path) -> None:
    path = data / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["files"], tree["sha256"]
    for source in tree["sources"]:
        del source["mtime_ns"], source["crc32c"]
    path.write_text(json.dumps(tree | {"format": 1}))
    found = manifest.load(str(data))
    assert found.files == {} and found.rows("train") > 0
    _read(found)
    text = (data / "schema.yaml").read_text()
    (data / "schema.yaml").write_text(text + "  buy: {label: {column: buy}}\n")
    with pytest.raises(UserError, match=r"is not the schema that the data were converted with \(they differ in buy\)"):
        _ = manifest.load(str(data)).schema


def test_data_replaced_between_two_epochs(converted: Path, data: Path) -> None:
    found = manifest.load(str(data))
    _read(found)
    shutil.rmtree(data)
    shutil.copytree(converted / "data", data)  # restored: the same content in new files
    _read(found)
    shard = Path(found.shards("train", "blocks")[0].path)
    os.utime(shard, ns=(1, 1))
    _read(found)
    _flip(shard)
    os.utime(shard, ns=(2, 2))
    with pytest.raises(UserError, match="blocks/train-.* has changed since the conversion"):
        _read(found)
    other = data.with_name("other.parquet")
    _write_log(other, shift=1)
    shutil.rmtree(data)
    convert(_options(other, data))
    with pytest.raises(UserError, match="the data were replaced while they were in use; start again"):
        _read(found)


def test_nobody_replaces_data_in_use(converted: Path, data: Path) -> None:
    options = _options(converted / "log.parquet", data, overwrite=True)
    before = (data / "manifest.json").read_bytes()
    with manifest.in_use(str(data)), manifest.in_use(str(data)):
        with pytest.raises(UserError, match="data is being read by another job .*: wait for it or choose"):
            convert(options)
        assert (data / "manifest.json").read_bytes() == before
    with manifest.replacing(str(data), True), pytest.raises(UserError, match="is being replaced by a conversion: wait"):
        manifest.in_use(str(data)).__enter__()
    convert(options)


def test_a_log_that_changed(tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    _write_log(log)
    found = convert(_options(log, tmp_path / "data", layouts=()))
    (source,) = found.sources
    _write_log(log)
    os.utime(log, ns=(1, 1))
    touched = manifest.check_source(source, Watch())
    assert touched == dataclasses.replace(source, mtime_ns=1)
    assert manifest.check_source(touched, Watch()) == touched  # of this time: not read again
    _write_log(log, shift=1)  # as many bytes, equal statistics
    assert log.stat().st_size == source.bytes
    with pytest.raises(UserError, match="log.parquet has changed since the conversion .*: restore it, or"):
        read_batches(found, "train", batch_size=8, training=True, input_format="parquet")
    again = convert(_options(log, tmp_path / "data", layouts=(), overwrite=True))
    assert again.files["vocabulary/user.parquet"] != found.files["vocabulary/user.parquet"]
    (before, now) = (dataclasses.replace(m, sources=(), files={}, loaded=None) for m in (found, again))
    assert before == now  # but for the checksums nothing tells them apart


def test_a_log_that_changes_while_it_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.parquet"
    _write_log(log)
    shards = conversion._Conversion._shards

    def slow(*arguments: object) -> object:
        _write_log(log, shift=1)
        return shards(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(conversion._Conversion, "_shards", slow)
    with pytest.raises(UserError, match="log.parquet changed while it was converted: convert it again when nobody"):
        convert(_options(log, tmp_path / "data"))
    assert not (tmp_path / "data").exists()
