"""The access log: one line per call, a JSON object, written by a thread of its own.

Calls hand over the fields of a line through a bounded queue. If the disk is full, the file is gone or nobody reads the
pipe, lines are lost and counted, and serving goes on. A file that was renamed or removed (logrotate) is opened again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from export.server.observation import Observation
from stem_util.errors import UserError

_WAITING = 10_000
_AT_A_TIME = 2000
_GATHER_SECONDS = 0.1
_LOOK_SECONDS = 1.0
_LONGEST_NAME, _LONGEST_ERROR = 128, 256
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def request_id(given: str | bytes | None) -> str:
    """The client's ``x-request-id`` if it is 1 to 128 visible ASCII characters, else a new one."""
    text = given.decode("latin-1") if isinstance(given, bytes) else given
    return text if text and _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


class AccessLog:
    """Writes calls to a file.

    Args:
      path: the file, or "-" for stdout. It is appended to.
      report: called with a line for the operator when writing fails, and when it works again.

    Raises:
      UserError: the file cannot be opened.
    """

    def __init__(self, path: str, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING)
        self._lost, self._lost_lock = 0, threading.Lock()
        self._file: int | None = None
        self._looked = 0.0
        self._torn, self._failing = False, False
        if path != "-":
            try:
                # Opening a pipe that nobody reads yet blocks. The thread may wait for a reader, the server may not.
                os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o640))
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise UserError(f"--access_log={path}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
        self._thread.start()

    def observe(self, seen: Observation) -> None:
        """Queues a call for the log. Does not block; any thread may call it."""
        fields = {
            "time": time.time(),
            "request_id": seen.request_id,
            "peer": seen.peer,
            "entrypoint": seen.entrypoint,
            "method": seen.method[:_LONGEST_NAME],
            "model": seen.model[:_LONGEST_NAME],
            "version": seen.version,
            "signature": seen.signature[:_LONGEST_NAME],
            "code": seen.code.name,
            "rows": seen.rows,
            "request_bytes": seen.request_bytes,
            "response_bytes": seen.response_bytes,
            "ms": round(seen.seconds * 1e3, 3),
            "waited_ms": round(seen.waited * 1e3, 3),
        }
        if seen.text:
            fields["error"] = seen.text[:_LONGEST_ERROR]
        try:
            self._queue.put_nowait(fields)
        except queue.Full:
            self._lose(1)

    def close(self, timeout: float) -> None:
        """Writes the lines that wait, for at most ``timeout`` seconds."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            calls = [self._queue.get()]
            if calls[0] is not None:
                time.sleep(_GATHER_SECONDS)  # waking for each call would slow calls more than writing does
            with contextlib.suppress(queue.Empty):
                while len(calls) < _AT_A_TIME:
                    calls.append(self._queue.get_nowait())
            self._write([call for call in calls if call is not None])
            if None in calls:
                return

    def _write(self, calls: list[dict[str, Any]]) -> None:
        with self._lost_lock:
            lost = self._lost
        lines = [json.dumps({"time": _stamp(time.time()), "lost": lost})] if lost else []
        lines += [json.dumps(call | {"time": _stamp(call["time"])}) for call in calls]
        if not lines:
            return
        try:
            self._open()
            # If the last write ended inside a line, the next record starts on a new line.
            self._put(("\n" if self._torn else "") + "\n".join(lines) + "\n")
        except OSError as error:
            self._lose(len(calls))
            if not self._failing:
                self._failing = True
                self._report(f"the access log {self._path} cannot be written: {error.strerror}; lines are lost")
            if self._file is not None and self._path != "-":
                os.close(self._file)
                self._file = None
            return
        self._lose(-lost)
        if self._failing:
            self._failing = False
            self._report(f"the access log {self._path} is written again; {lost} lines were lost")

    def _open(self) -> None:
        """Opens the file if it is not open, or if its name now belongs to another file."""
        if self._path == "-":
            self._file = 1
            return
        now = time.monotonic()
        if self._file is not None and now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if self._file is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                    return
            os.close(self._file)
            self._file = None
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._torn = False

    def _put(self, text: str) -> None:
        data = memoryview(text.encode())
        written = 0
        assert self._file is not None
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        finally:
            if written:
                self._torn = data[written - 1] != ord("\n")

    def _lose(self, lines: int) -> None:
        with self._lost_lock:
            self._lost += lines


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
