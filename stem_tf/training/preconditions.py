"""Checks what a training needs, before TensorFlow is imported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf import cluster as clusters
from stem_tf import configs, peers, report, start_from
from stem_tf.cluster import Cluster
from stem_tf.peers import Peers
from stem_tf.training import calibration, monitor
from stem_tf.workdir import Workdir, has_checkpoints
from stem_util import files, stores
from stem_util.errors import UserError
from stem_util.version import versions


@contextlib.contextmanager
def prepared(
    config: Any, directory: str | os.PathLike[str] | None, cluster: Cluster | None
) -> Iterator[tuple[Manifest, Workdir, Peers]]:
    """The manifest of the data, the work directory of a run, and the processes that train it, for the context's time.

    The data and the work directory are held, by the chief where there are several processes.

    Args:
      config: a complete, checked config, with ``data.dir``.
      directory: the work directory; runs/<config.experiment> if not given.
      cluster: of :func:`stem_tf.cluster.read`; this process trains.

    Raises:
      UserError: the data do not fit the config, the directory holds another run or something else, or it is in use;
        processes of the cluster differ in version, config or data.
      JobError: a process of the cluster has not come in time.
    """
    if config.train.strategy in clusters.STRATEGIES and stores.is_uri(directory or ""):
        raise UserError(
            f"--workdir={directory}: the processes of a cluster share their work directory: give one on a file system "
            "that all of them have"
        )
    check_strategy(config, directory)
    processes = len(cluster.tasks) if cluster else 1
    if config.train.strategy == "multi_worker" and config.data.batch_size % processes:
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} does not divide by the {processes} processes of "
            "config.train.strategy=multi_worker"
        )
    manifest = configs.data(config)
    monitor.monitor(config, manifest)  # refuses before anything is written
    calibration.methods(config, manifest.schema)
    workdir = Workdir(directory_of(config, directory))
    about: dict[str, Any] = dict(versions())
    if cluster is not None and not cluster.has_servers:  # what serves knows neither data nor config
        about |= {f"config.{key}": value for key, value in configs.flat(config).items() if key != "data.dir"}
        about["the checksum of the data"] = manifests.checksum(manifest.data_dir)
    with peers.meet(cluster, about, config.train.peer_timeout) as found, contextlib.ExitStack() as held:
        held.enter_context(manifests.in_use(manifest.data_dir))
        if found.is_chief:
            if config.start.run and os.path.realpath(Workdir(config.start.run).path) == os.path.realpath(workdir.path):
                raise UserError(f"--from={config.start.run} is the --workdir itself: give the new run another one")
            held.enter_context(workdir.locked())
            if config.start.run and not has_checkpoints(workdir.checkpoints):
                start_from.check(start_from.find(config.start.run), config, manifest)
            if started_over := workdir.prepare(config, manifest):
                report.warn(started_over)
        found.decide(lambda: "prepared")
        yield manifest, workdir, found


def directory_of(config: Any, directory: str | os.PathLike[str] | None) -> str:
    """The work directory of a run: ``directory``, or runs/<config.experiment> if not given."""
    return os.path.expanduser(directory or Path("runs") / config.experiment)


def check_strategy(config: Any, directory: str | os.PathLike[str] | None) -> None:
    """Refuses what ``train.strategy=parameter_server`` cannot do; ``directory`` as in :func:`prepared`.

    Raises:
      UserError: names the key.
    """
    if config.train.strategy != "parameter_server":
        return
    flat = configs.flat(config)
    strategy = "config.train.strategy=parameter_server"

    def only(key: str, values: tuple[Any, ...], why: str) -> None:
        if flat[key] not in values:
            shown = " or ".join(map(str, values))
            raise UserError(f"{strategy} needs config.{key}={shown}, not {flat[key]}: {why}")

    only(
        "optimizer.tables",
        ("lazy", "adagrad"),
        "its workers are at different steps, so that there is no one step up to which a row has missed others",
    )
    only(
        "loss.weighting",
        ("static", "decaying", "uncertainty"),
        "GradNorm's weights would be learned from gradients of different steps",
    )
    only("model.batch_norm", (False,), "its workers would overwrite each other's running means")
    only("train.xla", ("auto", "off"), "XLA compiles no operation that reaches into another process")
    only("train.steps_per_execution", (1,), "a batch is dealt out at a time")
    only("train.deterministic", (False,), "the order in which its workers finish is not determined")
    if config.start.run:
        raise UserError(
            f"{strategy} cannot go on from another run (--from), whose tables no process could hold: train from "
            "initial weights, or with another strategy"
        )
    if configs.best(config) == "own":
        raise UserError(
            f"{strategy} cannot put weights of several epochs together, which no process holds: set config.train.best "
            "to together or by_task"
        )
    path = directory_of(config, directory)
    if files.is_pattern(path):
        raise UserError(
            f"--workdir={path}: parameter servers find checkpoints by their paths, which TensorFlow would read as a "
            "pattern: take one without any of [ ] * ? \\"
        )
