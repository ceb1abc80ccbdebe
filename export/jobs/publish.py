"""Publishes a trained run as the next version of a served model, if it holds the rules of a gate.

    stem-publish --workdir=RUN --against=SERVED
    stem-publish --workdir=RUN --against=SERVED --rules=rules.yaml --dry_run
    stem-publish --print_rules > rules.yaml

SERVED is the directory of versions that servers read, as stem-export writes it. The candidate is exported beside them,
scores the held-back raw rows of the run's data side by side with the newest version, and is published only if every
rule holds. If not, the job says why on one line and ends with exit code 3; SERVED is as before. The verdict is written
to RUN/verdict.json, and to verdict.json in a version that was published.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from export import preconditions, publish, stored
from export.gate import REFUSED_CODE, rules
from export.gate import preconditions as gate_preconditions
from stem_tf.runtime import quieten_tensorflow
from stem_tf.workdir import Workdir
from stem_util import cli, owned, stores
from stem_util.errors import UserError

flags = cli.Flags()

_WORKDIR = flags.DEFINE(cli.PLACE, "workdir", None, "Directory or URI of the run, as given to stem-train.")
_AGAINST = flags.DEFINE(
    cli.PLACE, "against", None, "Directory or URI of the served versions; the newest one is what is served."
)
_RULES = flags.DEFINE(cli.PATH, "rules", None, "YAML file of rules; what it leaves out is as --print_rules shows it.")
_PRINT_RULES = flags.DEFINE_boolean("print_rules", False, "Print the default rules, to start a file from, and end.")
_SPLIT = flags.DEFINE_enum("split", "test", gate_preconditions.SPLITS, "The held-back rows of the run's data.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Judge the candidate, and publish nothing.")
_VERDICT = flags.DEFINE(cli.PATH, "verdict", None, "Where to write the verdict; RUN/verdict.json by default.")
_CHECKPOINT = flags.DEFINE(
    cli.PATH, "checkpoint", "best", "best, latest, or the path of a checkpoint without its suffix."
)
_DATA = flags.DEFINE(cli.PLACE, "data", None, "The run's converted data, if it has moved since the training.")
_NAME = flags.DEFINE_string(
    "name", None, "The name under which services ask for the model (default: that of the served version, or ranker)."
)
_CALIBRATED = flags.DEFINE_bool(
    "calibrated", True, "Calibrated scores, where the run's config.train.calibration asks for them."
)
_TABLES = flags.DEFINE_enum(
    "tables", "float32", ["float32", "bfloat16", "int8"], "How embedding tables are stored, as in stem-export."
)
_RANKING = flags.DEFINE(
    cli.PATH,
    "ranking",
    None,
    "One score to rank by, instead of the schema's: a YAML file or a formula, as in stem-export.",
)


def main(argv: Sequence[str]) -> None:
    del argv
    if _PRINT_RULES.value:
        print(rules.default_text(), end="")
        return
    for flag in (_WORKDIR, _AGAINST):
        if not flag.value:
            raise UserError(f"--{flag.name} is required")
    workdir = Workdir.fetched(_WORKDIR.value)
    config = workdir.config()
    gate_preconditions.check_run(workdir)
    verdict = Path(_VERDICT.value or workdir.path / "verdict.json")
    gate_preconditions.check_verdict(verdict)
    if not stores.is_uri(_AGAINST.value):
        owned.check(_AGAINST.value, owned.VERSIONS)
    # Of the run first: another split or data that has moved is said before anything about what is served.
    manifest = workdir.data(config, _DATA.value, _SPLIT.value)
    if _RANKING.value is not None:
        manifest = manifest.ranked_by(_RANKING.value)
    wanted = rules.load(_RULES.value, manifest.schema)
    tasks = gate_preconditions.judged_tasks(manifest, _SPLIT.value, wanted)
    served = stored.newest(_AGAINST.value)
    known = {} if served is None else gate_preconditions.check_served(served, manifest)
    name = known.get("model", "ranker") if _NAME.value is None else _NAME.value
    with _staging(known.get("version", 0)) as output:
        preconditions.check_places(workdir, manifest, output, name)
        quieten_tensorflow()
        import tensorflow as tf

        from export import exporter
        from export.gate.gate import Gate, Refused

        tf.config.set_visible_devices([], "GPU")
        gate = Gate(manifest, config.data, _SPLIT.value, tasks, wanted, served, verdict, dry_run=_DRY_RUN.value)
        newest = int(served.name) if served else 0
        try:
            directory, tree = exporter.export(
                workdir,
                config,
                manifest,
                _CHECKPOINT.value,
                output,
                name,
                _TABLES.value,
                calibrated=_CALIBRATED.value,
                newest=None if _DRY_RUN.value or stores.is_uri(_AGAINST.value) else newest,
                judge=gate,
            )
            refused = ""
        except Refused as reasons:
            refused = str(reasons)
        _say(gate, served, verdict)
        if refused:
            print(f"refused: {refused}", file=sys.stderr)
            sys.exit(REFUSED_CODE)
        if _DRY_RUN.value:
            print("would be published: every rule holds (--dry_run)")
        else:
            place = stored.upload(directory, _AGAINST.value, newest)
            print(f"published: {place}, {tree['model']} version {tree['version']}")


@contextlib.contextmanager
def _staging(served: int) -> Iterator[Path]:
    """The directory to export to; for a dry run a temporary one, whose first number is the one after ``served``."""
    if not _DRY_RUN.value:
        with stored.staging(_AGAINST.value) as output:
            yield output
        return
    with tempfile.TemporaryDirectory() as scratch:
        publish.use_numbers_after(served, Path(scratch))
        yield Path(scratch)


def _say(gate: Any, served: Path | None, verdict: Path) -> None:
    print(gate.table())
    beside = f"side by side with {served}" if served else "nothing is served yet, so only the candidate's own bounds"
    print(f"{gate.verdict['rows']:,} rows of {gate.verdict['split']} of {gate.verdict['data']}: {beside}")
    print(f"verdict: {verdict}")


def run() -> None:
    """Console script ``stem-publish``."""
    cli.run(main, flags, memory="a run with a smaller config.model.dim")


if __name__ == "__main__":
    run()
