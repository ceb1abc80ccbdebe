"""The finished runs of a comparison: checked that they can be compared, and grouped into arms. No TensorFlow."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from stem_tf import report
from stem_tf.compare import cells
from stem_tf.compare.comparison import Arm, Comparison, Finished, Settings
from stem_tf.configs import base
from stem_tf.workdir import Workdir
from stem_util import files, stores
from stem_util.errors import UserError, did_you_mean, message

SPLITS = ("validation", "test")
"""The splits that every compared run is evaluated on."""

SAME_ARM = ("seed", "data.dir", "train.checkpoint_every", "train.log_every")
"""Config keys in which runs of one arm may differ."""

_CONFIG = "config.json"
"""The file that makes a directory a run."""

Paths = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Wanted:
    """What makes an arm: its overrides of the config, and the directories of its runs."""

    overrides: Mapping[str, Any]
    runs: Paths


def compare(
    arms: Mapping[str, Wanted],
    *,
    name: str,
    single: str | None = None,
    incumbent: str | None = None,
    settings: Settings | None = None,
    data: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    output: Path | None = None,
) -> Comparison:
    """The comparison of finished runs.

    Args:
      arms: by name; :func:`grouped` makes them of directories.
      name: title of the report.
      single: name of the arm that trains each task alone; the one arm of the model ``single_task`` if not given.
      incumbent: name of the arm to beat.
      settings: how to judge.
      data: the runs' converted data, if they have moved since.
      provenance: what the report's last section shows.
      output: the comparison's directory.

    Raises:
      UserError: a directory holds no finished and evaluated run, two runs of an arm have one seed, the runs have
        different data or test rows, or there is no arm of a given name.
    """
    first = Workdir(next(iter(arms.values())).runs[0])
    manifest = manifests.load(data or config_of(first)["data.dir"])
    check_data(manifest)
    found = {arm: Arm(arm, wanted.overrides, _runs(arm, wanted, manifest)) for arm, wanted in arms.items()}
    _check_rows(found)
    if single is None:
        alone = [arm.name for arm in found.values() if arm.model == "single_task"]
        single = alone[0] if len(alone) == 1 else None
    for flag, wanted_name in (("single", single), ("incumbent", incumbent)):
        if wanted_name is not None and wanted_name not in found:
            raise UserError(
                f"{flag}: no arm '{wanted_name}'{did_you_mean(wanted_name, found) or '.'} Arms: {', '.join(found)}"
            )
    return Comparison(
        name, manifest, found, single, incumbent, settings or Settings(), dict(provenance or {}), output=output
    )


def check_data(manifest: Manifest) -> None:
    """Refuses data on which models cannot be compared.

    Raises:
      UserError: no rows of validation or test, or no task whose test labels differ.
    """
    for split in SPLITS:
        if not manifest.rows(split):
            raise UserError(f"{manifest.data_dir} has no {split} rows: convert the log with a {split} split")
    tasks = manifest.schema.tasks
    if not any(_measurable(manifest, task.name, task.type) for task in tasks):
        rates = ", ".join(f"{task.name} {report.number(manifest.task_rate('test', task.name))}" for task in tasks)
        raise UserError(
            f"{manifest.data_dir}: no task has test labels of both classes (rates: {rates}): convert the log with a "
            "larger test split"
        )


def _measurable(manifest: Manifest, task: str, kind: str) -> bool:
    """Whether a metric of the task is defined on test."""
    rows, rate = manifest.task_rows("test", task), manifest.task_rate("test", task)
    return rows > 0 and (kind == "regression" or 0 < rate < 1)


def found_at(word: str) -> tuple[list[Path], list[Path]]:
    """The runs that a word names, and those of them that are not trained to their end.

    Args:
      word: the directory of a run; or one with runs below it; or a pattern of directories, as ``runs/ple-*``.
        Trials of a search, whose seeds no report shows, count only where they are named by themselves.

    Returns:
      The trained runs, and the others: sorted, each once. A run that is named by itself is among the first.

    Raises:
      UserError: there is no run.
    """
    if stores.is_uri(word):
        raise UserError(f"--runs: {word} is in a store; runs are compared on this machine, where reports measure them")
    place = Path(os.path.expanduser(word))
    if (place / _CONFIG).exists():
        return [Path(os.path.realpath(place))], []
    places = [place] if place.is_dir() else [Path(path) for path in sorted(glob.glob(str(place), recursive=True))]
    found = dict.fromkeys(run for place in places for run in _below(place) if not cells.is_trial(run))
    if not found:
        where = f"no run at or below {word}" if places else f"there is no {word}"
        raise UserError(f"--runs: {where}; name directories that stem-train has written, or a directory of such ones")
    trained = {run: Workdir(run).report.exists() for run in found}
    return [run for run in found if trained[run]], [run for run in found if not trained[run]]


def _below(place: Path) -> Iterator[Path]:
    """The directories of runs at or below a place."""
    for directory, names, inside in os.walk(place):
        names.sort()
        if _CONFIG in inside:
            names.clear()
            yield Path(os.path.realpath(directory))


def check_trained(workdir: Workdir) -> None:
    """Refuses a directory that holds no run which is trained to its end.

    Raises:
      UserError: such a directory.
    """
    config_of(workdir)
    if not workdir.report.exists():
        raise UserError(f"{workdir.path} is not trained to its end (no {workdir.report.name}): go on with stem-train")


def check_same_data(workdir: Workdir, manifest: Manifest) -> None:
    """Refuses a run of other data than ``manifest`` describes.

    Raises:
      UserError: such a run.
    """
    if not workdir.is_of(manifest):
        raise UserError(
            f"{workdir.path} was trained on other data than {manifest.data_dir} holds now: compare runs of one "
            "conversion"
        )


def config_of(workdir: Workdir) -> dict[str, Any]:
    """The config of a run as it was written, ``{"model.dim": 8, ...}``, without a check that would need TensorFlow.

    Raises:
      UserError: there is no run.
    """
    path = workdir.path / _CONFIG
    if not path.exists():
        raise UserError(f"{workdir.path} holds no run (no config.json); stem-train writes one")
    values = {key: declared.default for key, declared in base.KEYS.items()}
    return values | files.read_json(path, "train the run again in another directory")


def grouped(paths: Paths) -> dict[str, Wanted]:
    """The arms of finished runs, by name: runs whose configs differ in their seed alone are one arm.

    An arm has its model's name; where several arms have the same model, the keys in which they differ follow it, as in
    ``ple, optimizer.l2=0.0001``.

    Args:
      paths: directories of runs that are trained and evaluated on validation and test.

    Raises:
      UserError: no directories, or one that holds no run.
    """
    if not paths:
        raise UserError("no runs to compare: name their directories")
    arms: list[tuple[dict[str, Any], list[str]]] = []
    for path in dict.fromkeys(os.path.realpath(path) for path in paths):
        values = {key: value for key, value in config_of(Workdir(path)).items() if key not in SAME_ARM}
        for known, runs in arms:
            if known == values:
                runs.append(path)
                break
        else:
            arms.append((values, [path]))
    differing = _differing([values for values, _ in arms])
    named = {}
    for values, runs in arms:
        model = values["model.name"]
        alike = [other for other, _ in arms if other["model.name"] == model]
        own = ", ".join(f"{key}={_shown(values.get(key))}" for key in _differing(alike))
        overrides = {"model.name": model} | {key: values[key] for key in differing if key in values}
        named[f"{model}, {own}" if own else model] = Wanted(overrides, runs)
    return named


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which configs differ."""
    keys = list(dict.fromkeys(key for values in configs for key in values))
    return [key for key in keys if any(values.get(key) != configs[0].get(key) for values in configs)]


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _runs(arm: str, wanted: Wanted, manifest: Manifest) -> tuple[Finished, ...]:
    runs = sorted((_finished(Workdir(path), manifest) for path in wanted.runs), key=lambda run: run.seed)
    for one, other in zip(runs, runs[1:], strict=False):
        if one.seed == other.seed:
            raise UserError(
                f"{one.workdir.path} and {other.workdir.path} are runs of the same config and seed {one.seed} (arm "
                f"'{arm}'): leave one of them out"
            )
    return tuple(runs)


def _finished(workdir: Workdir, manifest: Manifest) -> Finished:
    """A run; refuses one that is not finished, not evaluated, or of other data than ``manifest`` describes."""
    values = config_of(workdir)
    check_trained(workdir)
    check_same_data(workdir, manifest)
    tasks = [name.strip() for name in values["data.tasks"].split(",") if name.strip()]
    run = Finished(int(values["seed"]), workdir, base.from_flat(values), manifest.of_tasks(tasks))
    for split in SPLITS:
        metrics = run.metrics(split)
        if Path(str(metrics.get("checkpoint"))).parent.name != workdir.best.name:
            raise UserError(
                f"{workdir.evaluation / f'{split}.json'} is not of the run's best weights: evaluate it again "
                f"(stem-evaluate --workdir={workdir.path} --split={split})"
            )
    return run


def _check_rows(arms: Mapping[str, Arm]) -> None:
    """Refuses runs that were tested on different rows: damaged records that were skipped, or a changed file."""
    expected, of = None, Path()
    for arm in arms.values():
        for run in arm.runs:
            path = run.workdir.evaluation / "test.parquet"
            try:
                ids = pq.read_table(path, columns=["row_id"])["row_id"].to_numpy()
            except (pa.ArrowException, OSError, KeyError) as error:
                raise UserError(f"{path}: cannot be read ({message(error)}); run stem-evaluate again") from error
            if expected is None:
                expected, of = ids, run.workdir.path
            elif not np.array_equal(ids, expected):
                raise UserError(
                    f"{of} was tested on {len(expected):,} rows and {run.workdir.path} on {len(ids):,}, which are not "
                    "the same ones: evaluate both again (stem-evaluate --split=test)"
                )
