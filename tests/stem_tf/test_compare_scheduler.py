"""Processes side by side: room by number, memory and device; how they end; and that none outlives the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stem_tf.compare import scheduler
from stem_tf.compare.scheduler import Ended, Scheduler

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def say(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, signal, time; {code}"]


def all_ended(running: Scheduler) -> dict[str, Ended]:
    ended: dict[str, Ended] = {}
    until = time.monotonic() + 60
    while running.running and time.monotonic() < until:
        ended |= {one.name: one for one in running.wait(until)}
    return ended


def test_how_processes_end(tmp_path: Path) -> None:
    runs = Scheduler(4, measured=False)
    runs.start("good", say("x = bytearray(200_000_000); print('fine'); time.sleep(1)"), tmp_path / "deep" / "good.log")
    runs.start("bad", say("print('one'); print('error: it broke', file=sys.stderr); sys.exit(2)"), tmp_path / "bad.log")
    runs.start("killed", say("os.kill(os.getpid(), 9)"), tmp_path / "killed.log")
    runs.start("silent", say("sys.exit(3)"), tmp_path / "silent.log")
    assert not runs.may_start() and len(runs.running) == 4
    ended = all_ended(runs)
    assert (ended["good"].code, ended["good"].why) == (0, "") and ended["good"].peak_bytes > 200_000_000
    assert (ended["bad"].code, ended["bad"].why) == (2, "it broke")
    assert ended["killed"].code == -9 and "SIGKILL: by the system for lack of memory" in ended["killed"].why
    assert ended["silent"].why == "exit code 3, and it said nothing"
    assert runs.wait(0) == [] and runs.may_start()


def test_threads_and_devices_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "cores", lambda: 7)
    runs = Scheduler(3, measured=False, devices=("4", "6"))
    code = "print(os.environ['TF_NUM_INTRAOP_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(1)"
    for name in "abc":
        runs.start(name, say(code), tmp_path / name)
    assert all(one.code == 0 for one in all_ended(runs).values())
    assert [(tmp_path / name).read_text().split() for name in "abc"] == [["2", "4"], ["2", "6"], ["2", "4"]]


def test_memory_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10**12
    monkeypatch.setattr(scheduler, "available_bytes", lambda: free)
    monkeypatch.setattr(scheduler, "_SETTLED_SECONDS", 0.5)
    runs = Scheduler(3)
    runs.start("first", SLEEP, tmp_path / "first")
    assert not runs.may_start()  # its memory says nothing yet
    time.sleep(0.6)
    assert runs.may_start()
    free = 10**6
    assert not runs.may_start()
    runs.stop()
    assert runs.may_start()  # one may always run
    free = 10**9
    runs.start("large", say("x = bytearray(300_000_000); time.sleep(1)"), tmp_path / "large")
    all_ended(runs)
    runs.start("second", SLEEP, tmp_path / "second")
    assert runs.may_start()
    free = 400_000_000  # the running one has still to grow to 300 MB, and another one would, too
    assert not runs.may_start()
    runs.stop()


def test_stop_waits_for_checkpoints_and_then_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Scheduler(2, measured=False)
    runs.start(
        "polite", say("signal.signal(15, lambda *_: sys.exit(7)); print(1, flush=True); time.sleep(60)"), tmp_path / "p"
    )
    runs.start("deaf", say("signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"), tmp_path / "d")
    until = time.monotonic() + 30
    while not all((tmp_path / name).read_text() for name in "pd") and time.monotonic() < until:
        time.sleep(0.05)
    monkeypatch.setattr(scheduler, "_PATIENCE_SECONDS", 1.0)
    ended = {one.name: one.code for one in runs.stop()}
    assert ended == {"polite": 7, "deaf": -9} and not runs.running


JOB = """
import sys, time
from pathlib import Path
from stem_tf.compare.scheduler import Scheduler
runs = Scheduler(1)
code = "import os, sys, time; from stem_util.processes import end_with; end_with(int(sys.argv[-1][9:]));"
runs.start("cell", [sys.executable, "-c", code + "print(os.getpid(), flush=True); time.sleep(100)"], Path(sys.argv[1]))
time.sleep(100)
"""


def test_cells_end_with_a_job_that_is_killed(tmp_path: Path) -> None:
    job = subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path / "log")])
    until = time.monotonic() + 60
    while not ((tmp_path / "log").exists() and (tmp_path / "log").read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    cell = int((tmp_path / "log").read_text())
    job.send_signal(signal.SIGKILL)
    job.wait()
    while Path(f"/proc/{cell}").exists() and time.monotonic() < until:
        stat = Path(f"/proc/{cell}/stat").read_text() if Path(f"/proc/{cell}/stat").exists() else ") Z"
        if stat.rpartition(")")[2].split()[0] == "Z":
            break  # dead, and not waited for by whoever has inherited it
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{cell}").exists()


def test_available_memory_is_positive() -> None:
    assert 0 < scheduler.available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
