"""Judges a candidate that was exported but not published, and says why."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from export.gate import checks, held_back
from export.gate.checks import Check
from export.gate.rules import Rules
from export.publish import VERDICT
from export.published import Published
from pipelines.manifest import Manifest
from pipelines.schema import Task
from stem_tf import report
from stem_tf.evaluation import scoring
from stem_tf.trained import Trained
from stem_util import files

FORMAT = 1


class Refused(Exception):
    """The candidate does not hold the rules; the message has the reasons on one line."""


class Gate:
    """Called by `export.exporter.export` with a version that is complete but not published.

    Args:
      manifest: of the run's data.
      data: ``config.data`` of the run.
      split: the held-back rows.
      tasks: the tasks to judge.
      rules: what has to hold.
      served: the version that is served, or None.
      output: where to write the verdict, whatever it is.
      dry_run: nothing will be published.

    Attributes:
      verdict: what it came to, as verdict.json has it; empty before.
      checks: the same for people.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: Any,
        split: str,
        tasks: Sequence[Task],
        rules: Rules,
        served: Path | None,
        output: Path,
        *,
        dry_run: bool,
    ) -> None:
        self._manifest, self._data, self._split, self._tasks = manifest, data, split, tasks
        self._rules, self._served, self._output, self._dry_run = rules, served, output, dry_run
        self.verdict: dict[str, Any] = {}
        self.checks: list[Check] = []

    def __call__(self, directory: Path, trained: Trained) -> None:
        """Judges the version in ``directory``, and writes the verdict beside it.

        Raises:
          Refused: a rule does not hold.
          JobError: scores are not finite, or a version fails.
        """
        predicted = scoring.predict(
            trained.model, self._manifest, self._split, self._data, desc=f"{self._split} labels"
        )
        candidate = Published(directory)
        versions = [candidate, *([] if self._served is None else [Published(self._served)])]
        scored = held_back.measure(versions, self._manifest, self._split, predicted.row_id)
        held_back.check_finite(scored[0], "the candidate")
        if self._served is not None:
            held_back.check_finite(scored[1], f"{self._served}, which is served")
        rows = held_back.rows_of(predicted, self._tasks, self._rules.resamples)
        self.checks = checks.judge(self._rules, rows, scored[0], None if self._served is None else scored[1])
        reasons = [check.why for check in self.checks if check.outcome == "fails"]
        self.verdict = {
            "format": FORMAT,
            "decision": "refused" if reasons else "would be published" if self._dry_run else "published",
            "reasons": reasons,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "candidate": _about(candidate),
            "served": None if self._served is None else _about(versions[1]),
            "data": self._manifest.data_dir,
            "split": self._split,
            "rows": len(predicted.row_id),
            "checks": [check.tree() for check in self.checks],
            "rules": self._rules.tree(),
        }
        for path in (directory / VERDICT, self._output):
            files.write_json(path, self.verdict)
        if reasons:
            raise Refused("; ".join(reasons))

    def table(self) -> str:
        """What was judged as text, the checks that failed last."""
        judged = [check for check in self.checks if check.outcome != "not judged"]
        lines = [check.shown() for check in sorted(judged, key=lambda check: check.outcome == "fails")]
        left_out = len(self.checks) - len(judged)
        shown = [report.table(checks.HEAD, lines)] if lines else []
        return "\n".join([*shown, *([f"not judged: {left_out} bounds"] if left_out else [])])


def _about(version: Published) -> dict[str, Any]:
    tree = version.manifest()
    found = {key: tree[key] for key in ("model", "version")}
    with contextlib.suppress(KeyError):  # of a version that another program wrote
        found |= {key: tree["run"][key] for key in ("workdir", "checkpoint", "weights")}
    return found
