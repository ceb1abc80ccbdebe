"""A plan is taken to its end: the order, searches, failures, budgets, and going on. Cells are small programs here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.yaml_reader import parse
from stem_tf.compare import cells, plan
from stem_tf.compare.campaign import Campaign
from stem_tf.compare.measured import VERSION
from stem_tf.compare.scheduler import Scheduler

CELL = """
import json, os, pathlib, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
run = pathlib.Path(given["workdir"])
dim = int(given.get("config.model.dim", "8"))
with open(os.environ["ORDER"], "a") as order:
    report = "report" if "--report" in sys.argv else ""
    print(f"{run.parent.parent.name} {dim} {given['config.seed']} {report}", file=order)
time.sleep(float(os.environ.get("SLEEP", "0")))
if dim == 13:
    sys.exit("error: it broke")
if dim == 14:
    os.kill(os.getpid(), 9)
(run / "comparison").mkdir(parents=True)
best = {"epoch": 2, "score": 0.5 + dim / 100 - (dim > 10)}
(run / "report.json").write_text(json.dumps({"best": best, "monitor": "auc", "epochs": 3, "stopped": "at its end"}))
(run / "comparison" / "measures.json").write_text(json.dumps({"version": int(os.environ["VERSION"])}))
(run / "comparison" / "cell.json").write_text(json.dumps({"report": "--report" in sys.argv, "seconds": 2}))
"""

Made = Callable[..., tuple[Campaign, list[str], list[str]]]


@pytest.fixture
def run(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """``run(text)``: a campaign that has ended, what it said, and which cells were started, in their order."""
    (tmp_path / "cell.py").write_text(CELL)
    monkeypatch.setattr(cells, "python", lambda: [sys.executable, str(tmp_path / "cell.py")])
    monkeypatch.setenv("ORDER", str(tmp_path / "order"))
    monkeypatch.setenv("VERSION", str(VERSION))

    def run(text: str, hours: float | None = None, parallel: int = 1) -> tuple[Campaign, list[str], list[str]]:
        (tmp_path / "order").write_text("")
        found = plan.load(plan.changed(parse(text, "p.yaml"), data=str(tiny_data)))
        said: list[str] = []
        campaign = Campaign(found, tmp_path / "out", Scheduler(parallel, measured=False), hours, said.append)
        (tmp_path / "out").mkdir(exist_ok=True)
        campaign.open_searches()
        said.append(campaign.outline())
        campaign.run()
        return campaign, said, (tmp_path / "order").read_text().splitlines()

    return run


SEARCH = """
seeds: [5, 3]
arms:
  mmoe: {}
  ple: {search: {space: {model.dim: [4, 8, 12]}}}
"""


def test_first_seeds_come_first_and_the_winner_is_trained_with_all_seeds(run: Made) -> None:
    campaign, said, order = run(SEARCH)
    assert order[0] == "mmoe 8 5 report" and sorted(order[1:4]) == ["ple 12 6 ", "ple 4 6 ", "ple 8 6 "]
    assert order[4:] == ["ple 8 5 report", "mmoe 8 3 report", "ple 8 3 report"]
    found = campaign.found()
    assert found["ple"].overrides == {"model.name": "ple", "model.dim": "8"} and len(found["ple"].runs) == 2
    told = campaign.provenance()
    ple = told["trials"]["ple"]
    assert ple["trials"][ple["chosen"]]["overrides"] == {"model.dim": "8"} and ple["seed"] == 6
    assert len(told["cells"]) == 7 and {record["state"] for record in told["cells"]} == {"done"}
    assert "--config.seed=5" in told["cells"][0]["command"] and not told["dropped"] and not told["without_runs"]
    assert any("left to start" in line for line in said)
    json.dumps(told)

    again, said, order = run(SEARCH)
    assert order == [] and again.found() == found and "wins on validation" in said[0]
    assert [line.split()[1:3] for line in said[1].splitlines()[1:]] == [["1", "1"], ["3", "3"], ["1", "1"], ["2", "2"]]

    ran = again.found()["mmoe"].runs[0]
    (Path(ran) / "comparison" / "measures.json").write_text(json.dumps({"version": 0}))
    assert not cells.is_measured(Path(ran))  # by an earlier version: such a run is measured again

    _, said, order = run(SEARCH.replace("[5, 3]", "[5, 3, 2]").replace("mmoe: {}", "mmoe: {model.experts: 3}"))
    assert order == ["mmoe 8 5 report", "mmoe 8 3 report", "mmoe 8 2 report", "ple 8 2 report"]


def test_a_cell_that_fails_is_reported_and_the_rest_goes_on(run: Made) -> None:
    text = """
seeds: 1
arms:
  broken: {model.name: ple, model.dim: 13}
  killed: {model.name: ple, model.dim: 14}
  good: {model.name: ple}
  searched: {model.name: ple, search: {space: {model.dim: [13, 9]}}}
  lost: {model.name: ple, search: {space: {model.dim: [14]}}}
"""
    campaign, said, order = run(text, parallel=3)
    assert list(campaign.found()) == ["good", "searched"] and campaign.found()["searched"].overrides["model.dim"] == "9"
    why = {(record["arm"], record["trial"] is None): record["why"] for record in campaign.failed}
    assert why.pop(("broken", True)) == why.pop(("searched", False)) == "it broke"
    assert all("SIGKILL" in text for text in why.values()) and why.keys() == {("killed", True), ("lost", False)}
    assert campaign.provenance()["without_runs"]["lost"] == "no trial of its search has ended"
    assert any(line.startswith("broken, seed 0 FAILED") and "it broke" in line for line in said)
    _, _, order = run(text)
    assert len(order) == 4  # what failed is tried again, and only that


def test_keys_that_exclude_each_other_are_a_failed_trial(run: Made) -> None:
    space = "{optimizer.schedule: [constant, cosine], optimizer.decay_steps: [0, 5]}"
    campaign, _, order = run(f"seeds: 1\narms: {{ple: {{search: {{space: {space}}}}}}}")
    assert [record["state"] for record in campaign.provenance()["cells"]].count("failed") == 1
    assert "decay_steps" in campaign.failed[0]["why"] and list(campaign.found()) == ["ple"]
    assert len(order) == 3  # the schedule constant leaves the other key out


def test_trials_of_one_config_are_trained_once(run: Made) -> None:
    space = "{optimizer.schedule: [constant], optimizer.decay_steps: [5, 7]}"
    campaign, _, order = run(f"seeds: 1\narms: {{ple: {{search: {{space: {space}}}}}}}", parallel=2)
    assert len(order) == 2 and len(campaign.provenance()["cells"]) == 3


def test_a_budget_drops_what_does_not_fit(run: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEP", "1")
    text = "seeds: 9\narms: {ple: {}, mmoe: {}, stem_net: {search: {space: {model.dim: [4, 8]}}}}"
    campaign, said, order = run(text, hours=8 / 3600)
    told = campaign.provenance()
    assert {"ple", "mmoe"} <= set(campaign.found()) and len(order) < 12
    assert len(told["dropped"]) + len(campaign.provenance()["cells"]) >= 15 and campaign.dropped
    assert (
        any("the budget has" in line and "no room for" in line for line in said) or "stem_net" not in campaign.found()
    )


def test_the_end_of_the_budget_stops_what_runs(run: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEP", "30")
    campaign, _, order = run("seeds: 2\narms: {ple: {}}", hours=0.7 / 3600)
    assert len(order) <= 1 and campaign.found() == {} and len(campaign.dropped) == 2
    assert [record["state"] for record in campaign.provenance()["cells"]] == ["dropped"] and not campaign.failed
    assert campaign.provenance()["without_runs"]


def test_directories_of_arms_differ(tmp_path: Path) -> None:
    names: list[Any] = ["a b", "a_b", "..", "-x", "x/y", "x" * 200, "ä", "<b>", "a b "]
    found = {cells.directory(tmp_path, name, "f", 0) for name in names}
    assert len(found) == len(names) and all(path.parent.parent.parent == tmp_path / "runs" for path in found)
    assert all(path.resolve() == path and not path.parent.parent.name.startswith("-") for path in found)
