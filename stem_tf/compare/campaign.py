"""Runs a plan: trials, then the seeds of each arm, in the order in which a budget that ends early hurts least."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stem_tf import configs, report
from stem_tf.compare import cells, plan
from stem_tf.compare.cells import Cell
from stem_tf.compare.plan import Plan, Planned, Range
from stem_tf.compare.runs import Wanted
from stem_tf.compare.scheduler import Ended, Scheduler
from stem_tf.compare.search import Tuner
from stem_util.errors import UserError, message
from stem_util.progress import duration

_HOUR = 3600.0
_LOOK_SECONDS = 5.0
"""How often free memory is looked at while nothing ends."""


@dataclass(frozen=True)
class Step:
    """A part of the plan that is one process: a trial of an arm, or its run with one of the seeds."""

    arm: str
    seed: int | None


@dataclass
class _Arm:
    """An arm while the plan runs.

    Attributes:
      planned: what the plan says of it.
      tuner: its search, or None.
      cut: trials that the budget has left no room for.
      words: overrides of its reported runs; None until its search has ended.
      chosen: number of the trial that won.
      started: its seeds that have been started, or that did not fit into the budget.
      runs: directories of the reported runs that are done.
      stopped: why it gets no runs any more; "" while it does.
    """

    planned: Planned
    tuner: Tuner | None
    cut: int = 0
    words: tuple[str, ...] | None = None
    chosen: int | None = None
    started: list[int] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    stopped: str = ""


class Campaign:
    """Takes a plan to its end.

    Arms without a search have their first seed, then come the searches and the first seeds of their winners, and second
    seeds when every arm has its first. What an earlier call has done is not done again. A cell that fails is
    remembered, and the rest goes on.

    Args:
      plan: what to run.
      output: the comparison's directory.
      scheduler: starts the processes.
      hours: budget of this call, or None.
      say: prints a line.

    Attributes:
      dropped: what the budget had no room for.
    """

    def __init__(
        self, plan: Plan, output: Path, scheduler: Scheduler, hours: float | None, say: Callable[[str], None]
    ) -> None:
        self._plan, self._output, self._scheduler, self._say = plan, output, scheduler, say
        self._start = time.monotonic()
        self._deadline = None if hours is None else self._start + hours * _HOUR
        self._arms = {
            name: _Arm(planned, None, words=planned.words if planned.search is None else None)
            for name, planned in plan.arms.items()
        }
        self._seconds: dict[tuple[str, bool], list[float]] = defaultdict(list)
        self._cells: dict[str, Cell] = {}
        self._twins: list[Cell] = []
        self._records: list[dict[str, Any]] = []
        self.dropped: list[str] = []
        self._forecast_given = False

    def open_searches(self) -> None:
        """Opens the searches, which are kept in the output, and ends those that an earlier call has finished."""
        for arm in self._arms.values():
            if arm.planned.search is not None:
                arm.tuner = Tuner(arm.planned, self._output / "trials.log", self._plan.settings.seed)
                self._choose(arm)

    def run(self) -> None:
        """Runs all cells that are missing.

        Raises:
          KeyboardInterrupt, Stopped: after the cells that run have written a checkpoint.
        """
        try:
            while True:
                while self._scheduler.may_start() and (cell := self._next()) is not None:
                    self._begin(cell)
                if not self._scheduler.running:
                    return
                until = time.monotonic() + _LOOK_SECONDS
                for ended in self._scheduler.wait(until if self._deadline is None else min(until, self._deadline)):
                    self._end(ended)
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    for ended in self._scheduler.stop():
                        self._end(ended, in_time=False)
        finally:
            self._scheduler.stop()

    def _next(self) -> Cell | None:
        """The next cell to start; None where none is left, or where the next one waits for others to end.

        Cells that are done already, and those that the budget has no room for, are passed over.
        """
        for step in self._steps():
            arm = self._arms[step.arm]
            if not self._fits(step):
                self._drop(step)
                continue
            if step.seed is None:
                assert arm.tuner is not None
                point = arm.tuner.ask()
                assert point is not None
                cell = self._cell(arm, (*arm.planned.words, *point.words), point.number)
            else:
                assert arm.words is not None
                arm.started.append(step.seed)
                cell = self._cell(arm, arm.words, None, step.seed)
            if cell is None:
                continue
            if cell.done:
                self._keep(cell)
            elif any(cell.workdir == running.workdir for running in self._cells.values()):
                self._twins.append(cell)  # another trial has the same config, and is being trained
            else:
                return cell
        return None

    def _steps(self) -> Iterator[Step]:
        """The steps that may be taken now, in their order; the state may change between one and the next."""
        while (step := self._first_step()) is not None:
            yield step

    def _first_step(self) -> Step | None:
        alive = [arm for arm in self._arms.values() if not arm.stopped]
        for arm in alive:
            self._choose(arm)
        first = self._plan.seeds[0]
        for arm in alive:
            if arm.words is not None and first not in arm.started:
                return Step(arm.planned.name, first)
        searching = [arm for arm in alive if arm.tuner is not None and arm.tuner.left and not arm.cut]
        if searching:
            furthest = max(searching, key=lambda arm: arm.tuner.left if arm.tuner is not None else 0)
            return Step(furthest.planned.name, None)
        if any(arm.words is None and not arm.stopped for arm in alive):
            return None  # a search is about to end
        for seed in self._plan.seeds[1:]:
            for arm in alive:
                if not arm.stopped and seed not in arm.started:
                    return Step(arm.planned.name, seed)
        return None

    def _choose(self, arm: _Arm) -> None:
        """Ends a search whose trials have ended: its best trial becomes the arm."""
        tuner = arm.tuner
        if tuner is None or arm.words is not None or tuner.running or (tuner.left and not arm.cut):
            return
        winner = tuner.winner()
        if winner is None:
            arm.stopped = "no trial of its search has ended"
            return
        arm.words, arm.chosen = (*arm.planned.words, *winner.words), winner.number
        self._say(f"{arm.planned.name}: trial {winner.number} wins on validation ({', '.join(winner.words)})")

    def _cell(self, arm: _Arm, words: tuple[str, ...], trial: int | None, seed: int | None = None) -> Cell | None:
        """The cell of these overrides; None, and a record, where no config has them."""
        name, seed = arm.planned.name, self._plan.trial_seed if seed is None else seed
        try:
            left_out: list[str] = []
            config = configs.load(self._plan.config, words, left_out.append)
        except UserError as error:  # keys that a search has chosen, which exclude each other
            self._record({"arm": name, "trial": trial, "seed": seed, "state": "failed", "why": message(error)})
            if trial is not None and arm.tuner is not None:
                arm.tuner.tell(trial, None)
            return None
        useless = set(map(plan.key_of, left_out))
        words = tuple(text for text in words if text.partition("=")[0] not in useless)
        where = cells.directory(self._output, name, plan.fingerprint(config), seed)
        return Cell(name, trial, seed, self._plan.config, words, where)

    def _begin(self, cell: Cell) -> None:
        self._cells[str(cell)] = cell
        self._scheduler.start(str(cell), cell.process(), cell.log)

    def _keep(self, cell: Cell) -> None:
        """Counts a cell that an earlier call has done."""
        assert cell.seconds is not None
        self._seconds[cell.arm, cell.reported].append(cell.seconds)
        self._done(cell, {"seconds": cell.seconds, "kept": True})

    def _end(self, ended: Ended, in_time: bool = True) -> None:
        cell = self._cells.pop(ended.name)
        same = [twin for twin in self._twins if twin.workdir == cell.workdir]
        self._twins = [twin for twin in self._twins if twin not in same]
        self._end_one(cell, ended, in_time)
        for twin in same:
            if twin.done:
                self._keep(twin)
            else:
                self._end_one(twin, ended, in_time)

    def _end_one(self, cell: Cell, ended: Ended, in_time: bool) -> None:
        measured = {"seconds": round(ended.seconds, 1), "peak_bytes": ended.peak_bytes}
        if not ended.code:
            self._seconds[cell.arm, cell.reported].append(ended.seconds)
            self._done(cell, measured)
            if not self._forecast_given and (forecast := self.forecast()):
                self._say(forecast)
                self._forecast_given = True
            return
        arm = self._arms[cell.arm]
        if cell.trial is not None and arm.tuner is not None:
            arm.tuner.tell(cell.trial, None)
        if in_time:
            self._record(self._of(cell) | measured | {"state": "failed", "why": ended.why})
            self._say(f"{cell} FAILED after {duration(ended.seconds)}: {ended.why} (its output: {cell.log})")
        else:
            self._record(self._of(cell) | measured | {"state": "dropped", "why": "the budget ended while it ran"})
            self.dropped.append(str(cell))

    def _done(self, cell: Cell, measured: dict[str, Any]) -> None:
        arm, result = self._arms[cell.arm], cell.result()
        if cell.trial is None:
            arm.runs.append(cell.workdir)
        elif arm.tuner is not None:
            arm.tuner.tell(cell.trial, result["score"])
        self._record(self._of(cell) | measured | {"state": "done", "why": ""} | result)
        took = "done before" if measured.get("kept") else duration(measured["seconds"])
        score = report.number(result["score"])
        self._say(f"{cell}: validation {result['monitor']} {score}, {report.age(result['epoch'], 0)}; {took}")

    def _of(self, cell: Cell) -> dict[str, Any]:
        return {
            "arm": cell.arm,
            "trial": cell.trial,
            "seed": cell.seed,
            "command": cell.command(),
            "workdir": str(cell.workdir),
            "log": str(cell.log),
        }

    def _record(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def _fits(self, step: Step) -> bool:
        """Whether the budget has room for a step, and then still for each arm's first seed."""
        if self._deadline is None:
            return True
        left, needed = self._deadline - time.monotonic(), self.expected(step)
        if needed is None:
            return left > 0
        first = self._plan.seeds[0]
        if step.seed != first:
            missing = [arm for arm in self._arms.values() if first not in arm.started and not arm.stopped]
            times = [self.expected(Step(arm.planned.name, first)) or 0.0 for arm in missing]
            needed += sum(times) / self._scheduler.most
        return needed <= left

    def _drop(self, step: Step) -> None:
        """Leaves a step out that the budget has no room for."""
        arm = self._arms[step.arm]
        if step.seed is None:
            assert arm.tuner is not None
            arm.cut = arm.tuner.left
            what = f"{step.arm}, the last {arm.cut} trials"
        else:
            arm.started.append(step.seed)
            what = f"{step.arm}, seed {step.seed}"
        self.dropped.append(what)
        self._say(f"{what}: dropped, the budget has no room for it")

    def expected(self, step: Step) -> float | None:
        """How many seconds a step takes: as the arm's cells did, else as all have; None before any was measured."""
        reported = step.seed is not None
        for found in (
            self._seconds[step.arm, reported],
            self._seconds[step.arm, not reported],
            [seconds for (_, kind), times in list(self._seconds.items()) if kind == reported for seconds in times],
            [seconds for times in self._seconds.values() for seconds in times],
        ):
            if found:
                return statistics.fmean(found)
        return None

    def order(self) -> list[tuple[str, list[Step]]]:
        """The plan in words, with its steps, in the order in which they are taken."""
        names = list(self._arms)
        first, *others = self._plan.seeds
        searched = [arm.planned for arm in self._arms.values() if arm.planned.search is not None]
        fixed = [name for name in names if name not in [arm.name for arm in searched]]
        rounds = [(f"seed {first} of {', '.join(fixed)}", [Step(name, first) for name in fixed])] if fixed else []
        for arm in searched:
            assert arm.search is not None
            keys = ", ".join(map(_dimension, arm.search.space.items()))
            trials = [Step(arm.name, None)] * arm.search.trials
            rounds.append((f"trials of {arm.name} ({arm.search.sampler}: {keys})", trials))
            rounds.append((f"seed {first} of the winner of {arm.name}", [Step(arm.name, first)]))
        rounds += [(f"seed {seed} of each arm", [Step(name, seed) for name in names]) for seed in others]
        return rounds

    def outline(self) -> str:
        """The plan as a table: what is run in which order, what is done already, and what the rest should take."""
        lines = []
        for number, (text, steps) in enumerate(self.order(), 1):
            done = self._done_before(steps)
            times = [self.expected(step) for step in steps]
            known = [seconds for seconds in times if seconds is not None]
            rest = sum(known[: len(steps) - done]) if len(known) == len(steps) else None
            expected = "not known yet" if rest is None else duration(rest)
            lines.append([f"{number}", f"{len(steps)}", f"{done}", expected, text])
        return report.table(["order", "cells", "done", "the rest takes", ""], lines)

    def _done_before(self, steps: Sequence[Step]) -> int:
        """How many steps of a round earlier calls have done; what they took then counts for what others will take."""
        tuner = self._arms[steps[0].arm].tuner
        if steps[0].seed is None:
            return tuner.ended if tuner is not None else 0
        done = 0
        for step in steps:
            arm = self._arms[step.arm]
            cell = self._cell(arm, arm.words, None, step.seed) if arm.words is not None else None
            if cell is not None and cell.done and cell.seconds is not None:
                self._seconds[step.arm, True].append(cell.seconds)
                done += 1
        return done

    def forecast(self) -> str:
        """What the rest takes and what the budget has no room for; "" until a cell of each arm is measured."""
        alive = [name for name, arm in self._arms.items() if not arm.stopped]
        left = self._left()
        if not left or any(not self._measured(name) for name in alive):
            return ""
        seconds = [self.expected(step) or 0.0 for step in left]
        together = sum(seconds) / self._scheduler.most
        how = f"{self._scheduler.most} side by side" if self._scheduler.most > 1 else "one after another"
        text = f"{_count(len(left), 'cell')} left to start: about {duration(together)}, {how}"
        if self._deadline is None:
            return text
        room = max(0.0, self._deadline - time.monotonic())
        out = _without_room(left, seconds, room * self._scheduler.most)
        rest = f"no room for {_counted(out)}" if out else "room for all of them"
        return f"{text}; the budget has {duration(room)} left: {rest}"

    def _measured(self, name: str) -> bool:
        return bool(self._seconds[name, True] or self._seconds[name, False])

    def _left(self) -> list[Step]:
        """The steps that have not been taken yet."""
        left = []
        for _, steps in self.order():
            trials_of = next((step.arm for step in steps if step.seed is None), None)
            if trials_of is not None:
                tuner = self._arms[trials_of].tuner
                left += steps[: tuner.left if tuner is not None else 0]
            else:
                left += [step for step in steps if step.seed not in self._arms[step.arm].started]
        return [step for step in left if not self._arms[step.arm].stopped]

    def found(self) -> dict[str, Wanted]:
        """The arms that have at least one run, with what each sets, the winner of its search included."""
        arms = {}
        for name, arm in self._arms.items():
            if arm.runs:
                chosen = dict(text.split("=", 1) for text in (arm.words or ())[len(arm.planned.words) :])
                arms[name] = Wanted({**arm.planned.overrides, **chosen}, arm.runs)
        return arms

    def provenance(self) -> dict[str, Any]:
        """What was run, what failed, and what was dropped, for the report."""
        return {
            "cells": self._records,
            "trials": {
                name: {"chosen": arm.chosen, "seed": self._plan.trial_seed, "trials": arm.tuner.table()}
                for name, arm in self._arms.items()
                if arm.tuner is not None
            },
            "left_out": {name: list(arm.planned.left_out) for name, arm in self._arms.items() if arm.planned.left_out},
            "dropped": self.dropped,
            "without_runs": {
                name: arm.stopped or "all of its runs failed or were dropped"
                for name, arm in self._arms.items()
                if not arm.runs
            },
        }

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Records of the cells that failed."""
        return [record for record in self._records if record["state"] == "failed"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _dimension(item: tuple[str, plan.Dimension]) -> str:
    key, values = item
    if isinstance(values, Range):
        return f"{key} {values.low:g} to {values.high:g}"
    return f"{key} {' | '.join(values)}"


def _without_room(steps: Sequence[Step], seconds: Sequence[float], room: float) -> list[Step]:
    """The steps that do not fit, when all before them are taken."""
    out = []
    for step, needed in zip(steps, seconds, strict=True):
        if needed > room:
            out.append(step)
        else:
            room -= needed
    return out


def _counted(steps: Sequence[Step]) -> str:
    """``12 trials of ple; seed 2 of mmoe, ple``."""
    by_seed: dict[int, list[str]] = defaultdict(list)
    trials: dict[str, int] = defaultdict(int)
    for step in steps:
        if step.seed is None:
            trials[step.arm] += 1
        else:
            by_seed[step.seed].append(step.arm)
    texts = [f"{count} trials of {arm}" for arm, count in trials.items()]
    return "; ".join([*texts, *(f"seed {seed} of {', '.join(arms)}" for seed, arms in by_seed.items())])
