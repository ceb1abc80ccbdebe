"""How much memory, time, and how many hosts a training takes: formulas with constants measured here.

    python -m benchmarks.scaling_model --json=FILE     # measures the constants, checks the formulas, and answers
    python -m benchmarks.scaling_model --from=FILE --ids=5e8 --tasks=3 --rows_per_day=1e9

The formulas are in benchmarks/scaling_formulas.py; docs/scaling.md explains them. Everything is measured in processor
time of one core, the least of several turns, so that other work on the machine disturbs it little.
"""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import train_step
from benchmarks.scaling_formulas import Constants, Host, Load, Shape, distinct_rows
from stem_tf import report
from stem_tf.runtime import quieten_tensorflow
from stem_util import cli, files, owned
from stem_util.errors import UserError

flags = cli.Flags()

_TURNS = flags.DEFINE_integer("turns", 5, "Turns of every measurement; the least time counts.", lower_bound=1)
_FROM = flags.DEFINE(cli.PATH, "from", None, "Constants of an earlier run: measures nothing.")
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write constants and checks to this file.")
_ROWS = flags.DEFINE_float("rows_per_day", 1e10, "Rows of the log to train on per day.", lower_bound=1)
_IDS = flags.DEFINE_float("ids", 2e9, "Ids of all features.", lower_bound=1)
_TASKS = flags.DEFINE_integer("tasks", 8, "Tasks.", lower_bound=1)
_FEATURES = flags.DEFINE_integer("features", 8, "Features.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 65536, "Global batch.", lower_bound=1)
_DISTINCT = flags.DEFINE_float("distinct", 0.5, "Distinct rows per position of a batch.", lower_bound=0, upper_bound=1)
_BUCKETS = flags.DEFINE_float("buckets", 0.05, "Hash buckets per id, with two hashes.", lower_bound=0)
_CORES = flags.DEFINE_integer("cores", 64, "Cores per host.", lower_bound=1)
_HOST_GB = flags.DEFINE_float("host_gb", 512, "Memory per host, of which tables may take four fifths.", lower_bound=1)
_GBIT = flags.DEFINE_float("gbit", 25, "Network per host, of which half is reached.", lower_bound=0.001)
_GPU = flags.DEFINE_float("gpu", 2.5e13, "Multiply-adds per second that a GPU reaches in this network.", lower_bound=1)

SMALL = (
    (24_000, 1, 512),
    (24_000, 4, 2048),
    (240_000, 1, 2048),
    (240_000, 4, 512),
    (1_200_000, 2, 2048),
    (24_000, 1, 64),
)
"""Rows, tasks, batch of steps with a network of next to no size, from which the constants of tables come."""
CHECKS = (
    *((rows, 2, 1024) for rows in (24_000, 240_000, 2_400_000)),
    *((240_000, tasks, 1024) for tasks in (1, 4)),
    *((240_000, 2, batch) for batch in (256, 4096)),
)
"""Rows, tasks, batch of the steps with the whole network that are predicted."""


def main(argv: Sequence[str]) -> None:
    del argv
    if _FROM.value:
        found = files.read_json(_FROM.value, "python -m benchmarks.scaling_model --json=FILE writes it")
        if found.get("constants", {}).keys() != {field.name for field in dataclasses.fields(Constants)}:
            raise UserError(f"--from={_FROM.value} has other constants: measure them again, with --json={_FROM.value}")
    else:
        quieten_tensorflow()
        found = _measured()
        if _JSON.value:
            owned.write_figures(_JSON.value, found)
    constants = Constants(**found["constants"])
    print(_constants_table(constants))
    print(_check_table(found["checks"]))
    print(_loopback_table(constants))
    print(_answer(constants))


def _measured() -> dict[str, Any]:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    known = {"multiply_add": _multiply_add(), "mixed": _mixed(), "weight": _weight(), "byte": _loopback()}
    network = Constants(overhead=0, position=0, position_float=0, row=0, row_float=0, **known)
    counts, seconds = [], []
    for rows, tasks, batch in SMALL:
        shape = Shape(rows, tasks, batch, expert_units=(8,))
        distinct = distinct_rows(shape)
        counts.append([1, shape.positions, shape.positions * shape.width, distinct, distinct * shape.width])
        seconds.append(_step_seconds(shape) - network.network(shape))
    of_tables = _least_squares(np.array(counts), np.array(seconds))
    constants = Constants(*map(float, of_tables), **known)
    checks = []
    for rows, tasks, batch in CHECKS:
        shape = Shape(rows, tasks, batch)
        times = {"measured": _step_seconds(shape), "predicted": constants.step(shape)}
        checks.append({"rows": rows, "tasks": tasks, "batch": batch, **times})
    return {"constants": dataclasses.asdict(constants), "checks": checks}


def _least_squares(counts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Constants ``c >= 0`` by which ``counts @ c`` has the least relative error to ``seconds``."""
    from scipy.optimize import nnls

    return nnls(counts / seconds[:, np.newaxis], np.ones(len(seconds)))[0]


def _least(work: Callable[[], Any], times: int = 1) -> float:
    """Processor seconds of one call, the least of several turns of ``times`` calls; the first call does not count."""
    work()
    turns = []
    for _ in range(_TURNS.value):
        start = time.process_time()
        for _ in range(times):
            work()
        turns.append((time.process_time() - start) / times)
    return min(turns)


def _step_seconds(shape: Shape) -> float:
    """A training step as benchmarks/train_step.py has it."""
    case = train_step.CASE | {"rows": str(shape.rows), "tasks": str(shape.tasks), "batch": str(shape.batch)}
    case["units"] = ",".join(map(str, shape.expert_units))
    step, _ = train_step.ours(case)
    batches = iter(train_step.batches(case) * _TURNS.value)
    return _least(lambda: float(step(next(batches))))


def _multiply_add() -> float:
    """Per multiply-add of an expert with its ReLUs, forward and backward."""
    import tensorflow as tf

    from stem_tf.layers.mlp import MLP

    batch, expert = 1024, MLP((512, 512, 512), count=1)
    x = tf.random.normal([batch, 128])
    expert(x)

    def train() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = tf.reduce_sum(expert(x))
        return [tf.reduce_sum(g) for g in tape.gradient(out, [x, *expert.trainable_variables])]

    return _least(tf.function(train), 5) / (3 * batch * (128 * 512 + 2 * 512 * 512))


def _mixed() -> float:
    """Per product of an expert's output and a gate's weight, forward and backward."""
    import tensorflow as tf

    from stem_tf.layers.gate import mixture

    batch, experts, units = 1024, 4, 512
    outputs, weights = (
        [tf.random.normal([1, batch, units]) for _ in range(experts)],
        tf.random.uniform([batch, experts]),
    )

    def train() -> Any:
        with tf.GradientTape() as tape:
            tape.watch([weights, *outputs])
            out = tf.reduce_sum(mixture(weights, outputs))
        return [tf.reduce_sum(g) for g in tape.gradient(out, [weights, *outputs])]

    return _least(tf.function(train), 5) / (batch * experts * units)


def _weight() -> float:
    """Per weight of the network: flatten and clip its gradient, and make Adam's step."""
    import tensorflow as tf

    from stem_tf.training.learning_rate import Schedule
    from stem_tf.training.optimizers import Adam

    variables = [tf.Variable(tf.random.normal([512, 512])) for _ in range(8)]
    gradients = [tf.random.normal([512, 512]) for _ in variables]
    adam = Adam(variables, [0.0] * len(variables), Schedule(1e-3))

    def train() -> Any:
        gradient = adam.flatten(gradients)
        adam.apply(tf.clip_by_norm(gradient, 1.0), tf.constant(1, tf.int64))

    return _least(tf.function(train), 5) / (len(variables) * 512 * 512)


def _loopback(size: int = 1 << 24) -> float:
    """Processor seconds of both ends per byte that goes over a loopback connection."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        data = bytes(size)

        def send() -> None:
            thread = threading.Thread(target=sender.sendall, args=(data,))
            thread.start()
            left = size
            while left:
                left -= len(receiver.recv(1 << 20))
            thread.join()

        with receiver:
            return _least(send) / size


def _constants_table(constants: Constants) -> str:
    lines = [
        ["step", f"{1e3 * constants.overhead:.2f} ms"],
        [
            "position of a batch",
            f"{1e9 * constants.position:.0f} ns, and {1e9 * constants.position_float:.2f} ns per float",
        ],
        ["distinct row", f"{1e9 * constants.row:.0f} ns, and {1e9 * constants.row_float:.2f} ns per float"],
        ["multiply-add", f"{1e12 * constants.multiply_add:.1f} ps"],
        ["product of a mixture", f"{1e9 * constants.mixed:.2f} ns"],
        ["weight of the network", f"{1e9 * constants.weight:.2f} ns"],
        ["byte over loopback", f"{1e9 * constants.byte:.2f} ns"],
    ]
    return f"{report.table(['one core takes for a', ''], lines)}\n"


def _check_table(checks: Sequence[dict[str, Any]]) -> str:
    lines, errors, turned = [], [], 0
    for check in sorted(checks, key=lambda check: check["measured"]):
        measured, predicted = check["measured"], check["predicted"]
        times = [f"{1e3 * seconds:,.1f}" for seconds in (measured, predicted)]
        lines.append(
            [f"{check['rows']:,}", str(check["tasks"]), f"{check['batch']:,}", *times, f"{predicted / measured:.2f}"]
        )
        errors.append(abs(predicted / measured - 1))
        turned += sum(o["measured"] < 0.9 * measured and o["predicted"] >= predicted for o in checks)
    return (
        f"{report.table(['rows', 'tasks', 'batch', 'measured ms', 'predicted ms', 'ratio'], lines)}\n"
        f"largest error {max(errors):.0%}; pairs that differ by more than 10 % and are predicted the other way round: "
        f"{turned}\n"
    )


def _loopback_table(constants: Constants) -> str:
    shapes = [Shape(rows, tasks, batch) for rows, tasks, batch in CHECKS]
    cells = [
        [f"{s.rows:,}", str(s.tasks), f"{s.batch:,}", f"{constants.step(s) / constants.worker(s, 2):.2f}"]
        for s in shapes
    ]
    return report.table(["rows", "tasks", "batch", "2 workers of a core over loopback, times 1"], cells) + "\n"


def _answer(constants: Constants) -> str:
    per_second = _ROWS.value / 86_400
    seconds = _BATCH.value / per_second
    shape = Shape(round(_IDS.value), _TASKS.value, _BATCH.value, _FEATURES.value)
    host = Host(_CORES.value, 0.8e9 * _HOST_GB.value, 0.5e9 / 8 * _GBIT.value)
    rows = round(_BUCKETS.value * shape.rows)
    kinds = {
        "task tables": shape,
        "one shared table": dataclasses.replace(shape, task_tables=False),
        "task tables, hashed": dataclasses.replace(shape, rows=rows, hashes=2),
        "one shared table, hashed": dataclasses.replace(shape, rows=rows, hashes=2, task_tables=False),
    }
    lines = []
    for name, kind in kinds.items():
        for optimizer in ("deferred", "lazy", "adagrad"):
            load = Load(kind, seconds, _DISTINCT.value, optimizer)
            hosts, short = load.replicated(host, constants)
            workers, servers = load.sharded(host, constants)
            sharded = "-" if optimizer == "deferred" else f"{workers} + {servers}"
            lines.append(
                [name, optimizer, report.size(load.table), f"too little {short}" if short else str(hosts), sharded]
            )
    return (
        f"{_ROWS.value:,.0f} rows a day are {per_second:,.0f} rows/s. With {shape.tasks} tasks and {shape.features} "
        f"features the network has {shape.multiply_adds:,} multiply-adds per row: "
        f"{constants.network(shape) / seconds:,.0f} cores, or {3 * shape.multiply_adds * per_second / _GPU.value:.2f} "
        "GPUs.\n"
        + report.table(
            ["tables", "optimizer", "table and slots", "replicated: hosts", "sharded: workers + servers"], lines
        )
    )


if __name__ == "__main__":
    cli.run(main, flags)
