"""Logs in a store, partitioned by directories, are described and converted as local ones are."""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipelines import manifest
from pipelines.batches import log_reader
from pipelines.log.find import find_files
from stem_util import copies, stores
from stem_util.errors import UserError
from tests.stores import Proxy, Server

_SCHEMA = """
name: tiny
features:
  user: {kind: categorical, side: user, dtype: int64}
  day:  {kind: categorical, side: context, dtype: string}
  hour: {kind: numeric, side: context}
tasks:
  click: {label: {column: click}}
"""
Job = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """600 rows of two days and two hours; one file per day and hour."""
    rng = np.random.default_rng(0)
    for day in ("2026-11-20", "2026-11-21"):
        for hour in ("7", "8"):
            place = tmp_path / f"log/day={day}/hour={hour}"
            place.mkdir(parents=True)
            columns = {"user": rng.integers(0, 9, 150), "click": rng.integers(0, 2, 150)}
            pq.write_table(pa.table(columns), place / "part-0.parquet", row_group_size=50)
            (place / "_SUCCESS").touch()
    (tmp_path / "schema.yaml").write_text(_SCHEMA)
    return tmp_path / "log"


def upload(directory: Path, uri: str) -> None:
    for path in filter(Path.is_file, directory.rglob("*")):
        stores.put(path, f"{uri}/{path.relative_to(directory)}")


def test_files_are_found_as_they_are_locally(log: Path, s3: str) -> None:
    hour = log / "day=2026-11-20/hour=7"
    (hour / ".part-0.parquet").touch()
    (log / "_tmp").mkdir()
    (log / "_tmp/part-0.parquet").touch()
    (log / "[1]").mkdir()
    shutil.copy(hour / "part-0.parquet", log / "[1]/[2] %20+ü.parquet")
    upload(log, f"{s3}/logs")
    upload(log, f"{s3}/logs2")
    patterns = ["", "/day=2026-11-2*/hour=7/*.parquet", "/**/part-?.parquet", "/day=2026-11-20", "/*/hour=8/*", "/**"]
    patterns += ["/*/*/*.parquet", "/day=*", "/*/hour=[8-9]", "/_tmp/*", "/*", "/[1]", "/[1]/[2] %20+ü.parquet"]
    for pattern in patterns:
        local = [path.replace(str(log), f"{s3}/logs") for path in find_files(f"{log}{pattern}")]
        assert find_files(f"{s3}/logs{pattern}") == local
    one = f"{s3}/logs/day=2026-11-20/hour=7/part-0.parquet"
    assert find_files(f"{one},{one}") == [one]
    stores.write(f"{s3}/other/readme.md", b"none")
    for pattern, problem in {
        "/log": "no such file or directory",
        "/logs/*.csv": "no file matches it",
        "*/logs": "the name of the bucket or host should not be a pattern",
        "/other": "the directory holds no Parquet files",
    }.items():
        with pytest.raises(UserError, match=problem):
            find_files(f"{s3}{pattern}")


def test_conversion_from_a_store_to_a_store(
    log: Path, s3: str, s3_server: Server, tmp_path: Path, job_in_process: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(log, f"{s3}/logs")
    flags = ["--split=hash", "--split_column=user", f"--schema={tmp_path}/schema.yaml", "--processes=1"]
    job = job_in_process("pipelines.jobs.convert", str(log), f"--output={tmp_path}/data", *flags)
    assert job.returncode == 0, job.stderr
    with Proxy(s3_server.port) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.after, proxy.cuts = 2_000, 3  # inside a Parquet file of the log
        job = job_in_process("pipelines.jobs.convert", f"{s3}/logs", f"--output={s3}/data", *flags)
        assert job.returncode == 0, job.stderr
        assert not proxy.cuts
    assert f"written to {s3}/data: 600 rows" in job.stdout
    assert f"next: stem-train --config=CONFIG --config.data.dir={s3}/data\n" in job.stdout
    monkeypatch.setenv("STEM_TF_CACHE", str(tmp_path / "elsewhere"))
    ours, theirs = manifest.load(f"{s3}/data"), manifest.load(str(tmp_path / "data"))
    assert Path(ours.data_dir).is_relative_to(tmp_path / "elsewhere")
    assert ours.vocabularies == theirs.vocabularies and ours.splits == theirs.splits
    assert [source.path for source in ours.sources] == find_files(f"{s3}/logs")
    for shard in Path(theirs.data_dir).rglob("*.tfrecord"):
        assert (Path(ours.data_dir) / shard.relative_to(theirs.data_dir)).read_bytes() == shard.read_bytes()
    # Training may read the log itself.
    written = io.BytesIO()
    log_reader.plan(ours, "train", shuffle=None, reader=(0, 1)).write(written, 0, 1)
    rows = pa.ipc.open_stream(written.getvalue()).read_all()
    assert len(set(rows["key:row_id"].to_pylist())) == rows.num_rows == ours.rows("train")

    again = job_in_process("pipelines.jobs.convert", f"{s3}/logs", f"--output={s3}/data", *flags)
    assert again.returncode == 2 and f"{s3}/data exists already; --overwrite replaces it" in again.stderr
    again = job_in_process("pipelines.jobs.convert", f"{s3}/logs", f"--output={s3}/data", "--overwrite", *flags)
    assert again.returncode == 0, again.stderr
    names = {name.partition("/")[0] for name in stores.listing(f"{s3}/data")}
    assert len(names) == 2 and copies.COMPLETE in names  # what was replaced is gone

    # Data in a store grow like others.
    more = (f"--extend={s3}/data", f"--output={s3}/more", *flags)
    again = job_in_process("pipelines.jobs.convert", f"{s3}/logs", *more)
    assert again.returncode == 2 and f"is in {s3}/data already, as train rows" in again.stderr
    upload(log / "day=2026-11-21", f"{s3}/next/day=2026-11-22")
    again = job_in_process("pipelines.jobs.convert", f"{s3}/next", *more)
    assert again.returncode == 0, again.stderr
    assert f"extends {s3}/data; this is generation 2" in again.stdout
    grown = manifest.load(f"{s3}/more")
    assert grown.ancestor is not None and grown.ancestor.directory == f"{s3}/data"
    assert (grown.vocabularies["day"].size, grown.history["day"].new) == (3, 1)


def test_mistakes_are_known_before_work_starts(log: Path, s3: str, tmp_path: Path, job_in_process: Job) -> None:
    flags = ["--split=hash", "--split_column=user", f"--schema={tmp_path}/schema.yaml"]
    for arguments, problem in (
        ([f"{s3}/nothing", f"--output={s3}/data"], f"{s3}/nothing: no such file or directory"),
        (["s3://nowhere/x", f"--output={s3}/data"], "s3://nowhere/x: there is no bucket 'nowhere'"),
        (["s4://b/x", f"--output={s3}/data"], "s4:// is not known"),
        ([str(log), "--output=s4://b/data"], "flag --output=s4://b/data: s4://b/data: s4:// is not known"),
        ([str(log), "--output=s3://nowhere/data"], "there is no bucket 'nowhere'"),
        ([str(log), f"--output={s3}/data", "--schema=s3://b/x.yaml"], "it has to be on this machine, not in a store"),
    ):
        job = job_in_process("pipelines.jobs.convert", *flags, *arguments)
        assert job.returncode == 2 and problem in job.stderr and job.stderr.count("\n") == 1, job.stderr
    assert not stores.listing(f"{s3}/data")


def test_csv_of_a_store_is_described(s3: str, tmp_path: Path, job_in_process: Job) -> None:
    lines = ["user,click,seconds", *(f"{i % 7},{i % 2},{i / 10}" for i in range(300))]
    stores.write(f"{s3}/logs/day=1/a.csv", "\n".join(lines).encode())
    stores.write(f"{s3}/logs/day=2/b.csv.gz", gzip.compress("\n".join(lines).encode()))
    job = job_in_process("pipelines.jobs.describe", f"{s3}/logs", "--label=click")
    assert job.returncode == 0, job.stderr
    assert "\n  user:" in job.stdout and "day" in job.stdout
