"""Checks what an evaluation needs, before TensorFlow is imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf.evaluation.slices import Slicer
from stem_tf.workdir import Workdir
from stem_util import owned


@contextlib.contextmanager
def prepared(
    workdir: Workdir, config: Any, moved_to: str | None, split: str, output: Path, slices: Sequence[str]
) -> Iterator[Manifest]:
    """The manifest of a run's data, which are held while the context lasts.

    Args:
      workdir: the run.
      config: the run's config.
      moved_to: where the run's data are now, or None if they have not moved.
      split: name of the split to evaluate on.
      output: directory for the evaluation.
      slices: rows to measure by themselves, as `stem_tf.evaluation.slices` spells them.

    Raises:
      UserError: the data are not the run's or lack what the split or a slice needs, or ``output`` holds something else.
    """
    manifest = workdir.data(config, moved_to, split)
    owned.check_for_evaluation(output, split)
    with manifests.in_use(manifest.data_dir):
        if manifest.schema.group is not None:
            manifest.check_raw(split)
        if slices:
            slicer = Slicer(manifest, split, np.zeros(0, np.int64))
            for spelled in slices:
                slicer.check(spelled)
        yield manifest
