"""Memory and time of training as formulas: docs/scaling.md explains them, benchmarks/scaling_model.py checks them.

STEM-Net with T tasks and F features of width D, a table of R rows for all of them, and batches of B rows:

    W = (T + 1) D                   floats per row of the table; D without task tables
    P = B F                         rows that a batch reads, twice as many with two hashes; U of them are distinct
    A                               multiply-adds of the network for one row, forward; it has as many weights
    X = T E H                       products of expert outputs (E experts of width H) and gate weights for one row
    step = overhead + P (a + b W) + U (r + s W) + 3 A B m + X B x + A g

a, b: find the distinct row of a position, copy it there and add up its gradient. r, s: read a distinct row with its
slots, make up for missed steps, and write it. m: a multiply-add; each of A is done three times (forward, for the
inputs, for the weights). x: a product of a mixture. g: Adam's step of one weight of the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FLOAT = 4  # bytes of a float32, and of an int32


@dataclass(frozen=True)
class Shape:
    """What is trained: the paper's network, with one expert per table.

    Attributes:
      rows: R.
      tasks: T.
      batch: B, of all workers together.
      features: F.
      dim: D.
      task_tables: whether the features have task tables.
      hashes: rows that are read for a value, and added up.
      expert_units: hidden widths of an expert.
      head_units: hidden widths of a gate and of a tower.
    """

    rows: int
    tasks: int
    batch: int
    features: int = 8
    dim: int = 16
    task_tables: bool = True
    hashes: int = 1
    expert_units: tuple[int, ...] = (512, 512, 512)
    head_units: tuple[int, ...] = (128, 64)

    @property
    def _tables(self) -> int:
        return self.tasks + 1 if self.task_tables else 1

    @property
    def width(self) -> int:
        """W."""
        return self.dim * self._tables

    def bytes_per_row(self, optimizer: str) -> int:
        """Bytes of a row of the table with its slots, by ``optimizer.tables``."""
        adam = 3 * _FLOAT * self.width
        return {"deferred": adam + _FLOAT, "lazy": adam, "adagrad": _FLOAT * (self.width + self._tables)}[optimizer]

    @property
    def positions(self) -> int:
        """P."""
        return self.batch * self.features * self.hashes

    @property
    def multiply_adds(self) -> int:
        """A: of T + 1 experts, T gates and T towers."""
        flat = self.features * self.dim
        expert = _products([flat, *self.expert_units])
        gate = _products([flat, *self.head_units, self.tasks + 1])
        tower = _products([self.expert_units[-1], *self.head_units, 1])
        return (self.tasks + 1) * expert + self.tasks * (gate + tower)

    def exchanged(self, distinct: float) -> float:
        """Bytes that a worker of ``multi_worker`` receives in a step, and sends, except for the share of its own part.

        They are the numbers of all workers' rows, padded to a row per position, and the gradients of the ``distinct``
        rows and of the network, once to be added up and once to be given to all.
        """
        return _FLOAT * (self.positions + 2 * (distinct * self.width + self.multiply_adds))

    @property
    def mixed(self) -> int:
        """X."""
        return self.tasks * (self.tasks + 1) * self.expert_units[-1]


def _products(units: Sequence[int]) -> int:
    return sum(a * b for a, b in itertools.pairwise(units))


def distinct_rows(shape: Shape) -> float:
    """Expected U where a feature's ids are ``n u^3``, u uniform: the popularity that ids have in the benchmarks."""
    ids = shape.rows // shape.features
    share = np.diff(np.linspace(0, 1, ids + 1) ** (1 / 3))
    return shape.features * float(np.sum(1 - (1 - share) ** shape.batch))


@dataclass(frozen=True)
class Constants:
    """Seconds of one core for each thing that a step does; ``byte`` is of both ends of a loopback connection."""

    overhead: float
    position: float
    position_float: float
    row: float
    row_float: float
    multiply_add: float
    mixed: float
    weight: float
    byte: float

    def network(self, shape: Shape) -> float:
        """Seconds of one core for the network of a step."""
        of_row = 3 * shape.multiply_adds * self.multiply_add + shape.mixed * self.mixed
        return shape.batch * of_row + shape.multiply_adds * self.weight

    def lookups(self, shape: Shape) -> float:
        """Seconds of one core for the positions of a step."""
        return shape.positions * (self.position + self.position_float * shape.width)

    def updates(self, shape: Shape, distinct: float) -> float:
        """Seconds of one core for the distinct rows of a step."""
        return distinct * (self.row + self.row_float * shape.width)

    def step(self, shape: Shape) -> float:
        """Seconds of one core for a step."""
        return self.overhead + self.lookups(shape) + self.updates(shape, distinct_rows(shape)) + self.network(shape)

    def worker(self, shape: Shape, workers: int) -> float:
        """Seconds of one core for the part of each of several workers of ``multi_worker`` on one machine."""
        distinct = distinct_rows(shape)
        once = self.overhead + self.updates(shape, distinct) + shape.multiply_adds * self.weight
        received = shape.exchanged(distinct) * (workers - 1) / workers
        return once + (self.step(shape) - once) / workers + received * self.byte


@dataclass(frozen=True)
class Host:
    """A machine: its cores, bytes of memory that tables may take, and bytes per second that its network reaches."""

    cores: int
    memory: float
    network: float


@dataclass(frozen=True)
class Load:
    """What a training has to do per second.

    Attributes:
      shape: what is trained.
      seconds: of the day that one step may take.
      distinct: distinct rows per position.
      optimizer: of the tables.
    """

    shape: Shape
    seconds: float
    distinct: float
    optimizer: str

    @property
    def table(self) -> float:
        """Bytes of the table with its slots."""
        return float(self.shape.rows) * self.shape.bytes_per_row(self.optimizer)

    def replicated(self, host: Host, constants: Constants) -> tuple[int | None, str]:
        """Hosts under ``multi_worker``, and what they are short of where no number of them is enough.

        Every worker holds the table, receives every row's gradient, and writes every row of the batch.
        """
        rows = self.shape.positions * self.distinct
        writing = constants.updates(self.shape, rows) / self.seconds
        if self.table > host.memory:
            return None, "memory"
        if self.shape.exchanged(rows) / self.seconds > host.network:
            return None, "network"
        if writing >= host.cores:
            return None, "cores"
        shared = (constants.network(self.shape) + constants.lookups(self.shape)) / self.seconds
        return math.ceil(shared / (host.cores - writing)), ""

    def sharded(self, host: Host, constants: Constants) -> tuple[int, int]:
        """Workers and parameter servers under ``parameter_server``.

        A worker receives each distinct row of its batch and the network, and sends as much as gradients; the servers
        hold and write the rows.
        """
        rows = self.shape.positions * self.distinct
        moved = (rows * _FLOAT * (self.shape.width + 1) + _FLOAT * self.shape.multiply_adds) / self.seconds
        shared = (constants.network(self.shape) + constants.lookups(self.shape)) / self.seconds
        writing = constants.updates(self.shape, rows) / self.seconds
        workers = max(shared / host.cores, moved / host.network)
        return math.ceil(workers), math.ceil(max(self.table / host.memory, moved / host.network, writing / host.cores))
