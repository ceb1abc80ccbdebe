"""One day: convert or extend, train, compare with what is served and publish.

What a step has made is noted in the day's record once the step is done. A step that was interrupted runs again with
the same command: a conversion starts over, a training goes on from its last checkpoint, and a version is published as a
whole or not at all.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from export import stored
from export.daily import process
from export.daily.state import DONE, LEFT_OUT, PUBLISHED, REFUSED, Day, State
from export.gate import REFUSED_CODE, preconditions, rules
from pipelines import manifest as manifests
from pipelines import schema_yaml
from pipelines.convert import extending
from pipelines.manifest import SPLITS
from stem_util import files, stores
from stem_util.errors import JobError, UserError

BASES = ("published", "last", "nothing")
"""What a day goes on from: the last published day, the last day even if it was refused, or nothing."""


class BadLog(UserError):
    """The log cannot be converted, or the gate could not judge by it."""


@dataclass(frozen=True)
class Options:
    """What all days have in common.

    Attributes:
      schema: of the logs: a file or a shipped name.
      config: of the training.
      overrides: its ``--config.KEY=VALUE``.
      served: directory of the versions.
      rules: file with the gate's rules; "" for the gate's own.
      forget: ``--forget`` of stem-convert; "" to forget nothing.
      keep: how many days' data and runs are kept.
      go_on_from: one of `BASES`.
      split: the held-back rows that the gate compares on.
      convert, train, publish: further arguments of these jobs.
    """

    schema: str
    config: str
    overrides: tuple[str, ...]
    served: str
    rules: str = ""
    forget: str = ""
    keep: int = 7
    go_on_from: str = "published"
    split: str = "test"
    convert: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    publish: tuple[str, ...] = ()


def run(state: State, name: str, log: str, options: Options) -> Day:
    """Takes a day to its end, from wherever it was; a day that is done stays as it is.

    Args:
      state: locked by the caller.
      name: of the day.
      log: its log, as stem-convert takes it.
      options: what all days have in common.

    Raises:
      BadLog: the log cannot be converted or judged by, or was learned on another day.
      UserError: the day is older than the last one, was done with another log, or something that it needs is gone.
      JobError: a step failed; the same command goes on.
    """
    schema_yaml.load(options.schema)
    log = ",".join(map(stores.absolute, log.split(",")))
    day = state.day(name)
    if day.decision in DONE:
        if day.record["log"] != log:
            raise BadLog(f"{name} is done, with the log {day.record['log']}: a day is learned once; {log} is another")
        state.tidy(options.keep)
        return day
    last = state.last(published=False)
    if last is not None and name < last.name:
        raise BadLog(f"{name} is older than {last.name}, the last day that is done: days are learned in their order")
    for other in state.days():
        if other.name < name and not other.decision:
            other.write(decision=LEFT_OUT, why=other.record.get("error", f"not done when {name} began"))
    base = _base(state, options)
    day.write(
        **{"day": name, "log": log, "from": base.name if base else None, "began": day.record.get("began", _now())}
    )
    day.record.pop("error", None)
    try:
        _Steps(state, day, base, log, options).run()
    except (UserError, JobError) as error:
        day.write(error=str(error))
        state.tidy(options.keep)
        raise
    state.tidy(options.keep)
    return day


def _base(state: State, options: Options) -> Day | None:
    """The day to go on from, if there is one. A published day whose version was rolled back is passed over.

    Raises:
      UserError: no published day is of the version that is served, or of one before it.
    """
    if options.go_on_from != "published":
        return None if options.go_on_from == "nothing" else state.last(published=False)
    last = state.last(published=True)
    served = None if last is None else stored.newest(options.served)
    if last is None or served is None:
        return last
    base = state.last(published=True, until=int(served.name))
    if base is None:
        raise UserError(
            f"{options.served} serves version {served.name}, which is older than that of any day: pass "
            "--go_on_from=last or --go_on_from=nothing, or make the version of a day the served one (stem-versions)"
        )
    if base.name != last.name:
        print(f"version {last.record['version']} is not served any more: goes on from {base.name}, not {last.name}")
    return base


class _Steps:
    def __init__(self, state: State, day: Day, base: Day | None, log: str, options: Options) -> None:
        self._state, self._day, self._base, self._log, self._options = state, day, base, log, options

    def run(self) -> None:
        self._step("convert", "pipelines.jobs.convert", self._conversion(), self._convert)
        self._step("train", "stem_tf.jobs.train", self._training(), self._train)
        self._step("publish", "export.jobs.publish", self._publication(), self._publish)

    def _step(self, name: str, module: str, arguments: list[str], do: Callable[[str, list[str]], Any]) -> None:
        """Does a step that is not done yet.

        Raises:
          UserError: it was done with another command.
        """
        steps = self._day.record.get("steps", {})
        if name in steps:
            before, now = steps[name]["command"], [module, *arguments]
            if before != now:
                changed = sorted({*before} ^ {*now})
                raise UserError(
                    f"{self._day.name}: the step '{name}' was done with other arguments ({', '.join(changed)} differ): "
                    f"repeat the command that began the day, or remove {self._day.path} to start the day over"
                )
            return
        print(f"{self._day.name}: {name}", flush=True)
        started = time.monotonic()
        known = do(module, arguments) or {}
        took = {"command": [module, *arguments], "seconds": round(time.monotonic() - started, 1), "ended": _now()}
        self._day.write(**known, steps=steps | {name: took})

    def _job(self, what: str, module: str, arguments: Sequence[str], accepted: Sequence[int] = (0,)) -> int:
        return process.run(f"{what} of {self._day.name}", module, arguments, self._day.output, accepted)

    def _conversion(self) -> list[str]:
        options = self._options
        arguments = [self._log, f"--schema={options.schema}", f"--output={self._day.data}", *options.convert]
        if self._base is not None:
            arguments.append(f"--extend={self._base.data}")
            if options.forget:
                arguments.append(f"--forget={options.forget}")
        return arguments

    def _convert(self, module: str, arguments: list[str]) -> dict[str, Any]:
        if self._base is not None:
            data = self._base.data
            if not (data / manifests.FILENAME).exists():
                raise UserError(
                    f"{data} is gone, from which {self._day.name} grows: restore it, or pass --go_on_from=nothing to "
                    "begin anew"
                )
            # Data that are damaged, or a schema that has changed, are not the log's fault.
            with extending.extended(str(data), str(self._day.data), schema_yaml.load(self._options.schema)):
                pass
        try:
            self._job("the conversion", module, [*arguments, "--overwrite"])
        except UserError as error:
            raise BadLog(str(error)) from None
        found = manifests.load(str(self._day.data))
        wanted = rules.load(self._options.rules or None, found.schema)
        try:
            preconditions.judged_tasks(found, self._options.split, wanted)  # now, and not after hours of training
        except UserError as error:
            raise BadLog(str(error)) from None
        return {
            "rows": sum(found.rows(split) for split in SPLITS),
            "new_ids": sum(grown.new for grown in found.history.values()),
            "forgotten": sum(grown.evicted for grown in found.history.values()),
        }

    def _training(self) -> list[str]:
        options = self._options
        arguments = [f"--config={options.config}", f"--config.data.dir={self._day.data}", f"--workdir={self._day.run}"]
        if self._base is not None:
            arguments.append(f"--from={self._base.run}")
        # Keys of a run that goes on do nothing on a first day, and stem-train refuses such keys.
        given = (key for key in options.overrides if self._base is not None or not key.startswith("start."))
        arguments += [f"--config.{override}" for override in given]
        return [*arguments, *options.train]

    def _train(self, module: str, arguments: list[str]) -> None:
        if self._base is not None and not self._base.run.is_dir():
            raise UserError(
                f"{self._base.run} is gone, from which {self._day.name} goes on: restore it, or pass "
                "--go_on_from=nothing to begin anew"
            )
        self._job("the training", module, arguments)

    def _publication(self) -> list[str]:
        options = self._options
        given = [f"--rules={options.rules}"] if options.rules else []
        arguments = [f"--workdir={self._day.run}", f"--against={options.served}", f"--verdict={self._day.verdict}"]
        return [*arguments, *given, *options.publish]

    def _publish(self, module: str, arguments: list[str]) -> dict[str, Any]:
        """Asks the gate, unless it has published the run just before this process or the one before was killed."""
        before = self._state.last(published=True)
        if before is not None and stored.newest(self._options.served) is None:
            raise UserError(
                f"{self._options.served} serves no version, and {before.name} was published as version "
                f"{before.record['version']}: restore it, or copy that version to where --served leads now"
            )
        version = self._published()
        code = 0 if version else self._job("the publication", module, arguments, accepted=(0, REFUSED_CODE))
        verdict = files.read_json(self._day.verdict, f"remove {self._day.path} to start the day over")
        known = {"ended": _now(), "auc": _mean_auc(verdict, "candidate"), "served_auc": _mean_auc(verdict, "served")}
        if code == REFUSED_CODE:
            return known | {"decision": REFUSED, "why": "; ".join(verdict["reasons"])}
        version = version or self._published()
        if not version:
            raise JobError(f"the publication of {self._day.name}: no version in {self._options.served} is of this run")
        return known | {"decision": PUBLISHED, "version": version}

    def _published(self) -> int:
        """The version that was made of the day's run; 0 if there is none."""
        newest = stored.newest(self._options.served)
        try:
            tree = {} if newest is None else json.loads((newest / manifests.FILENAME).read_bytes())
        except (OSError, ValueError):
            return 0  # the gate says what is wrong with it
        run = tree.get("run", {}).get("workdir") == os.path.realpath(self._day.run)
        data = tree.get("data", {}).get("manifest_sha256") == manifests.checksum(self._day.data)
        return int(tree["version"]) if run and data else 0


def _mean_auc(verdict: dict[str, Any], of: str) -> float | None:
    """The mean AUC of ``candidate`` or ``served`` over the tasks in a verdict; None where it has none."""
    known = (check for check in verdict["checks"] if check["rule"].startswith("auc.") and check[of] is not None)
    by_task = {check["of"]: check[of] for check in known}
    return sum(by_task.values()) / len(by_task) if by_task else None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
