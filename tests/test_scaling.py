"""The formulas of docs/scaling.md: against TensorFlow's own counts, the optimizers' variables and cases by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.scaling_formulas import Constants, Host, Load, Shape, distinct_rows

SHAPE = Shape(rows=800, tasks=3, batch=64, features=8, expert_units=(24, 8))
SECONDS = Constants(
    overhead=1e-3,
    position=1e-6,
    position_float=0,
    row=2e-6,
    row_float=0,
    multiply_add=1e-9,
    mixed=0,
    weight=0,
    byte=1e-9,
)


def test_counts_are_those_of_the_model() -> None:
    from stem_tf import summary

    case = train_step.CASE | {"rows": "800", "tasks": "3", "batch": "64", "units": "24,8"}
    for optimizer in ("deferred", "lazy", "adagrad"):
        model = train_step.model(case | {"tables": optimizer})
        (tables,) = model.table_optimizers
        size = sum(v.shape.num_elements() * v.dtype.size for v in (tables.table, *tables.slots))
        assert size == tables.table.shape[0] * SHAPE.bytes_per_row(optimizer), optimizer
        assert tables.table.shape[1] == SHAPE.width
    assert summary.multiply_adds(model) == SHAPE.multiply_adds


def test_distinct_rows_are_those_of_the_batches() -> None:
    shape = Shape(rows=8000, tasks=1, batch=2048)
    case = train_step.CASE | {"rows": "8000", "tasks": "1", "batch": "2048"}
    found = [sum(len(np.unique(ids)) for ids in batch["features"].values()) for batch in train_step.batches(case)]
    assert distinct_rows(shape) == pytest.approx(np.mean(found), rel=0.02)


def test_a_step_by_hand() -> None:
    shape = dataclasses.replace(SHAPE, rows=8, batch=1000)  # one id per feature
    expert, gate, tower = 128 * 24 + 24 * 8, 128 * 128 + 128 * 64 + 64 * 4, 8 * 128 + 128 * 64 + 64
    network = 3 * 1000 * (4 * expert + 3 * (gate + tower)) * 1e-9
    assert SECONDS.step(shape) == pytest.approx(1e-3 + 8000 * 1e-6 + 8 * 2e-6 + network)


def test_a_worker_by_hand() -> None:
    shape = dataclasses.replace(SHAPE, rows=8, batch=1000)
    once, shared = 1e-3 + 8 * 2e-6, SECONDS.step(shape) - 1e-3 - 8 * 2e-6
    half = (8000 * 4 + 2 * 4 * (8 * 64 + shape.multiply_adds)) / 2  # bytes
    assert SECONDS.worker(shape, 2) == pytest.approx(once + shared / 2 + half * 1e-9)


def test_how_many_hosts_by_hand() -> None:
    """1,000 rows per second and 4 positions each, half of them distinct; the table has 10^6 rows of 2 x 16 floats."""
    shape = Shape(rows=10**6, tasks=1, batch=1000, features=4)
    none = dataclasses.replace(SECONDS, multiply_add=0)
    load = Load(shape, seconds=1.0, distinct=0.5, optimizer="lazy")
    assert load.table == 10**6 * 3 * 4 * 32
    # An id per position, and the gradients of 2,000 rows and of the network twice.
    exchanged = 4000 * 4 + 8 * (2000 * 32 + shape.multiply_adds)
    # Per second .004 s of a core for the rows of the batch, in every worker, and .004 s for its positions, divided.
    host = Host(cores=1, memory=load.table, network=exchanged)
    assert load.replicated(host, none) == (1, "")
    slow = dataclasses.replace(none, position=1e-3)  # 4 s, divided by what each worker has left: .996 of a core
    assert load.replicated(host, slow) == (5, "")
    assert load.replicated(dataclasses.replace(host, memory=load.table - 1), none) == (None, "memory")
    assert load.replicated(dataclasses.replace(host, network=exchanged - 1), none) == (None, "network")
    assert load.replicated(host, dataclasses.replace(none, row=1e-3)) == (None, "cores")
    assert load.sharded(dataclasses.replace(host, memory=load.table / 3), slow) == (4, 3)
    moved = 2000 * 4 * 33 + 4 * shape.multiply_adds
    assert load.sharded(dataclasses.replace(host, network=moved / 2.5), none) == (3, 3)
