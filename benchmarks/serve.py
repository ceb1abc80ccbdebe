"""Queries a second, latency and processor time of the embedded server: `rank` beside `serving_default`.

    python -m benchmarks.serve --model_base_path=EXPORT_DIR

Starts stem-serve over EXPORT_DIR and asks it from another process over loopback: one request at a time from each of
``--clients`` threads, at most ``--requests`` requests and ``--seconds`` seconds a case and round, after some that are
not counted. A request is one user with N candidates; its values are rows of the export's own warm-up requests, so they
are in the vocabularies. ``session`` is the same request's tensors run by the same session in this process, from as many
threads: what is left when gRPC, parsing and answering are taken away.

CPU is processor time (user and system, all threads) a request: of the server's process, or of this one for ``session``.
Each figure is the median of ``--repeats`` rounds, the cases taking turns.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from absl import flags

from export.server.directories import version_directories
from pipelines import cli, tfrecord
from pipelines.errors import JobError, UserError
from stem_tf.quiet import quieten_tensorflow

_MODEL_BASE_PATH = flags.DEFINE_string("model_base_path", None, "Directory of the export's versions.", required=True)
_CANDIDATES = flags.DEFINE_multi_integer("candidates", [200, 1000], "N; may be repeated.")
_CLIENTS = flags.DEFINE_multi_integer("clients", [1, 16], "Requests at a time; may be repeated.")
_REQUESTS = flags.DEFINE_integer("requests", 500, "Most requests of a case and round.", lower_bound=10)
_SECONDS = flags.DEFINE_float("seconds", 5, "Most seconds of a case and round.", lower_bound=0.1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Rounds.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

_SIGNATURES = ("serving_default", "rank")
_UNCOUNTED = 20


class Figures(NamedTuple):
    """One case and round."""

    qps: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float


def main(argv: Sequence[str]) -> None:
    del argv
    quieten_tensorflow()
    from export.server.servable import Servable

    versions = version_directories(Path(_MODEL_BASE_PATH.value))
    if not versions:
        raise UserError(f"--model_base_path={_MODEL_BASE_PATH.value} holds no version")
    path = versions[max(versions)]
    requests = {(key, n): request(path, key, n) for n in _CANDIDATES.value for key in _SIGNATURES}
    servable = Servable(path, "ranker", max(versions))
    for n in _CANDIDATES.value:
        compare(servable, requests["serving_default", n], requests["rank", n])

    rounds: dict[tuple[str, int, int, str], list[Figures]] = {}
    with server(_MODEL_BASE_PATH.value) as (process, address):
        for _ in range(_REPEATS.value):
            for (key, n), message in requests.items():
                for clients in _CLIENTS.value:
                    for where in ("server", "session"):
                        if where == "server":
                            figures = over_the_wire(process.pid, address, message.SerializeToString(), clients)
                        else:
                            figures = in_process(servable, message, clients)
                        rounds.setdefault((key, n, clients, where), []).append(figures)

    print(f"{path}, {len(os.sched_getaffinity(0))} cores, {_REPEATS.value} rounds")
    print(f"{'':17}{'N':>6}{'bytes':>9}{'clients':>9}  {'':8}{'QPS':>8}{'p50 ms':>9}{'p99 ms':>9}{'CPU ms':>9}")
    rows = []
    for (key, n, clients, where), figures_of in rounds.items():
        median = Figures(*(statistics.median(values) for values in zip(*figures_of, strict=True)))
        size = requests[key, n].ByteSize()
        print(
            f"{key:17}{n:>6}{size:>9,}{clients:>9}  {where:8}"
            f"{median.qps:>8.0f}{median.p50_ms:>9.2f}{median.p99_ms:>9.2f}{median.cpu_ms:>9.2f}"
        )
        rows.append(
            {
                "signature": key,
                "candidates": n,
                "request_bytes": size,
                "clients": clients,
                "where": where,
                "median": median._asdict(),
                "rounds": [figures._asdict() for figures in figures_of],
            }
        )
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump({"model": str(path), "cores": len(os.sched_getaffinity(0)), "cases": rows}, file, indent=1)


def request(path: Path, key: str, candidates: int) -> Any:
    """A PredictRequest of one user (the first row of the warm-up requests) and ``candidates`` items."""
    from tensorflow_serving.apis import predict_pb2

    from export.server import tensors

    rank, default = warm_up(path, "rank"), warm_up(path, "serving_default")
    rows = {alias: tensors.decode(proto) for alias, proto in default.inputs.items()}
    built = predict_pb2.PredictRequest()
    built.model_spec.name, built.model_spec.signature_name = "ranker", key
    for alias, values in rows.items():
        # An item feature has one axis more in `rank`: the candidates.
        item = len(rank.inputs[alias].tensor_shape.dim) > values.ndim
        if item:
            values = np.resize(values, (candidates, *values.shape[1:]))
            values = values[None] if key == "rank" else values
        else:
            values = np.repeat(values[:1], 1 if key == "rank" else candidates, axis=0)
        tensors.encode(values, built.inputs[alias], as_content=True)
    return built


def warm_up(path: Path, key: str) -> Any:
    """The warm-up request of a signature that has the most rows."""
    from tensorflow_serving.apis import prediction_log_pb2

    from export.server.servable import WARM_UP

    logs = [prediction_log_pb2.PredictionLog.FromString(x) for _, x in tfrecord.scan(str(path / WARM_UP))]
    found = [log.predict_log.request for log in logs if log.predict_log.request.model_spec.signature_name == key]
    if not found:
        raise JobError(f"{path / WARM_UP} has no request for {key}")
    return max(found, key=lambda request: request.ByteSize())


def compare(servable: Any, default: Any, rank: Any) -> None:
    """Both signatures must score the same candidates alike: what is timed is the same work."""
    from export.server import tensors

    answers = [servable.predict(message).outputs for message in (default, rank)]
    for task in answers[0]:
        one, other = (tensors.decode(answer[task]).ravel() for answer in answers)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=task)


@contextmanager
def server(base_path: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "export.serve", f"--model_base_path={base_path}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("serving "):
                raise JobError(f"the server did not start: {line}")
            yield process, line.split()[-1]
        finally:
            process.terminate()
            process.communicate()


def over_the_wire(pid: int, address: str, message: bytes, clients: int) -> Figures:
    """The load comes from a process of its own, so that its processor time is not the server's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=ask, args=(theirs, address, message, clients, _REQUESTS.value, _SECONDS.value))
    child.start()
    theirs.close()
    try:
        ours.recv()  # connected and warm
        before = cpu_seconds(pid)
        ours.send(None)
        latencies, seconds = ours.recv()
    except EOFError as error:
        raise JobError("the process that asks has failed; its message is above") from error
    after = cpu_seconds(pid)
    child.join()
    return figures_of(latencies, seconds, after - before)


def ask(pipe: Any, address: str, message: bytes, clients: int, requests: int, seconds: float) -> None:
    """In the client's process: sends latencies and the time that all took."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")  # bytes in, bytes out
        for _ in range(_UNCOUNTED):
            call(message, timeout=60)
        pipe.send(None)
        pipe.recv()
        pipe.send(load(lambda: call(message, timeout=60), clients, requests, seconds))


def in_process(servable: Any, message: Any, clients: int) -> Figures:
    from export.server import tensors

    signature = servable._signatures[message.model_spec.signature_name]
    run = signature._callable(signature._all)
    arrays = [tensors.decode(message.inputs[alias]) for alias in signature._order]
    for _ in range(_UNCOUNTED):
        run(arrays)
    before = time.process_time()
    latencies, seconds = load(lambda: run(arrays), clients, _REQUESTS.value, _SECONDS.value)
    return figures_of(latencies, seconds, time.process_time() - before)


def load(call: Callable[[], Any], clients: int, requests: int, seconds: float) -> tuple[list[float], float]:
    """Latencies of ``call`` from ``clients`` threads, and the time from the first to the last."""
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


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    cli.run(main)
