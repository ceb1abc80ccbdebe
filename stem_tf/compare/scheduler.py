"""Runs the processes of cells side by side, as many as cores, memory and devices allow."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stem_util import files

_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 60.0
"""How long cells that are told to stop may take to write a checkpoint."""
_SETTLED_SECONDS = 20.0
"""How long a first cell runs before its memory says something about others."""
_STILL_TO_GROW = 1.5
"""Before any cell has ended: the peak of a cell over what running ones have taken so far."""
_SPARE = 1.1
"""Memory that must be free for another cell, over what it is expected to take."""
_MEMORY = re.compile(r"^Vm(HWM|RSS):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
      name: as it was started under.
      code: exit code; the negative number of a signal that killed it.
      seconds: how long it ran.
      peak_bytes: the most memory that it held.
      why: one sentence about a failure; "" for a code of 0.
    """

    name: str
    code: int
    seconds: float
    peak_bytes: int
    why: str


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    device: str | None
    peak: int = 0

    def resident(self) -> int:
        """Bytes that it holds now; 0 if it has just ended. Notes its peak.

        Not the peak that the system reports at its end: that counts this process, which it was a copy of at its start.
        """
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        found = {name: int(number) * 1024 for name, number in _MEMORY.findall(status)}
        self.peak = max(self.peak, found.get("HWM", 0))
        return found.get("RSS", 0)


class Scheduler:
    """Starts processes and waits for them. They end with this process, however it ends.

    Args:
      most: how many may run side by side.
      measured: whether free memory decides, too; not where a user says how many.
      devices: CUDA devices, which take turns; each process sees one. None where there are none.
    """

    def __init__(self, most: int, *, measured: bool = True, devices: Sequence[str] = ()) -> None:
        self.most, self._measured, self._devices = most, measured, tuple(devices)
        self.threads = max(1, cores() // most)
        self._running: dict[str, _Running] = {}
        self._peak = 0

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the processes that run."""
        return tuple(self._running)

    def may_start(self) -> bool:
        """Whether there is room for another process. One is always allowed to run."""
        if not self._running:
            return True
        if len(self._running) >= self.most:
            return False
        return not self._measured or self._fits()

    def _fits(self) -> bool:
        """Whether memory is free for one more, when those that run have grown as large as the largest so far."""
        resident = [running.resident() for running in self._running.values()]
        expected = max(self._peak, *resident)
        if not self._peak:
            newest = max(running.started for running in self._running.values())
            if time.monotonic() - newest < _SETTLED_SECONDS:
                return False
            expected = int(expected * _STILL_TO_GROW)
        growing = sum(max(0, expected - now) for now in resident)
        return available_bytes() - growing > expected * _SPARE

    def start(self, name: str, command: Sequence[str], log: Path) -> None:
        """Starts a process whose output goes to ``log``."""
        environment = dict(os.environ)
        if self.most > 1:
            threads = {"TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
            environment |= dict.fromkeys(threads, str(self.threads))
        device = None
        if self._devices:
            used = [running.device for running in self._running.values()]
            device = min(self._devices, key=used.count)
            environment["CUDA_VISIBLE_DEVICES"] = device
        files.make_directory(log.parent)
        with open(log, "wb") as output:
            # A session of its own: Ctrl-C reaches this process alone, which then tells the others.
            process = subprocess.Popen(
                [*command, f"--parent={os.getpid()}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._running[name] = _Running(process, log, time.monotonic(), device)

    def wait(self, until: float) -> list[Ended]:
        """The processes that have ended, as soon as one has, or none after the time ``until`` of time.monotonic."""
        while True:
            found = [ended for name in self.running if (ended := self._poll(name)) is not None]
            if found or time.monotonic() >= until:
                return found
            time.sleep(_POLL_SECONDS)

    def _poll(self, name: str) -> Ended | None:
        running = self._running[name]
        running.resident()
        code = running.process.poll()
        if code is None:
            return None
        if code == 0:
            self._peak = max(self._peak, running.peak)
        del self._running[name]
        why = _why(code, running.log) if code else ""
        return Ended(name, code, time.monotonic() - running.started, running.peak, why)

    def stop(self) -> list[Ended]:
        """Tells all processes to stop, which a training does after a checkpoint, and waits for them."""
        for running in self._running.values():
            _signal(running, signal.SIGTERM)
        ended, until = [], time.monotonic() + _PATIENCE_SECONDS
        try:
            while self._running and time.monotonic() < until:
                ended += self.wait(until)
        finally:
            for running in self._running.values():
                _signal(running, signal.SIGKILL)
            while self._running:
                ended += self.wait(time.monotonic() + 1)
        return ended


def _signal(running: _Running, number: int) -> None:
    """Sends a signal to a process that has not been waited for, and to those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, number)


def _why(code: int, log: Path) -> str:
    """A sentence about a process that failed: what it said last."""
    if code == -signal.SIGKILL:
        return "killed by SIGKILL: by the system for lack of memory, or by somebody"
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return said.removeprefix("error: ") or f"{ended}, and it said nothing"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def available_bytes() -> int:
    """Memory that can be had without swapping: of the machine, and of the control group (a container's limit)."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = [int(found[1]) * 1024] if found else []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = next(line.removeprefix("0::/") for line in lines if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup") / group
        limit = int((folder / "memory.max").read_text())  # "max" is no limit
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / "memory.current").read_text()) - int(statistics["inactive_file"])
        free.append(limit - used)
    return min(free)
