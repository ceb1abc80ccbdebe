"""The server under pressure: overload, small calls beside large ones, new versions, stops, memory.

    python -m benchmarks.pressure --model_base_path=DIR [--against=CHECKOUT] [--cases=overload,mixed]

Runs over loopback with a model of `stem-export`, such as the quickstart's. Each case starts its own servers:

    cpu       16 clients in a closed loop: processor time per request; --against: in turn with another checkout's
    overload  an open loop at 5 times the rate of a closed loop, deadlines of 0.5 s: share of the capacity in time
    mixed     one client with small calls, alone and beside two with calls of --large rows: p50
    swaps     versions published under 16 clients that also filter outputs: lost calls, p99 in swaps and at rest
    stops     SIGTERM under 32 clients: status codes; and two replicas restarted in turn under the client
    memory    resident memory after 20 swaps and --requests requests, compared with before
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.served import cpu_seconds, request, server, start
from export.server.directories import version_directories
from stem_client import RankingClient, RankingError, RetryPolicy
from stem_tf.runtime import quieten_tensorflow
from stem_util import cli, owned
from stem_util.errors import JobError, UserError

CASES = ("cpu", "overload", "mixed", "swaps", "stops", "memory")
flags = cli.Flags()

_MODEL_BASE_PATH = flags.DEFINE(cli.PATH, "model_base_path", None, "Directory of an export's versions.", required=True)
_AGAINST = flags.DEFINE(cli.PATH, "against", None, "A checkout of another version of this project, for cpu.")
_CASES = flags.DEFINE_list("cases", list(CASES), "Which of them.")
_CANDIDATES = flags.DEFINE_integer("candidates", 200, "Of a call.", lower_bound=1)
_OVERLOAD_CANDIDATES = flags.DEFINE_integer(
    "overload_candidates", 1000, "Of a call of overload: long enough for 5 x capacity from one process.", lower_bound=1
)
_LARGE = flags.DEFINE_integer("large", 50_000, "Rows of a large call.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 4, "Of a measurement.", lower_bound=0.5)
_SWAPS = flags.DEFINE_integer("swaps", 50, "Versions that swaps publishes.", lower_bound=1)
_STOPS = flags.DEFINE_integer("stops", 8, "Servers that stops stops.", lower_bound=1)
_REQUESTS = flags.DEFINE_integer("requests", 100_000, "Of memory.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Rounds of cpu.", lower_bound=1)
_JSON = flags.DEFINE(cli.PATH, "json", None, "Also write the figures to this file.")

_PREDICT = "/tensorflow.serving.PredictionService/Predict"
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


def main(argv: Sequence[str]) -> None:
    del argv
    if unknown := set(_CASES.value).difference(CASES):
        raise UserError(f"--cases={','.join(_CASES.value)}: there is no {', '.join(sorted(unknown))}")
    quieten_tensorflow()
    base = Path(_MODEL_BASE_PATH.value)
    versions = version_directories(base).versions
    if not versions:
        raise UserError(f"--model_base_path={base} holds no version")
    measure = {
        "cpu": _cpu,
        "overload": _overload,
        "mixed": _mixed,
        "swaps": _swaps,
        "stops": _stops,
        "memory": _memory,
    }
    figures = {}
    for case in _CASES.value:
        figures[case] = measure[case](base, versions[max(versions)])
        print(f"{case}: {json.dumps(figures[case])}", flush=True)
    if _JSON.value:
        owned.write_figures(_JSON.value, {"cores": len(os.sched_getaffinity(0)), "cases": figures})


def _cpu(base: Path, version: Path) -> dict[str, Any]:
    payload = request(version, "rank", _CANDIDATES.value).SerializeToString()
    checkouts = {"here": None} | ({"against": _AGAINST.value} if _AGAINST.value else {})
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(server(base, checkout=path)) for name, path in checkouts.items()}
        rounds: dict[str, list[float]] = collections.defaultdict(list)
        for _ in range(_REPEATS.value):
            for name, (process, address) in servers.items():
                before = cpu_seconds(process.pid)
                latencies = apart(closed_loop, address, payload, 16, _SECONDS.value)
                rounds[name].append(1e3 * (cpu_seconds(process.pid) - before) / len(latencies))
    result: dict[str, Any] = {f"ms_{name}": rounded(values) for name, values in rounds.items()}
    if _AGAINST.value:
        pairs = zip(rounds["here"], rounds["against"], strict=True)
        result["ratio"] = round(statistics.median(one / other for one, other in pairs), 3)
    return result


def _overload(base: Path, version: Path) -> dict[str, Any]:
    payload = request(version, "rank", _OVERLOAD_CANDIDATES.value).SerializeToString()
    with server(base) as (_, address):
        apart(closed_loop, address, payload, 16, 1.0)
        capacity = len(apart(closed_loop, address, payload, 16, _SECONDS.value)) / _SECONDS.value
        codes, late = apart(open_loop, address, payload, 5 * capacity, _SECONDS.value, 0.5)
        after = len(apart(closed_loop, address, payload, 16, _SECONDS.value)) / _SECONDS.value
    goodput = codes.get("OK", 0) / _SECONDS.value
    return {
        "capacity": round(capacity),
        "goodput": round(goodput),
        "of_capacity": round(goodput / capacity, 3),
        "codes": codes,
        "generator_late_ms": round(1e3 * late, 1),
        "capacity_after": round(after),
    }


def _mixed(base: Path, version: Path) -> dict[str, Any]:
    small = request(version, "rank", 50).SerializeToString()
    large = request(version, "serving_default", _LARGE.value).SerializeToString()
    with server(base) as (_, address):
        apart(closed_loop, address, small, 1, 1.0)
        alone = apart(closed_loop, address, small, 1, _SECONDS.value)
        apart(closed_loop, address, large, 1, 0.1)
        with beside(closed_loop, address, large, 2, _SECONDS.value + 1):
            time.sleep(0.5)
            mixed = apart(closed_loop, address, small, 1, _SECONDS.value)
    one, other = (1e3 * statistics.median(latencies) for latencies in (alone, mixed))
    return {"p50_alone_ms": round(one, 2), "p50_beside_ms": round(other, 2), "ratio": round(other / one, 2)}


def _swaps(base: Path, version: Path) -> dict[str, Any]:
    message = request(version, "rank", _CANDIDATES.value)
    payloads = [message.SerializeToString()]
    for task in _tasks(version):
        del message.output_filter[:]
        message.output_filter.append(task)
        payloads.append(message.SerializeToString())
    with directory_of(version) as copy, server(copy, "--poll_seconds=0.1") as (process, address):
        with asking(address, payloads, clients=1) as seen:  # each set of outputs is built when it is first asked for
            wait_for(lambda: len(seen.latencies) > 2 * len(payloads))
        with asking(address, payloads, clients=16) as seen:
            time.sleep(_SECONDS.value)
            rest, begun = len(seen.latencies), time.monotonic()
            for number in range(2, _SWAPS.value + 2):
                publish(version, copy, number)
                wait_for(lambda n=number: serving(address) == n)  # type: ignore[misc]
            swaps = len(seen.latencies)
            seconds = time.monotonic() - begun
        p99 = [1e3 * np.percentile(part, 99) for part in (seen.latencies[:rest], seen.latencies[rest:swaps])]
    return {
        "swaps": _SWAPS.value,
        "seconds": round(seconds),
        "calls": len(seen.latencies),
        "lost": dict(seen.failures),
        "p99_rest_ms": round(float(p99[0]), 1),
        "p99_swaps_ms": round(float(p99[1]), 1),
        "ratio": round(float(p99[1] / p99[0]), 2),
    }


def _stops(base: Path, version: Path) -> dict[str, Any]:
    payload = request(version, "rank", _CANDIDATES.value).SerializeToString()
    failures: collections.Counter[str] = collections.Counter()
    calls = 0
    for _ in range(_STOPS.value):
        with server(base) as (process, address), asking(address, [payload], clients=32) as seen:
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            process.wait()
            time.sleep(0.1)
        calls += len(seen.latencies)
        failures.update(seen.failures)
    return {"calls": calls, "codes": dict(failures), "restart": _rolling(base, version)}


def _rolling(base: Path, version: Path) -> dict[str, Any]:
    """Restarts two replicas on fixed ports in turn under the project's client; any exception is an error."""
    message = request(version, "rank", _CANDIDATES.value)
    ports = [free_port(), free_port()]
    items = version_features(version)
    from export.server import tensors

    arrays = {name: tensors.decode(tensor) for name, tensor in message.inputs.items()}
    user = {name: array[0] for name, array in arrays.items() if name not in items}
    candidates = {name: array[0] for name, array in arrays.items() if name in items}
    errors: collections.Counter[str] = collections.Counter()
    calls = itertools.count()
    ended = threading.Event()
    processes = [start(base, f"--port={port}") for port in ports]
    try:
        addresses: Any = [f"127.0.0.1:{port}" for port in ports]
        with RankingClient(addresses, timeout=5, retry=RetryPolicy(budget=1000, refill=1.0)) as client:

            def ask() -> None:
                while not ended.is_set():
                    try:
                        client.rank(user, candidates)
                    except RankingError as error:
                        errors[str(error)] += 1
                    next(calls)

            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            for _ in range(2):
                for place, port in enumerate(ports):
                    time.sleep(0.5)
                    processes[place].send_signal(signal.SIGTERM)
                    processes[place].wait()
                    processes[place] = start(base, f"--port={port}")
            time.sleep(0.5)
            ended.set()
            for thread in threads:
                thread.join()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return {"restarts": 4, "calls": next(calls), "errors": dict(errors)}


def _memory(base: Path, version: Path) -> dict[str, Any]:
    payload = request(version, "rank", _CANDIDATES.value).SerializeToString()
    with directory_of(version) as copy, server(copy, "--poll_seconds=0.1") as (process, address):
        apart(closed_loop, address, payload, 16, 3.0)
        # Every swap needs memory for two versions, so compare with the first swap.
        publish(version, copy, 2)
        wait_for(lambda: serving(address) == 2)
        time.sleep(1)
        sizes, asked = [resident(process.pid)], 0
        for number in range(3, 23):
            publish(version, copy, number)
            wait_for(lambda n=number: serving(address) == n)  # type: ignore[misc]
            shutil.rmtree(copy / str(number - 2), ignore_errors=True)
            while asked < _REQUESTS.value * (number - 2) // 20:
                asked += len(apart(closed_loop, address, payload, 16, 2.0))
            sizes.append(resident(process.pid))
    return {
        "requests": asked,
        "mb": [round(size / 1e6) for size in sizes],
        "ratio": round(sizes[-1] / sizes[0], 3),
        "ratio_second_half": round(sizes[-1] / sizes[len(sizes) // 2], 3),
    }


# Servers


@contextlib.contextmanager
def directory_of(version: Path) -> Iterator[Path]:
    """A directory with a copy of a version as version 1."""
    with tempfile.TemporaryDirectory(prefix="stem-pressure-") as directory:
        publish(version, Path(directory), 1)
        yield Path(directory)


def publish(version: Path, base: Path, number: int) -> None:
    beside = base / f".{number}.partial"
    shutil.copytree(version, beside)
    beside.rename(base / str(number))


def serving(address: str) -> int:
    """Returns the newest version that serves."""
    from tensorflow_serving.apis import get_model_status_pb2 as pb

    with grpc.insecure_channel(address, _OPTIONS) as channel:
        ask = channel.unary_unary(
            "/tensorflow.serving.ModelService/GetModelStatus",
            request_serializer=pb.GetModelStatusRequest.SerializeToString,
            response_deserializer=pb.GetModelStatusResponse.FromString,
        )
        message = pb.GetModelStatusRequest()
        message.model_spec.name = "ranker"
        statuses = ask(message, timeout=60).model_version_status
    available = [status.version for status in statuses if status.state == pb.ModelVersionStatus.AVAILABLE]
    return max(available, default=0)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise JobError("nothing happened in time")
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _tasks(version: Path) -> list[str]:
    return [task["name"] for task in _schema(version)["tasks"]]


def version_features(version: Path) -> set[str]:
    """The features of items."""
    return {feature["name"] for feature in _schema(version)["features"] if feature["side"] == "item"}


def _schema(version: Path) -> dict[str, Any]:
    return dict(json.loads((version / "manifest.json").read_text(encoding="utf-8"))["schema"])


# Loads run in separate processes, so that their processor time is not the server's.


def apart(load: Callable[..., Any], *arguments: Any) -> Any:
    """Runs ``load`` in another process and returns its result."""
    with beside(load, *arguments) as result:
        return result()


@contextlib.contextmanager
def beside(load: Callable[..., Any], *arguments: Any) -> Iterator[Callable[[], Any]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_send, args=(theirs, load, arguments), daemon=True)
    child.start()
    theirs.close()
    ours.recv()
    try:
        yield ours.recv
    finally:
        child.join()


def _send(pipe: Any, load: Callable[..., Any], arguments: Sequence[Any]) -> None:
    pipe.send("started")
    pipe.send(load(*arguments))


def closed_loop(address: str, payload: bytes, clients: int, seconds: float) -> list[float]:
    """Latencies of clients that each wait for an answer before they call again."""
    latencies: list[float] = []
    with grpc.insecure_channel(address, _OPTIONS) as channel:
        call = channel.unary_unary(_PREDICT)
        end = time.monotonic() + seconds

        def ask() -> None:
            own = []
            while time.monotonic() < end:
                begun = time.perf_counter()
                call(payload, timeout=60)
                own.append(time.perf_counter() - begun)
            latencies.extend(own)

        threads = [threading.Thread(target=ask) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return latencies


def open_loop(
    address: str, payload: bytes, rate: float, seconds: float, deadline: float
) -> tuple[dict[str, int], float]:
    """Sends calls at Poisson times: returns their codes, and how late the last one was sent."""
    codes: collections.Counter[str] = collections.Counter()
    times = np.cumsum(np.random.default_rng(0).exponential(1 / rate, int(rate * seconds)))
    with contextlib.ExitStack() as stack:
        calls = [stack.enter_context(grpc.insecure_channel(address, _OPTIONS)).unary_unary(_PREDICT) for _ in range(8)]
        for call in calls:
            call(payload, timeout=60)
        pending, begun, late = [], time.monotonic(), 0.0
        for number, due in enumerate(times):
            wait = begun + due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            late = max(0.0, -wait)
            pending.append(calls[number % len(calls)].future(payload, timeout=deadline))
        for future in pending:
            codes[future.code().name] += 1
    return dict(codes), late


class _Seen:
    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.failures: collections.Counter[str] = collections.Counter()


@contextlib.contextmanager
def asking(address: str, payloads: Sequence[bytes], clients: int) -> Iterator[_Seen]:
    """Clients in this process that send calls until the block ends; after UNAVAILABLE a client waits a little."""
    seen, ended = _Seen(), threading.Event()

    def ask(number: int) -> None:
        with grpc.insecure_channel(address, _OPTIONS) as channel:
            call = channel.unary_unary(_PREDICT)
            for payload in itertools.islice(itertools.cycle(payloads), number, None):
                if ended.is_set():
                    return
                begun = time.perf_counter()
                try:
                    call(payload, timeout=30)
                except grpc.RpcError as error:
                    seen.failures[f"{error.code().name}: {error.details()}"[:80]] += 1
                    ended.wait(0.05)
                else:
                    seen.latencies.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


if __name__ == "__main__":
    cli.run(main, flags)
