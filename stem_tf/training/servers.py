"""The processes of a cluster with parameter servers: the chief's connection to the others, and what the others do.

The chief reads the data, deals batches out to the workers and writes the work directory. Workers and parameter servers
run operations that the chief sends them, and end when the chief does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import tensorflow as tf

from stem_tf import watch
from stem_tf.cluster import Cluster, Task
from stem_tf.peers import RESUME, Chief, Peers, Served
from stem_tf.training.sharded_tables import served
from stem_tf.watch import ANSWER_SECONDS, hangs, listens
from stem_util import cli
from stem_util.errors import JobError

_POLL_SECONDS = 1.0
_LEAVING_SECONDS = 10.0
"""Time for which a worker that is asked to stop still takes batches."""
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError)
"""What is raised where an operation needs a process that is gone."""


class Servers:
    """The workers and parameter servers of a cluster, connected to this process, its chief.

    Args:
      peers: this process, their chief.
      timeout: seconds for which the chief waits for a process that does not answer, and then ends.

    Attributes:
      coordinator: sends functions to the workers, and one whose worker died to another.
      workers: the number of workers.
      patience: seconds to wait for a batch; longer than it takes to see that a process hangs.

    Raises:
      JobError: a process did not start in time, or has ended.
    """

    def __init__(self, peers: Chief, timeout: float) -> None:
        own = peers.cluster
        self._tasks = [task for task in own.tasks if task != own.task]
        self.workers, self._timeout = len(own.addresses["worker"]), timeout
        self.patience = 2 * timeout
        _wait_for(self._tasks, timeout, peers.has_ended)
        if ended := [str(task) for task in self._tasks if peers.has_ended(task)]:
            raise JobError(f"{' and '.join(ended)} ended before training began: what it printed may say why")
        threading.Thread(target=self._watch, daemon=True).start()
        self.coordinator = _coordinator(own.tasks)
        count = len(own.addresses["ps"])
        self._devices = [f"/job:ps/replica:0/task:{index}/device:CPU:0" for index in range(count)]

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Variables made inside lie on the parameter servers: packed tables on all, all others on the first."""
        return served(self._devices)

    @contextlib.contextmanager
    def naming_lost(self) -> Iterator[None]:
        """Replaces errors that come of a parameter server that is gone by one that names it.

        Raises:
          JobError: a parameter server is gone.
        """
        try:
            yield
        except (tf.errors.OpError, JobError) as error:
            lost = isinstance(error, LOST)
            end = time.monotonic() + (ANSWER_SECONDS if lost else 0.0)
            servers = [task for task in self._tasks if task.kind == "ps"]
            # One that was just killed may still hold its port.
            while not (gone := [task for task in servers if not listens(task)]) and time.monotonic() < end:
                time.sleep(0.1)
            if not gone and not lost:
                raise
            names = ", ".join(map(str, gone)) or "a parameter server"
            raise JobError(f"{names} is gone, and its rows with it: {RESUME}") from error

    def lost_workers(self) -> list[Task]:
        """Workers that are gone, and were not started again."""
        return [task for task in self._tasks if task.kind == "worker" and not listens(task)]

    def end_waiting(self) -> NoReturn:
        """Ends this process where no batch has come back for :attr:`patience` seconds."""
        gone = " and ".join(str(task) for task in self._tasks if not listens(task))
        why = f"{gone} gone" if gone else "though all processes answer: give them more, by config.train.peer_timeout"
        _end(f"no batch came back from the workers in {self.patience:g} seconds, {why}; {RESUME}")

    def _watch(self) -> None:
        """Ends this process when another one does not answer for ``timeout`` seconds, in whatever it does."""
        watcher = watch.start(self._tasks, self._timeout, RESUME)
        assert watcher.stdin is not None
        while (code := watcher.poll()) is None:
            # Ends it where TensorFlow keeps Python's lock, which the watcher has had time to explain.
            faulthandler.dump_traceback_later(self._timeout + 3 * ANSWER_SECONDS, exit=True, file=watcher.stdin)
            time.sleep(_POLL_SECONDS)
        _end("" if code == 1 else f"the process that watches the others has ended (exit code {code}); {RESUME}")


def connected(config: Any, peers: Peers) -> Servers | None:
    """The servers of a run with ``config.train.strategy=parameter_server``; None for other strategies."""
    if config.train.strategy != "parameter_server":
        return None
    assert isinstance(peers, Chief)
    return Servers(peers, config.train.peer_timeout)


@functools.cache
def _coordinator(tasks: Sequence[Task]) -> Any:
    """The process's only coordinator: a second connection would lose the variables of the first."""
    # Its messages about a worker that died, which it replaces by itself, are of no use to a user.
    logging.getLogger("tensorflow").setLevel(logging.CRITICAL)
    _fail_fast()
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        _spec(tasks), task_type="chief", task_id=0, rpc_layer="grpc"
    )
    return tf.distribute.coordinator.ClusterCoordinator(tf.distribute.ParameterServerStrategy(resolver))


def serve(own: Cluster, chief: Served, finished: Path, timeout: float) -> None:
    """Serves the chief as a worker or parameter server until it ends.

    SIGTERM and Ctrl-C to a parameter server make the chief write a checkpoint and stop. A worker that gets one stays
    for a few seconds: where all are asked to stop, the chief waits for its batches. A second signal ends it at once.

    Args:
      own: this process is not its chief.
      chief: the connection to it.
      finished: a file that the chief writes at the end of a run.
      timeout: seconds to wait for the chief to start.

    Raises:
      SystemExit: with the chief's exit code where it has failed or was stopped, or that of a signal that came here.
      JobError: the chief did not start in time, or is gone before the run was finished.
    """
    _fail_fast()
    started, leave, came = time.time(), math.inf, 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal leave, came
        came = number
        for each, handler in before.items():
            signal.signal(each, handler)
        if own.kind == "ps":
            chief.ask_to_stop(number)
        else:
            leave = time.monotonic() + _LEAVING_SECONDS

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    # Operations that wait for another process hold a thread each.
    config = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=max(8, os.cpu_count() or 1))
    tf.distribute.Server(_spec(own.tasks), own.kind, own.index, protocol="grpc", config=config)
    print(f"{own.task}: serves the chief, {own.chief.address}", flush=True)
    _wait_for([own.chief], timeout, lambda task: chief.has_ended())
    heard = time.monotonic()
    while (here := listens(own.chief)) and time.monotonic() < leave:
        time.sleep(_POLL_SECONDS)
        if not hangs(own.chief):
            heard = time.monotonic()
        elif time.monotonic() - heard > timeout:
            raise JobError(f"no answer from {own.chief} for {timeout:g} seconds; {RESUME}")
    code = 128 + came if came else 0
    if not here:
        word = chief.last_word()
        if word is None and not came and not (finished.exists() and finished.stat().st_mtime >= started):
            raise JobError(f"{own.chief} is gone before the run was finished: {RESUME}")
        why, code = word or ("", code)
        if why:
            print(f"error: {why}", file=sys.stderr)
            sys.exit(code)
    if code:
        name, again = signal.Signals(code - 128).name, cli.command_line("stem_tf.jobs.train")
        print(f"{name}: {own.task} has stopped; to go on: {again}")
        sys.exit(code)


def _fail_fast() -> None:
    """Makes TensorFlow report a process that is gone at once, rather than wait for it to come back."""
    os.environ.setdefault("GRPC_FAIL_FAST", "use_caller")


def _spec(tasks: Sequence[Task]) -> Any:
    addresses: dict[str, list[str]] = {}
    for task in tasks:
        addresses.setdefault(task.kind, []).append(task.address)
    return tf.train.ClusterSpec(addresses)


def _wait_for(tasks: Sequence[Task], timeout: float, has_ended: Callable[[Task], bool] = lambda task: False) -> None:
    """Waits until all tasks listen on their ports."""
    end = time.monotonic() + timeout
    missing = list(tasks)
    while missing := [task for task in missing if not listens(task)]:
        if any(map(has_ended, missing)):
            return
        if time.monotonic() > end:
            are = "does" if len(missing) == 1 else "do"
            raise JobError(
                f"{', '.join(map(str, missing))} {are} not listen after {timeout:g} seconds: start every process of "
                "the cluster with the same command"
            )
        time.sleep(_POLL_SECONDS)


def _end(why: str) -> NoReturn:
    """Ends this process at once, with a reason if none is printed yet: TensorFlow would wait for the others even to
    close a file."""
    sys.stdout.flush()
    if why:
        print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(1)
