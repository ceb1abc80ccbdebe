"""Serves the windows of a :class:`~pipelines.batches.log_reader.Plan` over Unix sockets.

Each connection gets its own process, which writes into it and ends when the other side closes it. The kernel closes it
if the other side is killed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from pipelines.batches.log_reader import Plan
from stem_util.errors import JobError, UserError

_PATH_BYTES = 100  # the system allows 107
_PACKAGES = str(Path(__file__).resolve().parents[2])


class Streams:
    """Unix sockets, one for each of ``count`` processes that share a plan's parts.

    Args:
      plan: what the processes read.
      count: the number of processes.

    Attributes:
      endpoints: addresses of the sockets in tensorflow-io's notation.
      failure: the error that ended a stream early, or None. It is set before the connection is closed.
    """

    def __init__(self, plan: Plan, count: int) -> None:
        self.failure: Exception | None = None
        self._directory = tempfile.mkdtemp(prefix="stem-")
        self._listeners: list[socket.socket] = []
        self.endpoints: list[str] = []
        if len(os.fsencode(self._directory)) > _PATH_BYTES - 4:
            self.close()
            raise UserError(f"the path of TMPDIR is too long for a socket: {os.path.dirname(self._directory)}")
        for number in range(count):
            path = os.path.join(self._directory, str(number))
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(path)
            listener.listen()
            self._listeners.append(listener)
            self.endpoints.append(f"unix://{path}")
            job = pickle.dumps((plan, number, count))
            threading.Thread(target=self._accept, args=(listener, job), daemon=True).start()

    def close(self) -> None:
        """Accepts no more connections; open ones go on."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
            listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _accept(self, listener: socket.socket, job: bytes) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection, job), daemon=True).start()

    def _serve(self, connection: socket.socket, job: bytes) -> None:
        """Lets a process write to the connection, and sets `failure` before the other side sees the end."""
        with connection:
            try:
                failure: Exception | None = _read(connection, job)
            except Exception as error:
                failure = JobError(f"a process to read the log could not be started: {error}")
            if failure is not None:
                self.failure = self.failure or failure
                self.close()  # tensorflow-io connects again after an error


def _read(connection: socket.socket, job: bytes) -> UserError | JobError | None:
    """Runs the process; returns its error, or None."""
    packages = os.pathsep.join(filter(None, [_PACKAGES, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pipelines.batches.log_reader"],
        stdin=subprocess.PIPE,
        stdout=connection.fileno(),
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": packages},
        process_group=0,  # Ctrl-C reaches the job only
    )
    _, output = process.communicate(job)
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return JobError(f"a process that reads the log was ended by {name}: killed from outside, or out of memory")
    why, _, trace = output.decode(errors="replace").strip().partition("\n")
    failure = UserError(why) if process.returncode == 2 else JobError(f"a process that reads the log failed: {why}")
    failure.__cause__ = RuntimeError(f"in that process:\n{trace}")
    return failure
