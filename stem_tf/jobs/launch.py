"""Starts a cluster of processes on this machine, each with its TF_CONFIG, and ends them together.

stem-launch --workers=2 -- stem-train --config=small --config.data.dir=DATA --config.train.strategy=multi_worker

The chief's output goes to the terminal, that of the others into files. SIGTERM and Ctrl-C are passed on to all. When a
process fails, the others are ended, and the job exits with its exit code. If the job itself is killed, so are they.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from stem_tf.cluster import VARIABLE, Task
from stem_util import cli, files
from stem_util.errors import UserError
from stem_util.processes import end_with

flags = cli.Flags()

_WORKERS = flags.DEFINE_integer("workers", 1, "Workers.", lower_bound=1)
_PS = flags.DEFINE_integer("ps", 0, "Parameter servers; with them there is a chief, too.", lower_bound=0)
_CHIEF = flags.DEFINE_bool("chief", False, "A chief beside the workers; otherwise the first worker is the chief.")
_RESTARTS = flags.DEFINE_integer(
    "restarts", 0, "How often to start the whole cluster again when a process has failed.", lower_bound=0
)
_LOGS = flags.DEFINE(
    cli.PATH, "logs", None, "Directory for the output of all processes but the chief; a temporary one by default."
)

_WHICH_COMMAND = "which command? It follows --, as in stem-launch --workers=2 -- stem-train --config=..."
_GRACE = 10.0  # seconds: for the others to notice by themselves, and again to end on SIGTERM
_USER_ERROR = 2


class Processes:
    """The processes of a cluster on this machine.

    Args:
      command: what each runs.
      counts: number of tasks by kind, the chief's kind first.
      logs: directory of the output of all but the first task.
    """

    def __init__(self, command: Sequence[str], counts: dict[str, int], logs: Path) -> None:
        self._logs = logs
        self.running: dict[Task, subprocess.Popen[bytes]] = {}
        self.failed: tuple[Task, int] | None = None
        ports = iter(free_ports(sum(counts.values())))
        cluster = {kind: [f"127.0.0.1:{next(ports)}" for _ in range(count)] for kind, count in counts.items()}
        tasks = [
            Task(kind, index, of_kind[index]) for kind, of_kind in cluster.items() for index in range(len(of_kind))
        ]
        self.chief, parent = tasks[0], os.getpid()
        for task in tasks:
            config = json.dumps({"cluster": cluster, "task": {"type": task.kind, "index": task.index}})
            with contextlib.ExitStack() as stack:
                output = None if task == self.chief else stack.enter_context(open(self.log(task), "wb"))
                self.running[task] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output and subprocess.STDOUT,
                    env=os.environ | {VARIABLE: config},
                    process_group=0,  # Ctrl-C comes from this process only, once
                    preexec_fn=lambda: end_with(parent),
                )

    def log(self, task: Task) -> Path:
        """The file that holds a task's output."""
        return self._logs / f"{task.kind}-{task.index}.log"

    def send(self, number: int) -> None:
        """Sends a signal to all that run."""
        for process in self.running.values():
            process.send_signal(number)

    def wait(self) -> None:
        """Returns when all have ended. Once one has failed, or the chief is done, the others have to end, too."""
        ending = 0.0
        number = signal.SIGTERM
        while self.running:
            time.sleep(0.01)
            ended = {task: process.poll() for task, process in self.running.items()}
            codes = {task: code for task, code in ended.items() if code is not None}
            for task in codes:
                del self.running[task]
            # Killed ones first: the others may have noticed at once.
            failures = sorted((code, task.index, task) for task, code in codes.items() if code)
            if failures and self.failed is None:
                self.failed = failures[0][2], failures[0][0]
            if not ending and (failures or self.chief in codes):
                ending = time.monotonic()
            if ending and time.monotonic() - ending > _GRACE:
                self.send(number)
                ending, number = time.monotonic(), signal.SIGKILL

    def kill(self) -> None:
        """Ends what still runs."""
        self.send(signal.SIGKILL)
        for process in self.running.values():
            process.wait()

    def why_failed(self, task: Task, code: int) -> str:
        """How a task ended, in words, with the last line of its output."""
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if task == self.chief:
            return f"{task} {ended}"
        lines = self.log(task).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f"{task} {ended}: {last} ({self.log(task)})"


def main(argv: Sequence[str]) -> None:
    command = list(argv[1:])
    if not command:
        raise UserError(_WHICH_COMMAND)
    command[0] = _program(command[0])
    counts = {"chief": int(_CHIEF.value or _PS.value > 0), "worker": _WORKERS.value, "ps": _PS.value}
    counts = {kind: count for kind, count in counts.items() if count}
    logs = Path(_LOGS.value or tempfile.mkdtemp(prefix="stem-launch-"))
    files.make_directory(logs)
    print(
        f"{', '.join(f'{count} {kind}' for kind, count in counts.items())}; output of all but the chief: {logs}",
        flush=True,
    )
    for left in reversed(range(_RESTARTS.value + 1)):
        processes = Processes(command, counts, logs)
        try:
            with _passing_on(processes) as signals:
                processes.wait()
        finally:
            processes.kill()
        if processes.failed is None:
            if _LOGS.value is None:
                shutil.rmtree(logs)
            return
        task, code = processes.failed
        if not signals:
            print(f"stem-launch: {processes.why_failed(task, code)}", file=sys.stderr, flush=True)
        if signals or code == _USER_ERROR or not left:
            sys.exit(code if code > 0 else 128 - code)
        print(f"stem-launch: starting again; {left - 1} more times if it fails", file=sys.stderr, flush=True)


def _program(name: str) -> str:
    """The path of a program; the console scripts of this installation are found where PATH lacks them."""
    beside = os.path.join(os.path.dirname(sys.executable), name)
    found = shutil.which(name) or shutil.which(beside)
    if found is None:
        raise UserError(f"no such command: {name}")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


@contextlib.contextmanager
def _passing_on(processes: Processes) -> Iterator[list[int]]:
    """Passes SIGTERM and Ctrl-C on to the processes; yields a list of those that have come."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(number)
        processes.send(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _with_command(arguments: Sequence[str]) -> list[str]:
    """Refuses a command line without ``--``, whose command's flags would be taken for the job's."""
    if "--" not in arguments:
        raise UserError(_WHICH_COMMAND)
    return list(arguments)


def run() -> None:
    """Console script ``stem-launch``."""
    cli.run(main, flags, "-- COMMAND...", rewritten=_with_command)


if __name__ == "__main__":
    run()
