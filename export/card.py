"""The card of a published model, as Markdown: what a person needs to know to call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.log.casts import EMPTY
from pipelines.schema import Feature, Label, Schema, Task, Threshold
from stem_tf import report


def text(tree: Mapping[str, Any], schema: Schema, rows: Mapping[str, np.ndarray]) -> str:
    """Returns the text of the card.

    Args:
      tree: the manifest of the version.
      schema: of the data.
      rows: tensors of ``serving_default`` of real rows; the first one is the example.
    """
    run, data = tree["run"], tree["data"]
    parts = [
        f"# {tree['model']}, version {tree['version']}",
        f"Predicts {_list(schema.task_names)} from raw values: vocabularies and transforms are inside the model. "
        f"Model `{run['config']['model.name']}`, experiment `{run['experiment']}`, trained on `{data['name']}` "
        f"({data['rows']['train']:,} rows); weights of {report.age(run['epoch'], run['step'])}.",
        "## Inputs\n\n" + _inputs(schema, rows),
        _missing(schema),
        "## Scores\n\n" + _table(["task", "is", "test rows", "test mean", "test metric"], _tasks(tree, schema)),
        _metrics_note(tree),
        *([f"## Calibration\n\n{_calibration(tree)}"] if tree["calibration"] else []),
        *([f"## Beside the tasks\n\n{_outputs(tree['outputs'])}"] if tree["outputs"] else []),
        *([f"## Tables\n\n{_rounding(tree['tables'])}"] if "cost" in tree["tables"] else []),
        "## Calls\n\n" + _calls(tree, schema, rows),
        "## Check\n\n" + _check(tree),
        "## Where it comes from\n\n" + _origin(tree),
    ]
    return "\n\n".join(parts) + "\n"


def _inputs(schema: Schema, rows: Mapping[str, np.ndarray]) -> str:
    lines = [
        [f"`{f.name}`", f.side, f.dtype, _shape(f), _meaning(f), f"`{_example(f, rows[f.name][0])}`", _EMPTY[f.dtype]]
        for f in schema.features
    ]
    return _table(["input", "side", "type", "shape", "meaning", "example", "empty value"], lines)


def _missing(schema: Schema) -> str:
    parts = ["Send missing values as the empty value."]
    if any(feature.has_vocabulary for feature in schema.features):
        parts.append("Missing, unseen and rare values score alike, as rare ones did in training.")
    if hashed := [feature.name for feature in schema.features if feature.hash is not None]:
        parts.append(f"An unseen value of {', '.join(hashed)} is not told from those that share its rows.")
    return " ".join([*parts, "In a list, empty values are padding, and values beyond its length are ignored."])


_EMPTY = {"int64": "-2^63", "string": '""', "float32": "NaN"}


def _shape(feature: Feature) -> str:
    own = {"multivalent": feature.max_length, "dense": feature.length}.get(feature.kind)
    return "[B]" if own is None else f"[B, {own}]"


def _meaning(feature: Feature) -> str:
    hashed = "" if feature.hash is None else f", hashed into {feature.hash.buckets:,} rows"
    if feature.kind == "multivalent":
        return (
            f"a list of up to {feature.max_length} values ({feature.pooling}){hashed}, filled up with the empty value"
        )
    if feature.kind == "categorical":
        return f"one value{hashed}"
    if feature.bucketised:
        return "a number, in buckets"
    if feature.transform:
        return f"a number ({', '.join(feature.transform)})"
    return {"numeric": "a number", "dense": "a vector"}[feature.kind]


def _example(feature: Feature, value: Any) -> str:
    """The value as written in Python, without the padding of a list."""
    if feature.kind == "multivalent":
        return _short(repr([_python(v) for v in value if v != EMPTY[feature.dtype]]))
    return _short(repr(_python(value)))


def _python(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_python(v) for v in value]
    return float(f"{value:.7g}") if isinstance(value, np.floating) else value.item()


def _short(text: str) -> str:
    """Makes a text fit into a cell of a Markdown table."""
    text = text.replace("|", "\\|").replace("`", "'")
    return text if len(text) <= 60 else text[:57] + "..."


def _tasks(tree: Mapping[str, Any], schema: Schema) -> list[list[str]]:
    found = (tree["test_metrics"] or {}).get("tasks", {})
    lines = []
    for task in schema.tasks:
        metrics = found.get(task.name, {})
        metric = "auc" if task.type == "binary" else "mse"
        cells = [f"{metrics['rows']:,}", report.number(metrics["rate"])] if metrics else ["", ""]
        value = metrics.get(metric)
        why = tree["run"]["untrained"].get(task.name)
        means = f"nothing: it was not trained, {why}" if why else _is(task)
        lines.append([f"`{task.name}`", means, *cells, "" if value is None else f"{metric.upper()} {value:.4f}"])
    return lines


def _is(task: Task) -> str:
    label, space = task.label, task.space
    column = f"`{label.column}`" + (f" / `{label.divide_by}`" if label.divide_by else "")
    rows = "" if space is None else f", given that `{space.task or space.column}` is 1"
    rows += f"; rows weigh their `{task.row_weight}`" if task.row_weight else ""
    if task.type == "binary":
        return f"the probability of {column}{_condition(label)}{rows}"
    return f"the value of {column}" + (f", clipped to {list(label.clip)}" if label.clip else "") + rows


def _condition(label: Label) -> str:
    """The condition on the column for a label of 1; "" if the column holds the label."""
    if label.values:
        return " = " + " or ".join(map(repr, label.values))
    signs = {"at_least": ">=", "at_most": "<="}
    limits = {
        key: f"{limit.times:g} x `{limit.column}`" if isinstance(limit, Threshold) else f"{limit:g}"
        for key, limit in label.thresholds.items()
    }
    return " and".join(f" {signs[key]} {limit}" for key, limit in limits.items())


def _metrics_note(tree: Mapping[str, Any]) -> str:
    metrics = tree["test_metrics"]
    if metrics is None:
        return (
            "No test metrics: the run was not evaluated with these weights (`stem-evaluate`) before it was exported. "
            "If `stem-publish` made this version, `verdict.json` has its metrics on held-back rows."
        )
    return f"On the {metrics['rows']:,} test rows; mean AUC {report.number(metrics['mean_auc'])}."


def _calibration(tree: Mapping[str, Any]) -> str:
    """How the scores of each task are calibrated, and their metrics before and after."""
    on_test, fitted = (tree["test_metrics"] or {}).get("tasks", {}), tree["calibration"]
    names = {
        "logloss": "logloss",
        "predicted_over_observed": "predicted/observed",
        "calibration_error": "calibration error",
        "auc": "AUC",
    }
    lines = []
    for task, one in fitted.items():
        if "why" not in one:
            before, after = (on_test[task]["uncalibrated"], on_test[task]) if on_test else (one["before"], one["after"])
            cells = [" -> ".join(report.number(values[name]) for values in (before, after)) for name in names]
            lines.append([f"`{task}`", one["method"], *cells])
    split = "test" if on_test else "validation, on which they were fitted"
    parts = [f"Scores are calibrated inside the model; before -> after on {split}:"] if lines else []
    parts += [_table(["task", "by", *names.values()], lines)] if lines else []
    parts += [
        f"The scores of `{task}` are not calibrated: {one['why']}." for task, one in fitted.items() if "why" in one
    ]
    if any(one["method"] == "undersampling" for one in fitted.values()):
        parts.append("With undersampling scores are for a log with all negatives, and rows of these splits lack some.")
    return "\n\n".join(parts)


def _outputs(outputs: Sequence[Mapping[str, Any]]) -> str:
    lines = [[f"`{output['name']}`", output["meaning"], f"`{output['text']}`"] for output in outputs]
    return (
        _table(["output", "is", "made of"], lines)
        + "\n\nTasks stand for their scores, features for the values that a request sends. What is no number, such "
        "as the root of a negative one, becomes -3.4e38 and ranks last; what is beyond float32 becomes its largest or "
        "lowest value, and what is closer to 0 than 1.2e-38 becomes 0."
    )


def cost(tables: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Says what rounded tables save and cost.

    Args:
      tables: the entry of the manifest; the tables are rounded.

    Returns:
      A sentence, and the heading and lines of a table with each task's metric.
    """
    kind, measured = tables["stored"], tables["cost"]
    sizes = [tables[key] / 1e6 for key in ("bytes", "float32_bytes")]
    lines = []
    for task, values in measured["tasks"].items():
        before, after = values["float32"], values[kind]
        change = "-" if None in (before, after) else f"{after - before:+.5f}"
        lines.append([task, values["metric"].upper(), report.number(before), report.number(after), change])
    sentence = f"tables in {kind}: {sizes[0]:,.1f} MB, not {sizes[1]:,.1f} MB; on {measured['rows']:,} "
    return f"{sentence}{measured['split']} rows", ["task", "metric", "float32", kind, "change"], lines


def _rounding(tables: Mapping[str, Any]) -> str:
    sentence, head, lines = cost(tables)
    note = "The metrics are the trainer's, before and after its tables were rounded. The metrics above are from before."
    return f"{sentence[0].upper()}{sentence[1:]}. {note}\n\n{_table(head, lines)}"


def _calls(tree: Mapping[str, Any], schema: Schema, rows: Mapping[str, np.ndarray]) -> str:
    lines = [
        "| signature | inputs | scores |",
        "|---|---|---|",
        "| `serving_default` | every input, for B rows | [B] |",
    ]
    if tree["why_no_rank"]:
        return "\n".join([*lines, _EXAMPLES, "", f"There is no signature `rank`: {tree['why_no_rank']}."])
    lines += ["| `rank` | user and context inputs for B requests; item inputs [B, N] for their N candidates | [B, N] |"]

    def values(items: bool) -> str:
        chosen = [f for f in schema.features if (f.side == "item") == items]
        examples = {f.name: _example(f, rows[f.name][0]).replace("\\|", "|") for f in chosen}
        return ", ".join(f'"{name}": {f"[{value}]" if items else value}' for name, value in examples.items())

    return "\n".join(
        [
            *lines,
            _EXAMPLES,
            "",
            "Every score is float32, an output by its name. From Python, with `stem-tf-client`:",
            "",
            "```python",
            "from stem_client import RankingClient",
            "",
            f'client = RankingClient("localhost:8500", model="{tree["model"]}")',
            f"scores = client.rank(user={{{values(False)}}}, items={{{values(True)}}}, timeout=0.05)",
            f'scores["{_by(tree, schema)}"]  # float32 [N]',
            "```",
        ]
    )


def _by(tree: Mapping[str, Any], schema: Schema) -> str:
    """What a caller would rank by."""
    return str(tree["outputs"][0]["name"]) if tree["outputs"] else schema.tasks[0].name


_EXAMPLES = (
    "| `examples` | `examples`: serialised tf.Example [B], keys are the inputs' names, a missing key is empty | [B] |"
)


def _check(tree: Mapping[str, Any]) -> str:
    check = tree["check"]
    which = "all" if check["rows"] == check["rows_of_split"] else "the first"
    lines = [[f"`{signature}`", f"{difference:.1e}"] for signature, difference in check["worst"].items()]
    return (
        f"Before publication, a fresh process loaded this directory as TensorFlow Serving does, and scored "
        f"{which} {check['rows']:,} of {check['rows_of_split']:,} raw validation rows. The worst differences from the "
        f"trainer's scores (relative for values above 1; allowed {check['tolerance']:.0e}):\n\n"
        + _table(["signature", "worst difference"], lines)
    )


def _origin(tree: Mapping[str, Any]) -> str:
    run, data = tree["run"], tree["data"]
    rows = ", ".join(f"{split} {rows:,}" for split, rows in data["rows"].items())
    sizes = ", ".join(f"{name} {entry['size']:,}" for name, entry in tree["vocabularies"].items())
    versions = ", ".join(f"{name} {version}" for name, version in tree["versions"].items())
    lines = [
        f"- run: `{run['workdir']}`, checkpoint `{run['checkpoint']}`",
        f"- data: `{data['dir']}` (rows: {rows}; manifest sha256 {data['manifest_sha256'][:16]}...)",
        f"- vocabularies: {sizes or 'none'}",
        f"- written by {tree['created_by']}; {versions}",
        "- manifest.json and schema.yaml beside this file have everything else, including the whole config",
    ]
    return "\n".join(lines)


def _list(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
