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
from stem_tf import configs, peers, report
from stem_tf.peers import Peers
from stem_tf.training import monitor
from stem_tf.workdir import Workdir
from stem_util.errors import UserError
from stem_util.version import versions


@contextlib.contextmanager
def prepared(config: Any, directory: str | os.PathLike[str] | None) -> Iterator[tuple[Manifest, Workdir, Peers]]:
    """The manifest of the data, the work directory of a run, and the processes that train it, for the context's time.

    The data and the work directory are held, by the chief where there are several processes.

    Args:
      config: a complete, checked config, with ``data.dir``.
      directory: the work directory; runs/<config.experiment> if not given.

    Raises:
      UserError: the data do not fit the config, the directory holds another run or something else, or it is in use;
        TF_CONFIG is wrong, or processes of the cluster differ in version, config or data.
      JobError: a process of the cluster has not come in time.
    """
    cluster = clusters.read(config.train.strategy)
    processes = len(cluster.tasks) if cluster else 1
    if config.train.strategy == "multi_worker" and config.data.batch_size % processes:
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} does not divide by the {processes} processes of "
            "config.train.strategy=multi_worker"
        )
    manifest = configs.data(config)
    monitor.monitor(config, manifest)  # refuses before anything is written
    workdir = Workdir(os.path.expanduser(directory or Path("runs") / config.experiment))
    about = versions() | {f"config.{key}": value for key, value in configs.flat(config).items() if key != "data.dir"}
    about["the checksum of the data"] = manifests.checksum(manifest.data_dir)
    with peers.meet(cluster, about, config.train.peer_timeout) as found, contextlib.ExitStack() as held:
        held.enter_context(manifests.in_use(manifest.data_dir))
        if found.is_chief:
            held.enter_context(workdir.locked())
            if started_over := workdir.prepare(config, manifest):
                report.warn(started_over)
        found.decide(lambda: "prepared")
        yield manifest, workdir, found
