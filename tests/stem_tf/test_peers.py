"""The processes of a run among each other, without TensorFlow: real processes that meet on loopback."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stem_tf import peers
from stem_tf.cluster import Cluster
from stem_tf.jobs.launch import free_ports
from stem_tf.peers import Interrupted, Peers
from stem_util.errors import JobError, UserError

PROCESS = """
import sys, time
from stem_tf import cluster, peers
from stem_util import cli
rank, ports, timeout = int(sys.argv[1]), sys.argv[2].split(","), float(sys.argv[3])
found = cluster.Cluster({"worker": tuple(f"127.0.0.1:{port}" for port in ports)}, "worker", rank)
with peers.meet(found, {}, timeout) as crew:
    print("met", flush=True)
    while True:
        if sys.argv[4] == str(rank):
            time.sleep(60)  # its main thread hangs
        crew.launch()
        time.sleep(0.02)
        crew.gather({})
        crew.decide(lambda: None)
"""


def clusters(count: int) -> list[Cluster]:
    """The cluster as each of its processes sees it."""
    addresses = {"worker": tuple(f"127.0.0.1:{port}" for port in free_ports(count))}
    return [Cluster(addresses, "worker", index) for index in range(count)]


def together(found: list[Cluster], work: Callable[[Peers], Any], about: list[Any] | None = None) -> list[Any]:
    """What ``work`` returns or raises in each of the processes, which are threads here."""
    results: list[Any] = [None] * len(found)

    def run(index: int) -> None:
        try:
            with peers.meet(found[index], {"version": about[index] if about else 1}, 10.0) as mine:
                results[index] = work(mine)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


@contextlib.contextmanager
def processes(
    count: int, timeout: float, hangs: int = -1, code: str = PROCESS
) -> Iterator[tuple[list[subprocess.Popen[str]], list[str]]]:
    """Processes that make steps together until one fails, and their addresses."""
    ports = free_ports(count)
    words = [",".join(map(str, ports)), str(timeout), str(hangs)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "met\n"
        yield started, [f"127.0.0.1:{port}" for port in ports]
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_alone() -> None:
    alone = Peers()
    assert alone.is_chief and alone.decide(lambda: 3) == 3
    alone.check()
    alone.ask_to_stop(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        alone.check()


def test_the_chief_gathers_and_decides() -> None:
    def work(mine: Peers) -> Any:
        arrays = {"a": np.arange(mine.rank * 100_000), "b": np.full((2, 3), mine.rank, np.float32)}
        gathered = mine.gather(arrays)
        assert bool(gathered) == mine.is_chief
        sizes = mine.decide(lambda: {"sizes": [len(part["a"]) for part in gathered], "nan": float("nan")})
        assert all((part["b"] == rank).all() and part["b"].shape == (2, 3) for rank, part in enumerate(gathered))
        return sizes["sizes"]

    assert together(clusters(3), work) == [[0, 100_000, 200_000]] * 3


def test_they_meet_over_ipv6() -> None:
    addresses = {"worker": tuple(f"[::1]:{port}" for port in free_ports(2))}
    found = [Cluster(addresses, "worker", index) for index in range(2)]
    assert together(found, lambda mine: mine.decide(lambda: 7)) == [7, 7]


def test_all_stop_where_the_furthest_is() -> None:
    """A worker that gets the signal while another is ahead, inside a step that needs all of them."""
    step, reached = threading.Barrier(3), {}

    def work(mine: Peers) -> None:
        if mine.rank == 2:
            time.sleep(0.3)
        for number in range(1, 1000):
            mine.launch()
            reached[mine.rank] = number
            if number == 4 and mine.rank == 1:
                mine.ask_to_stop(signal.SIGTERM)
            step.wait(timeout=20)  # a collective operation
            time.sleep(0.01 * mine.rank)
            mine.check()
        raise AssertionError("never stopped")

    stopped = together(clusters(3), work)
    assert [type(error) for error in stopped] == [Interrupted] * 3, stopped
    assert len(set(reached.values())) == 1 and 4 <= reached[0] < 100


def test_a_process_that_waits_for_a_value_stops_too() -> None:
    def work(mine: Peers) -> None:
        mine.launch()
        if mine.rank:
            mine.gather({"a": np.arange(3)})
            mine.decide(lambda: None)
        else:
            mine.ask_to_stop(signal.SIGINT)
            while True:
                mine.check()

    assert [type(error) for error in together(clusters(2), work)] == [Interrupted] * 2


def test_a_difference_is_one_sentence_in_all() -> None:
    one, two = (str(error) for error in together(clusters(2), lambda mine: None, about=[1, 2]))
    assert one == two and one.startswith("version is 2 in worker 1 (127.0.0.1:")


@pytest.mark.parametrize("fails", [False, True])
def test_parameter_servers_ask_their_chief_to_stop_and_hear_how_it_ended(fails: bool) -> None:
    ports = [f"127.0.0.1:{port}" for port in free_ports(3)]
    addresses = {"chief": (ports[0],), "worker": (ports[1],), "ps": (ports[2],)}
    chief, worker, server = (Cluster(addresses, kind, 0) for kind in addresses)
    words: list[Any] = []

    def serve(own: Cluster) -> None:
        mine = peers.attend(own, {"version": 1}, 10.0)
        if own.kind == "ps":
            mine.ask_to_stop(signal.SIGTERM)
        words.append(mine.last_word())

    def lead() -> None:
        with peers.meet(chief, {"version": 1}, 10.0) as mine:
            if fails:
                raise UserError("a bad row")
            while True:
                mine.check()

    threads = [threading.Thread(target=serve, args=(own,)) for own in (worker, server)]
    for thread in threads:
        thread.start()
    with pytest.raises(UserError if fails else Interrupted, match="a bad row" if fails else "SIGTERM"):
        lead()
    for thread in threads:
        thread.join(timeout=10)
    word = (f"chief 0 ({ports[0]}) has failed: a bad row", 2) if fails else ("", 128 + signal.SIGTERM)
    assert words == [word] * 2


def test_news_of_one_that_has_stopped_ends_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an operation of TensorFlow has failed, and where nobody is the cause."""
    alone: list[float] = []

    def work(mine: Peers) -> None:
        begun = time.monotonic()
        mine.await_news()
        alone.append(time.monotonic() - begun)

    monkeypatch.setattr(peers, "_NEWS", 0.5)
    assert together(clusters(2), work) == [None, None] and all(0.4 < seconds < 5 for seconds in alone)
    code = PROCESS.replace("time.sleep(0.02)", "crew.await_news()")
    with processes(2, 60, code=code) as (started, addresses):
        started[1].send_signal(signal.SIGSTOP)
        error = started[0].communicate(timeout=30)[1]
        assert started[0].returncode == 1 and f"worker 1 ({addresses[1]}) has not answered for 5" in error


def test_two_processes_of_one_index() -> None:
    found = clusters(3)
    sentences = [str(error) for error in together([found[0], found[1], found[1]], lambda mine: None)]
    assert all("two processes are worker 1 (" in sentence for sentence in sentences), sentences


def test_strangers_are_ignored_and_who_is_missing_is_named() -> None:
    found = clusters(2)
    chief = found[0].chief

    def knock() -> None:
        for payload in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x02[]", b""):
            with contextlib.suppress(OSError), socket.create_connection((chief.host, chief.port)) as stranger:
                stranger.sendall(payload)

    threading.Timer(0.2, knock).start()
    with (
        pytest.raises(JobError, match=r"worker 1 \(127.0.0.1:\d+\) did not come within 1 s"),
        peers.meet(found[0], {}, 1.0),
    ):
        pass
    with (
        pytest.raises(JobError, match=r"worker 0 \(127.0.0.1:\d+\) did not answer within 0.5 s"),
        peers.meet(found[1], {}, 0.5),
    ):
        pass


def test_one_that_fails_tells_why() -> None:
    """Its sentence reaches the others, which end at once."""
    code = PROCESS.replace("time.sleep(60)  # its main thread hangs", "raise ValueError('a bad row')")
    ports = ",".join(map(str, free_ports(2)))
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), ports, "10", "1"], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=30)[1] for process in started]
    assert started[0].returncode == 1
    assert "worker 1 (127.0.0.1:" in errors[0] and "has failed: ValueError: a bad row" in errors[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 2])
def test_one_that_is_killed_or_stopped_is_named(number: signal.Signals, victim: int) -> None:
    with processes(3, 1.5) as (started, addresses):
        begun = time.monotonic()
        started[victim].send_signal(number)
        others = [process for rank, process in enumerate(started) if rank != victim]
        errors = [process.communicate(timeout=20)[1] for process in others]
        assert time.monotonic() - begun < 15
        assert [process.returncode for process in others] == [1, 1]
        why = "has ended without a word" if number == signal.SIGKILL else "has not answered for 1.5 s"
        assert all(f"worker {victim} ({addresses[victim]}) {why}" in error for error in errors), errors


def test_one_whose_main_thread_hangs_is_named() -> None:
    with processes(2, 1.5, hangs=1) as (started, addresses):
        errors = [process.communicate(timeout=20)[1] for process in started]
        assert all(f"the others wait for worker 1 ({addresses[1]})" in error for error in errors), errors
