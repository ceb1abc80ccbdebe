"""Checks what an export needs, before TensorFlow is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.manifest import Manifest
from stem_tf.workdir import Workdir
from stem_util.errors import UserError


def check(
    workdir: Workdir, config: Any, moved_to: str | None, output: Path, name: str, ranking: str | None = None
) -> Manifest:
    """Returns the manifest of the run's data.

    Args:
      workdir: the run.
      config: the run's config.
      moved_to: where the run's data are now, or None if they have not moved.
      output: directory of the versions.
      name: the model's name.
      ranking: another ranking than the schema's, see `pipelines.ranking.replaced`.

    Raises:
      UserError: the data are not the run's, there are no raw validation rows for the check, or ``output``, ``name`` or
        ``ranking`` is not allowed.
    """
    manifest = workdir.manifest(config, moved_to)
    check_places(workdir, manifest, output, name)
    return manifest if ranking is None else manifest.ranked_by(ranking)


def check_places(workdir: Workdir, manifest: Manifest, output: Path, name: str) -> None:
    """Checks what an export reads and where it goes.

    Args:
      workdir: the run.
      manifest: of its data.
      output: directory of the versions.
      name: the model's name.

    Raises:
      UserError: there are no raw validation rows for the check, or ``output`` or ``name`` is not allowed.
    """
    if not manifest.rows("validation"):
        raise UserError(
            f"the validation split of {manifest.data_dir} has no rows, so an export could not be checked against "
            "the trainer; convert with a validation split, and train on that"
        )
    raw = validation_rows(manifest)
    if not any(raw.glob("*.parquet")):
        raise UserError(f"{raw} is missing: it holds the raw rows that the export is checked on; convert the log again")
    manifest.check_raw("validation")
    if output.resolve() in (workdir.path.resolve(), Path(manifest.data_dir).resolve()):
        raise UserError(f"--output={output} is the run or its data; give a directory of its own")
    if not name:
        raise UserError("--name is empty")


def validation_rows(manifest: Manifest) -> Path:
    """The directory of the raw rows of the validation split."""
    return Path(manifest.data_dir) / "raw" / "validation"
