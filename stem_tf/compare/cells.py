"""The cells of a comparison: one run of one arm each, where it lies, and the command that trains it. No TensorFlow."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stem_tf.compare.measured import VERSION
from stem_tf.workdir import Workdir
from stem_util import files

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9,=+_-]+")
_LONGEST = 60


@dataclass(frozen=True)
class Cell:
    """A run that a comparison trains.

    Attributes:
      arm: name of its arm.
      trial: number of the search's trial that it is, or None for a run that is reported.
      seed: its ``config.seed``.
      config: the experiment, by name or path.
      words: its overrides, ``KEY=VALUE`` each, without the seed.
      workdir: directory of the run.
    """

    arm: str
    trial: int | None
    seed: int
    config: str
    words: tuple[str, ...]
    workdir: Path

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}" if self.trial is None else f"{self.arm}, trial {self.trial}"

    @property
    def reported(self) -> bool:
        """Whether a report shows it; a trial is trained only."""
        return self.trial is None

    @property
    def log(self) -> Path:
        """The output of its process."""
        return self.workdir.with_name(f"{self.workdir.name}.log")

    @property
    def done(self) -> bool:
        """Whether it needs no process any more."""
        path = done_file(Workdir(self.workdir))
        if not path.exists():
            return False
        return not self.reported or (files.read_json(path, "remove it")["report"] and is_measured(self.workdir))

    @property
    def seconds(self) -> float | None:
        """How long its last process took; None before it is done."""
        path = done_file(Workdir(self.workdir))
        return float(files.read_json(path, "remove it")["seconds"]) if path.exists() else None

    def train_arguments(self) -> list[str]:
        """The arguments of stem-train that make the same run."""
        overrides = [f"--config.{text}" for text in (*self.words, f"seed={self.seed}")]
        return [f"--config={self.config}", *overrides, f"--workdir={self.workdir}"]

    def command(self) -> str:
        """The command that makes the same run, for people."""
        return shlex.join(["stem-train", *self.train_arguments()])

    def process(self) -> list[str]:
        """The command of its process: see `stem_tf.compare.cell`."""
        return [*python(), *self.train_arguments(), *(["--report"] if self.reported else [])]

    def result(self) -> dict[str, Any]:
        """What the run's report.json says of it: the best epoch and its score, why it ended, samples per second."""
        found = files.read_json(Workdir(self.workdir).report, "run stem-compare again")
        best = found["best"]
        return {
            "epoch": best["epoch"],
            "score": best["score"],
            "monitor": found["monitor"],
            "epochs": found["epochs"],
            "stopped": found["stopped"],
        }


def python() -> list[str]:
    """The command of a cell's process, without its arguments."""
    return [sys.executable, "-m", "stem_tf.compare.cell"]


def evaluation(run: Path, data: str | None) -> list[str]:
    """The command of a process that evaluates and measures a run which is trained already."""
    return [*python(), f"--workdir={run}", "--report", *([f"--data={data}"] if data else [])]


def lacks_evaluation(run: Path, splits: tuple[str, ...]) -> bool:
    """Whether a trained run lacks files that a report reads, or has evaluations of other weights than its best."""
    workdir = Workdir(run)
    for split in splits:
        path = workdir.evaluation / f"{split}.json"
        if not path.exists() or not path.with_suffix(".parquet").exists():
            return True
        checkpoint = files.read_json(path, "remove it").get("checkpoint")
        if Path(str(checkpoint)).parent.name != workdir.best.name:
            return True
    return not is_measured(run)


def is_measured(run: Path) -> bool:
    """Whether a run holds the measures that this version's report shows."""
    path = Workdir(run).measures
    return path.exists() and files.read_json(path, "remove it").get("version") == VERSION


def is_trial(run: Path) -> bool:
    """Whether a run is a trial of a search that has ended: it was trained to choose a config, not to be reported."""
    path = done_file(Workdir(run))
    return path.exists() and not files.read_json(path, "remove it")["report"]


def done_file(workdir: Workdir) -> Path:
    """The file that a cell's process writes at its end."""
    return workdir.comparison / "cell.json"


def directory(output: Path, arm: str, fingerprint: str, seed: int) -> Path:
    """Where the run of an arm lies: the same config has the same place, so that a changed plan finds it again."""
    return output / "runs" / _file_name(arm) / f"config-{fingerprint}" / f"seed-{seed}"


def _file_name(text: str) -> str:
    """A file name for any text; another one for another text."""
    name = _NOT_IN_NAMES.sub("_", text)[:_LONGEST]
    if name == text and not name.startswith("-"):
        return name
    return f"{name.strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
