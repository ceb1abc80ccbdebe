"""Fills in the templates: a Kubernetes manifest, or a script that starts the processes over ssh."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stem_tf.submission.training import Training, shell
from stem_util import owned, stores, templates
from stem_util.errors import UserError

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_NAME = 40
_SCRIPT = "start.sh"


@dataclass(frozen=True)
class Cluster:
    """Where and how the pods run in Kubernetes.

    Attributes:
      name: name of the Job, and the beginning of the names of its pods.
      image: container image with stem-train.
      cores, memory, gpus: of each worker, and of the chief without its GPUs; memory as ``16Gi``.
      ps_memory: of each parameter server.
      volume: the claim of the volume that all pods share; "" for none.
      mount: where the volume is mounted.
      secret: a secret whose keys become environment variables, such as credentials of a bucket; "" for none.
      service_account: the service account of the pods; "" for the namespace's default.
      port: port of the processes.
      grace_seconds: from SIGTERM to SIGKILL.
      restarts: how often the whole cluster may fail.
    """

    name: str
    image: str
    cores: int
    memory: str
    ps_memory: str
    gpus: int
    volume: str
    mount: str
    secret: str
    service_account: str
    port: int
    grace_seconds: int
    restarts: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", self.name) or len(self.name) > _LONGEST_NAME:
            raise UserError(
                f"--name={self.name!r} should be lower-case letters, digits and hyphens, at most {_LONGEST_NAME} and a "
                "letter first: it begins the names of pods"
            )
        templates.check_image(self.image)
        for flag, value in (
            ("volume", self.volume),
            ("secret", self.secret),
            ("service_account", self.service_account),
        ):
            if value and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", value):
                raise UserError(f"--{flag}={value!r} is no name of an object in Kubernetes")
        if not re.fullmatch(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+", self.mount):
            raise UserError(f"--mount={self.mount!r} should be the absolute path of a directory, as in /work")
        for flag, value in (("memory", self.memory), ("ps_memory", self.ps_memory)):
            if not re.fullmatch(r"[1-9]\d*(Mi|Gi|Ti)", value):
                raise UserError(f"--{flag}={value!r} should be a number of Mi, Gi or Ti, as in 64Gi")


def kubernetes(training: Training, cluster: Cluster) -> dict[str, str]:
    """The text of the manifest, by file name.

    Raises:
      UserError: a directory of the command would not outlive its pod.
    """
    for flag in ("workdir", "config.data.dir"):
        path = training.given(flag)
        if path is None or stores.is_uri(path):
            continue
        if not cluster.volume or not PurePosixPath(path).is_relative_to(cluster.mount) or ".." in path.split("/"):
            where = f"below --mount={cluster.mount}" if cluster.volume else "on a --volume"
            raise UserError(
                f"--{flag}={path} is on the pod's own disk, which ends with the pod: put it {where} or in a bucket"
            )
    hosts = {
        kind: [f"{cluster.name}-{kind}-{index}.{cluster.name}:{cluster.port}" for index in range(count)]
        for kind, count in training.tasks.items()
    }
    parts = [
        {"kind": kind, "count": count, "memory": cluster.ps_memory if kind == "ps" else cluster.memory}
        | {"gpus": cluster.gpus if kind == "worker" else 0}
        for kind, count in training.tasks.items()
    ]
    environment = templates.environment(_TEMPLATES)
    environment.filters["literal"] = lambda text: text.replace("$", "$$")  # Kubernetes reads $(X) in commands
    text = environment.get_template("kubernetes.yaml.j2").render(
        dataclasses.asdict(cluster),
        training=training,
        command=shell(training.command),
        hosts=json.dumps(hosts),
        parts=parts,
    )
    return {"training.yaml": text}


def over_ssh(training: Training, port: int) -> dict[str, str]:
    """The text of the script, by file name.

    Args:
      training: what to start.
      port: port of the first task; the others take the next ones.

    Raises:
      UserError: it is no cluster.
    """
    if not training.is_cluster:
        raise UserError("--to=ssh starts a cluster: give --workers=N, or run the command on the machine itself")
    tasks = [(kind, index) for kind, count in training.tasks.items() for index in range(count)]
    text = (
        templates.environment(_TEMPLATES)
        .get_template("start.sh.j2")
        .render(training=training, command=shlex.quote(shell(training.command)), tasks=tasks, port=port)
    )
    return {_SCRIPT: text}


def write(output: Path, texts: Mapping[str, str], facts: Mapping[str, Any]) -> list[str]:
    """Writes the files; see :func:`stem_util.templates.write`."""
    return templates.write(
        output,
        owned.SUBMISSION,
        texts,
        facts,
        job="stem-submit",
        facts_file="submission.json",
        scripts=texts.keys() & {_SCRIPT},
    )
