"""Compares models on one converted data set: trains them, and writes a report that says which differences are real.

    stem-compare PLAN.yaml --output=OUTPUT
    stem-compare --models=single_task,mmoe,ple,stem_net --seeds=3 --data=DATA --output=OUTPUT
    stem-compare --runs=RUN,RUN,... --output=OUTPUT
    stem-compare --runs='runs/ple-*' --output=OUTPUT

A plan is a YAML file, or the name of a shipped one. Every cell (arm x trial x seed) is an ordinary stem-train run in a
process of its own. If the job is killed, the same command goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from pipelines.yaml_reader import Node
from stem_tf import configs, report
from stem_tf.compare import build, cells, figures, page, plan, runs
from stem_tf.compare.campaign import Campaign
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.plan import Plan
from stem_tf.compare.scheduler import Scheduler, cores
from stem_tf.compare.text import plain
from stem_tf.runtime import quieten_tensorflow
from stem_tf.workdir import Workdir
from stem_util import cli, files, owned
from stem_util.errors import JobError, UserError
from stem_util.progress import duration
from stem_util.version import versions

flags = cli.Flags()

_OUTPUT = flags.DEFINE(cli.PATH, "output", None, "Directory of the comparison: runs, searches and the report.")
_MODELS = flags.DEFINE_list("models", [], "Models to compare, instead of a plan.")
_RUNS = flags.DEFINE_list(
    "runs",
    [],
    "Finished runs to compare, instead of training: their directories, directories above them, or patterns (*).",
)
_DATA = flags.DEFINE(
    cli.PLACE, "data", None, "Directory or URI of the converted data; with --runs, where it has moved to."
)
_CONFIG = flags.DEFINE(cli.PATH, "config", None, "Experiment that all arms start from; small by default.")
_OVERRIDES = flags.DEFINE_multi_string(
    configs.OVERRIDE, [], "KEY=VALUE for all arms; --config.KEY=VALUE is short for it."
)
_TASKS = flags.DEFINE_list(
    "tasks", [], "Compare on these tasks only, and leave out the data's others: short for --config.data.tasks."
)
_SEEDS = flags.DEFINE_list("seeds", [], "How many seeds each arm gets, or several seeds; 3 by default.")
_NAME = flags.DEFINE_string("name", None, "Title of the report; the data's name by default.")
_SINGLE = flags.DEFINE_string("single", None, "Arm that trains each task alone; the one of the model single_task.")
_INCUMBENT = flags.DEFINE_string("incumbent", None, "Arm to beat beside Single-Task.")
_LEVEL = flags.DEFINE_float("level", None, "Chance of a wrong verdict in a whole table; .05 by default.")
_RESAMPLES = flags.DEFINE_integer("resamples", None, "Resamples of the bootstrap; 1,000 by default.")
_COMPARABLE = flags.DEFINE_integer("comparable", None, "Most buckets between tasks of a comparable zone; 2 by default.")
_OVERWHELMING = flags.DEFINE_integer("overwhelming", None, "Least buckets where one overwhelms; 5 by default.")
_HOURS = flags.DEFINE_float("hours", None, "Budget of this call: what does not fit is dropped, and the report says so.")
_PARALLEL = flags.DEFINE_integer(
    "parallel", None, "Cells side by side; by default as many as cores, memory and devices allow.", lower_bound=1
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan, and do nothing.")

_STATE = "comparison.json"
_MODULE = "stem_tf.jobs.compare"


def main(argv: Sequence[str]) -> None:
    plans = argv[1:]
    given = [*plans, *(["--models"] if _MODELS.value else []), *(["--runs"] if _RUNS.value else [])]
    if len(given) != 1:
        what = f"not {' and '.join(given)} together" if given else "but nothing is given"
        raise UserError(f"one plan, --models or --runs says what to compare, {what}")
    if _HOURS.value is not None and not _HOURS.value > 0:
        raise UserError(f"--hours={_HOURS.value:g} should be more than 0")
    if _OUTPUT.value is None and not _DRY_RUN.value:
        raise UserError("--output is required: the directory of the comparison")
    if _RUNS.value:
        for_training = {
            "config": _CONFIG,
            "config.KEY": _OVERRIDES,
            "tasks": _TASKS,
            "seeds": _SEEDS,
            "hours": _HOURS,
        }
        for name, flag in for_training.items():
            if flag.value:
                raise UserError(f"--{name} says what to train, but --runs are trained already: leave one of them out")
        _compare_runs()
    else:
        _compare_plan(_plan(plans))


def _plan(plans: Sequence[str]) -> Plan:
    """The plan of a file or of flags, which replace the file's keys."""
    if plans:
        root = plan.read(plans[0])
    else:
        root = Node("--models", "", {"arms": {model: {"model.name": model} for model in _MODELS.value}})
        if len(root.value["arms"]) < len(_MODELS.value):
            raise UserError(f"--models={','.join(_MODELS.value)} names a model twice")
    words = dict(text.partition("=")[::2] if "=" in text else (text, True) for text in _OVERRIDES.value)
    if _TASKS.value:
        words["data.tasks"] = ",".join(_TASKS.value)
    quieten_tensorflow()
    return plan.load(
        plan.changed(root, data=_DATA.value, config=_CONFIG.value, seeds=_seeds(), set=words or None, **_judging())
    )


def _judging() -> dict[str, Any]:
    return {
        "name": _NAME.value,
        "single": _SINGLE.value,
        "incumbent": _INCUMBENT.value,
        "level": _LEVEL.value,
        "resamples": _RESAMPLES.value,
        "comparable": _COMPARABLE.value,
        "overwhelming": _OVERWHELMING.value,
    }


def _seeds() -> int | list[int] | None:
    try:
        seeds = [int(text) for text in _SEEDS.value]
    except ValueError:
        raise UserError(f"--seeds={','.join(_SEEDS.value)} should be whole numbers") from None
    return None if not seeds else seeds[0] if len(seeds) == 1 else seeds


def _compare_plan(found: Plan) -> None:
    if not _DRY_RUN.value:
        figures.pyplot()  # refuses before hours of training, not after them
    output = Path(os.path.realpath(_OUTPUT.value)) if _OUTPUT.value else Path("OUTPUT")
    scheduler = _scheduler(found)
    campaign = Campaign(found, output, scheduler, _HOURS.value, lambda line: print(line, flush=True))
    if _DRY_RUN.value:
        _say_plan(found, campaign, scheduler)
        return
    with _claimed(output, found.manifest):
        campaign.open_searches()
        _say_plan(found, campaign, scheduler)
        start = time.monotonic()
        try:
            with manifests.in_use(found.manifest.data_dir):
                campaign.run()
        except BaseException:
            print(f"stopped; to go on: {cli.command_line(_MODULE)}", flush=True)
            raise
        arms = campaign.found()
        for record in campaign.failed:
            report.warn(f"{record['arm']}: {record['why']}")
        if not arms or (len(arms) == 1 < len(found.arms)):
            why = campaign.failed[0]["why"] if campaign.failed else "the budget left no room for them"
            raise JobError(f"nothing could be compared: {len(arms)} of {len(found.arms)} arms have a run; {why}")
        named = {}
        for role, name in (("single", found.single), ("incumbent", found.incumbent)):
            named[role] = name if name in arms else None
            if name is not None and name not in arms:
                report.warn(f"{role}: the arm '{name}' has no run, so the report judges without it")
        provenance = _provenance(found.manifest, found.text, scheduler.most) | campaign.provenance()
        provenance["seconds"] = round(time.monotonic() - start, 1)
        comparison = runs.compare(
            arms, name=found.name, settings=found.settings, provenance=provenance, output=output, **named
        )
        if campaign.dropped:
            report.warn(f"dropped, as the budget had no room: {'; '.join(campaign.dropped)}")
        _report(comparison, output)


def _say_plan(found: Plan, campaign: Campaign, scheduler: Scheduler) -> None:
    manifest = found.manifest
    print(
        f"{found.name}: {len(found.arms)} arms, config {found.config}, on {manifest.data_dir} "
        f"({manifest.rows('train'):,} train, {manifest.rows('validation'):,} validation and "
        f"{manifest.rows('test'):,} test rows); {scheduler.most} side by side at most"
    )
    lines = []
    for name, arm in found.arms.items():
        role = [
            role for role, other in (("Single-Task", found.single), ("incumbent", found.incumbent)) if other == name
        ]
        sets = ", ".join(plan.word(key, value) for key, value in arm.overrides.items())
        lines.append([name, (sets or "nothing") + (f" ({', '.join(role)})" if role else "")])
        for sentence in arm.left_out:
            lines.append(["", sentence])
    print(report.table(["arm", "sets"], lines))
    print(campaign.outline())
    if forecast := campaign.forecast():
        print(forecast)
    sys.stdout.flush()


def _scheduler(found: Plan) -> Scheduler:
    """As many processes as there are GPUs, or cores."""
    import tensorflow as tf

    count = len(tf.config.list_physical_devices("GPU"))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (named.split(",") if named else list(map(str, range(count))))[:count]
    if any(arm.mirrored for arm in found.arms.values()):
        return Scheduler(_PARALLEL.value or 1, measured=_PARALLEL.value is None)
    trials = sum(arm.search.trials for arm in found.arms.values() if arm.search is not None)
    most = min(count or cores(), len(found.arms) * len(found.seeds) + trials)
    return Scheduler(_PARALLEL.value or most, measured=_PARALLEL.value is None, devices=devices)


def _compare_runs() -> None:
    """Compares runs that exist; evaluates those that lack it, each in a process of its own."""
    figures.pyplot()
    words = [runs.found_at(word) for word in _RUNS.value]
    paths = list(dict.fromkeys(path for trained, _ in words for path in trained))
    for path in dict.fromkeys(path for _, others in words for path in others):
        report.warn(f"{path} is not trained to its end and is left out")
    if not paths:
        raise UserError(f"--runs={','.join(_RUNS.value)}: no run is trained to its end; go on with stem-train")
    for path in paths:
        runs.check_trained(Workdir(path))
    manifest = manifests.load(_DATA.value or runs.config_of(Workdir(paths[0]))["data.dir"])
    runs.check_data(manifest)
    for path in paths:
        runs.check_same_data(Workdir(path), manifest)
    judging = _judging()
    settings = plan.judging(plan.changed(Node("flags", "", {}), **judging))
    lacking = [path for path in paths if cells.lacks_evaluation(path, runs.SPLITS)]
    scheduler = Scheduler(_PARALLEL.value or 1)
    print(f"{len(paths)} runs on {manifest.data_dir}, {len(lacking)} of them to be evaluated", flush=True)
    if _DRY_RUN.value:
        return
    output = Path(os.path.realpath(_OUTPUT.value))
    with _claimed(output, manifest):
        failed = _evaluate(lacking, scheduler, output)
        paths = [path for path in paths if str(path) not in failed]
        if not paths:
            raise JobError(f"nothing could be compared: {next(iter(failed.values()))}")
        provenance = _provenance(manifest, "", scheduler.most)
        records = [_record(path, "") for path in paths] + [_record(Path(path), why) for path, why in failed.items()]
        provenance["cells"] = records
        found = runs.compare(
            runs.grouped(paths),
            name=judging["name"] or manifest.name,
            single=judging["single"],
            incumbent=judging["incumbent"],
            settings=settings,
            data=_DATA.value,
            provenance=provenance,
            output=output,
        )
        _report(found, output)


def _evaluate(lacking: Sequence[Path], scheduler: Scheduler, output: Path) -> dict[str, str]:
    """Evaluates and measures runs; returns why, for each that could not be."""
    failed, waiting = {}, list(lacking)
    try:
        while waiting or scheduler.running:
            while waiting and scheduler.may_start():
                path = waiting.pop(0)
                log = output / "logs" / f"{len(lacking) - len(waiting)}-{path.name}.log"
                scheduler.start(str(path), cells.evaluation(path, _DATA.value), log)
            for ended in scheduler.wait(time.monotonic() + 1):
                if ended.code:
                    failed[ended.name] = ended.why
                    report.warn(f"{ended.name} could not be evaluated and is left out: {ended.why}")
                else:
                    print(f"evaluated {ended.name} in {duration(ended.seconds)}", flush=True)
    finally:
        scheduler.stop()
    return failed


def _record(path: Path, why: str) -> dict[str, Any]:
    """What provenance says of a run that existed before."""
    workdir = Workdir(path)
    values, reached = runs.config_of(workdir), files.read_json(workdir.report, "go on with stem-train")
    return {
        "arm": values["model.name"],
        "trial": None,
        "seed": values["seed"],
        "command": reached.get("command", ""),
        "versions": reached.get("versions", {}),
        "workdir": str(path),
        "state": "failed" if why else "done",
        "why": why,
        "score": reached["best"]["score"],
    }


@contextlib.contextmanager
def _claimed(output: Path, manifest: Manifest) -> Iterator[None]:
    """Holds the output directory, which is a comparison on this data or empty.

    Raises:
      UserError: another job is writing it, or it holds something else, or a comparison on other data.
    """
    owned.claim(output, owned.COMPARISON)
    with files.locked(output / ".lock", output):
        state, checksum = output / _STATE, manifests.checksum(manifest.data_dir)
        if state.exists():
            before = files.read_json(state, "choose another --output")
            if before.get("data_sha256") != checksum:
                raise UserError(
                    f"{output} holds a comparison on other data ({before.get('data')}; now {manifest.data_dir}): "
                    "choose another --output"
                )
        files.write_json(state, {"data": manifest.data_dir, "data_sha256": checksum})
        yield


def _provenance(manifest: Manifest, text: str, side_by_side: int) -> dict[str, Any]:
    return {
        "command": cli.command_line(_MODULE),
        "plan": text,
        "versions": versions(),
        "machine": {"system": platform.platform(), "cores": cores(), "side_by_side": side_by_side},
        "data": {
            "dir": manifest.data_dir,
            "sha256": manifests.checksum(manifest.data_dir),
            "created_by": manifest.created_by,
        },
    }


def _report(comparison: Comparison, output: Path) -> None:
    """Writes the report and prints what it says first."""
    sections = build.sections_of(comparison)
    build.write(comparison, sections, output)
    print(f"\n{plain(sections[0].lead)}\n")
    print(f"written to {output}: {page.HTML}, {page.MARKDOWN}, {page.JSON}")
    print(f"next: open {shlex.quote(str(output / page.HTML))} in a browser")


def run() -> None:
    """Console script ``stem-compare``."""
    cli.run(main, flags, "[PLAN]", memory="fewer cells side by side (--parallel)", rewritten=configs.override_flags)


if __name__ == "__main__":
    run()
