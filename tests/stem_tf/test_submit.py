"""stem-submit: manifests that Kubernetes takes, and what pods and hosts run is run here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from stem_tf import cluster as clusters
from stem_tf.submission import render
from stem_tf.submission.training import training
from stem_util.errors import UserError

Job = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = ("stem-train", "--config=small", "--config.data.dir=/work/data", "--workdir=/work/my run")
ONE: tuple[str, ...] = ()
WORKERS = ("--workers=3",)
SERVERS = ("--workers=2", "--ps=2")


@pytest.fixture
def submit(job_in_process: Job, tmp_path: Path) -> Callable[..., Path]:
    """``submit("--workers=2", ...)``: writes files for ``COMMAND`` and returns their directory."""

    def run(*flags: str, command: tuple[str, ...] = COMMAND) -> Path:
        done = job_in_process("stem_tf.jobs.submit", f"--output={tmp_path / 'out'}", *flags, "--", *command)
        assert done.returncode == 0, done.stderr
        return tmp_path / "out"

    return run


@pytest.fixture
def refused(job_in_process: Job, tmp_path: Path) -> Callable[..., str]:
    """As ``submit``, for what is refused: returns the one sentence."""

    def run(*flags: str, command: tuple[str, ...] = COMMAND) -> str:
        done = job_in_process("stem_tf.jobs.submit", f"--output={tmp_path / 'out'}", *flags, "--", *command)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert not (tmp_path / "out").exists()
        return done.stderr

    return run


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory of programs for the PATH: a stem-train that tells how it was started, and an ssh to this machine."""
    directory = tmp_path / "programs"
    directory.mkdir()
    (directory / "stem-train").write_text(f"#!{sys.executable}\n{STEM_TRAIN}")
    # As sshd does, it hands one string to a shell and its own input to that.
    (directory / "ssh").write_text('#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift 2; done\nshift\nexec sh -c "$*"\n')
    for program in directory.iterdir():
        program.chmod(0o755)
    return directory


STEM_TRAIN = """
import glob, json, os, signal, sys, time
config = json.loads(os.environ.get("TF_CONFIG", "null"))
task = "{type}-{index}".format(**config["task"]) if config else "alone"
def stopped(number, frame):
    if task == os.environ.get("SLOW"):
        time.sleep(0.5)
    print(task, "was stopped at", time.time(), flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stopped)
print(json.dumps({"words": sys.argv[1:], "config": config, "pid": os.getpid(), "parent": os.getppid()}), flush=True)
while sum(os.path.getsize(log) > 0 for log in glob.glob("logs/*.log")) < int(os.environ.get("STARTED", 0)):
    time.sleep(0.02)
if task == os.environ.get("FAILS"):
    sys.exit(3)
if task not in os.environ.get("ENDS", "").split(","):
    time.sleep(60)
"""


def objects(path: Path) -> dict[tuple[str, str], Any]:
    """The objects of a manifest by kind and name, each checked against the oldest Kubernetes that will do."""
    found = list(yaml.safe_load_all((path / "training.yaml").read_text()))
    for each in found:
        kubernetes_validate.validate(each, "1.29", strict=True)
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def pod(job: Any) -> Any:
    return job["spec"]["template"]["spec"]


def run_as_a_pod(job: Any, index: int, programs: Path) -> Any:
    """What stem-train says that the command of a pod of ``job`` starts."""
    # Kubernetes replaces $(NAME) and $$ in commands before it runs them.
    shell, flag, script = (word.replace("$$", "$") for word in pod(job)["containers"][0]["command"])
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": str(index)}
    environment |= {"ENDS": f"alone,chief-{index},worker-{index},ps-{index}"}
    with subprocess.Popen([shell, flag, script], env=environment, stdout=subprocess.PIPE, text=True) as process:
        said = json.loads(process.communicate(timeout=20)[0])
    assert process.returncode == 0 and said["pid"] == process.pid  # signals reach it: no shell is between
    return said


def test_one_machine_is_a_job(submit: Callable[..., Path], programs: Path) -> None:
    awkward = "--config.note=$(HOME) $HOME 'a' \"b\" $$ \\"
    flags = ("--volume=training", "--gpus=4", "--cores=16", "--memory=64Gi", "--name=ranker", "--grace_seconds=77")
    command = (*COMMAND, "--config.train.strategy=mirrored", awkward)
    ((kind, name), job), *others = objects(submit(*flags, command=command)).items()
    assert (kind, name, others) == ("Job", "ranker", [])
    assert pod(job)["terminationGracePeriodSeconds"] == 77
    container = pod(job)["containers"][0]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 4}
    assert container["volumeMounts"] == [{"name": "work", "mountPath": "/work"}]
    said = run_as_a_pod(job, 0, programs)
    assert said["words"] == list(command[1:]) and said["config"] is None


@pytest.mark.parametrize(("flags", "sizes"), [(WORKERS, {"worker": 3}), (SERVERS, {"chief": 1, "worker": 2, "ps": 2})])
def test_pods_of_a_cluster_find_one_another(
    submit: Callable[..., Path], programs: Path, flags: tuple[str, ...], sizes: dict[str, int]
) -> None:
    found = objects(submit(*flags, "--volume=training", "--name=ranker", "--port=6000", "--gpus=1"))
    service = found["Service", "ranker"]["spec"]
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"]
    tasks = set()
    for kind, size in sizes.items():
        job = found["Job", f"ranker-{kind}"]
        assert job["spec"]["completionMode"] == "Indexed"
        assert job["spec"]["completions"] == job["spec"]["parallelism"] == size
        assert ("nvidia.com/gpu" in pod(job)["containers"][0]["resources"]["limits"]) == (kind == "worker")
        labels = job["spec"]["template"]["metadata"]["labels"]
        for selector in (
            service["selector"],
            found["NetworkPolicy", "ranker"]["spec"]["podSelector"]["matchLabels"],
            found["PodDisruptionBudget", "ranker"]["spec"]["selector"]["matchLabels"],
        ):
            assert selector.items() <= labels.items()
        for index in range(size):
            said = run_as_a_pod(job, index, programs)
            strategy = "parameter_server" if "ps" in sizes else "multi_worker"
            assert said["words"] == [*COMMAND[1:], f"--config.train.strategy={strategy}"]
            cluster = clusters.parse(json.dumps(said["config"]))
            # An indexed Job calls a pod's host NAME-INDEX; the headless Service is the domain of all of them.
            assert str(cluster.task) == f"{kind} {index} (ranker-{kind}-{index}.{pod(job)['subdomain']}:6000)"
            assert pod(job)["subdomain"] == found["Service", "ranker"]["metadata"]["name"]
            tasks.add(cluster.tasks)
    assert len(tasks) == 1  # all have the same cluster
    assert found["PodDisruptionBudget", "ranker"]["spec"]["minAvailable"] == sum(sizes.values()) - 1


def test_a_pod_that_is_moved_is_no_failure_and_a_mistake_is_not_tried_again(submit: Callable[..., Path]) -> None:
    for (kind, _), job in objects(submit(*SERVERS, "--volume=training", "--restarts=3")).items():
        if kind != "Job":
            continue
        moved, stopped, mistake = job["spec"]["podFailurePolicy"]["rules"]
        assert moved == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        assert stopped["action"] == "Ignore" and stopped["onExitCodes"]["values"] == [143]
        assert mistake["action"] == "FailJob" and mistake["onExitCodes"]["values"] == [2]
        assert job["spec"]["podReplacementPolicy"] == "Failed"  # two never train in one work directory
        assert job["spec"]["backoffLimit"] == 3 * job["spec"]["completions"]
        assert pod(job)["restartPolicy"] == "Never"


def test_credentials_of_a_bucket_come_from_a_secret_or_an_account(submit: Callable[..., Path]) -> None:
    command = ("stem-train", "--config.data.dir=s3://b/data", "--workdir", "s3://b/run")
    (job,) = objects(submit("--secret=aws", "--service_account=trainer", command=command)).values()
    assert pod(job)["containers"][0]["envFrom"] == [{"secretRef": {"name": "aws"}}]
    assert pod(job)["serviceAccountName"] == "trainer" and "volumes" not in pod(job)


@pytest.mark.parametrize(
    ("flags", "command", "why"),
    [
        (ONE, ("stem-evaluate", "--workdir=/work/run"), "what to submit comes after --, as in"),
        (ONE, ("stem-train", "--config=small"), "has no --workdir"),
        (ONE, ("stem-train", "--workdir=/work/a\nb"), "line break"),
        (("--ps=2",), COMMAND, "--ps=2 serves workers, and there are none"),
        (ONE, (*COMMAND, "--config.train.strategy=parameter_server"), "give --workers=N and --ps=N"),
        (WORKERS, (*COMMAND, "--config.train.strategy", "mirrored"), "a cluster for --config.train.strategy="),
        (ONE, COMMAND, "/work/my run is on the pod's own disk, which ends with the pod: put it on a --volume or"),
        (("--volume=v", "--mount=/data"), COMMAND, "put it below --mount=/data or in a bucket"),
        (("--volume=v",), ("stem-train", "--workdir=/work/../run"), "own disk"),
        (("--volume=v",), ("stem-train", "--workdir=runs/first"), "own disk"),
        (("--volume=v",), (*COMMAND, "--workdir", "/work/a", "--workdir=/b"), "--workdir=/b is on the pod's own disk"),
        (("--volume=v", "--name=My_ranker"), COMMAND, "--name='My_ranker' should be lower-case"),
        (("--volume=v", "--memory=64"), COMMAND, "--memory='64' should be a number of Mi, Gi or Ti"),
        (("--volume=v: x",), COMMAND, "--volume='v: x' is no name of an object"),
        (("--volume=v", "--image=a b"), COMMAND, "is no name of an image"),
        (("--volume=v", "--mount=/work/../x"), COMMAND, "should be the absolute path"),
        (("--volume=v", "--ps_memory=1Gi"), COMMAND, "--ps_memory does nothing without parameter servers"),
        (WORKERS, ("stem-train", "--workdir=s3://b/run"), "a cluster share their work directory through a file system"),
        (("--mount=/work",), COMMAND, "--mount does nothing without a --volume"),
        (("--to=ssh",), COMMAND, "--to=ssh starts a cluster: give --workers=N"),
        (("--to=ssh", "--workers=2", "--gpus=1"), COMMAND, "--gpus is for Kubernetes: it does nothing with --to=ssh"),
    ],
)  # fmt: skip
def test_mistakes_are_said(
    refused: Callable[..., str], flags: tuple[str, ...], command: tuple[str, ...], why: str
) -> None:
    assert why in refused(*flags, command=command)


def test_a_manifest_changed_by_hand_stays(submit: Callable[..., Path], tmp_path: Path) -> None:
    manifest = submit("--volume=training") / "training.yaml"
    submit("--volume=training", "--cores=4")
    manifest.write_text(manifest.read_text().replace('cpu: "4"', 'cpu: "5"'))
    with pytest.raises(UserError, match=r"training\.yaml changed since stem-submit wrote it"):
        render.write(tmp_path / "out", render.over_ssh(training(COMMAND, 2, 0), 5000), {})
    assert 'cpu: "5"' in manifest.read_text()


class Hosts:
    """Runs a start.sh on hosts that are all this machine."""

    def __init__(self, script: Path, programs: Path, directory: Path) -> None:
        self.script, self.programs, self.directory = script, programs, directory

    def start(self, *hosts: str, **environment: str) -> subprocess.Popen[str]:
        path = {"PATH": f"{self.programs}:{os.environ['PATH']}", "DIRECTORY": str(self.directory), "STARTED": "5"}
        path["LC_ALL"] = "C"  # as cron has it
        given = os.environ | path | environment
        command = ["bash", str(self.script), *hosts]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.directory, env=given, stdout=pipe, stderr=pipe, text=True)

    def log(self, task: str) -> list[str]:
        path = self.directory / "logs" / f"{task}.log"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, *tasks: str) -> list[int]:
        """Waits until the processes have started; returns their ids."""
        end = time.monotonic() + 20
        while not all(self.log(task) for task in tasks):
            assert time.monotonic() < end
            time.sleep(0.02)
        return [json.loads(self.log(task)[0])["pid"] for task in tasks]


@pytest.fixture(params=[SERVERS])
def hosts(submit: Callable[..., Path], programs: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Hosts:
    script = submit("--to=ssh", *request.param, "--port=7000") / "start.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and os.access(script, os.X_OK)
    directory = tmp_path / "a 'dïrectory' of $HOME"
    directory.mkdir()
    return Hosts(script, programs, directory)


TASKS = ("chief-0", "worker-0", "worker-1", "ps-0", "ps-1")


def test_ssh_starts_every_task_and_the_end_of_the_chief_ends_all(hosts: Hosts) -> None:
    with hosts.start("a", "me@b", "c.net", "c.net", "e", ENDS="chief-0") as process:
        out, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    said = {task: json.loads(hosts.log(task)[0]) for task in TASKS}
    assert json.loads(out.splitlines()[0]) == said["chief-0"]
    for task in TASKS:
        cluster = clusters.parse(json.dumps(said[task]["config"]))
        assert f"{cluster.kind}-{cluster.index}" == task
        assert cluster.addresses == {
            "chief": ("a:7000",), "worker": ("b:7001", "c.net:7002"), "ps": ("c.net:7003", "e:7004"),
        }  # fmt: skip
        assert said[task]["words"] == [*COMMAND[1:], "--config.train.strategy=parameter_server"]
        assert [line.partition(" at ")[0] for line in hosts.log(task)[1:]] == [f"{task} was stopped"] * (
            task != TASKS[0]
        )


def test_ssh_stops_all_when_one_fails_and_says_which(hosts: Hosts) -> None:
    with hosts.start("a", "b", "c", "d", "e", FAILS="worker-1") as process:
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 3
    assert error == "error: worker 1 on c ended with code 3; its output: logs/worker-1.log\n"
    for task in TASKS:
        assert len(hosts.log(task)) == (1 if task == "worker-1" else 2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
@pytest.mark.parametrize("hosts", [SERVERS, ("--workers=5",)], indirect=True)
def test_ssh_leaves_no_process_behind(hosts: Hosts, number: int, code: int, request: pytest.FixtureRequest) -> None:
    servers = SERVERS in request.node.callspec.params.values()
    tasks = TASKS if servers else tuple(f"worker-{index}" for index in range(5))
    with hosts.start("a", "b", "c", "d", "e", SLOW=tasks[0]) as process:
        ids = hosts.wait_for(*tasks)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == code
    assert all(hosts.log(task)[1].startswith(f"{task} was stopped") for task in tasks)
    times = [float(hosts.log(task)[1].split()[-1]) for task in tasks]
    if number == signal.SIGTERM:  # parameter servers are there until the chief has written its checkpoint
        assert (min(times[1:]) >= times[0]) == servers
    assert not any(Path(f"/proc/{each}").exists() for each in ids)


def test_ssh_refuses_hosts_that_are_none(hosts: Hosts) -> None:
    for given, why in ((["a"], "usage: "), (["a", "b", "-oX", "d", "e"], "'-oX' is no name")):
        with hosts.start(*given) as process:
            assert why in process.communicate(timeout=20)[1]
        assert process.returncode == 2 and not (hosts.directory / "logs").exists()
