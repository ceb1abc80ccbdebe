"""The processes that train a run together talk to each other, beside TensorFlow's own collectives.

Every process holds one connection to the chief, for as long as the run takes::

    at the start      do all have the same version, config and data?
    once a second     a beat with the process's position, so that one that hangs or has died is named
    between epochs    rows scored by each, to the chief (``gather``); what the chief has found, to all (``decide``)
    on a signal       all stop after the same step: each says how far it is, and the furthest is where they stop

A process that learns that another has failed ends at once: its main thread may be inside a collective operation, and
nothing interrupts that. Files are written whole or not at all, so it may end at any time.

Workers and parameter servers say less to their chief, which alone trains, and finds out by itself whether they live:
that they are asked to stop. They hear how the run has ended. One that is started again has no connection.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from stem_tf import meeting
from stem_tf.cluster import Cluster, Task
from stem_tf.meeting import Arrays, read, write
from stem_util.errors import Stopped, UserError, message

T = TypeVar("T")

RESUME = "start all processes again with the same command, and the run goes on from its last checkpoint"

_BEAT = 1.0  # seconds between beats, at most
_NEWS = 10.0  # seconds in which the end of another process becomes known
_SILENT = 5.0  # seconds without a beat, after which a process may be why an operation of TensorFlow has failed
_READING = 0.3  # seconds for the others to read the last message, lost if this process ends with messages unread
_CODES = {UserError: 2, Stopped: 128 + signal.SIGTERM, KeyboardInterrupt: 128 + signal.SIGINT}  # as of stem_util.cli


class Interrupted(Exception):
    """A signal asked the job to end; ``signal`` is its number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal = signal_number


class Peers:
    """The processes of a run, of which there is one: what :class:`Connected` does among several.

    Attributes:
      count: how many there are.
      rank: this one's number, from 0.
    """

    count, rank = 1, 0

    def __init__(self) -> None:
        self._wish: int | None = None

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the work directory, and speaks for all."""
        return self.rank == 0

    def ask_to_stop(self, number: int) -> None:
        """Asks all processes to stop, because of signal ``number``; may be called by a signal handler."""
        self._wish = number

    def launch(self) -> None:
        """Call before each execution of steps, which all processes make together; raises as :meth:`check`."""

    def check(self) -> None:
        """Raises Interrupted where all processes are to stop."""
        if self._wish is not None:
            raise Interrupted(self._wish)

    def decide(self, decision: Callable[[], T]) -> T:
        """What ``decision``, which only the chief calls, returns: numbers, strings, lists, dicts, None."""
        return decision()

    def gather(self, arrays: Arrays) -> list[Arrays]:
        """The arrays of all processes, in the order of their ranks; [] in a process that is not the chief."""
        return [arrays]

    def await_news(self) -> None:
        """Call where an operation of TensorFlow has failed: a process that has ended may be the cause.

        News of one ends this process; it returns where none comes.
        """


class Connected(Peers):
    """The processes of a cluster; see :func:`meet`.

    Args:
      tasks: the processes, in the order of their ranks.
      rank: which of them this is.
      connections: to every other process if this is the chief, else to the chief; by rank.
      timeout: seconds after which a process that does not answer ends the run.
    """

    def __init__(
        self, tasks: tuple[Task, ...], rank: int, connections: Mapping[int, socket.socket], timeout: float
    ) -> None:
        super().__init__()
        self.count, self.rank = len(tasks), rank
        self._tasks, self._timeout = tasks, timeout
        self._stderr = os.fdopen(os.dup(2), "w")  # also while TensorFlow starts with stderr closed
        self._changed = threading.Condition()
        self._position = self._progress = 0  # executions launched; those and batches evaluated
        self._waiting = self._paused = self._ending = False
        self._votes: dict[int, int] = {}
        self._stop: tuple[int, int] | None = None  # the position to stop at, and the signal
        self._others = {peer: _Other(connection) for peer, connection in connections.items()}
        for peer in self._others:
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def launch(self) -> None:
        with self._changed:
            self._go_on()
            self._position += 1

    def check(self) -> None:
        with self._changed:
            self._go_on()

    def decide(self, decision: Callable[[], T]) -> T:
        if not self.is_chief:
            value: T = self._receive(0)[0]
            return value
        value = json.loads(text := json.dumps(decision()))  # as the others read it
        for other in self._others.values():
            self._send(other, "value", text)
        return value

    def gather(self, arrays: Arrays) -> list[Arrays]:
        if self.is_chief:
            return [arrays, *(self._receive(peer)[1] for peer in sorted(self._others))]
        self._send(self._others[0], "value", "null", arrays)
        return []

    def await_news(self) -> None:
        end = time.monotonic() + _NEWS
        while (now := time.monotonic()) < end:
            for peer, other in self._others.items():
                if not other.done and now - other.heard > _SILENT:
                    self._fail_of_silence(peer, now - other.heard)
            time.sleep(0.1)

    def _go_on(self) -> None:
        """Waits while positions are compared; raises Interrupted where all processes are to stop."""
        self._progress += 1
        self._changed.wait_for(lambda: not self._paused)
        if (number := self._stopped_by()) is not None:
            raise Interrupted(number)

    def _stopped_by(self) -> int | None:
        """The signal by which all processes stop at this position."""
        return self._stop[1] if self._stop is not None and self._position >= self._stop[0] else None

    def _receive(self, peer: int) -> tuple[Any, Arrays]:
        """The next value that a peer has sent; it may also have stopped before it sent one."""
        values = self._others[peer].values
        with self._changed:
            self._waiting = True
            self._changed.wait_for(lambda: values or self._stopped_by() is not None)
            self._waiting = False
            if not values:
                self._go_on()
            return values.popleft()

    def _send(self, other: _Other, kind: str, text: str, arrays: Arrays | None = None) -> None:
        try:
            with other.lock:
                write(other.connection, kind, text, arrays or {})
        except OSError:
            time.sleep(self._timeout)  # it has gone: the thread that listens to it ends this process

    def _listen(self, peer: int) -> None:
        """Reads what a peer sends until the connection ends."""
        other = self._others[peer]
        with contextlib.suppress(OSError, ValueError, EOFError):
            while True:
                kind, value, arrays = read(other.connection, other.note)
                with self._changed:
                    reply = self._note(peer, kind, value, arrays)
                    self._changed.notify_all()
                if reply is not None:
                    other.tell("position", reply)
        with self._changed:
            if other.done or self._ending:
                return
        self._fail(f"{self._tasks[peer]} has ended without a word: killed, or out of memory; {RESUME}")

    def _note(self, peer: int, kind: str, value: Any, arrays: Arrays) -> int | None:
        """Acts on a message, with the lock held; returns this process's position where the chief asks for it."""
        other = self._others[peer]
        if kind == "value":
            other.values.append((value, arrays))
        elif kind == "beat":
            other.state = tuple(value)
        elif kind == "stop":  # to the chief
            self._wish = value
        elif kind == "pause":  # from the chief
            self._paused = True
            return self._position
        elif kind == "position":
            self._votes[peer] = value
        elif kind == "stop at":
            self._stop, self._paused = tuple(value), False
        elif kind == "failed":
            self._fail(*value)
        elif kind == "done":
            other.done = True
        return None

    def _watch(self) -> None:
        """Sends beats, passes signals on, and ends the process when another does not answer."""
        beat = min(_BEAT, self._timeout / 10)
        last, since = None, time.monotonic()
        next_beat = 0.0
        while not self._ending:
            time.sleep(0.05)
            with self._changed:
                news = self._news_of_signal()
                state = (self._position, self._progress, self._waiting)
            if news is not None:
                self._tell_all(*news)
            if time.monotonic() < next_beat:
                continue
            next_beat = time.monotonic() + beat
            for peer, other in self._others.items():
                other.tell("beat", state, even_if_busy=False)
                if not other.done and time.monotonic() - other.heard > self._timeout:
                    self._fail_of_silence(peer, self._timeout)
            if self.is_chief:
                states = {0: state} | {peer: other.state for peer, other in self._others.items()}
                if states != last:
                    last, since = states, time.monotonic()
                elif time.monotonic() - since > self._timeout:
                    self._fail(self._why_stuck(states))

    def _news_of_signal(self) -> tuple[str, Any] | None:
        """What to tell the others of a signal; called with the lock held.

        The chief compares the positions of all, and says where they stop.
        """
        if self._wish is None or self._stop is not None:
            return None
        if not self.is_chief:
            number, self._wish = self._wish, None
            return "stop", number
        if not self._paused:
            self._paused, self._votes = True, {0: self._position}
            return "pause", None
        if len(self._votes) < self.count:
            return None
        self._stop, self._paused = (max(self._votes.values()), self._wish), False
        self._changed.notify_all()
        return "stop at", self._stop

    def _tell_all(self, kind: str, value: Any) -> None:
        for other in self._others.values():
            other.tell(kind, value)

    def _why_stuck(self, states: Mapping[int, tuple[int, int, bool]]) -> str:
        """Names the processes that the others wait for."""
        least = min(position for position, _, _ in states.values())
        behind = [peer for peer, (position, _, waiting) in states.items() if position == least and not waiting]
        names = " and ".join(str(self._tasks[peer]) for peer in behind)
        what = (
            f"the others wait for {names}" if behind and len(behind) < self.count else "nobody is ahead of the others"
        )
        return f"no process has made progress for {self._timeout:g} s: {what}; {RESUME}"

    def _fail_of_silence(self, peer: int, seconds: float) -> NoReturn:
        self._fail(f"{self._tasks[peer]} has not answered for {seconds:.3g} s: it hangs, or is cut off; {RESUME}")

    def _fail(self, why: str, code: int = 1) -> NoReturn:
        """Ends this process, after the chief has told the others why."""
        if self.is_chief:
            self._tell_all("failed", [why, code])
            time.sleep(_READING)
        sys.stdout.flush()
        print(f"\nerror: {why}", file=self._stderr, flush=True)
        os._exit(code)

    def end(self, why: str = "", code: int = 0) -> None:
        """Leaves the cluster: once all processes leave, or at once, with the reason why this one fails and its code."""
        if why:
            self._tell_all("failed", [f"{self._tasks[self.rank]} has failed: {why}", code])
        else:
            self._tell_all("done", None)
        with self._changed:
            self._waiting = True
            self._changed.wait_for(lambda: why or all(other.done for other in self._others.values()))
            self._ending = True
        for other in self._others.values():
            with contextlib.suppress(OSError):
                other.connection.shutdown(socket.SHUT_RDWR)


class _Other:
    """Another process: the connection to it, and what it has said."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        self.connection, self.lock = connection, threading.Lock()
        self.values: collections.deque[tuple[Any, Arrays]] = collections.deque()
        self.state = (0, 0, False)
        self.done = False
        self.note()

    def note(self) -> None:
        """Notes that it is alive."""
        self.heard = time.monotonic()

    def tell(self, kind: str, value: Any, even_if_busy: bool = True) -> None:
        """Sends a short message. Where the connection is broken, the thread that listens will see it."""
        if self.lock.acquire(blocking=even_if_busy):
            try:
                with contextlib.suppress(OSError):
                    write(self.connection, kind, json.dumps(value), {})
            finally:
                self.lock.release()


class Chief(Peers):
    """The chief of workers and parameter servers, see :func:`meet`: it stops when one of them is asked to.

    Args:
      cluster: this process is its chief.
      connections: to every other process, by rank.
    """

    def __init__(self, cluster: Cluster, connections: Mapping[int, socket.socket]) -> None:
        super().__init__()
        self.cluster = cluster
        self._ended: set[Task] = set()
        self._code = 0
        self._others = {cluster.tasks[rank]: _Other(connection) for rank, connection in connections.items()}
        for task in self._others:
            threading.Thread(target=self._listen, args=(task,), daemon=True).start()

    def check(self) -> None:
        try:
            super().check()
        except Interrupted as interrupted:
            self._code = 128 + interrupted.signal
            raise

    def has_ended(self, task: Task) -> bool:
        """Whether the process that was ``task`` at the start has ended."""
        return task in self._ended

    def _listen(self, task: Task) -> None:
        with contextlib.suppress(OSError, ValueError, EOFError):
            while True:
                _, number, _ = read(self._others[task].connection)
                self.ask_to_stop(number)
        self._ended.add(task)

    def end(self, why: str = "", code: int = 0) -> None:
        """Tells the others how the run has ended: why it failed, or nothing, and the exit code."""
        for other in self._others.values():
            other.tell("ended", [why and f"{self.cluster.task} has failed: {why}", code or self._code])


class Served:
    """The chief, as its workers and parameter servers know it; see :func:`attend`."""

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection

    def ask_to_stop(self, number: int) -> None:
        """Asks the chief to write a checkpoint and to stop, because of signal ``number``."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                write(self._connection, "stop", json.dumps(number), {})

    def has_ended(self) -> bool:
        """Whether the chief has ended, or said that it does."""
        return self._connection is not None and meeting.has_news(self._connection)

    def last_word(self) -> tuple[str, int] | None:
        """Why the chief has failed, or "", and its exit code; None where it ended without a word, or said it to others.

        Call it once the chief has ended.
        """
        with contextlib.suppress(OSError, ValueError, EOFError):
            if self._connection is not None:
                self._connection.settimeout(_SILENT)
                _, (why, code), _ = read(self._connection)
                return str(why), int(code)
        return None


@contextlib.contextmanager
def meet(cluster: Cluster | None, about: Mapping[str, Any], timeout: float) -> Iterator[Peers]:
    """Connects the processes that train a run while the context lasts; it ends once all have left it.

    Args:
      cluster: of :func:`stem_tf.cluster.read`; where it has parameter servers, this process is its chief.
      about: what has to be the same in all processes, by name.
      timeout: seconds to wait for the others: at the start, and later for one that does not answer.

    Raises: as :func:`stem_tf.meeting.connect`.
    """
    if cluster is None:
        yield Peers()
        return
    connections = meeting.connect(cluster, about, timeout)
    peers: Chief | Connected
    if cluster.has_servers:
        peers = Chief(cluster, connections)
    else:
        peers = Connected(cluster.tasks, cluster.tasks.index(cluster.task), connections, timeout)
    try:
        yield peers
    except (SystemExit, Interrupted):
        peers.end()
        raise
    except BaseException as error:
        peers.end(message(error), next((code for kind, code in _CODES.items() if isinstance(error, kind)), 1))
        raise
    peers.end()


def attend(cluster: Cluster, about: Mapping[str, Any], timeout: float) -> Served:
    """Connects a worker or parameter server to its chief; arguments and errors as of :func:`meet`."""
    return Served(meeting.connect(cluster, about, timeout, may_be_late=True).get(0))
