"""Reads and writes large JSON in a separate process, because Python's parser lets no other thread run.

The process starts with the first large body. It ends with the server, because its input ends then.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

import grpc
import numpy as np

from export.server import rest_json
from export.server.status import StatusError

Types = Mapping[str, Mapping[str, np.dtype[Any]]]
"""Of inputs, by signature."""
_SIZE_BYTES = 8


def read(body: bytes, types: Types) -> tuple[str, bool, dict[str, np.ndarray]]:
    """Returns a request's signature ("" for the default one), whether it is by row, and its arrays.

    Raises:
      StatusError: INVALID_ARGUMENT, it is not a request for one of these signatures.
    """
    request = rest_json.parse(body)
    if request.signature not in types:
        raise StatusError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f'Serving signature name: "{request.signature or "serving_default"}" not found in signature def',
        )
    return request.signature, request.rows, rest_json.arrays(request, types[request.signature])


_FUNCTIONS: dict[str, Callable[..., Any]] = {"read": read, "answer": rest_json.answer}


class Worker:
    """Calls functions in the other process, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls "read" or "answer" in the process; blocks.

        Raises:
          StatusError: as they do; UNAVAILABLE, the process was killed (the next call starts another one).
        """
        with self._lock:
            if self._process is None:
                self._process = _start()
            try:
                assert self._process.stdin is not None and self._process.stdout is not None
                _send(self._process.stdin, (name, arguments))
                error, result = _receive(self._process.stdout)
            except (OSError, EOFError):
                self._process.kill()
                self._process.wait()
                self._process = None
                raise StatusError(grpc.StatusCode.UNAVAILABLE, "the process that reads large JSON was killed") from None
        if error is not None:
            raise StatusError(*error)
        return result

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()
                self._process = None


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,  # Ctrl-C is for the server, which waits for its calls
    )


def _send(file: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    file.write(len(data).to_bytes(_SIZE_BYTES, "little"))
    file.write(data)
    file.flush()


def _receive(file: IO[bytes]) -> Any:
    head = file.read(_SIZE_BYTES)
    size = int.from_bytes(head, "little")
    data = file.read(size)
    if len(head) < _SIZE_BYTES or len(data) < size:
        raise EOFError
    return pickle.loads(data)


def main() -> None:
    """Answers until the input ends."""
    inputs, outputs = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that prints may get between the answers
    while True:
        try:
            name, arguments = _receive(inputs)
        except EOFError:
            return
        try:
            _send(outputs, (None, _FUNCTIONS[name](*arguments)))
        except StatusError as error:
            _send(outputs, ((error.number, error.text), None))


if __name__ == "__main__":
    main()
