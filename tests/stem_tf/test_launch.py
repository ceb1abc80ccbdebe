"""stem-launch: processes that start together and end together, however one of them ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stem_tf.jobs import launch

WORKER = """
import json, os, sys, time
task = json.loads(os.environ["TF_CONFIG"])["task"]
name = f"{task['type']}-{task['index']}"
open(name + ".pid", "w").write(str(os.getpid()))
print("I am", name, flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """``start(code, "--workers=2")``: stem-launch of processes that run ``code``, in ``tmp_path``."""

    def start(code: str, *flags: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "stem_tf.jobs.launch", "--logs=logs", *flags, "--", sys.executable, "-c"]
        return subprocess.Popen(
            [*words, WORKER + code],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(launch.__file__).parents[2])},
        )

    return start


def pids(directory: Path, count: int) -> list[int]:
    """Of the processes, once all have started."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = [path.read_text() for path in directory.glob("*.pid")]
        if len(found) == count and all(found):
            return [int(pid) for pid in found]
        time.sleep(0.02)
    raise AssertionError("the processes did not start")


def gone(pid: int) -> bool:
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_every_process_has_its_task(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    job = start("print(os.environ['TF_CONFIG'])", "--workers=2", "--ps=1")
    out, err = job.communicate(timeout=30)
    assert (job.returncode, err) == (0, "")
    first, mine, config = out.splitlines()
    assert first == "1 chief, 2 worker, 1 ps; output of all but the chief: logs" and mine == "I am chief-0"
    cluster = json.loads(config)["cluster"]
    assert {kind: len(addresses) for kind, addresses in cluster.items()} == {"chief": 1, "worker": 2, "ps": 1}
    assert len({address for of_kind in cluster.values() for address in of_kind}) == 4
    for name in ("worker-0", "worker-1", "ps-0"):
        lines = (tmp_path / "logs" / f"{name}.log").read_text().splitlines()
        assert lines[0] == f"I am {name}" and json.loads(lines[1])["cluster"] == cluster


def test_the_first_failure_ends_all_and_is_told(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    code = "if name == 'worker-1': sys.exit('error: a bad row')\nelse: time.sleep(0.5); sys.exit(3)"
    job = start(code, "--workers=3", "--restarts=1")
    out, err = job.communicate(timeout=30)
    assert job.returncode == 1 and out.count("I am worker-0") == 2
    assert err.count("exit code 1: error: a bad row (logs/worker-1.log)") == 2
    assert err.count("starting again; 0 more times if it fails") == 1


def test_a_mistake_of_the_user_is_not_tried_again(start: Callable[..., subprocess.Popen[str]]) -> None:
    job = start("sys.exit(2)", "--workers=1", "--restarts=5")
    assert job.wait(timeout=30) == 2 and "starting again" not in job.communicate()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_once(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    code = f"""
import signal
signal.signal({int(number)}, lambda *_: (open(name + ".got", "a").write("x"), sys.exit(128 + {int(number)})))
open(name + ".ready", "w").write("x")
time.sleep(60)
"""
    job = start(code, "--workers=2", "--restarts=1")
    found = pids(tmp_path, 2)
    while len(list(tmp_path.glob("*.ready"))) < 2:
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(timeout=30) == 128 + number
    assert [path.read_text() for path in tmp_path.glob("*.got")] == ["x", "x"]
    assert all(map(gone, found))


def test_nothing_is_left_when_it_is_killed_itself(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    job = start("time.sleep(60)", "--workers=2")
    found = pids(tmp_path, 2)
    job.kill()
    assert all(map(gone, found))
    job.communicate()


def test_those_that_do_not_end_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_GRACE", 0.3)
    monkeypatch.chdir(tmp_path)
    code = "import signal; signal.signal(15, signal.SIG_IGN)\nif name == 'worker-0': sys.exit()\ntime.sleep(60)"
    processes = launch.Processes([sys.executable, "-c", WORKER + code], {"worker": 2}, tmp_path)
    processes.wait()  # the chief is done, and nothing else was asked of it
    assert not processes.running


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--workers=2"], "which command? It follows --"),
        (["--workers=2", "--"], "which command? It follows --"),
        (["stem-train", "--config=small"], "which command? It follows --"),
        (["--", "stem-trian"], "no such command: stem-trian"),
        (["--", "/"], "no such command: /"),
        (["--workers=0", "--", "true"], "--workers=0: 0 is not a positive integer"),
        ([f"--logs={__file__}", "--", "true"], "test_launch.py is a file, or lies under one"),
        (["--ps=two", "--", "true"], "--ps=two: invalid literal"),
        (["--servers=2", "--", "true"], "Unknown command line flag 'servers'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    job_in_process: Callable[..., subprocess.CompletedProcess[str]], words: list[str], sentence: str
) -> None:
    job = job_in_process("stem_tf.jobs.launch", *words)
    assert job.returncode == 2 and sentence in job.stderr and job.stderr.count("\n") == 1
