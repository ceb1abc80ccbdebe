"""The sections "Why" and "Cost" of made-up measures, and what they make of runs that lack some."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipelines.schema import Label, Schema, Task
from stem_tf.compare import figures, measured, page
from stem_tf.compare.comparison import Arm, Comparison, Settings
from stem_tf.compare.document import Block, Cell, Details, Figure, Section, Table
from stem_tf.compare.sections import cost, why

ODD = "<b>l'\"ike</b> ünd $x_1$"
EDGES = np.linspace(0, 2, 5).tolist()


def measures(**other: Any) -> dict[str, Any]:
    """Of a run with two tasks, a gate each, two tables and two features."""
    expert = {"level": 0, "weight": 0.6, "zeros": 0.2}

    def gate(reader: str, mean: Sequence[float]) -> dict[str, Any]:
        experts = ["click 1", "click 2", ODD, "shared"]
        return {"reader": reader, "level": 0, "experts": experts, "mean": list(mean), "std": [0.1] * 4}

    def at(mean: float | None, counts: Sequence[int], **more: Any) -> dict[str, Any]:
        return {"mean": mean, "counts": list(counts), **more}

    near, far = at(0.4, [60, 0, 0, 0], auc=0.2, sd=0.02), at(1.5, [0, 0, 60, 0], auc=0.9, sd=None)
    tables = {"task:click": near, f"task:{ODD}": far}
    lost = {
        "user": {"click": {"lost": 0.2, "sd_rows": 0.01, "sd_shuffles": 0.0}, ODD: dict.fromkeys(LOST, None)},
        "hour": {
            "click": {"lost": 0.001, "sd_rows": 0.01, "sd_shuffles": 0.0},
            ODD: {"lost": -0.1, "sd_rows": 0.01, "sd_shuffles": 0.0},
        },
    }
    tree = {
        "version": measured.VERSION,
        "split": "test",
        "rows": 200,
        "rows_of_split": 200,
        "gates": {"click": gate("click", (0.3, 0.2, 0.1, 0.4)), ODD: gate(ODD, (0.25, 0.25, 0.25, 0.25))},
        "experts": {"click 1": expert, "click 2": expert, ODD: expert, "shared": expert},
        "abundance": [
            {"table": "task:click", "feature": "user", "rows": 9, "most": 4, "abundance": 2.0},
            {"table": f"task:{ODD}", "feature": "user", "rows": 0, "most": 0, "abundance": None},
        ],
        "distances": {
            "user": "user",
            "item": "item",
            "rows": 190,
            "edges": EDGES,
            "tables": {"task:click": at(0.9, [50, 50, 50, 40]), f"task:{ODD}": at(1.1, [40, 50, 50, 50])},
            "pairs": [
                {"positive": "click", "negative": ODD, "rows": 60, "tables": tables},
                {"positive": ODD, "negative": "click", "rows": 49, "tables": tables},
            ],
        },
        "importance": lost,
        "importance_rows": 200,
        "cost": {
            "parameters": {"tables": 1000, "network": 500},
            "bytes": {"tables": 4000, "network": 2000},
            "slots": 12000,
            "sets": 1,
            "samples_per_second": 100.0,
            "multiply_adds": 400,
            "request": {"candidates": 200, "repeats": 9, "ms": 2.0, "ms_low": 1.5, "ms_high": 3.0},
        },
    }
    return tree | other


LOST = ("lost", "sd_rows", "sd_shuffles")


def comparison(arms: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Sequence[str] = ("click", ODD)) -> Comparison:
    schema = Schema("made_up", (), tuple(Task(name, Label(name)) for name in tasks))

    def run(seed: int, tree: Mapping[str, Any]) -> Any:
        return SimpleNamespace(
            seed=seed, measures=tree, manifest=SimpleNamespace(schema=schema), metrics=lambda split: {"mean_auc": 0.7}
        )

    found = {name: Arm(name, {}, tuple(run(*tree) for tree in enumerate(trees))) for name, trees in arms.items()}
    manifest: Any = SimpleNamespace(schema=schema)
    return Comparison("made up", manifest, found, next(iter(arms)), None, Settings())


def flat(blocks: Sequence[Block]) -> list[Block]:
    return [one for block in blocks for one in (flat(block.blocks) if isinstance(block, Details) else [block])]


def tables_of(section: Section) -> list[Table]:
    return [block for block in flat(section.blocks) if isinstance(block, Table)]


def texts(row: Sequence[str | Cell]) -> list[str]:
    return [cell.text if isinstance(cell, Cell) else cell for cell in row]


def test_estimates_by_hand() -> None:
    two = measured.estimate([0.1, None, 0.3], [0.02, None, 0.04], 0.05)
    seeds = stats.t.ppf(0.975, 1) * 0.1
    assert two.mean == pytest.approx(0.2)
    assert two.half == pytest.approx(math.hypot(1.959964 * 0.03, seeds))
    assert not two.differs_from(0) and two.differs_from(5)
    one = measured.estimate([0.1], [0.02], 0.05)
    assert str(one) == ".1000 ±.0392" and one.differs_from(0)
    assert str(measured.estimate([0.1], None, 0.05)) == ".1000"
    unknown = measured.estimate([0.1, 0.1], [None, None], 0.05)
    assert str(unknown) == ".1000" and not unknown.differs_from(0)
    assert str(measured.estimate([None], [None], 0.05)) == "-"
    assert measured.span([0.75, None, 0.25]) == ".50 (.25 to .75)"
    assert measured.span([0.5, 0.5], 1) == ".5" and measured.span([None]) == "-"


def test_runs_without_measures() -> None:
    unmeasured: list[list[dict[str, Any]]] = [[{}, {}], [measures(version=measured.VERSION - 1)]]
    for trees in unmeasured:
        for make in (why.section, cost.section):
            section = make(comparison({"single": trees}))
            assert section.lead.endswith("None of these runs was measured.") and not section.blocks
    some = comparison({"single": [{}], "joint": [{}, measures()]})
    for make in (why.section, cost.section):
        section = make(some)
        assert section.blocks[-1] == "Not measured: single."
        json.dumps(dict(section.data), allow_nan=False)


def test_why_shows_gates_pairs_tables_and_features(tmp_path: Any) -> None:
    other = measures()
    other["gates"]["click"]["mean"] = [0.1, 0.2, 0.3, 0.4]
    section = why.section(comparison({"joint": [measures(), other], "single": [measures(gates={}, experts={})]}))
    json.dumps(dict(section.data), allow_nan=False)
    gates, pairs, tables, *features = tables_of(section)
    assert texts(gates.rows[0])[:4] == ["joint", "click", ".40 (.30 to .50)", ".40"]
    assert texts(gates.rows[1]) == ["joint", ODD, ".25", ".25", "4.0", "4"]
    assert [texts(row) for row in pairs.rows[:2]] == [
        ["joint", "task:click", ".40", ".90", ".20", "2 of 2"],
        ["joint", f"task:{ODD}", "1.50", "1.10", ".90", "0 of 2"],  # too few users for an error
    ]
    assert texts(tables.rows[0]) == ["joint", "task:click", "user", "9", "2.00", "4"]
    assert texts(tables.rows[1])[-2:] == ["-", "0"]
    assert [row[0] for row in features[0].rows] == ["user", "hour"]
    assert texts(features[1].rows[0]) == ["user", ".2000 ±.0196", "-"]
    assert [cell.tone for row in features[1].rows for cell in row[1:] if isinstance(cell, Cell)] == [
        "",
        "muted",
        "muted",
        "",
    ]
    assert "No expert is dead or unused." in section.lead
    assert "No arm gets worse without hour, as far as these test rows can tell." in section.lead
    assert len([block for block in flat(section.blocks) if isinstance(block, Figure)]) == 4
    page.write("made up", [section], tmp_path / "page", subject="", settings={})
    assert "<b>l" not in (tmp_path / "page" / "report.html").read_text()


def test_an_arm_that_was_not_measured_does_not_change_the_colours_of_others() -> None:
    section = why.section(comparison({"single": [{}], "joint": [measures()]}))
    bars = next(one for one in flat(section.blocks) if isinstance(one, Figure) and one.alt.startswith("Bars"))
    colours = figures.styles(["single", "joint"])
    assert colours["joint"][0] in bars.svg and colours["single"][0] not in bars.svg


def test_experts_that_do_nothing_are_named() -> None:
    tree = measures()
    tree["experts"] = {name: dict(expert) for name, expert in tree["experts"].items()}
    tree["experts"]["click 2"]["zeros"] = 1.0
    tree["experts"]["shared"]["weight"] = 0.001
    section = why.section(comparison({"joint": [measures(), tree]}))
    idle = next(table for table in tables_of(section) if table.header[-1] == "state")
    assert idle.rows == (("joint", "1", "click 2", "dead"), ("joint", "1", "shared", "unused"))
    assert "Some experts of joint do nothing." in section.lead


def test_rows_and_seeds_of_features_are_those_of_all_arms() -> None:
    many, few = measures(importance_rows=2000), measures()
    said = [text for text in why.section(comparison({"a": [many, many], "b": [few]})).blocks if isinstance(text, str)]
    assert any(text.endswith("200 to 2,000 test rows; 1 to 2 seeds per arm.") for text in said)
    said = [text for text in why.section(comparison({"a": [few]})).blocks if isinstance(text, str)]
    assert any(text.endswith("200 test rows; 1 seed per arm.") for text in said)


def test_what_cannot_be_shown_is_said() -> None:
    bare = measures(gates={}, experts={}, abundance=[], distances={"reason": "the schema has no user"})
    section = why.section(comparison({"single": [bare]}))
    said = [block for block in section.blocks if isinstance(block, str)]
    assert "**Gates.** None of these arms has gates." in said
    assert "**Contradictory pairs.** Not measured: the schema has no user." in said
    assert "**Tables.** No feature has ids, so there is no table to look at." in said
    few = measures()
    few["distances"]["pairs"] = few["distances"]["pairs"][1:]
    section = why.section(comparison({"single": [few]}))
    assert "**Contradictory pairs.** No two tasks disagree about 50 test rows: too few to tell." in section.blocks


def test_costs_beside_single_task() -> None:
    larger = measures()
    larger["cost"] |= {"sets": 3, "samples_per_second": None}
    larger["cost"]["request"] = {"candidates": 200, "repeats": 9, "ms": 8.0, "ms_low": 7.0, "ms_high": 9.0}
    found = comparison({"single": [measures(), measures()], ODD: [larger]})
    section = cost.section(found)
    json.dumps(dict(section.data), allow_nan=False)
    assert f"{ODD} takes the most memory to serve, 18 kB, which is 3.0 times that of single." in section.lead
    assert f"A request of 200 candidates takes longer with {ODD} than with single." in section.lead
    (table,) = tables_of(section)
    assert texts(table.rows[0]) == [
        "single",
        "1,000",
        "500",
        "6.0 kB",
        "1.00",
        "18 kB",
        "400",
        "2.0 (1.5 to 3.0)",
        "100",
    ]
    assert texts(table.rows[1]) == [ODD, "1,000", "500", "18 kB", "3.00", "18 kB", "400", "8.0 (7.0 to 9.0)", "-"]
    (beside,) = tables_of(cost.section(replace(found, incumbent=ODD)))
    assert beside.header[4:6] == ("times single", f"times {ODD}")
    assert [texts(row)[4:6] for row in beside.rows] == [["1.00", "0.33"], ["3.00", "1.00"]]
    assert isinstance(section.blocks[-1], Figure)
    alone = cost.section(comparison({"single": [measures()]}))
    assert not any(isinstance(block, Figure) for block in alone.blocks) and alone.lead.endswith("in time.")
