"""Queries per second, latency and processor time of the embedded server, for `rank` and `serving_default`.

    python -m benchmarks.serve
    python -m benchmarks.serve --model_base_path=EXPORT_DIR

Starts stem-serve with EXPORT_DIR and calls it from another process over loopback: one request at a time from each of
``--clients`` threads, at most ``--requests`` requests and ``--seconds`` seconds per case and round, after some that are
not counted. A request is one user with N candidates. Its values are rows of the export's own warm-up requests, so they
are in the vocabularies. ``session`` runs the tensors of the same request in the same session in this process, from as
many threads: this is the cost without gRPC, parsing and answering. ``serving_default`` has the user repeated.

Without EXPORT_DIR the real jobs make the model: STEM-Net with T = 2, K1 = K2 = 1, D = 16 and experts 512-512-512, 16
int64 features of ``--ids`` values each, half of them the user's, trained for one epoch on a generated log.

CPU is processor time (user and system, all threads) per request: of the server, or of this process for ``session``.
Each figure is the median of ``--repeats`` rounds, in which the cases take turns; a ratio is the median of the rounds'.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.served import cpu_seconds, request, server
from export.server.directories import version_directories
from export.server.limits import Limits
from pipelines import schema_yaml
from pipelines.schema import Feature, Label, Schema, Task
from stem_tf import report
from stem_tf.runtime import quieten_tensorflow
from stem_util import cli, owned
from stem_util.errors import JobError, UserError

flags = cli.Flags()

_MODEL_BASE_PATH = flags.DEFINE(
    cli.PATH, "model_base_path", None, "Directory of an export's versions; made when not given."
)
_IDS = flags.DEFINE_integer("ids", 100_000, "Values of each feature of the model that is made.", lower_bound=1000)
_TABLES = flags.DEFINE_enum(
    "tables", "float32", ["float32", "bfloat16", "int8"], "How that model's tables are stored, as stem-export does it."
)
_CANDIDATES = flags.DEFINE_multi_integer("candidates", [50, 200, 1000], "N; may be repeated.")
_CLIENTS = flags.DEFINE_multi_integer("clients", [1, 4, 16], "Requests at a time; may be repeated.")
_REQUESTS = flags.DEFINE_integer("requests", 500, "Most requests of a case and round.", lower_bound=10)
_SECONDS = flags.DEFINE_float("seconds", 1.5, "Most seconds of a case and round.", lower_bound=0.1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Rounds.", lower_bound=1)
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")

_SIGNATURES = ("serving_default", "rank")
_FEATURES: dict[str, Any] = {f"{side}_{i}": side for side in ("user", "item") for i in range(8)}
_LABELS = {"click": 0.3, "like": 0.05}
_UNCOUNTED = 10


class Figures(NamedTuple):
    """One case and round."""

    qps: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float


class Case(NamedTuple):
    """A case: signature, candidates and clients."""

    signature: str
    candidates: int
    clients: int


def main(argv: Sequence[str]) -> None:
    del argv
    quieten_tensorflow()
    with tempfile.TemporaryDirectory(prefix="stem-benchmark-") as directory:
        measure(_MODEL_BASE_PATH.value or make(directory))


def make(directory: str) -> str:
    """Generates a log and runs the jobs on it; returns the directory of the export's versions."""
    ids, rows = _IDS.value, _IDS.value * 21 // 20
    random = np.random.default_rng(0)
    # Every id once and some twice, spread over int64 so that nothing gains from small ones.
    columns = {name: random.permutation(np.arange(rows) % ids) * 1_000_003 for name in _FEATURES}
    columns |= {name: (random.random(rows) < rate).astype(np.int64) for name, rate in _LABELS.items()}
    log, described, data, run, export, config = (
        os.path.join(directory, name) for name in ("log.parquet", "schema.yaml", "data", "run", "export", "paper.py")
    )
    pq.write_table(pa.table(columns), log)
    features = tuple(Feature(name, "categorical", side, name, "int64") for name, side in _FEATURES.items())
    tasks = tuple(Task(name, Label(name)) for name in _LABELS)
    Path(described).write_text(schema_yaml.dumps(Schema("benchmark", features, tasks)), encoding="utf-8")
    Path(config).write_text("from stem_tf.configs.base import get_config\n", encoding="utf-8")
    split = ["--split=random", "--fractions=0.97,0.02,0.01", "--layouts=blocks"]
    _job("pipelines.jobs.convert", log, f"--schema={described}", f"--output={data}", *split)
    settings = {"data.dir": data, "data.batch_size": 4096, "train.epochs": 1, "model.init_std": 0.05}
    keys = [f"--config.{key}={value}" for key, value in settings.items()]
    _job("stem_tf.jobs.train", f"--config={config}", f"--workdir={run}", *keys)
    _job("export.jobs.export", f"--workdir={run}", f"--output={export}", f"--tables={_TABLES.value}")
    return export


def _job(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise JobError(f"{module} failed: {done.stderr}")


def measure(base_path: str) -> None:
    """Runs all cases over the newest version in ``base_path``, prints the tables and writes the JSON."""
    from export.server.servable import Servable

    versions = version_directories(Path(base_path)).versions
    if not versions:
        raise UserError(f"--model_base_path={base_path} holds no version")
    path = versions[max(versions)]
    requests = {(key, n): request(path, key, n) for n in _CANDIDATES.value for key in _SIGNATURES}
    servable = Servable(path, "ranker", max(versions))
    for n in _CANDIDATES.value:
        compare(servable, requests["serving_default", n], requests["rank", n])

    cases = [Case(key, n, clients) for n in _CANDIDATES.value for clients in _CLIENTS.value for key in _SIGNATURES]
    served: dict[Case, list[Figures]] = {case: [] for case in cases}
    alone: dict[Case, list[Figures]] = {case: [] for case in cases}
    with server(Path(base_path)) as (process, address), asking(address) as pipe:
        for _ in range(_REPEATS.value):
            for case in cases:
                message = requests[case.signature, case.candidates]
                served[case].append(over_the_wire(process.pid, pipe, message.SerializeToString(), case.clients))
                alone[case].append(in_process(servable, message, case.clients))
    tell(path, {key: message.ByteSize() for key, message in requests.items()}, served, alone)


def compare(servable: Any, default: Any, rank: Any) -> None:
    """Checks that both signatures give the same scores, so that the timed work is the same."""
    answers = []
    for message in (default, rank):
        signature = servable.signature(message.model_spec.signature_name)
        feeds = signature.read(message.inputs, (), Limits())
        answers.append(signature.run(feeds.arrays, feeds.wanted))
    for task in answers[0]:
        one, other = (answer[task].ravel() for answer in answers)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=task)


@contextlib.contextmanager
def asking(address: str) -> Iterator[Any]:
    """A pipe to a process that sends the load, so that its processor time is not counted with the server's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=ask, args=(theirs, address), daemon=True)
    child.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        child.join()


def ask(pipe: Any, address: str) -> None:
    """In that process: answers each load with the latencies and the time of the whole load."""
    with grpc.insecure_channel(address) as channel, contextlib.suppress(EOFError):
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")  # bytes in, bytes out
        while True:
            message, *limits = pipe.recv()
            for _ in range(_UNCOUNTED):
                call(message, timeout=60)
            pipe.send(None)
            pipe.recv()
            pipe.send(load(functools.partial(call, message, timeout=60), *limits))


def over_the_wire(pid: int, pipe: Any, message: bytes, clients: int) -> Figures:
    try:
        pipe.send((message, clients, _REQUESTS.value, _SECONDS.value))
        pipe.recv()  # connected and warm
        before = cpu_seconds(pid)
        pipe.send(None)
        latencies, seconds = pipe.recv()
    except (EOFError, BrokenPipeError) as error:
        raise JobError("the process that asks has failed; its message is above") from error
    return figures_of(latencies, seconds, cpu_seconds(pid) - before)


def in_process(servable: Any, message: Any, clients: int) -> Figures:
    signature = servable.signature(message.model_spec.signature_name)
    feeds = signature.read(message.inputs, (), Limits())
    run = functools.partial(signature.run, feeds.arrays, feeds.wanted)
    for _ in range(_UNCOUNTED):
        run()
    before = time.process_time()
    latencies, seconds = load(run, clients, _REQUESTS.value, _SECONDS.value)
    return figures_of(latencies, seconds, time.process_time() - before)


def load(call: Callable[[], Any], clients: int, requests: int, seconds: float) -> tuple[list[float], float]:
    """Returns the latencies of ``call`` from ``clients`` threads, and the time from the first to the last."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    start = time.perf_counter()

    def repeat(own: list[float]) -> None:
        for _ in range(requests // clients):
            begun = time.perf_counter()
            call()
            ended = time.perf_counter()
            own.append(ended - begun)
            if ended - start > seconds:
                return

    threads = [threading.Thread(target=repeat, args=(own,)) for own in latencies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [latency for own in latencies for latency in own], time.perf_counter() - start


def figures_of(latencies: list[float], seconds: float, cpu: float) -> Figures:
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return Figures(len(latencies) / seconds, float(p50), float(p99), cpu / len(latencies) * 1e3)


def median(figures: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(values) for values in zip(*figures, strict=True)))


def ratio(ours: Sequence[Figures], others: Sequence[Figures], field: str) -> float:
    """The median of the rounds' ratios."""
    pairs = zip(ours, others, strict=True)
    return statistics.median(getattr(one, field) / getattr(other, field) for one, other in pairs)


def tell(
    path: Path,
    size: Mapping[tuple[str, int], int],
    served: Mapping[Case, Sequence[Figures]],
    alone: Mapping[Case, Sequence[Figures]],
) -> None:
    """Prints and writes the results; ``size``: bytes of a request by signature and candidates."""
    cores = len(os.sched_getaffinity(0))
    print(f"{path}, {cores} cores, {_REPEATS.value} rounds; server / the same session without it")
    lines, tree = [], []
    for case, figures in served.items():
        one, other = median(figures), median(alone[case])
        against = {field: ratio(figures, alone[case], field) for field in ("p50_ms", "cpu_ms")}
        pairs = [f"{getattr(one, f):.{d}f} / {getattr(other, f):.{d}f}" for f, d in (("qps", 0), ("p50_ms", 2))]
        pairs += [f"{getattr(one, f):.2f} / {getattr(other, f):.2f}" for f in ("p99_ms", "cpu_ms")]
        bytes_ = size[case.signature, case.candidates]
        ratios = [f"{value:.2f}" for value in against.values()]
        lines.append([case.signature, f"{case.candidates}", f"{bytes_:,}", f"{case.clients}", *pairs, *ratios, ""])
        rounds = {"server": figures, "session": alone[case]}
        tree.append(
            case._asdict()
            | {"request_bytes": bytes_, "server_against_session": against}
            | {
                where: {"median": median(x)._asdict(), "rounds": [y._asdict() for y in x]}
                for where, x in rounds.items()
            }
        )
    head = ["signature", "N", "bytes", "clients", "QPS", "p50 ms", "p99 ms", "CPU ms", "p50 x", "CPU x", ""]
    print(report.table(head, lines))

    lines, ranked = [], []
    for case in served:
        if case.signature == "rank":
            repeated = case._replace(signature="serving_default")
            against = {"bytes": size["rank", case.candidates] / size["serving_default", case.candidates]}
            against |= {f: ratio(served[case], served[repeated], f) for f in ("p50_ms", "cpu_ms")}
            ratios = [f"{value:.2f}" for value in against.values()]
            lines.append(["rank / serving_default", f"{case.candidates}", f"{case.clients}", *ratios, ""])
            ranked.append({"candidates": case.candidates, "clients": case.clients} | against)
    print(report.table(["server", "N", "clients", "bytes x", "p50 x", "CPU x", ""], lines))
    if _JSON.value:
        figures_tree = {"model": str(path), "cores": cores, "cases": tree, "rank_against_serving_default": ranked}
        owned.write_figures(_JSON.value, figures_tree)


if __name__ == "__main__":
    cli.run(main, flags)
