"""Which arms are better than Single-Task and than the incumbent, task by task: better, worse or undecided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from stem_tf import report
from stem_tf.compare import effects
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Block, Cell, Details, Section, Table
from stem_tf.compare.effects import MEAN, Effect, Key
from stem_tf.evaluation import intervals
from stem_tf.evaluation.standing import answers_of


def section(comparison: Comparison) -> Section:
    """The first section: the answer."""
    opponents = list(dict.fromkeys(filter(None, (comparison.single, comparison.incumbent))))
    found = {opponent: effects.effects(comparison, opponent) for opponent in opponents}
    blocks: list[Block] = []
    for opponent, of_opponent in found.items():
        if of_opponent:
            blocks += [_matrix(comparison, opponent, of_opponent), _all(comparison, opponent, of_opponent)]
    blocks += [*_reached(comparison), _explained(comparison)]
    return Section(
        key="verdict",
        title="Verdict",
        lead=_lead(comparison, found),
        blocks=tuple(blocks),
        data={
            "against": {name: [_data(effect) for effect in of.values()] for name, of in found.items()},
            "reached": _reached_data(comparison),
        },
    )


def _lead(comparison: Comparison, found: Mapping[str, Mapping[tuple[str, Key], Effect]]) -> str:
    if not found:
        return "There is no arm to compare with: name one (`--single`, `--incumbent`)."
    drawn = _drawn(comparison)
    return " ".join(_sentence(opponent, list(of.values()), drawn) for opponent, of in found.items())


def _drawn(comparison: Comparison) -> str:
    """What the bootstrap draws."""
    return "users" if comparison.manifest.schema.group else "rows"


def _sentence(opponent: str, found: Sequence[Effect], drawn: str) -> str:
    decided = [effect for effect in found if effect.verdict != "undecided"]
    if not found:
        return f"No other arm has a task in common with {opponent}."
    if not decided:
        return (
            f"Against {opponent}, none of {len(found)} differences is decided: each could come from chance in the test "
            f"{drawn} or the seeds."
        )
    arms = dict.fromkeys(effect.arm for effect in decided)
    parts = []
    for arm in arms:
        words = []
        for verdict in ("better", "worse"):
            tasks = [_task(effect.task) for effect in decided if (effect.arm, effect.verdict) == (arm, verdict)]
            if tasks:
                words.append(f"**{verdict}** on {effects.listed(tasks)}")
        parts.append(f"{arm} is {' and '.join(words)}")
    left = len(found) - len(decided)
    rest = f" The other {left} of {len(found)} differences are undecided." if left else ""
    return f"Against {opponent}, {'; '.join(parts)}.{rest}"


def _task(task: Key) -> str:
    return "the mean AUC" if task is MEAN else task


def _matrix(comparison: Comparison, opponent: str, found: Mapping[tuple[str, Key], Effect]) -> Table:
    keys = effects.columns(comparison, found)

    def cell(arm: str, task: Key) -> Cell:
        effect = found.get((arm, task))
        if effect is None:
            return Cell("-", "muted", hint="not a task of both arms")
        return Cell(f"{effect.verdict} {effect.shown()}", effect.tone, hint=effect.interval())

    arms = dict.fromkeys(arm for arm, _ in found)
    return Table(
        (f"against {opponent}", *(effects.heading(comparison, task) for task in keys)),
        tuple((arm, *(cell(arm, task) for task in keys)) for arm in arms),
        f"Difference from {opponent} on test, mean over the seeds; positive is better, for an error too.",
    )


def _all(comparison: Comparison, opponent: str, found: Mapping[tuple[str, Key], Effect]) -> Details:
    level = comparison.settings.level
    rows = tuple(
        (
            effect.arm,
            effects.heading(comparison, effect.task),
            effect.shown(),
            effect.interval(),
            _p(effect.p),
            Cell(effect.verdict, effect.tone),
            effect.way_out(),
        )
        for effect in found.values()
    )
    table = Table(
        (
            "arm",
            "task",
            "difference",
            f"{_percent(1 - level)} interval",
            "p",
            "verdict",
            "what it would take to decide",
        ),
        rows,
        f"The interval is of each difference alone; p is corrected for the {len(found)} differences of this table "
        "(Holm), and the verdict goes by p. If the true difference is the one seen, what it would take decides it with "
        f"a probability of {_percent(intervals.POWER)}.",
        left=(1, 5, 6),
    )
    return Details(f"Every difference from {opponent}, with its interval and what it would take to decide", (table,))


def _reached(comparison: Comparison) -> list[Block]:
    """What arms, trivial answers and the truth reach."""
    measured, level = comparison.measured, comparison.settings.level
    keys: list[Key] = [task.name for task in comparison.tasks if task.name in measured.rows]
    keys += [MEAN] if len(measured.binary) > 1 else []

    def of_arm(arm: str, task: Key) -> str:
        runs = measured.of(arm, task, measured.averaged(arm))
        if runs is None:
            return "-"
        half = measured.half_width(arm, task, level)
        auc = task is MEAN or task in measured.binary
        text = effects.number(abs(runs.mean), auc=auc)
        return text if math.isnan(half) else f"{text} \N{PLUS-MINUS SIGN} {effects.number(half, auc=auc)}"

    def of_answer(values: Mapping[str, float], task: Key) -> str:
        if task is MEAN:
            among = [values[name] for name in measured.binary if name in values]
            return effects.number(sum(among) / len(among)) if len(among) == len(measured.binary) else "-"
        return effects.number(abs(values.get(task, math.nan)), auc=task in measured.binary)

    rows: list[tuple[str | Cell, ...]] = [(arm, *(of_arm(arm, task) for task in keys)) for arm in comparison.arms]
    trivial = _trivial(comparison)
    names = answers_of(comparison.manifest.schema)
    for answer, values in trivial.items():
        rows.append(
            (f"trivial answer: {names.get(answer, answer)}", *(Cell(of_answer(values, task), "muted") for task in keys))
        )
    if measured.best:
        rows.append(("the best anyone could reach", *(of_answer(measured.best, task) for task in keys)))
    caption = (
        f"What each arm reaches on test, mean over the seeds \N{PLUS-MINUS SIGN} half of the {_percent(1 - level)} "
        "interval (AUC: higher is better; MSE: lower). A trivial answer needs no model: each row gets the train mean "
        "of its user, of its item, or a sum of both."
    )
    if measured.best:
        caption += " The best anyone could reach: the true probabilities, from which the labels were drawn."
    if measured.averaged(*comparison.arms) != list(measured.binary):
        caption += " The mean AUC of an arm is over the tasks that it has."
    blocks: list[Block] = [Table(("arm", *(effects.heading(comparison, task) for task in keys)), tuple(rows), caption)]
    below = _below_trivial(comparison)
    if below:
        blocks.append(
            f"**No run is clearly above each trivial answer on {effects.listed(below)}**: there, the arms hardly know "
            "more than who the user and what the item is, and a difference between arms says little."
        )
    return blocks


def _trivial(comparison: Comparison) -> dict[str, dict[str, float]]:
    """What trivial answers reach, by answer (`answers_of`) and task; errors with a minus, as `effects` counts."""
    found: dict[str, dict[str, float]] = {}
    for arm in comparison.arms.values():
        for task, values in arm.runs[0].metrics("test")["tasks"].items():
            for answer, value in values["trivial"].items():
                if value is not None:
                    sign = 1 if "auc" in values else -1
                    found.setdefault(answer, {}).setdefault(task, sign * value)
    return found


def _below_trivial(comparison: Comparison) -> list[str]:
    """The tasks on which no run's lead over each trivial answer has an interval above 0."""
    leads: dict[str, list[float]] = {}
    for arm in comparison.arms.values():
        for run in arm.runs:
            for task, values in run.metrics("test")["tasks"].items():
                lows = [lead["low"] for lead in values.get("over_trivial", {}).values() if lead["low"] is not None]
                if lows and task in comparison.measured.runs[arm.name]:
                    leads.setdefault(task, []).append(min(lows))
    return [task.name for task in comparison.tasks if task.name in leads and max(leads[task.name]) <= 0]


def _explained(comparison: Comparison) -> str:
    """How the intervals are made, and what makes them weak here."""
    drawn = _drawn(comparison)
    text = (
        f"How sure it is: an interval adds up, as squares, how much a difference changes when other test {drawn} are "
        f"drawn ({comparison.settings.resamples:,} draws with replacement, the same ones for all arms) and how much it "
        "changes from one seed to another. It says nothing of other training logs or of days to come."
    )
    seeds = {arm.name: len(arm.runs) for arm in comparison.arms.values()}
    one = [name for name, number in seeds.items() if number == 1]
    if len(one) == len(seeds):
        text += " **Every arm has one seed**: how much the seed matters is unknown, so nothing can be decided."
    elif one:
        text += f" {effects.listed(one)} have one seed: how much it matters was taken from the arms with several."
    elif min(seeds.values()) == 2:
        text += " With two seeds per arm only large differences can be decided: take three to five."
    return text


def _p(p: float) -> str:
    if math.isnan(p):
        return "-"
    return "<.001" if p < 0.001 else report.number(p, 3)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _data(effect: Effect) -> dict[str, object]:
    found = effect.difference
    return {
        "arm": effect.arm,
        "task": effect.task,
        "difference": found.estimate,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "p_holm": effect.p,
        "verdict": effect.verdict,
        "error_users": found.users.error,
        "error_seeds": found.seeds.error,
        "runs": list(found.count),
        "to_decide": effect.way_out(),
    }


def _reached_data(comparison: Comparison) -> dict[str, object]:
    measured, level = comparison.measured, comparison.settings.level
    return {
        "arms": {
            arm: {
                task: {"mean": abs(runs.mean), "half_width": measured.half_width(arm, task, level)}
                | {"runs": [abs(float(value)) for value in runs.values]}
                for task, runs in of.items()
            }
            for arm, of in measured.runs.items()
        },
        "trivial": {name: {t: abs(v) for t, v in of.items()} for name, of in _trivial(comparison).items()},
        "best": {task: abs(value) for task, value in measured.best.items()},
    }
