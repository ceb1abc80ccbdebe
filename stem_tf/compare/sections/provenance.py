"""Where the numbers come from: each run with its command, seed and time, what failed, and what was dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stem_tf import report
from stem_tf.compare.comparison import Comparison, Finished
from stem_tf.compare.document import Block, Cell, Details, Section, Table

_MEGABYTE = 1e6


def section(comparison: Comparison) -> Section:
    """The section: arms, failures and what was dropped at once, runs, trials and commands folded away."""
    known = comparison.provenance
    of_run = {record["workdir"]: record for record in known.get("cells", ()) if record["trial"] is None}
    failed = [record for record in known.get("cells", ()) if record["state"] == "failed"]
    dropped = list(known.get("dropped", ()))
    blocks: list[Block] = [_arms(comparison)]
    blocks += _problems(failed, dropped, known)
    blocks += [_data(comparison), *_versions(known)]
    blocks.append(Details("Every run that is compared", tuple(_runs(comparison, of_run))))
    blocks += _trials(known.get("trials", {}))
    if known.get("command"):
        words = [f"This report: `{_code(known['command'])}`"]
        words += [f"Its plan, on one line: `{_code(known['plan'])}`"] if known.get("plan") else []
        blocks.append(Details("The command of this report", tuple(words)))
    return Section(
        key="provenance",
        title="Where the numbers come from",
        lead=_lead(comparison, failed, dropped),
        blocks=tuple(blocks),
        data={
            **known,
            "arms": {
                name: {
                    "overrides": dict(arm.overrides),
                    "runs": [{"seed": run.seed, "workdir": str(run.workdir.path)} for run in arm.runs],
                }
                for name, arm in comparison.arms.items()
            },
        },
    )


def _lead(comparison: Comparison, failed: Sequence[Any], dropped: Sequence[Any]) -> str:
    runs = [run for arm in comparison.arms.values() for run in arm.runs]
    lead = (
        f"{_count(len(runs), 'run')} of {_count(len(comparison.arms), 'arm')}, all trained on the same rows and tested "
        "on the same rows."
    )
    if failed:
        lead += f" {_count(len(failed), 'run')} failed."
    if dropped:
        lead += " The time that was given was not enough for the whole plan."
    if not failed and not dropped:
        lead += " Nothing failed, and nothing was left out."
    return lead


def _arms(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.arms.values():
        sets = ", ".join(f"{key}={_shown(value)}" for key, value in arm.overrides.items() if key != "model.name")
        seeds = ", ".join(str(run.seed) for run in arm.runs)
        rows.append((Cell(arm.name), Cell(arm.model), Cell(sets or "-"), seeds))
    caption = "What is compared. Keys that are not named here are the same for all arms, or do nothing for the model."
    return Table(("arm", "model", "sets", "seeds"), tuple(rows), caption, left=(1, 2))


def _problems(failed: Sequence[Mapping[str, Any]], dropped: Sequence[str], known: Mapping[str, Any]) -> Iterator[Block]:
    """What is missing from the report, and why."""
    if failed:
        rows = tuple((Cell(_name(record)), Cell(record["why"]), Cell(record.get("log", ""))) for record in failed)
        yield Table(("failed", "why", "its output"), rows, "Runs that failed. The report is made without them.", (1, 2))
    if dropped:
        caption = "What was left out because it did not fit into the time that was given."
        yield Table(("dropped",), tuple((Cell(what),) for what in dropped), caption)
    if missing := known.get("without_runs", {}):
        caption = "Arms of the plan that have no run, and are not in this report."
        yield Table(("arm", "why"), tuple((Cell(name), Cell(why)) for name, why in missing.items()), caption, (1,))
    if left_out := known.get("left_out", {}):
        caption = "Settings of the plan that mean nothing to an arm's model, which was trained without them."
        settings = tuple((Cell(arm), Cell(sentence)) for arm, sentences in left_out.items() for sentence in sentences)
        table = Table(("arm", "setting"), settings, caption, (1,))
        yield Details("Settings that do not apply to every arm", (table,))


def _data(comparison: Comparison) -> Table:
    manifest, known = comparison.manifest, comparison.provenance.get("data", {})
    rows = [
        ("data", manifest.data_dir),
        ("rows", ", ".join(f"{manifest.rows(split):,} {split}" for split in manifest.splits)),
        ("split", ", ".join(f"{key} {_shown(value)}" for key, value in manifest.split.items() if value is not None)),
        ("converted by", manifest.created_by),
    ]
    if known.get("sha256"):
        rows.append(("SHA-256 of its manifest", known["sha256"]))
    cells = tuple((name, Cell(text)) for name, text in rows)
    return Table(("", ""), cells, "The data. Every run holds a copy of their manifest, and they were equal.", (1,))


def _versions(known: Mapping[str, Any]) -> Iterator[Block]:
    if "versions" in known:
        machine = known.get("machine", {})
        rows = [("versions", _listed(known["versions"]))]
        made = {_listed(cell["versions"]) for cell in known.get("cells", ()) if cell.get("versions")}
        rows += [("versions that trained runs", other) for other in sorted(made - {rows[0][1]})]
        if machine:
            side = machine["side_by_side"]
            how = f", up to {side} runs side by side" if side > 1 else ""
            rows.append(("machine", f"{machine['system']}, {_count(machine['cores'], 'core')}{how}"))
        yield Table(("", ""), tuple((name, Cell(text)) for name, text in rows), "What it was run with.", (1,))


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _runs(comparison: Comparison, of_run: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    rows, commands = [], []
    for arm in comparison.arms.values():
        for run in arm.runs:
            record = of_run.get(str(run.workdir.path), {})
            peak = record.get("peak_bytes")
            rows.append(
                (
                    Cell(arm.name),
                    str(run.seed),
                    Cell(_epoch(run)),
                    report.number(record.get("score")),
                    "-" if record.get("seconds") is None else f"{record['seconds']:,.0f}",
                    "-" if peak is None else f"{peak / _MEGABYTE:,.0f}",
                    Cell(str(run.workdir.path)),
                )
            )
            if record.get("command"):
                commands.append(f"{arm.name}, seed {run.seed}: `{_code(record['command'])}`")
    header = ("arm", "seed", "best epoch", "validation score", "seconds", "peak MB", "directory")
    caption = (
        "The validation score is the one that chose the epoch (train.monitor). Seconds are those of the run's process: "
        "training, evaluation and measures."
    )
    yield Table(header, tuple(rows), caption, (6,))
    if commands:
        yield "Each of these commands trains the same run again; `config.json` in its directory has the whole config."
        yield from commands


def _epoch(run: Finished) -> str:
    """The epoch of the weights that were evaluated; one per task where tasks have weights of their own."""
    epoch = run.metrics("test").get("epoch")
    if isinstance(epoch, Mapping):
        return ", ".join(f"{task} {number}" for task, number in epoch.items())
    return "-" if epoch is None else str(epoch)


def _trials(trials: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    """A table of each search."""
    for arm, found in trials.items():
        keys = list(dict.fromkeys(key for trial in found["trials"] for key in trial["overrides"]))
        rows = tuple(
            (
                str(trial["number"]),
                *(Cell(trial["overrides"].get(key, "-")) for key in keys),
                report.number(trial["score"]),
                "wins" if trial["number"] == found["chosen"] else "",
            )
            for trial in found["trials"]
        )
        caption = (
            f"Trials of {arm}, with seed {found['seed']}, which no reported run has. The best validation score wins; "
            "test rows decide nothing."
        )
        table = Table(("trial", *keys, "validation score", ""), rows, caption)
        yield Details(f"Search of {arm}: {_count(len(rows), 'trial')}", (table,))


def _name(record: Mapping[str, Any]) -> str:
    what = f"seed {record['seed']}" if record["trial"] is None else f"trial {record['trial']}"
    return f"{record['arm']}, {what}"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _code(text: str) -> str:
    """A command inside of backticks, which it must not hold itself."""
    return text.replace("`", "'")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
