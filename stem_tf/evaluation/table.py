"""The tables that an evaluation prints, made of what its JSON holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.schema import Schema
from stem_tf import report
from stem_tf.evaluation import ranking_score
from stem_tf.evaluation.metrics import MAIN
from stem_tf.evaluation.standing import answers_of

_MEANING = {
    "predicted_over_observed": "predicted/observed",
    "calibration_error": "calibration error",
    "calibration_error_by_chance": "by chance up to",
}


def tables(tree: Mapping[str, Any], schema: Schema) -> str:
    """The metrics as text: beside the trivial answers, then how lists are ordered and what scores mean, then slices.

    Args:
      tree: the content of ``<split>.json``; a metric that is not defined is None.
      schema: schema of the data.
    """
    texts = []
    for part in (_against_trivial, _more):
        for kind in ("binary", "regression"):
            tasks = {t.name: tree["tasks"][t.name] for t in schema.tasks if t.type == kind}
            if tasks:
                texts.append(part(kind, tasks, tree, schema))
    if calibrated := {task: values for task, values in tree["tasks"].items() if "uncalibrated" in values}:
        texts.append(_before(calibrated))
    texts.append("\n".join([*_notes(tree["k"], schema), *_calibration_notes(tree)]))
    if tree["ranking"]:
        texts.append(ranking_score.tables(tree["ranking"], tree["k"], tree["level"]))
    if tree["slices"]:
        texts.append(_slices(tree["slices"], schema))
    return "\n\n".join(texts)


def _against_trivial(kind: str, tasks: Mapping[str, Any], tree: Mapping[str, Any], schema: Schema) -> str:
    metric, answers = MAIN[kind], _answers(schema)
    columns = [
        "rows",
        "rate" if kind == "binary" else "mean",
        metric.upper(),
        f"{100 - 100 * tree['level']:g} % interval",
    ]
    lines = [
        [
            task,
            f"{values['rows']:,}",
            report.number(values["rate"]),
            report.number(values[metric]),
            _interval(values["interval"]),
            *[report.number(values["trivial"][answer]) for answer in answers],
            "not trained" if task in tree["untrained"] else _verdict(values["over_trivial"], answers),
        ]
        for task, values in tasks.items()
    ]
    trained = [task for task in tasks if task not in tree["untrained"]]
    if kind == "binary" and len(trained) > 1:
        mean = tree["mean"]
        numbers = [report.number(mean["trivial"][answer]) for answer in answers]
        verdict = _verdict(mean["over_trivial"], answers)
        lines.append(["mean", "", "", report.number(mean["auc"]), _interval(mean["interval"]), *numbers, verdict])
    return report.table([kind, *columns, *answers.values(), ""], lines)


def _verdict(over_trivial: Mapping[str, Mapping[str, float | None]], answers: Mapping[str, str]) -> str:
    """A note where the model is not clearly better than a trivial answer; "" where it is."""
    worse, level, unknown = [], [], []
    for answer, lead in over_trivial.items():
        if lead["low"] is None or lead["high"] is None:
            unknown.append(answers[answer])
        elif lead["high"] < 0:
            worse.append(answers[answer])
        elif lead["low"] <= 0:
            level.append(answers[answer])
    notes = [f"worse than {_listed(worse, answers)}"] if worse else []
    notes += [f"no clear gain over {_listed(level, answers)}"] if level else []
    return "; ".join(notes or ["too few rows to judge"] * bool(unknown))


def _listed(names: Sequence[str], answers: Mapping[str, str]) -> str:
    if len(answers) > 1 and len(names) == len(answers):
        return "any"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _more(kind: str, tasks: Mapping[str, Any], tree: Mapping[str, Any], schema: Schema) -> str:
    names = {}
    if kind == "binary":
        if schema.group is not None:
            names = {"grouped_auc": "grouped AUC", f"ndcg@{tree['k']}": f"NDCG@{tree['k']}", "map": "MAP"}
        names["logloss"] = "logloss"
    lines = [
        [task, *(report.number(values[name]) for name in [*names, *_MEANING]), ""] for task, values in tasks.items()
    ]
    if kind == "binary" and sum(task not in tree["untrained"] for task in tasks) > 1:
        lines.append(["mean", *(report.number(tree["mean"][name]) for name in names), *[""] * len(_MEANING), ""])
    return report.table([kind, *names.values(), *_MEANING.values(), ""], lines)


def _before(tasks: Mapping[str, Any]) -> str:
    """What the scores were before they were calibrated."""
    names = {"auc": "AUC", "logloss": "logloss"} | _MEANING
    names.pop("calibration_error_by_chance")
    lines = [
        [task, values["calibration"]["method"], *(report.number(values["uncalibrated"][name]) for name in names), ""]
        for task, values in tasks.items()
    ]
    return report.table(["before calibration", "by", *names.values(), ""], lines)


def _calibration_notes(tree: Mapping[str, Any]) -> list[str]:
    """What calibrated scores are, and which tasks could not be calibrated."""
    of_task = {task: values["calibration"] for task, values in tree["tasks"].items() if "calibration" in values}
    done = {task: one["method"] for task, one in of_task.items() if "why" not in one}
    notes = [f"not calibrated: {task} ({one['why']})" for task, one in of_task.items() if "why" in one]
    if done:
        same = ", these rows themselves" if tree["split"] == "validation" else ""
        notes.insert(0, f"scores of {', '.join(done)} are calibrated: fitted on validation{same}")
    if thinned := [task for task, method in done.items() if method == "undersampling"]:
        notes.append(
            f"scores of {', '.join(thinned)} are for a log with all negatives: on one that lacks some, "
            "predicted/observed is below 1"
        )
    return notes


def _answers(schema: Schema) -> dict[str, str]:
    """The head of each trivial answer's column by its name in the tree."""
    return {name: "biases" if answer == "both" else f"per {name}" for answer, name in answers_of(schema).items()}


def _notes(k: int, schema: Schema) -> list[str]:
    """What the columns mean that do not say so themselves."""
    notes, columns = [], [column for column in (schema.group, schema.item) if column is not None]
    if columns:
        heads = ", ".join(f"per {column}" for column in columns)
        notes.append(f"{heads}: what the train mean of the label for that value would reach as a score")
    if len(columns) == 2:
        notes.append(f"biases: the same for a model of one bias per {schema.group} and one per {schema.item}")
    drawn = "rows" if schema.group is None else f"values of {schema.group}"
    notes.append(f"95 % intervals and remarks: what other {drawn} might have given (bootstrap), for the model as it is")
    if schema.group is not None and any(task.type == "binary" for task in schema.tasks):
        notes.append(f"grouped AUC, NDCG@{k} and MAP: means over each {schema.group} that has rows of both classes")
    weighted = {task.name: task.row_weight for task in schema.tasks if task.row_weight}
    if weighted:
        counted = ", ".join(f"{task} by {column}" for task, column in weighted.items())
        notes.append(f"rows count with weights: {counted}")
    return notes


def _interval(ends: Sequence[float | None]) -> str:
    return "-" if ends[0] is None else f"{report.number(ends[0])} to {report.number(ends[1])}"


def _slices(slices: Sequence[Mapping[str, Any]], schema: Schema) -> str:
    """One line per slice: the metric of each task, and below it predicted over observed."""
    texts = []
    for head in ("AUC", "predicted/observed"):
        lines = []
        for one in slices:
            cells = [one["name"], f"{one['rows']:,}"]
            for task in schema.tasks:
                values = one["tasks"][task.name]
                if head == "AUC":
                    cells.append(_plus_minus(values[MAIN[task.type]], values["interval"]))
                else:
                    ends = values["predicted_over_observed_interval"]
                    cells.append(_plus_minus(values["predicted_over_observed"], ends))
            lines.append([*cells, ""])
        names = [f"{t.name} MSE" if head == "AUC" and t.type == "regression" else t.name for t in schema.tasks]
        texts.append(report.table([head, "rows", *names, ""], lines))
    notes = [f"{one['name']}: {one['about']}" for one in slices if one["about"]]
    notes.append("±: half of the 95 % interval; -: too few rows, users, or rows of a class to say")
    return "\n\n".join([*texts, "\n".join(notes)])


def _plus_minus(value: float | None, ends: Sequence[float | None]) -> str:
    low, high = ends
    if value is None or low is None or high is None:
        return "-"
    return f"{report.number(value, 3)} ±{report.number((high - low) / 2, 3)}"
