"""The cluster that a run is trained on, read from TF_CONFIG and checked. Needs no TensorFlow.

Each process of a cluster has its own TF_CONFIG, with the addresses of all tasks and which of them the process is. It is
the one that tf.distribute reads (https://www.tensorflow.org/guide/distributed_training#TF_CONFIG)::

    {"cluster": {"worker": ["host-0:5000", "host-1:5000"]}, "task": {"type": "worker", "index": 0}}
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stem_util.errors import UserError, did_you_mean

VARIABLE = "TF_CONFIG"
KINDS = ("chief", "worker", "ps")
STRATEGIES = {"multi_worker": ("chief", "worker"), "parameter_server": ("chief", "worker", "ps")}
"""Strategies that train on a cluster, and the kinds of tasks that take part."""

_ADDRESS = re.compile(r"(?P<host>[^:\s/]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_EXAMPLE = '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'


@dataclass(frozen=True)
class Task:
    """One process of a cluster.

    Attributes:
      kind: one of :data:`KINDS`.
      index: its number among the tasks of its kind.
      address: ``host:port``, where the others reach it.
    """

    kind: str
    index: int
    address: str

    def __str__(self) -> str:
        return f"{self.kind} {self.index} ({self.address})"

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True)
class Cluster:
    """The tasks of a cluster, and which of them this process is.

    Attributes:
      addresses: ``host:port`` of each task, by kind.
      kind: this task's kind, one of :data:`KINDS`.
      index: its number among the tasks of its kind.
    """

    addresses: Mapping[str, tuple[str, ...]]
    kind: str
    index: int

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks: the chief, the workers, the parameter servers."""
        return tuple(
            Task(kind, index, address) for kind in KINDS for index, address in enumerate(self.addresses.get(kind, ()))
        )

    @property
    def task(self) -> Task:
        """This process."""
        return Task(self.kind, self.index, self.addresses[self.kind][self.index])

    @property
    def chief(self) -> Task:
        """The task that writes the work directory: the chief, or the first worker of a cluster without one."""
        return self.tasks[0]

    @property
    def is_chief(self) -> bool:
        """Whether this process is the :attr:`chief`."""
        return self.task == self.chief

    @property
    def has_servers(self) -> bool:
        """Whether it has parameter servers: the chief alone trains then, and the others serve it."""
        return bool(self.addresses.get("ps"))


def read(strategy: str, environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """The cluster in TF_CONFIG; None where ``strategy`` trains in one process.

    Args:
      strategy: ``config.train.strategy``.
      environment: environment variables.

    Raises:
      UserError: TF_CONFIG does not parse, is missing, contradicts itself or the strategy, or the port is in use.
    """
    text = environment.get(VARIABLE, "").strip()
    if text in ("", "{}"):
        if strategy not in STRATEGIES:
            return None
        raise UserError(
            f"config.train.strategy={strategy} needs a cluster: start its processes with stem-launch, or "
            f"set {VARIABLE} for each, {_EXAMPLE}"
        )
    if strategy not in STRATEGIES:
        raise UserError(
            f"{VARIABLE} is set, but config.train.strategy={strategy} trains in one process: set it to "
            f"{' or '.join(STRATEGIES)}, or unset {VARIABLE}"
        )
    cluster = parse(text)
    _check(cluster, strategy)
    check_port(cluster.task)
    return cluster


def parse(text: str) -> Cluster:
    """The cluster that the JSON of a TF_CONFIG describes.

    Raises:
      UserError: it is no JSON, lacks something, or contradicts itself.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{VARIABLE} is not JSON ({error}): it should be {_EXAMPLE}") from None
    cluster, task = (value.get(key) if isinstance(value, dict) else None for key in ("cluster", "task"))
    if not isinstance(cluster, dict) or not cluster:
        raise UserError(f"{VARIABLE} names no cluster: it should be {_EXAMPLE}")
    if not isinstance(task, dict) or not {"type", "index"} <= task.keys():
        raise UserError(f"{VARIABLE} does not say which task this process is: it should be {_EXAMPLE}")
    addresses = {kind: tuple(_addresses(kind, given)) for kind, given in cluster.items() if given != []}
    if not addresses:
        raise UserError(f"{VARIABLE} names no address: it should be {_EXAMPLE}")
    every = [address.lower() for of_kind in addresses.values() for address in of_kind]
    twice = next((address for address in every if every.count(address) > 1), None)
    if twice is not None:
        raise UserError(f"{VARIABLE} gives the address {twice} to two tasks: each needs its own")
    kind, index = task["type"], task["index"]
    if not isinstance(kind, str) or not addresses.get(kind):
        raise UserError(f"{VARIABLE}: this process is a {kind!r}, but the cluster has {' and '.join(addresses)} only")
    if type(index) is not int or not 0 <= index < len(addresses[kind]):
        last = len(addresses[kind]) - 1
        raise UserError(f"{VARIABLE}: this process is {kind} {index!r}, but index should be a number from 0 to {last}")
    return Cluster(addresses, kind, index)


def _addresses(kind: str, given: Any) -> Iterator[str]:
    """The addresses of the tasks of a kind, each checked."""
    if kind not in KINDS:
        meant = did_you_mean(kind, KINDS) or "."
        raise UserError(f"{VARIABLE}: no kind of task '{kind}'{meant} A cluster here has {', '.join(KINDS)}")
    if not isinstance(given, list):
        raise UserError(f"{VARIABLE}: '{kind}' should be a list of addresses, host:port, but is {given!r}")
    for address in given:
        found = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
        if found is None or not 0 < int(found["port"]) < 1 << 16:
            raise UserError(f"{VARIABLE}: the address of a {kind} should be host:port, but is {address!r}")
        yield address


def _check(cluster: Cluster, strategy: str) -> None:
    """Refuses a cluster that lacks what a strategy needs, or has what it has no use for."""
    counts = {kind: len(cluster.addresses.get(kind, ())) for kind in KINDS}
    needs = f"{VARIABLE}: config.train.strategy={strategy} needs"
    if counts["chief"] > 1:
        raise UserError(f"{VARIABLE} names {counts['chief']} chiefs: there can be only one")
    if strategy == "parameter_server" and not all(counts.values()):
        missing = " and no ".join(kind for kind, count in counts.items() if not count)
        raise UserError(f"{needs} a chief, one worker or more and one ps or more, but the cluster has no {missing}")
    idle = [kind for kind in KINDS if counts[kind] and kind not in STRATEGIES[strategy]]
    if idle:
        raise UserError(
            f"{needs} {' and '.join(STRATEGIES[strategy])} only: leave '{idle[0]}' out of the cluster, or set the "
            "strategy to parameter_server"
        )


def check_port(task: Task) -> None:
    """Refuses a task whose port another process of this machine listens on.

    TensorFlow would share it with that process, and lose part of the messages to it.

    Raises:
      UserError: the port is in use, or may not be opened.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("", task.port))
        except OSError as error:
            raise UserError(
                f"{VARIABLE}: the port of {task} cannot be opened ({os.strerror(error.errno or 0)}): end the process "
                "that has it, or give the task another port"
            ) from None
