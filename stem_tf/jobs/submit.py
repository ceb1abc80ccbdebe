"""Writes the files that start a training on a Kubernetes cluster, or on hosts that are reached over ssh.

    stem-submit --output=DIR --workers=4 --ps=2 --volume=training -- stem-train --config=small --workdir=/work/run ...

Without --workers it is a training on one machine. With --workers=N it has train.strategy=multi_worker, and with --ps=N
train.strategy=parameter_server. A file that was changed by hand is not replaced. See docs/beyond_one_machine.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stem_util import cli, owned
from stem_util.errors import UserError

flags = cli.Flags()

_OUTPUT = flags.DEFINE(cli.PATH, "output", None, "The directory to write to.", required=True)
_TO = flags.DEFINE_enum(
    "to",
    "kubernetes",
    ["kubernetes", "ssh"],
    "kubernetes: a manifest, training.yaml. ssh: a script, start.sh, which starts the processes on hosts.",
)
_WORKERS = flags.DEFINE_integer("workers", 0, "Workers of a cluster; 0: one machine, without a cluster.", lower_bound=0)
_PS = flags.DEFINE_integer("ps", 0, "Parameter servers of a cluster.", lower_bound=0)
_PORT = flags.DEFINE_integer(
    "port", 5000, "The processes' port; over ssh the first process's.", lower_bound=1024, upper_bound=60_000
)

_NAME = flags.DEFINE_string("name", "stem-train", "Name of the training in Kubernetes.")
_IMAGE = flags.DEFINE_string("image", "stem-tf", "The container image with stem-train; see docker/Dockerfile.")
_CORES = flags.DEFINE_integer("cores", 2, "Cores per pod.", lower_bound=1)
_MEMORY = flags.DEFINE_string("memory", "16Gi", "Memory per pod.")
_PS_MEMORY = flags.DEFINE_string("ps_memory", "16Gi", "Memory per parameter server; docs/scaling.md says how much.")
_GPUS = flags.DEFINE_integer("gpus", 0, "GPUs per worker.", lower_bound=0)
_VOLUME = flags.DEFINE_string("volume", "", "The claim of a volume that all pods mount; none if all is in a bucket.")
_MOUNT = flags.DEFINE_string("mount", "/work", "Where pods see the volume.")
_SECRET = flags.DEFINE_string("secret", "", "A secret that becomes environment variables, for credentials of a bucket.")
_ACCOUNT = flags.DEFINE_string(
    "service_account", "", "Service account of the pods; the namespace's default if not given."
)
_GRACE = flags.DEFINE_integer(
    "grace_seconds", 300, "How long a process may take to write a checkpoint after SIGTERM.", lower_bound=1
)
_RESTARTS = flags.DEFINE_integer("restarts", 10, "How often the training may fail and start again.", lower_bound=0)
_OF_KUBERNETES: tuple[Any, ...] = (
    _NAME, _IMAGE, _CORES, _MEMORY, _PS_MEMORY, _GPUS, _VOLUME, _MOUNT, _SECRET, _ACCOUNT, _GRACE, _RESTARTS,
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    from stem_tf.submission import render
    from stem_tf.submission.training import training

    found = training(argv[1:], _WORKERS.value, _PS.value)
    owned.check(_OUTPUT.value, owned.SUBMISSION)
    facts = {"command": list(found.command), "strategy": found.strategy, "tasks": found.tasks, "port": _PORT.value}
    if _TO.value == "ssh":
        idle = next((flag.name for flag in _OF_KUBERNETES if flags.values[flag.name].present), None)
        if idle is not None:
            raise UserError(f"--{idle} is for Kubernetes: it does nothing with --to=ssh")
        texts = render.over_ssh(found, _PORT.value)
    else:
        if "ps" not in found.tasks and flags.values["ps_memory"].present:
            raise UserError("--ps_memory does nothing without parameter servers (--ps=N)")
        if not _VOLUME.value and flags.values["mount"].present:
            raise UserError("--mount does nothing without a --volume")
        cluster = render.Cluster(**{flag.name: flag.value for flag in _OF_KUBERNETES}, port=_PORT.value)
        texts = render.kubernetes(found, cluster)
        facts |= dataclasses.asdict(cluster)
    written = render.write(Path(_OUTPUT.value), texts, facts)
    processes = ", ".join(f"{count} {kind}" for kind, count in found.tasks.items())
    print(f"{found.strategy}, {processes}: {', '.join(written) if written else 'no file has changed'}")
    first = Path(_OUTPUT.value) / next(iter(texts))
    print(f"next: {first} HOST..." if _TO.value == "ssh" else f"next: kubectl apply -f {first}")


def run() -> None:
    """Console script ``stem-submit``."""
    cli.run(main, flags, "-- stem-train ...")


if __name__ == "__main__":
    run()
