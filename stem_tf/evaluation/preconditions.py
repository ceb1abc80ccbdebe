"""Checks what an evaluation needs, before TensorFlow is imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf.evaluation import ranking_score, ranking_search
from stem_tf.evaluation.slices import Slicer
from stem_tf.workdir import Workdir
from stem_util import owned
from stem_util.errors import UserError


@contextlib.contextmanager
def prepared(
    workdir: Workdir,
    config: Any,
    moved_to: str | None,
    split: str,
    output: Path,
    slices: Sequence[str],
    ranking: str | None = None,
    search: bool = False,
) -> Iterator[Manifest]:
    """The manifest of a run's data, which are held while the context lasts.

    Args:
      workdir: the run.
      config: the run's config.
      moved_to: where the run's data are now, or None if they have not moved.
      split: name of the split to evaluate on.
      output: directory for the evaluation.
      slices: rows to measure by themselves, as `stem_tf.evaluation.slices` spells them.
      ranking: another ranking than the schema's, see `pipelines.ranking.replaced`.
      search: parameters of the ranking are searched on validation.

    Raises:
      UserError: the data are not the run's or lack what the split, a slice or the ranking needs, there is a mistake in
        ``ranking``, or ``output`` holds something else.
    """
    manifest = workdir.data(config, moved_to, split)
    if ranking is not None:
        manifest = manifest.ranked_by(ranking)
        if why := ranking_score.why_not(manifest.schema, split):
            raise UserError(f"--ranking={ranking} cannot be measured on {split}: {why}")
    if search:
        _check_search(manifest, split, output)
    owned.check_for_evaluation(output, split)
    with manifests.in_use(manifest.data_dir):
        if manifest.schema.group is not None:
            for one in (split, *(("validation",) if search else ())):
                manifest.check_raw(one)
        if slices:
            slicer = Slicer(manifest, split, np.zeros(0, np.int64))
            for spelled in slices:
                slicer.check(spelled)
        yield manifest


def _check_search(manifest: Manifest, split: str, output: Path) -> None:
    schema = manifest.schema
    if split == "validation":
        raise UserError(
            "--search_ranking chooses on validation, where what it finds looks too good: take another --split"
        )
    if schema.ranking is None or not ranking_search.searched(schema.ranking):
        task = schema.task_names[0]
        raise UserError(
            "--search_ranking needs a ranking with a parameter that has a range, in the schema or in a file for "
            f"--ranking: {{score: {task}^a, parameters: {{a: {{value: 1, low: 0, high: 4}}}}}}"
        )
    if why := ranking_score.why_not(schema, split):
        raise UserError(f"--search_ranking: {why}")
    if not manifest.rows("validation"):
        raise UserError(f"--search_ranking chooses on validation, and {manifest.data_dir} has no rows of it")
    ranking_search.check(output)
