"""How the processes of a cluster meet: each connects to the chief, which compares what they say about themselves.

They meet at the chief's address before TensorFlow starts, which then opens the same port for itself; the connections
stay. A message is a kind, a value as JSON, and arrays of numbers.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_tf.cluster import VARIABLE, Cluster, Task
from stem_util.errors import JobError, UserError

Arrays = Mapping[str, NDArray]

_LONGEST = 1 << 24  # bytes of a message without its arrays
_HELLO = "stem-tf"
_SETTINGS = b"\x04" + bytes(5)
"""How an HTTP/2 server begins, such as TensorFlow's, after the length of this frame: type, no flags, stream 0."""


def connect(
    cluster: Cluster, about: Mapping[str, Any], timeout: float, may_be_late: bool = False
) -> dict[int, socket.socket]:
    """Connects this process to the chief or, if it is the chief, all others to it; returns when all have come.

    Args:
      cluster: where they are; tasks are numbered in its order.
      about: what has to be the same in all processes, by name.
      timeout: seconds to wait for the others.
      may_be_late: whether this process may come when the others have met before: it then gets no connection.

    Returns:
      The connections, by the number of the task at the other side.

    Raises:
      UserError: something differs between the processes, or two of them are the same task.
      JobError: a process has not come in time.
    """
    about = json.loads(json.dumps({f"{VARIABLE}'s cluster": cluster.addresses, **about}))
    if cluster.is_chief:
        return _await_others(cluster, about, timeout)
    return _join_chief(cluster, about, timeout, may_be_late)


def _await_others(cluster: Cluster, about: Mapping[str, Any], timeout: float) -> dict[int, socket.socket]:
    """Accepts a connection from each other process, by rank, and compares what they say about themselves."""
    tasks, deadline = cluster.tasks, time.monotonic() + timeout
    found: dict[int, socket.socket] = {}
    wrong = ""
    # One listener on a port: it is closed, and its connections stay, before TensorFlow opens the port.
    with _listener(cluster.task.port, len(tasks)) as listener:
        while len(found) < len(tasks) - 1 and not wrong:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = " and ".join(str(task) for rank, task in enumerate(tasks) if rank and rank not in found)
                late = f"{missing} did not come within {timeout:g} s: its own output may say why"
                _answer(found, "refused", late)
                raise JobError(late) from None
            hello = _hello(connection)
            if hello is None or not 0 < hello[0] < len(tasks):
                connection.close()
                continue
            rank, theirs = hello
            if rank in found and _pending(found[rank]) != b"":
                wrong = f"two processes are {tasks[rank]}: each needs a {VARIABLE} with an index of its own"
                _answer({rank: connection}, "refused", wrong)
            else:
                wrong, found[rank] = _difference(about, theirs, tasks[0], tasks[rank]), connection
    _answer(found, *(("refused", wrong) if wrong else ("welcome", "")))
    if wrong:
        raise UserError(wrong)
    return found


def _listener(port: int, backlog: int) -> socket.socket:
    """Listens on a port of all addresses, of IPv6 too where the machine has it."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def _join_chief(
    cluster: Cluster, about: Mapping[str, Any], timeout: float, may_be_late: bool
) -> dict[int, socket.socket]:
    """Connects to the chief, and waits until it has heard from all."""
    chief, deadline = cluster.chief, time.monotonic() + timeout
    hello = json.dumps([_HELLO, cluster.tasks.index(cluster.task), about])
    why = ""
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((chief.host, chief.port), deadline - time.monotonic())
            write(connection, "hello", hello, {})
            if may_be_late and connection.recv(9, socket.MSG_PEEK | socket.MSG_WAITALL)[3:] == _SETTINGS:
                return {}
            kind, sentence, _ = read(connection)
            if kind == "welcome":
                return {0: connection}
            if kind == "refused":
                raise UserError(sentence)
        except (OSError, ValueError, EOFError) as error:
            why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        time.sleep(0.2)
    raise JobError(
        f"{chief} did not answer within {timeout:g} s{why}: start all processes of a cluster together, and all again "
        "where one has ended"
    )


def _hello(connection: socket.socket) -> tuple[int, Mapping[str, Any]] | None:
    """Rank and description of the process that has connected; None where it is no process of ours."""
    connection.settimeout(5.0)
    with contextlib.suppress(OSError, ValueError, EOFError):
        _, (magic, rank, about), _ = read(connection)
        if magic == _HELLO and isinstance(rank, int) and isinstance(about, dict):
            return rank, about
    return None


def has_news(connection: socket.socket) -> bool:
    """Whether something can be read from a connection, or it has ended."""
    return _pending(connection) is not None


def _pending(connection: socket.socket) -> bytes | None:
    """The next byte of a connection, which stays there; b"" where it has ended, None where nothing has come."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], me: Task, other: Task) -> str:
    """What differs between two processes, in words; "" where nothing does."""
    for name in dict.fromkeys([*mine, *theirs]):
        if mine.get(name) != theirs.get(name):
            return (
                f"{name} is {theirs.get(name)} in {other}, and {mine.get(name)} in {me}: start all processes of a "
                "cluster with the same versions, config and data"
            )
    return ""


def _answer(connections: Mapping[int, socket.socket], kind: str, sentence: str) -> None:
    for connection in connections.values():
        with contextlib.suppress(OSError):
            write(connection, kind, json.dumps(sentence), {})


def write(connection: socket.socket, kind: str, text: str, arrays: Arrays) -> None:
    """Sends a message."""
    shapes = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    head = json.dumps([kind, text, shapes]).encode()
    connection.sendall(struct.pack(">I", len(head)) + head)
    for array in arrays.values():
        connection.sendall(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read(connection: socket.socket, alive: Callable[[], None] = lambda: None) -> tuple[str, Any, Arrays]:
    """The next message; ``alive`` is called whenever a part of it has come."""

    def fill(buffer: memoryview) -> None:
        while buffer:
            count = connection.recv_into(buffer)
            if not count:
                raise EOFError
            alive()
            buffer = buffer[count:]

    size = bytearray(4)
    fill(memoryview(size))
    length = int.from_bytes(size)
    if length > _LONGEST:
        raise ValueError(f"a message of {length} bytes")
    head = bytearray(length)
    fill(memoryview(head))
    kind, text, shapes = json.loads(head)
    arrays = {name: np.empty(shape, np.dtype(dtype)) for name, (dtype, shape) in shapes.items()}
    for array in arrays.values():
        if array.dtype.hasobject:
            raise ValueError("an array of objects")
        fill(array.reshape(-1).view(np.uint8).data)
    return kind, json.loads(text), arrays
