"""Conversions whose tasks are done twice, and conversions on Apache Beam: the bytes are the local converter's."""

from __future__ import annotations

import contextlib
import filecmp
import functools
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipelines import schema_yaml
from pipelines.convert import conversion
from pipelines.convert.conversion import convert
from pipelines.convert.options import Options
from stem_util import progress
from stem_util.errors import JobError, UserError
from stem_util.workers import Pool

Job = Callable[..., subprocess.CompletedProcess[str]]

_SCHEMA = """
name: tiny
group: user
features:
  user: {kind: categorical, side: user, dtype: int64}
  video: {kind: categorical, side: item, dtype: string, min_count: 2}
  tags: {kind: multivalent, side: item, dtype: string, separator: "|", max_length: 2}
  hashed: {kind: categorical, side: user, column: user, dtype: int64, hash: {buckets: 7}}
  words:
    kind: multivalent
    side: item
    column: tags
    dtype: string
    separator: "|"
    max_length: 9
    hash: {buckets: 5, hashes: 2}
  length: {kind: numeric, side: item, bucketise: {quantiles: 4}}
tasks:
  click: {label: {column: click}}
  stay: {type: regression, label: {column: stay, standardise: true}}
"""


def _write(directory: Path, rows: int = 300) -> Path:
    """A log of three files, in which a row of the second is bad (its click is 7); beside it, its schema."""
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "user": rng.integers(0, 20, rows),
            "video": np.array(["a\nb", "c", "日本", ""])[rng.integers(0, 4, rows)],
            "tags": np.array(["x|y|z", "y", "", "x||z"])[rng.integers(0, 4, rows)],
            "length": rng.random(rows),
            "click": np.where(np.arange(rows) == rows // 2, 7, rng.integers(0, 2, rows)),
            "stay": rng.random(rows),
            "time": np.arange(rows) * 10,
        }
    )
    (directory / "schema.yaml").write_text(_SCHEMA)
    log = directory / "log"
    log.mkdir()
    for number in range(3):
        pq.write_table(table.slice(number * rows // 3, rows // 3), log / f"part-{number}.parquet")
    return log


def _convert(log: Path, output: Path, **settings: Any) -> Path:
    defaults: dict[str, Any] = {"split": "time", "split_column": "time", "drop_bad_rows": True, "shard_rows": 60}
    convert(Options(schema=schema_yaml.loads(_SCHEMA), log=str(log), output=str(output), **(defaults | settings)))
    return output


def _files(directory: Path) -> dict[str, int]:
    """All files, with their inodes."""
    found = {os.path.join(d, f) for d, _, names in os.walk(directory) for f in names}
    return {os.path.relpath(path, directory): os.stat(path).st_ino for path in sorted(found)}


def _assert_same_bytes(one: Path, other: Path) -> None:
    assert list(_files(one)) == list(_files(other))
    assert filecmp.cmpfiles(one, other, list(_files(one)), shallow=False)[1:] == ([], [])


class _Twice(Pool):
    """Does each task twice at the same time, and each again when the task after it is done; remembers all of them."""

    done: list[tuple[Callable[..., Any], tuple]]

    def __init__(self, processes: int) -> None:
        super().__init__(1)
        _Twice.done = []

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[str, tuple]]) -> Iterator[Any]:
        results = []
        for number, (_, arguments) in enumerate(tasks):
            threads = [threading.Thread(target=function, args=arguments) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            results.append(function(*arguments))
            if number:
                function(*tasks[number - 1][1])
        _Twice.done += [(function, arguments) for _, arguments in tasks]
        yield from results


@pytest.mark.parametrize("split", ["time", "leave_last"])
def test_tasks_that_are_done_twice_and_late_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    log = _write(tmp_path)
    once = _convert(log, tmp_path / "once", split=split)
    monkeypatch.setattr(conversion, "Pool", _Twice)
    twice = _convert(log, tmp_path / "twice", split=split)
    _assert_same_bytes(once, twice)
    before = _files(twice)
    for function, arguments in _Twice.done:  # a worker that was given up, and goes on
        if function.__name__ != "crc32c":
            with pytest.raises(FileNotFoundError):
                function(*arguments)
    assert _files(twice) == before
    assert sorted(os.listdir(tmp_path)) == ["log", "once", "schema.yaml", "twice"]


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "pipelines.convert.beam", raising=False)
    with pytest.raises(UserError, match=r"Apache Beam is not installed, .*: pip install 'stem-tf\[beam\]'"):
        _convert(_write(tmp_path), tmp_path / "out", runner="direct")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--beam_args=--direct_num_workers=2"], "--beam_args belongs to --runner=direct, flink, spark and dataflow"),
        (["--runner=direct", "--processes=2"], "--processes belongs to --runner=local"),
        (["--runner=beam"], "runner"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, job_in_process: Job, arguments: list[str], why: str) -> None:
    _refused(tmp_path, job_in_process, arguments, why)


def _refused(tmp_path: Path, job_in_process: Job, arguments: list[str], why: str) -> None:
    log = _write(tmp_path)
    common = [str(log), f"--schema={tmp_path}/schema.yaml", f"--output={tmp_path}/out", "--split=random"]
    done = job_in_process("pipelines.jobs.convert", *common, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert why in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["log", "schema.yaml"]


class TestOnBeam:
    """Needs the extra ``beam``, which is part of ``dev``."""

    @pytest.fixture(autouse=True)
    def beam(self) -> Any:
        pytest.importorskip("apache_beam")
        return conversion._beam()

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"split": "hash", "split_column": "user", "layouts": (), "extend": True},
            {"split": "leave_last", "layouts": ("blocks",)},
            {"csv": True, "split": "random", "split_column": None},
        ],
    )
    def test_same_bytes_in_one_process(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        log = _write(tmp_path)
        if settings.pop("csv", False):
            for path in log.iterdir():
                pyarrow.csv.write_csv(pq.read_table(path), path.with_suffix(".csv"))
                path.unlink()
        if settings.pop("extend", False):
            before = log / "part-0.parquet"
            settings["extend"] = str(_convert(before, tmp_path / "before"))
            before.unlink()
        local = _convert(log, tmp_path / "local", **settings)
        _assert_same_bytes(local, _convert(log, tmp_path / "beam", runner="direct", **settings))

    def test_a_bad_row_is_named_as_by_the_local_converter(self, tmp_path: Path) -> None:
        log, said = _write(tmp_path), []
        for runner in ("local", "direct"):
            with pytest.raises(UserError) as error:
                _convert(log, tmp_path / "out", runner=runner, drop_bad_rows=False)
            said.append(str(error.value))
        assert said[0] == said[1] and "part-1.parquet, row 50" in said[0]
        assert sorted(os.listdir(tmp_path)) == ["log", "schema.yaml"]

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (
                ["--runner=direct", "--beam_args=--direct_num_worker=2"],
                "Apache Beam has no option --direct_num_worker; did you mean 'direct_num_workers'?",
            ),
            (["--runner=direct", "--beam_args=--direct_num_workers=two"], "--direct_num_workers: invalid int value"),
            (["--runner=direct", "--beam_args=--direct_num_workers=-1"], "should be 0 (the number of cores) or more"),
            (["--runner=direct", "--beam_args=direct_num_workers=2"], "unexpected word 'direct_num_workers=2'"),
            (["--runner=direct", "--beam_args=--runner=FlinkRunner"], "the runner is chosen by --runner"),
            (["--runner=direct", "--beam_args='"], "No closing quotation"),
            (["--runner=flink", "--beam_args=--paralelism=4"], "no option --paralelism; did you mean 'parallelism'?"),
            (["--runner=spark", "--beam_args=--job_server_jvm_properties=-Xmx2g"], "needs Java: install it, or name"),
            (
                ["--runner=flink", "--beam_args=--environment_type=PROCESS --job_endpoint=localhost:1"],
                "process_command is required for environment type PROCESS",
            ),
            (["--runner=flink", "--beam_args=--job_endpoint=localhost:1"], "no job server answers there"),
            (["--runner=dataflow"], "--runner=dataflow"),
        ],
    )
    def test_pipeline_options_are_checked_before_anything_starts(
        self, tmp_path: Path, job_in_process: Job, monkeypatch: pytest.MonkeyPatch, arguments: list[str], why: str
    ) -> None:
        monkeypatch.setenv("PATH", "")  # no Java
        _refused(tmp_path, job_in_process, arguments, why)

    def test_workers_get_paths_that_do_not_depend_on_their_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(_write(tmp_path).parent)
        for runner, prefix in (("local", ""), ("flink", f"{tmp_path}/")):
            options = Options(schema=schema_yaml.loads(_SCHEMA), output="out", log="log", runner=runner)
            assert conversion._open(options)[0].files[0] == f"{prefix}log/part-0.parquet"

    def test_a_worker_says_what_it_lacks(self, tmp_path: Path, beam: Any) -> None:
        with pytest.raises(JobError, match="does not see .*: the directory of --output must have the same path on all"):
            beam.work(0, str(tmp_path / "elsewhere"))
        (tmp_path / "tasks").write_bytes(pickle.dumps("0.0.1"))
        with pytest.raises(JobError, match=r"the worker on .* has stem-tf .*, this job 0\.0\.1: install the same"):
            beam.work(0, str(tmp_path))

    def test_a_step_shows_how_many_tasks_are_done(
        self, tmp_path: Path, beam: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown = io.StringIO()
        monkeypatch.setattr(beam, "_LOOKS_EVERY_SECONDS", 0.01)
        monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
        monkeypatch.setattr(beam, "Progress", functools.partial(progress.Progress, stream=shown))
        with beam._showing_progress("fit", 3, str(tmp_path)):
            for number in range(3):
                (tmp_path / f"result-{number}").touch()
                _wait_until(functools.partial(_says, shown, f"fit: {number + 1} of 3 tasks"))

    def test_same_bytes_in_several_processes_and_through_a_job_server(self, tmp_path: Path) -> None:
        log = _write(tmp_path)
        settings: dict[str, Any] = {"split": "random", "split_column": None, "layouts": ()}
        local = _convert(log, tmp_path / "local", **settings)
        two = _convert(log, tmp_path / "two", runner="direct", beam_args="--direct_num_workers=2", **settings)
        _assert_same_bytes(local, two)
        # Beam's own job server takes the place of one that sends the work to a cluster.
        with _job_server() as endpoint:
            arguments = f"--job_endpoint={endpoint} --environment_type=LOOPBACK"
            served = _convert(log, tmp_path / "served", runner="flink", beam_args=arguments, **settings)
        _assert_same_bytes(local, served)

    def test_killed_workers_and_a_killed_job_leave_no_process_and_no_half_output(self, tmp_path: Path) -> None:
        log = _write(tmp_path, 600_000)
        job, workers = _start(log)
        os.kill(workers[0], signal.SIGKILL)
        _, stderr = job.communicate(timeout=120)
        assert (job.returncode, stderr.count("\n")) == (1, 1)
        assert stderr.startswith("error: a worker process died: killed from outside, or out of memory")
        assert sorted(os.listdir(tmp_path)) == ["log", "schema.yaml"]
        _wait_until(lambda: not any(map(_runs, workers)))

        job, workers = _start(log)
        job.send_signal(signal.SIGTERM)
        _, stderr = job.communicate(timeout=120)
        assert (job.returncode, stderr) == (143, "error: stopped by SIGTERM; nothing was kept\n")
        assert sorted(os.listdir(tmp_path)) == ["log", "schema.yaml"]
        _wait_until(lambda: not any(map(_runs, workers)))

        job, workers = _start(log)
        job.kill()
        job.communicate(timeout=120)
        assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.partial-*"))
        _wait_until(lambda: not any(map(_runs, workers)))
        again = _convert(log, tmp_path / "out", runner="direct", split="random", split_column=None, shard_rows=250_000)
        assert sorted(os.listdir(tmp_path)) == ["log", "out", "schema.yaml"]
        assert (again / "manifest.json").exists()


@contextlib.contextmanager
def _job_server() -> Iterator[str]:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    module = "apache_beam.runners.portability.local_job_service_main"
    server = subprocess.Popen(
        [sys.executable, "-m", module, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_until(lambda: _answers(port))
        yield f"localhost:{port}"
    finally:
        server.kill()
        server.wait()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
        return True
    return False


def _start(log: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A conversion on two worker processes, whose ids are returned, once they write scratch files."""
    command = [sys.executable, "-m", "pipelines.jobs.convert", str(log), f"--schema={log.parent}/schema.yaml"]
    command += [f"--output={log.parent}/out", "--split=random", "--on_bad_rows=drop"]
    command += ["--runner=direct", "--beam_args=--direct_num_workers=2"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    _wait_until(lambda: job.poll() is not None or any(log.parent.glob(".out.partial-*/scratch/clean-*")))
    workers: list[int] = []

    def two() -> bool:
        children = Path(f"/proc/{job.pid}/task").glob("*/children")
        workers[:] = filter(_runs, [int(pid) for path in children for pid in path.read_text().split()])
        return job.poll() is not None or len(workers) == 2

    _wait_until(two)  # between two steps there are none
    return job, workers


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"beam_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _says(stream: io.StringIO, line: str) -> bool:
    return line in stream.getvalue()
