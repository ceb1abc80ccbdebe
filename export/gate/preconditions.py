"""Checks what the gate needs, before TensorFlow is imported and a candidate is made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from export import publish
from export.gate.rules import Rules
from pipelines import manifest as manifests
from pipelines import outputs, schema_yaml
from pipelines.manifest import Manifest
from pipelines.schema import Feature, Schema, Task
from stem_tf.workdir import Workdir
from stem_util import files
from stem_util.errors import UserError

SPLITS = ("test", "validation")
"""Rows that no model was trained on."""


def check_run(workdir: Workdir) -> None:
    """Refuses a run that another job trains.

    Raises:
      UserError: it is locked.
    """
    if (process := workdir.locked_by()) is not None:
        raise UserError(f"{workdir.place} is still being trained (process {process}): wait for its end")


def judged_tasks(manifest: Manifest, split: str, rules: Rules) -> list[Task]:
    """The tasks that have a rule; each has labels in the split, of both classes if it is binary.

    Raises:
      UserError: the split cannot be judged on.
    """
    manifest.check_raw(split)
    if not any((Path(manifest.data_dir) / "raw" / split).glob("*.parquet")):
        raise UserError(f"{manifest.data_dir}/raw/{split} is missing: it holds the raw rows that are scored")
    tasks = [task for task in manifest.schema.tasks if rules.of_task(task)]
    for task in tasks:
        rows, rate = manifest.task_rows(split, task.name), manifest.task_rate(split, task.name)
        way_out = f"choose another --split, or let the rules say `tasks: {{{task.name}: off}}`"
        if not rows:
            raise UserError(f"the {split} split of {manifest.data_dir} has no labels of task '{task.name}': {way_out}")
        if task.type == "binary" and rate in (0.0, 1.0):
            raise UserError(
                f"all {rows:,} labels of task '{task.name}' in the {split} split of {manifest.data_dir} are {rate:g}: "
                f"nothing can be judged on them: {way_out}"
            )
    return tasks


def check_served(version: Path, manifest: Manifest) -> dict[str, Any]:
    """The manifest of the version that is served; callers send it the inputs of the candidate, and miss no score.

    Raises:
      UserError: the version cannot be read, is damaged, or has other inputs, or scores or outputs
        that the candidate lacks.
    """
    way_out = f"repair it, or make another version the served one (stem-versions promote {version.parent} NUMBER)"
    for name in (manifests.FILENAME, "schema.yaml"):
        if not (version / name).is_file():
            raise UserError(f"{version}, which is served, was not published by stem-export (no {name}): {way_out}")
    if why := publish.damage(version):
        raise UserError(f"{version}, which is served, is not the version that was published: {why}; {way_out}")
    theirs = schema_yaml.load(version / "schema.yaml")
    if differing := _differences(manifest.schema, theirs):
        raise UserError(
            f"the run is not for the callers of {version}: {'; '.join(differing)}. Publish it under a directory of its "
            "own, or with stem-export"
        )
    own = {output.name for output in outputs.of(manifest.schema)}
    if missing := [output.name for output in outputs.of(theirs) if output.name not in own]:
        raise UserError(
            f"the run's schema makes no {', '.join(missing)}, which callers of {version} may read: give the job "
            "--ranking (a file or a formula), or publish the run under a directory of its own, or with stem-export"
        )
    return files.read_json(version / manifests.FILENAME, way_out)


def check_verdict(path: Path) -> None:
    """Refuses a place where no verdict can be written.

    Raises:
      UserError: it is a directory, or in none that can be written to.
    """
    if path.is_dir():
        raise UserError(f"--verdict={path} is a directory: name a file")
    if not os.access(path.parent, os.W_OK):
        why = "cannot be written to" if path.parent.is_dir() else "is no directory"
        raise UserError(f"--verdict={path}: {path.parent} {why}")


def _differences(ours: Schema, theirs: Schema) -> list[str]:
    """How the candidate would break calls of the served model: other inputs, or scores that it does not have."""
    sent, needed = ({f.name: _input(f) for f in schema.features} for schema in (theirs, ours))
    changed = sorted(name for name in sent.keys() & needed.keys() if sent[name] != needed[name])
    given, wanted = ({task.name: task.type for task in schema.tasks} for schema in (ours, theirs))
    found = {
        "it does not take the input{} {}": sorted(sent.keys() - needed.keys()),
        "it needs the input{} {} as well": sorted(needed.keys() - sent.keys()),
        "other type or shape of the input{} {}": changed,
        "it does not score the task{} {}": sorted(wanted.keys() - given.keys()),
        "other type of the task{} {}": sorted(t for t in wanted.keys() & given.keys() if wanted[t] != given[t]),
    }
    return [
        text.format("s" if len(names) > 1 else "", ", ".join(map(repr, names)))
        for text, names in found.items()
        if names
    ]


def _input(feature: Feature) -> tuple[Any, ...]:
    """What a caller has to know of an input."""
    return feature.kind, feature.dtype, feature.side == "item", feature.max_length, feature.length
