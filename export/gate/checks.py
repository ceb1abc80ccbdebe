"""Holds what was measured against the rules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from export.gate import measures
from export.gate.measures import Rows
from export.gate.rules import Bounds, Rules
from stem_tf import report

Outcome = Literal["holds", "fails", "not judged"]


@dataclass(frozen=True)
class Check:
    """One bound of one rule.

    Attributes:
      rule: the rule's name and the bound's: ``auc.margin``.
      of: the task or feature; "" for the whole version.
      outcome: what it came to.
      why: of a failure, in words; or why nothing was judged.
      bound: what the rules say.
      candidate, served: the numbers of both; None where there is none.
      value: what is held against the bound.
      low, high: the ends of its interval; None where it has none.
    """

    rule: str
    of: str
    outcome: Outcome
    why: str
    bound: float
    candidate: float | None = None
    served: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None

    def tree(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return dict(report.finite(asdict(self)))

    def shown(self) -> list[str]:
        """As cells of a line of `HEAD`."""
        interval = "" if self.low is None or self.high is None else f"{_number(self.low)} to {_number(self.high)}"
        numbers = [_number(value) for value in (self.candidate, self.served, self.value)]
        return [self.rule, self.of, *numbers, interval, _number(self.bound), self.outcome]


HEAD = ["rule", "of", "candidate", "served", "held against the bound", "interval", "bound", ""]
_MOVED = {
    "psi": "their population stability index is {}",
    "mean": "their mean by {} standard deviations of the served scores",
    "quantiles": "a quantile by {} standard deviations of the served scores",
}
"""How far scores have moved, in words, by bound."""
NOTHING_SERVED = "nothing is served yet"


def _number(value: float | None) -> str:
    return "" if value is None else "-" if math.isnan(value) else f"{value:.4g}"


@dataclass(frozen=True)
class Scored:
    """What was measured of one version on the held-back rows.

    Attributes:
      scores: [N] by task.
      unknown: by feature with a vocabulary, the share of the given values that it does not hold; NaN where none is
        given.
      megabytes: of its files.
      milliseconds: of a call.
    """

    scores: Mapping[str, NDArray]
    unknown: Mapping[str, float]
    megabytes: float
    milliseconds: float


def judge(rules: Rules, rows: Mapping[str, Rows], candidate: Scored, served: Scored | None) -> list[Check]:
    """Every bound that the rules have.

    Args:
      rules: of the gate.
      rows: the held-back rows of each task.
      candidate, served: what was measured of both, on the same rows; None where nothing is served yet.
    """
    found: list[Check] = []
    nothing = NOTHING_SERVED if served is None else "the served version does not score it"
    for task, of_task in rows.items():
        theirs = None if served is None else served.scores.get(task)
        for rule, bounds in rules.of_task(of_task.task).items():
            if rule == "score_drift":
                found += _drift(of_task, bounds, candidate.scores[task], theirs, nothing, rules.level)
            else:
                found += _metric(rule, of_task, bounds, candidate.scores[task], theirs, nothing, rules.level)
    for feature, share in candidate.unknown.items():
        before = None if served is None else served.unknown.get(feature, math.nan)
        found += _unknown(feature, rules.of_feature(feature), share, before)
    sizes = (candidate.megabytes, None if served is None else served.megabytes)
    times = (candidate.milliseconds, None if served is None else served.milliseconds)
    found += _version("size", rules.bounds["size"], *sizes, "MB")
    found += _version("latency", rules.bounds["latency"], *times, "ms")
    return found


def _given(bounds: Bounds, *keys: str) -> Iterator[tuple[str, float]]:
    """The bounds that are not switched off."""
    return ((key, bounds[key]) for key in keys if bounds.get(key) is not None)


def _metric(
    metric: str, rows: Rows, bounds: Bounds, candidate: NDArray, served: NDArray | None, nothing: str, level: float
) -> Iterator[Check]:
    task = rows.task.name
    ours = rows.value(metric, candidate)
    theirs = None if served is None else rows.value(metric, served)
    words = f"{metric.replace('_', ' ')} of '{task}'"
    for _, margin in _given(bounds, "margin"):
        rule = f"{metric}.margin"
        if served is None or theirs is None:
            yield Check(rule, task, "not judged", nothing, margin, ours)
            continue
        loss = measures.compare(metric, rows, candidate, served, level)
        if math.isnan(loss.estimate):
            yield Check(rule, task, "not judged", "it is not defined on these rows", margin, ours, theirs)
            continue
        why = _too_much(loss, margin, bounds.get("in_doubt", "refuse"))
        why = f"{words} is {_number(ours)}, of the served version {_number(theirs)}: {why}" if why else ""
        outcome: Outcome = "fails" if why else "holds"
        yield Check(rule, task, outcome, why, margin, ours, theirs, loss.estimate, loss.low, loss.high)
    yield from _limits(metric, task, bounds, ours, words)


def _too_much(loss: measures.Estimate, margin: float, in_doubt: str) -> str:
    """Why a loss is not within its margin; "" where it is."""
    least = loss.estimate if math.isnan(loss.low) else loss.low
    if least > margin:
        return f"worse by {_number(loss.estimate)} (margin {margin:g})"
    if in_doubt == "publish" or loss.high <= margin:
        return ""
    if math.isnan(loss.high):
        return f"too few users to tell (margin {margin:g})"
    return f"it may be worse by {_number(loss.high)} (margin {margin:g})"


def _limits(rule: str, of: str, bounds: Bounds, value: float, words: str, unit: str = "") -> Iterator[Check]:
    """The bounds on the candidate's own number."""
    for key, limit in _given(bounds, "at_least", "at_most", f"at_most_{unit}"):
        fails = value < limit if key == "at_least" else value > limit
        side = "less" if key == "at_least" else "more"
        why = f"{words} is {_number(value)}, {side} than {limit:g}" if fails else ""
        if math.isnan(value):
            yield Check(f"{rule}.{key}", of, "not judged", "it is not defined on these rows", limit)
        else:
            yield Check(f"{rule}.{key}", of, "fails" if fails else "holds", why, limit, value, value=value)


def _drift(
    rows: Rows, bounds: Bounds, candidate: NDArray, served: NDArray | None, nothing: str, level: float
) -> Iterator[Check]:
    """A bound fails where the whole interval is beyond it: few rows make scores look as if they had moved."""
    task = rows.task.name
    moved = {} if served is None else measures.drift(candidate, served, rows.resamples, level)
    for key, limit in _given(bounds, *_MOVED):
        rule = f"score_drift.{key}"
        if served is None:
            yield Check(rule, task, "not judged", nothing, limit)
            continue
        by = moved[key]
        ours, theirs = (float(np.mean(scores)) if key == "mean" else None for scores in (candidate, served))
        if math.isnan(by.estimate) or math.isnan(by.low):
            why = "all served scores are equal" if math.isnan(by.estimate) else "too few users to tell"
            yield Check(rule, task, "not judged", why, limit, ours, theirs, by.estimate)
            continue
        moved_by = _MOVED[key].format(_number(by.estimate))
        numbers = f"({_number(by.low)} to {_number(by.high)}, at most {limit:g})"
        why = f"scores of '{task}' have moved: {moved_by} {numbers}" if by.low > limit else ""
        outcome: Outcome = "fails" if why else "holds"
        yield Check(rule, task, outcome, why, limit, ours, theirs, by.estimate, by.low, by.high)


def _unknown(feature: str, bounds: Bounds, candidate: float, served: float | None) -> Iterator[Check]:
    words = f"the share of unknown ids of '{feature}'"
    nothing = "no value is given, or the served version has no vocabulary"
    for key, margin in _given(bounds, "margin"):
        rule = f"unknown_ids.{key}"
        if served is None or math.isnan(served) or math.isnan(candidate):
            why = NOTHING_SERVED if served is None else nothing
            yield Check(rule, feature, "not judged", why, margin, candidate)
            continue
        more = candidate - served
        why = f"{words} is {_number(candidate)}, of the served version {_number(served)}" if more > margin else ""
        outcome: Outcome = "fails" if why else "holds"
        yield Check(rule, feature, outcome, why, margin, candidate, served, more)
    yield from _limits("unknown_ids", feature, bounds, candidate, words)
    for key, most in _given(bounds, "served_at_most"):
        rule = f"unknown_ids.{key}"
        if served is None or math.isnan(served):
            why = NOTHING_SERVED if served is None else nothing
            yield Check(rule, feature, "not judged", why, most)
            continue
        why = (
            f"{words} in the served version is {_number(served)}, more than {most:g}: has the log ids of another kind?"
        )
        fails = served > most
        yield Check(rule, feature, "fails" if fails else "holds", why if fails else "", most, None, served, served)


def _version(rule: str, bounds: Bounds, candidate: float, served: float | None, unit: str) -> Iterator[Check]:
    for key, most in _given(bounds, "times"):
        if served is None:
            yield Check(f"{rule}.{key}", "", "not judged", NOTHING_SERVED, most, candidate)
            continue
        times = candidate / served
        numbers = f"{_number(candidate)} {unit}, {_number(times)} times the served version's {_number(served)} {unit}"
        why = f"the {rule} is {numbers} (at most {most:g} times)" if times > most else ""
        yield Check(f"{rule}.{key}", "", "fails" if why else "holds", why, most, candidate, served, times)
    yield from _limits(rule, "", bounds, candidate, f"the {rule} in {unit}", unit.lower())
