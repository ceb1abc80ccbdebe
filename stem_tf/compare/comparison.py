"""The finished runs of a comparison, grouped into arms: what the sections of a report read. No TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.manifest import Manifest
from pipelines.schema import Task
from stem_tf.compare import effects
from stem_tf.evaluation import predictions
from stem_tf.evaluation.predictions import Predictions
from stem_tf.workdir import Workdir
from stem_util import files


@dataclass(frozen=True)
class Finished:
    """One run of an arm: trained, evaluated on validation and test, and measured.

    Attributes:
      seed: the run's ``config.seed``.
      workdir: its directory, with ``evaluation/{validation,test}.{json,parquet}`` and ``comparison/measures.json``.
      config: its complete config.
      manifest: manifest of the data, with the tasks that the run predicts.
    """

    seed: int
    workdir: Workdir
    config: Any
    manifest: Manifest

    @functools.cached_property
    def measures(self) -> Mapping[str, Any]:
        """What `stem_tf.compare.measures.measure` found in the trained model; {} where nothing was measured."""
        path = self.workdir.measures
        return files.read_json(path, "run stem-compare again") if path.exists() else {}

    def metrics(self, split: str) -> dict[str, Any]:
        """The content of ``<split>.json``: ``mean_auc``, ``tasks`` and so on."""
        return files.read_json(self.workdir.evaluation / f"{split}.json", "run stem-compare again")

    def predictions(self, split: str) -> Predictions:
        """Scores and labels of a split; read at each call, since a report of many runs cannot hold them all."""
        return predictions.read(self.workdir.evaluation / f"{split}.parquet", self.manifest.schema)


@dataclass(frozen=True)
class Arm:
    """A model, or a set of config overrides, that a comparison compares.

    Attributes:
      name: its name in the plan.
      overrides: what it sets, as ``{"model.dim": 8}``, the winner of its search included.
      runs: its finished runs, one per seed; at least one.
    """

    name: str
    overrides: Mapping[str, Any]
    runs: tuple[Finished, ...]

    @property
    def model(self) -> str:
        """``config.model.name``."""
        return str(self.runs[0].config.model.name)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it predicts."""
        return self.runs[0].manifest.schema.task_names


@dataclass(frozen=True)
class Settings:
    """How a report judges.

    Attributes:
      level: two verdicts that are both by chance are at most this likely (Holm over all comparisons of a table).
      resamples: how often the bootstrap draws the test set's users again.
      comparable, overwhelming: zones: buckets of two tasks that differ by at most ``comparable`` count as comparable,
        by ``overwhelming`` or more as overwhelming.
      seed: of the bootstrap.
    """

    level: float = 0.05
    resamples: int = 1000
    comparable: int = 2
    overwhelming: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """All that a report is made of.

    Attributes:
      name: title of the report.
      manifest: manifest of the data that all runs share, with all of its tasks.
      arms: by name, in the plan's order. Every arm was tested on the same rows; some may lack tasks.
      single: name of the arm that trains each task alone (Single-Task), or None.
      incumbent: name of the arm to beat beside Single-Task, or None.
      settings: how to judge.
      provenance: what the provenance section shows: the plan, commands, versions, what failed and what was dropped.
      output: the comparison's directory.
    """

    name: str
    manifest: Manifest
    arms: Mapping[str, Arm]
    single: str | None
    incumbent: str | None
    settings: Settings
    provenance: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None

    @functools.cached_property
    def measured(self) -> effects.Measured:
        """What the arms reach on test and on resamples of its users: read once, used by several sections."""
        return effects.measure(self)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The data's tasks that at least one arm predicts, in the schema's order."""
        predicted = {task for arm in self.arms.values() for task in arm.tasks}
        return tuple(task for task in self.manifest.schema.tasks if task.name in predicted)
