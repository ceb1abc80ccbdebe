"""Watches the workers and parameter servers of a cluster for its chief, from a process of its own. Needs no TensorFlow.

The chief itself cannot always look: TensorFlow tells all of them of each new function, such as the one that writes a
checkpoint, and keeps Python's lock until they have answered. One that hangs never does.
"""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

from stem_tf.cluster import Task

ANSWER_SECONDS = 10.0
"""Time in which a process that does not hang answers."""

_POLL_SECONDS = 1.0


def start(tasks: Sequence[Task], timeout: float, advice: str) -> subprocess.Popen[bytes]:
    """Starts the process that watches ``tasks``.

    It exits with code 1 once one of them has not answered for ``timeout`` seconds, after it has printed a sentence that
    names it and ends with ``advice``. It also ends when its stdin does, and prints what came there.
    """
    spelled = [f"{task.kind} {task.index} {task.address}" for task in tasks]
    command = [sys.executable, "-m", "stem_tf.watch", str(timeout), advice, *spelled]
    return subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)  # Ctrl-C is for this process alone


def listens(task: Task) -> bool:
    """Whether a process listens on a task's port."""
    try:
        socket.create_connection((task.host, task.port), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def hangs(task: Task, patience: float = ANSWER_SECONDS) -> bool:
    """Whether a process leaves a call without an answer in ``patience`` seconds; one that was stopped still listens."""
    with grpc.insecure_channel(task.address) as channel:
        call = channel.unary_unary("/tensorflow.WorkerService/GetStatus")  # an empty message has no bytes
        try:
            call(b"", timeout=patience)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.DEADLINE_EXCEEDED)
    return False


def _watch(timeout: float, advice: str, *spelled: str) -> None:
    """What the process does that :func:`start` starts."""
    tasks = [Task(kind, int(index), address) for kind, index, address in map(str.split, spelled)]
    heard = dict.fromkeys(tasks, time.monotonic())
    with ThreadPoolExecutor(len(tasks)) as pool:
        while not select.select([sys.stdin], [], [], _POLL_SECONDS)[0]:
            hang = pool.map(lambda task: hangs(task, min(ANSWER_SECONDS, timeout / 2)), tasks)
            heard |= {task: time.monotonic() for task, one in zip(tasks, hang, strict=True) if not one}
            silent = [str(task) for task, last in heard.items() if time.monotonic() - last > timeout]
            if silent:
                sys.exit(f"error: no answer from {' and '.join(silent)} for {timeout:g} seconds; {advice}")
    sys.stderr.write(sys.stdin.read())


if __name__ == "__main__":
    _watch(float(sys.argv[1]), *sys.argv[2:])
