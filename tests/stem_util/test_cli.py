"""The exit code, the one line on stderr and the help of a small job run in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from absl import flags

from pipelines.log.find import find_files
from stem_util import cli

JOB = '''"""Fails in the way it is told."""

import errno
import os
import signal

from stem_util import cli
from stem_util.errors import JobError, UserError

flags = cli.Flags()
_WAYS = ["user", "job", "disk", "bug", "memory", "interrupt", "sigterm", "pipe"]
_HOW = flags.DEFINE_enum("how", None, _WAYS, "Way to fail.", required=True)
_ROWS = flags.DEFINE_integer("rows", 10, "Rows to read.")
_KEEP = flags.DEFINE_boolean("keep", True, "Keep what was read.")


def main(argv):
    if _HOW.value == "user":
        raise UserError("log.csv: no column 'x'")
    if _HOW.value == "job":
        raise JobError("a worker died:\\n  killed")
    if _HOW.value == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "out.tfrecord")
    if _HOW.value == "interrupt":
        raise KeyboardInterrupt
    if _HOW.value == "memory":
        raise MemoryError
    if _HOW.value == "sigterm":
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            print("cleared away")
    if _HOW.value == "pipe":
        print("x" * 10_000_000)
        return
    raise ZeroDivisionError("a bug")


def run():
    cli.run(main, flags, memory="a smaller --rows")


if __name__ == "__main__":
    run()
'''

_WAYS = "user|job|disk|bug|memory|interrupt|sigterm|pipe"
Job = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def job(run_job: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    (folder / "failing.py").write_text(JOB)
    return lambda *arguments: run_job("failing", *arguments, cwd=folder)


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--how=user"], 2, "error: log.csv: no column 'x'"),
        (["--how=job"], 1, "error: a worker died: killed"),
        (["--how=disk"], 1, "error: out.tfrecord: No space left on device"),
        (["--how=memory"], 1, "error: out of memory: a smaller --rows needs less"),
        (
            ["--how=bug"],
            1,
            "error: ZeroDivisionError: a bug. That is a bug, or a case nobody thought of: the same command with "
            "--debug shows where; please report it",
        ),
        (["--how=interrupt"], 130, "error: interrupted"),
        ([], 2, "error: --how is required"),
        (["--how=user", "--row=3"], 2, "error: Unknown command line flag 'row'. Did you mean: rows ?"),
        (["--how=user", "--rows=many"], 2, "error: flag --rows=many: invalid literal for int() with base 10: 'many'"),
        (
            ["--how=nap"],
            2,
            "error: flag --how=nap: value should be one of <user|job|disk|bug|memory|interrupt|sigterm|pipe>",
        ),
        (["--how=user", "3"], 2, "error: unexpected argument '3'; flags are written --name=value"),
    ],
)
def test_one_line_and_the_exit_code(job: Job, arguments: list[str], code: int, line: str) -> None:
    result = job(*arguments)
    assert (result.returncode, result.stderr, result.stdout) == (code, line + "\n", "")


@pytest.mark.parametrize("arguments", [["--how=user"], ["--how=user", "--row=3"], ["--how=bug"]])
def test_debug_shows_the_traceback(job: Job, arguments: list[str]) -> None:
    result = job(*arguments, "--debug")
    assert result.returncode == (1 if arguments == ["--how=bug"] else 2)
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_sigterm_is_an_exception_and_a_second_one_does_not_stop_the_clearing_away(job: Job) -> None:
    result = job("--how=sigterm")
    assert (result.returncode, result.stderr) == (143, "error: stopped by SIGTERM\n")
    assert result.stdout == "cleared away\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_job_s_own_flags(job: Job, flag: str) -> None:
    result = job(flag)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        "usage: python -m failing [--flag=value ...]\n\nFails in the way it is told.\n\nflags:\n"
        f"  --how\n      <{_WAYS}>: Way to fail.\n"
        "  --rows\n      Rows to read. (default: 10)\n"
        "  --[no]keep\n      Keep what was read.\n"
        "  --[no]debug\n      Show the traceback of an error.\n"
    )


def test_a_console_script_shows_the_same(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(JOB)
    script = tmp_path / "stem-fail"
    script.write_text("import failing\nfailing.run()\n")
    helped = subprocess.run([sys.executable, script, "--help"], check=False, capture_output=True, text=True)
    assert helped.stdout.startswith("usage: stem-fail [--flag=value ...]\n\nFails in the way")
    assert "--how" in helped.stdout
    assert subprocess.run([sys.executable, script, "--how=user"], check=False).returncode == 2


def test_a_closed_pipe_is_no_traceback(job: Job, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(JOB)
    process = subprocess.Popen(
        [sys.executable, "-m", "failing", "--how=pipe"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"error: Broken pipe\n"
    assert process.wait() == 1


def test_flag_files(job: Job, tmp_path: Path) -> None:
    flags = tmp_path / "flags"
    flags.write_text("# a comment\n--how=user\n--rows=3\n")
    result = job(f"--flagfile={flags}", "--how=job")
    assert (result.returncode, result.stderr) == (1, "error: a worker died: killed\n")
    flags.write_bytes(b"--how=\xff")
    result = job(f"--flagfile={flags}")
    assert result.returncode == 2 and result.stderr.startswith("error: a --flagfile is not UTF-8 (")
    result = job(f"--flagfile={tmp_path}/none")
    assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_home_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of --output=~/x alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    values = flags.FlagValues()
    flags.DEFINE(cli.PATH, "output", "~/default", "", flag_values=values)
    assert values(["job"]) and values.output == str(tmp_path / "default")
    for text, path in {"~/x": f"{tmp_path}/x", "~": str(tmp_path), "./~": "./~", "a/~/b": "a/~/b", "": ""}.items():
        values(["job", f"--output={text}"])
        assert values.output == path
    with pytest.raises(flags.IllegalFlagValueError, match="its bytes are not UTF-8"):
        values(["job", "--output=a\udcff"])
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.csv").write_text("x\n1\n")
    assert find_files("~/a.csv,~/b*") == [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]


def test_every_flag_that_is_a_path_is_read_as_one() -> None:
    """But --log and those of splits, which are several paths each, and config.data.dir, a key of the config."""
    root = Path(cli.__file__).parent.parent
    defined = re.compile(r'DEFINE_string\(\s*"(\w+)",[^()]*?"[^"]*\b(?:[Dd]irectory|[Ff]ile|path)\b')
    found = {
        name
        for package in ("pipelines", "stem_tf", "export", "benchmarks")
        for path in (root / package).rglob("*.py")
        for name in defined.findall(path.read_text(encoding="utf-8"))
    }
    assert not found


Here = Callable[..., subprocess.CompletedProcess[str]]


def test_jobs_run_one_after_another_in_a_process(job_in_process: Here, tmp_path: Path) -> None:
    """Each with flags of its own, as the --workdir of two of them, which are forgotten afterwards."""
    for job in ("evaluate", "inspect", "evaluate"):
        result = job_in_process(f"stem_tf.jobs.{job}", f"--workdir={tmp_path / job}", "--verbosity=0")
        line = f"error: {tmp_path / job} holds no run (no config.json); stem-train writes one\n"
        assert (result.returncode, result.stdout, result.stderr) == (2, "", line)
        result = job_in_process(f"stem_tf.jobs.{job}")
        assert (result.returncode, result.stderr) == (2, "error: --workdir is required\n")


def test_flags_that_may_be_given_more_than_once_start_empty(job_in_process: Here) -> None:
    """Else the second run would know the first one's."""
    for key in ("a", "b"):
        result = job_in_process("stem_tf.jobs.train", "--config=stem_net", f"--config.{key}=1")
        assert result.returncode == 2 and result.stderr.startswith(f"error: --config.{key}: the config has no such key")


def test_no_flag_of_a_job_is_everybody_s() -> None:
    """A notebook or a program may have a --debug of its own."""
    code = "import absl.flags, stem_tf.jobs.train as j; print({'debug', 'workdir'} & {*absl.flags.FLAGS}, j.__name__)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout == "set() stem_tf.jobs.train\n", done.stderr
