"""Checks what a training needs, before TensorFlow is imported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf import configs, report
from stem_tf.training import monitor
from stem_tf.workdir import Workdir


@contextlib.contextmanager
def prepared(config: Any, directory: str | os.PathLike[str] | None) -> Iterator[tuple[Manifest, Workdir]]:
    """The manifest of the data and the work directory of a run, both held by it while the context lasts.

    Args:
      config: a complete, checked config, with ``data.dir``.
      directory: the work directory; runs/<config.experiment> if not given.

    Raises:
      UserError: the data do not fit the config, the directory holds another run or something else, or it is in use.
    """
    manifest = configs.data(config)
    monitor.monitor(config, manifest)  # refuses before anything is written
    workdir = Workdir(os.path.expanduser(directory or Path("runs") / config.experiment))
    with manifests.in_use(manifest.data_dir), workdir.locked():
        if started_over := workdir.prepare(config, manifest):
            report.warn(started_over)
        yield manifest, workdir
