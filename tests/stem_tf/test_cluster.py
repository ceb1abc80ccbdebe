"""TF_CONFIG: what it may say, and one sentence about each of its faults."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from stem_tf import cluster
from stem_util.errors import UserError


def config(of: dict[str, Any], kind: Any = "worker", index: Any = 0) -> str:
    return json.dumps({"cluster": of, "task": {"type": kind, "index": index}})


def read(strategy: str, text: str) -> cluster.Cluster | None:
    return cluster.read(strategy, {"TF_CONFIG": text})


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def test_a_strategy_of_one_process_has_no_cluster() -> None:
    assert cluster.read("none", {}) is cluster.read("mirrored", {"TF_CONFIG": " {} "}) is None


def test_the_first_worker_is_the_chief_of_a_cluster_without_one(port: int) -> None:
    workers = ["a.example:5000", f"[::1]:{port}"]
    found = read("multi_worker", config({"worker": workers}, index=1))
    assert found is not None and not found.is_chief
    assert (found.task.host, found.task.port) == ("::1", port)
    assert [str(task) for task in found.tasks] == ["worker 0 (a.example:5000)", f"worker 1 ([::1]:{port})"]
    assert found.chief == found.tasks[0]


def test_kinds_without_tasks_are_left_out(port: int) -> None:
    found = read("multi_worker", config({"worker": [f"HOST:{port}"], "ps": [], "chief": []}))
    assert found is not None and found.addresses == {"worker": (f"HOST:{port}",)} and not found.has_servers


def test_parameter_servers_have_a_chief_of_their_own(port: int) -> None:
    addresses = {"ps": ["c:1", "d:1"], "worker": ["b:1"], "chief": [f"a:{port}"]}
    found = read("parameter_server", config(addresses, "chief"))
    assert found is not None and found.is_chief
    assert [task.kind for task in found.tasks] == ["chief", "worker", "ps", "ps"]


@pytest.mark.parametrize(
    ("strategy", "text", "sentence"),
    [
        ("multi_worker", "", "config.train.strategy=multi_worker needs a cluster: start its processes with"),
        ("none", config({"worker": ["a:1"]}), "TF_CONFIG is set, but config.train.strategy=none trains in one process"),
        ("multi_worker", "{'cluster'", "TF_CONFIG is not JSON (Expecting property name"),
        ("multi_worker", "[" * 100_000, "TF_CONFIG is not JSON (maximum recursion depth exceeded"),
        ("multi_worker", '{"task": {}}', "TF_CONFIG names no cluster: it should be"),
        ("multi_worker", "[1]", "TF_CONFIG names no cluster: it should be"),
        ("multi_worker", '{"cluster": {"worker": ["a:1"]}}', "does not say which task this process is"),
        ("multi_worker", config({"workers": ["a:1"]}), "no kind of task 'workers'; did you mean 'worker'?"),
        ("multi_worker", config({"worker": "a:1"}), "'worker' should be a list of addresses, host:port, but is 'a:1'"),
        ("multi_worker", config({"worker": ["a"]}), "the address of a worker should be host:port, but is 'a'"),
        ("multi_worker", config({"worker": []}), "TF_CONFIG names no address: it should be"),
        ("multi_worker", config({"worker": ["a:1"], "evaluator": ["b:1"]}), "no kind of task 'evaluator'. A cluster"),
        ("multi_worker", config({"worker": ["a:1", "A:1"]}), "gives the address a:1 to two tasks"),
        ("multi_worker", config({"worker": ["a:0"]}), "should be host:port, but is 'a:0'"),
        ("multi_worker", config({"worker": ["::1:5000"]}), "should be host:port, but is '::1:5000'"),
        ("multi_worker", config({"worker": ["http://a:1"]}), "should be host:port, but is 'http://a:1'"),
        ("multi_worker", config({"worker": {"0": "a:1"}}), "'worker' should be a list of addresses"),
        ("multi_worker", config({"worker": ["a:1"]}, index=0.0), "worker 0.0, but index should be a number"),
        ("multi_worker", config({"worker": ["a:1"]}, index=-1), "worker -1, but index should be a number"),
        ("multi_worker", "null", "TF_CONFIG names no cluster: it should be"),
        ("multi_worker", config({"worker": ["a:70000"]}), "should be host:port, but is 'a:70000'"),
        ("multi_worker", config({"worker": [7]}), "should be host:port, but is 7"),
        ("multi_worker", config({"chief": ["a:1"], "worker": ["a:1"]}), "gives the address a:1 to two tasks"),
        ("multi_worker", config({"worker": ["a:1"]}, "chief"), "this process is a 'chief', but the cluster has worker"),
        ("multi_worker", config({"worker": ["a:1"]}, ["x"]), "this process is a ['x'], but the cluster has worker"),
        ("multi_worker", config({"worker": ["a:1", "b:1"]}, index=2), "worker 2, but index should be a number from"),
        ("multi_worker", config({"worker": ["a:1"]}, index="0"), "worker '0', but index should be a number"),
        ("multi_worker", config({"worker": ["a:1"]}, index=True), "worker True, but index should be a number"),
        ("multi_worker", config({"chief": ["a:1", "b:1"]}, "chief"), "names 2 chiefs: there can be only one"),
        ("multi_worker", config({"worker": ["a:1"], "ps": ["b:1"]}), "leave 'ps' out of the cluster"),
        ("parameter_server", config({"worker": ["a:1"]}), "but the cluster has no chief and no ps"),
    ],
)  # fmt: skip
def test_each_fault_is_one_sentence(strategy: str, text: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        read(strategy, text)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        mine = f"here:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"the port of worker 0 \({mine}\) cannot be opened \(Address already"):
            read("multi_worker", config({"worker": [mine]}))
