"""The job stem-convert, from outside: messages, exit codes, interruptions, full disks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import manifest

_SCHEMA = """
name: tiny
features:
  user: {kind: categorical, side: user, dtype: int64}
tasks:
  click: {label: {column: click}}
"""
_MANY = 1_200_000  # rows: three units of work
Job = Callable[..., subprocess.CompletedProcess[str]]
_PYTHON = [sys.executable, "-m", "pipelines.jobs.convert"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of 60 rows beside its schema."""
    (tmp_path / "schema.yaml").write_text(_SCHEMA)
    _write(tmp_path / "log.parquet", 60)
    return tmp_path / "log.parquet"


def _write(path: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    columns = {"user": rng.integers(0, 9, rows), "click": rng.integers(0, 2, rows), "time": np.arange(rows)}
    pq.write_table(pa.table(columns), path, row_group_size=100_000)


def _run(log: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [*_after(before), *arguments, f"--schema={log.parent}/schema.yaml", f"--output={log.parent}/out"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def _after(statements: str) -> list[str]:
    """The job's command, started by a Python that first runs ``statements``.

    A preexec_fn would run in a fork of this process, whose gRPC threads (other tests') do not survive one.
    """
    if not statements:
        return _PYTHON
    code = f"import os, resource, signal, sys; {statements}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return [sys.executable, "-c", code, *_PYTHON[1:]]


def test_reports_what_was_written(log: Path) -> None:
    done = _run(log, str(log), "--split=time", "--split_column=time", "--layouts=blocks")
    assert done.returncode == 0, done.stderr
    assert "click" in done.stdout and "user" in done.stdout
    assert f"written to {log.parent}/out: 60 rows in " in done.stdout
    assert f"next: stem-train --config=CONFIG --config.data.dir={log.parent}/out" in done.stdout
    assert done.stderr == ""
    assert manifest.load(f"{log.parent}/out").rows("test") == 6
    again = _run(log, str(log), "--split=random")
    assert again.returncode == 2
    assert again.stderr == f"error: {log.parent}/out exists already; --overwrite replaces it\n"


def test_rates_are_those_inside_a_space(log: Path) -> None:
    columns = {"user": [1] * 4, "click": [1, 0, 1, None], "shown": [True, True, True, False]}
    pq.write_table(pa.table(columns), log)
    text = _SCHEMA.replace(
        "click}}", "click}, space: {column: shown}}\n  buy: {label: {column: click}, space: {task: click}}"
    )
    (log.parent / "schema.yaml").write_text(text)
    done = _run(log, f"--train={log}", "--validation_share=0")
    assert done.returncode == 0, done.stderr
    lines = [line.split()[:3] for line in done.stdout.splitlines()[1:4]]
    assert lines == [["click", "0.6667", "3"], ["buy", "1.0000", "2"], ["rows", "4", "0"]]


def test_empty_splits_are_warned_about(log: Path) -> None:
    done = _run(log, f"--train={log}", "--validation_share=0")
    assert done.returncode == 0
    warnings = [
        "warning: the validation split has no rows: stem-train will refuse these data",
        "warning: the test split has no rows",
    ]
    assert done.stderr.splitlines() == warnings


def test_no_process_imports_tensorflow() -> None:
    # Workers import what the job imports: they are spawned with its module as their main one.
    code = (
        "import sys, pipelines.jobs.convert; print([m for m in sys.modules if m.startswith(('tensorflow', 'stem_tf'))])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "the log is required"),
        (["LOG"], "--split is required: time, hash, random or leave_last"),
        (["LOG", "--split=time"], "--split=time needs --split_column"),
        (
            ["LOG", "--split=random", "--split_column=user"],
            "--split_column belongs to --split=time, hash and leave_last",
        ),
        (["LOG", "--split=leave_last"], "--split=leave_last needs --split_column"),
        (["LOG", "--split=random", "--extend="], "--extend is empty: name the data to go on from, or leave it out"),
        (["LOG", "--split=random", "--split_group=user"], "--split_group belongs to --split=leave_last"),
        (
            ["LOG", "--split=leave_last", "--split_column=time", "--fractions=.8,.1,.1"],
            "--fractions belongs to --split=",
        ),
        (
            ["LOG", "--split=random", "--validation_share=.1"],
            "--validation_share belongs to --train without --validation",
        ),
        (
            ["--train=LOG", "--test=LOG"],
            "there is no validation, without which nothing can be trained: give --validation",
        ),
        (["--train=LOG", "--validation_by=time"], "--validation_by needs --validation_share"),
        (["--train=LOG", "--validation_share=1"], "--validation_share=1: should be below 1"),
        (["--train=LOG", "--validation_share=.1", "--validation_by=hash"], "--validation_by=hash needs --split_column"),
        (["LOG", "--split=random", "--test_from=5"], "--validation_from and --test_from belong to --split=time"),
        (["LOG", "--split=random", "--fractions=.8,.1"], "--fractions=.8,.1: should be three numbers"),
        (
            ["LOG", "--split=random", "--fractions=.8,.1,.2"],
            "--fractions=0.8,0.1,0.2: should be three shares that add up to",
        ),
        (
            ["LOG", "--split=random", "--layouts=block"],
            "--layouts: 'block' should be one of blocks, rows, or none alone; did you mean",
        ),
        (["LOG", "--split=random", "--csv_delimiter=::"], "--csv_delimiter=::: should be one ASCII character"),
        (["LOG", "--split=random", "--csv_columns=a,b,a"], "--csv_columns=a,b,a: a name is there more than once"),
        (["LOG", "--split=random", "--log=LOG"], "the log is given twice"),
        (["LOG", "LOG", "--split=random"], "unexpected argument"),
        (["LOG", "--train=LOG"], "--train gives a split's files; leave out the log"),
        (["--test=LOG"], "--train is required with --validation and --test"),
        (["nowhere.csv", "--split=random"], "nowhere.csv: no such file or directory"),
        (["LOG", "--split=random", "--block_rows=0"], "block_rows"),
        (["LOG", "--split=day"], "split"),
    ],
)
def test_wrong_flags_are_one_line(log: Path, job_in_process: Job, arguments: list[str], why: str) -> None:
    given = [argument.replace("LOG", str(log)) for argument in arguments]
    done = job_in_process(
        "pipelines.jobs.convert", *given, f"--schema={log.parent}/schema.yaml", f"--output={log.parent}/out"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert why in done.stderr
    assert sorted(os.listdir(log.parent)) == ["log.parquet", "schema.yaml"]


def _start(log: Path, *arguments: str) -> subprocess.Popen[str]:
    """A conversion of many units in two processes, once it has begun to write."""
    # Where the tests run in the background, Ctrl-C is ignored, and children inherit that.
    job = _after("signal.signal(signal.SIGINT, signal.SIG_DFL)")
    command = [*job, str(log), f"--schema={log.parent}/schema.yaml", f"--output={log.parent}/out", "--split=random"]
    process = subprocess.Popen([*command, "--processes=2", *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(log.parent.glob(".out.partial-*/scratch/counts-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def _tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_killed_half_way_and_run_again(log: Path) -> None:
    _write(log, _MANY)
    process = _start(log)
    process.kill()
    process.wait()
    assert not (log.parent / "out").exists()
    assert list(log.parent.glob(".out.partial-*"))
    assert _run(log, str(log), "--split=random", "--layouts=blocks", "--processes=2").returncode == 0
    assert sorted(os.listdir(log.parent)) == ["log.parquet", "out", "schema.yaml"]
    first = _tree(log.parent / "out")
    again = _run(log, str(log), "--split=random", "--layouts=blocks", "--processes=1", "--overwrite")
    assert again.returncode == 0
    assert _tree(log.parent / "out") == first
    assert json.loads(first["manifest.json"])["sources"][0]["rows"] == _MANY


@pytest.mark.parametrize(
    ("signum", "code", "message"),
    [
        (signal.SIGTERM, 143, "error: stopped by SIGTERM; nothing was kept\n"),
        (signal.SIGINT, 130, "error: interrupted; nothing was kept\n"),
    ],
)
def test_signals_leave_nothing(log: Path, signum: int, code: int, message: str) -> None:
    _write(log, _MANY)
    process = _start(log)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (code, message)
    assert sorted(os.listdir(log.parent)) == ["log.parquet", "schema.yaml"]


def test_a_killed_worker_is_named(log: Path) -> None:
    _write(log, _MANY)
    process = _start(log)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        children = [int(pid) for pid in file.read().split()]
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith("error: a worker process died while it worked on ")
    assert sorted(os.listdir(log.parent)) == ["log.parquet", "schema.yaml"]


@pytest.mark.parametrize("processes", [1, 2])
def test_no_space_left(log: Path, processes: int) -> None:
    _write(log, 600_000)  # two units

    # A file size limit fails writes as a full disk does.
    limit = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    )
    done = _run(log, str(log), "--split=random", f"--processes={processes}", before=limit)
    assert done.returncode == 1
    assert done.stderr == f"error: no space left for {log.parent}/out (File too large); nothing was kept\n"
    assert sorted(os.listdir(log.parent)) == ["log.parquet", "schema.yaml"]
