"""The verdict, the gains and the seesaw, on made-up predictions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import config_dict

from pipelines import manifest as manifests
from pipelines.manifest import Manifest
from pipelines.recipes import truth
from pipelines.schema import Schema
from stem_tf.compare import effects, page, published
from stem_tf.compare.comparison import Arm, Comparison, Finished, Settings
from stem_tf.compare.document import Cell, Details, Figure, Section, Table
from stem_tf.compare.sections import gain, seesaw, verdict
from stem_tf.evaluation import metrics
from stem_tf.evaluation.predictions import Predictions
from stem_tf.workdir import Workdir

Made = Callable[..., Comparison]
USERS = 120


class MadeUp(Finished):
    """A finished run without files."""

    def __init__(self, model: str, seed: int, manifest: Manifest, predicted: Predictions, tree: dict[str, Any]) -> None:
        config = config_dict.create(model={"name": model})
        super().__init__(seed, Workdir("nowhere"), config, manifest)
        self.__dict__["made"] = predicted, tree

    def metrics(self, split: str) -> dict[str, Any]:
        return self.__dict__["made"][1]

    def predictions(self, split: str) -> Predictions:
        return self.__dict__["made"][0]


def with_schema(manifest: Manifest, schema: Schema) -> Manifest:
    changed = dataclasses.replace(manifest)
    changed.__dict__["schema"] = schema
    return changed


@pytest.fixture
def made(tiny_data: Path) -> Made:
    """``made({"ple": {"click": 0.5, "watched": 0}}, seeds=3)``: arms whose scores are better by so much on each task.

    1,200 rows of 120 users; ``watched`` is a regression with labels for two rows of three. A task that an arm does not
    name is one that it does not predict.
    """
    whole = manifests.load(str(tiny_data))

    def make(
        arms: Mapping[str, Mapping[str, float]],
        *,
        seeds: int | Mapping[str, int] = 3,
        single: str | None = "single_task",
        rename: Mapping[str, str] | None = None,
        binary: bool = False,
        **options: Any,
    ) -> Comparison:
        names = rename or {}
        data = options.get("data", whole.schema.name)
        schema = dataclasses.replace(
            whole.schema,
            name=data,
            tasks=tuple(
                dataclasses.replace(task, name=names.get(task.name, task.name), type="binary" if binary else task.type)
                for task in whole.schema.tasks
            ),
        )
        manifest = with_schema(whole, schema)
        random = np.random.default_rng(0)
        users = np.repeat(np.arange(USERS), 10)
        labels: dict[str, np.ndarray] = {}
        shared: dict[str, np.ndarray] = {}
        for task in schema.tasks:
            drawn = random.random(len(users)) < 0.3 if task.type == "binary" else random.normal(size=len(users))
            labels[task.name] = drawn.astype(np.float32)
            shared[task.name] = random.normal(size=len(users))
        labels[schema.tasks[1].name][::3] = np.nan
        found = {}
        for arm, gains in arms.items():
            runs = []
            tasks = tuple(task for task in schema.tasks if task.name in gains)
            own = with_schema(whole, dataclasses.replace(schema, tasks=tasks))
            for seed in range(seeds if isinstance(seeds, int) else seeds[arm]):
                scores = {}
                for task in tasks:
                    gain, noise = gains[task.name], shared[task.name] + 0.2 * random.normal(size=len(users))
                    base = np.nan_to_num(labels[task.name]) * (1 + gain)
                    error = noise if task.type == "binary" else noise / (1 + gain)
                    scores[task.name] = (base if task.type == "binary" else np.nan_to_num(labels[task.name])) + error
                predicted = Predictions(
                    np.arange(len(users)),
                    {name: labels[name] for name in scores},
                    {name: values.astype(np.float32) for name, values in scores.items()},
                    {},
                    users,
                    None,
                )
                lead = {"item": {"low": options.get("lead", 0.1)}}
                tree = {
                    "tasks": {
                        task.name: {metrics.MAIN[task.type]: 0.7, "trivial": {"item": 0.6}, "over_trivial": lead}
                        for task in tasks
                    }
                }
                runs.append(MadeUp(arm, seed, own, predicted, tree))
            found[arm] = Arm(arm, {}, tuple(runs))
        settings = Settings(resamples=200)
        return Comparison("made up", manifest, found, single, options.get("incumbent"), settings)

    return make


ARMS = {
    "single_task": {"click": 0.0, "watched": 0.0},
    "same": {"click": 0.0, "watched": 0.0},
    "seesaw": {"click": 0.8, "watched": -0.4},
}


def tables(section: Section) -> list[Table]:
    return [block for block in section.blocks if isinstance(block, Table)]


def text(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else cell.text


def test_effects_are_differences_of_means_with_their_sign(made: Made) -> None:
    comparison = made(ARMS)
    found = effects.effects(comparison, "single_task")
    assert set(found) == {(arm, task) for arm in ("same", "seesaw") for task in ("click", "watched")}  # no mean of one
    for task, metric, sign in (("click", metrics.auc, 1), ("watched", metrics.mse, -1)):
        means = {
            arm: np.mean(
                [
                    metric(p.labels[task], p.scores[task], p.weights_of(task))
                    for p in (run.predictions("test") for run in comparison.arms[arm].runs)
                ]
            )
            for arm in ARMS
        }
        for arm in ("same", "seesaw"):
            expected = sign * (means[arm] - means["single_task"])
            assert found[arm, task].difference.estimate == pytest.approx(expected)
    assert found["seesaw", "click"].verdict == "better" and found["seesaw", "watched"].verdict == "worse"
    assert found["same", "click"].verdict == "undecided" and found["same", "click"].way_out()
    assert found["seesaw", "click"].rows == 1200 and found["seesaw", "watched"].rows == 800
    assert not found["seesaw", "click"].way_out()


def test_mean_is_over_the_tasks_that_both_have(made: Made) -> None:
    comparison = made(
        {"single_task": {"click": 0.0, "watched": 0.0}, "b": {"click": 0.5, "watched": 0.5}, "part": {"click": 0.5}},
        binary=True,
    )
    found = effects.effects(comparison, "single_task")
    assert ("part", None) not in found and ("part", "watched") not in found
    mean = found["b", None].difference
    assert mean.estimate == pytest.approx(
        np.mean([found["b", task].difference.estimate for task in ("click", "watched")])
    )
    assert found["b", None].verdict == "better"


def test_verdict(made: Made, tmp_path: Path) -> None:
    section = verdict.section(made(ARMS, incumbent="same"))
    assert "seesaw is **better** on click and **worse** on watched" in section.lead
    assert "Against same" in section.lead and "The other 2 of 4 differences are undecided" in section.lead
    matrix = tables(section)[0]
    assert matrix.header == ("against single_task", "click, AUC", "watched, MSE")
    cells = {row[0]: [cell for cell in row[1:] if isinstance(cell, Cell)] for row in matrix.rows}
    assert [cell.tone for cell in cells["seesaw"]] == ["good", "bad"]
    assert [cell.tone for cell in cells["same"]] == ["unsure", "unsure"]
    reached = tables(section)[-1]
    assert [text(row[0]) for row in reached.rows] == [*ARMS, "trivial answer: item"]
    page.write("t", [section], tmp_path)


def test_verdict_with_the_best_anyone_could_reach(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = made(ARMS, lead=-0.01)
    predicted = comparison.arms["single_task"].runs[0].predictions("test")
    truths = {"click": predicted.labels["click"] * 0.5 + 0.1}
    monkeypatch.setattr(truth, "load", lambda manifest, split: truths)
    section = verdict.section(comparison)
    reached = tables(section)[-1]
    assert [text(cell) for cell in reached.rows[-1]] == ["the best anyone could reach", "1.0000", "-"]
    assert any("No run is clearly above each trivial answer on click and watched" in str(b) for b in section.blocks)


def test_rows_are_drawn_without_users_and_tasks_of_one_class_are_left_out(made: Made) -> None:
    comparison = made(ARMS, seeds=1)
    del comparison.manifest.__dict__["schema"]
    comparison.manifest.__dict__["schema"] = dataclasses.replace(comparison.manifest.schema, group=None)
    for arm in comparison.arms.values():
        predicted = arm.runs[0].predictions("test")
        predicted.labels["click"][:] = 1
    section = verdict.section(comparison)
    assert "test rows or the seeds" in section.lead and "none of 2 differences" in section.lead
    reached = tables(section)[-1]
    assert reached.header == ("arm", "click, AUC", "watched, MSE") and reached.rows[0][1] == "-"


def test_verdict_without_anything_to_compare_with(made: Made) -> None:
    section = verdict.section(made({"ple": {"click": 0.0}}, single=None))
    assert "no arm to compare with" in section.lead and len(tables(section)) == 1
    section = verdict.section(made({"single_task": {"click": 0.0}}))
    assert "No other arm" in section.lead


def test_one_seed_decides_nothing_by_itself(made: Made) -> None:
    comparison = made(ARMS, seeds=1)
    section = verdict.section(comparison)
    assert "none of 4 differences is decided" in section.lead
    assert any("Every arm has one seed" in block for block in section.blocks if isinstance(block, str))
    found = effects.effects(comparison, "single_task")
    assert {effect.way_out() for effect in found.values()} == {"a second seed"}
    assert all(math.isnan(effect.p) for effect in found.values())
    section = verdict.section(made(ARMS, seeds={"single_task": 4, "same": 4, "seesaw": 1}))
    assert "seesaw is **better** on click" in section.lead
    assert any("was taken from the arms with several" in block for block in section.blocks if isinstance(block, str))


def test_gain(made: Made) -> None:
    section = gain.section(made(ARMS))
    assert section.lead.startswith("Of 4 gains over Single-Task (each arm on each task), 1 is above 0")
    assert "1 is below 0 beyond chance" in section.lead
    (heat,) = tables(section)
    cells = {row[0]: row[1:] for row in heat.rows}
    found = effects.effects(made(ARMS), "single_task")
    for place, task in enumerate(("click", "watched")):
        cell, difference = cells["seesaw"][place], found["seesaw", task].difference
        assert isinstance(cell, Cell) and cell.shade == (1.0, -1.0)[place]  # AUC and an error have scales of their own
        assert cell.text.startswith(effects.number(difference.estimate, auc=task == "click", sign=True))
        assert cell.tone == ("good", "bad")[place]
    assert sum(isinstance(block, Figure) for block in section.blocks) == 1


def test_gain_beside_published_numbers(made: Made) -> None:
    names = {"click": "income", "watched": "never_married"}
    arms = {arm: {names[task]: value for task, value in of.items()} for arm, of in ARMS.items()}
    comparison = made({"single_task": arms["single_task"], "mmoe": arms["seesaw"]}, rename=names, data="census_income")
    section = gain.section(comparison)
    beside = tables(section)[1]
    assert beside.header == ("arm", "income, here", "income, paper", "never_married, here", "never_married, paper")
    assert [text(row[0]) for row in beside.rows] == ["mmoe", "ple (not run)"]
    assert [text(row[2]) for row in beside.rows] == ["-.0052", "+.0077"]
    assert [text(row[4]) for row in beside.rows] == ["+.0005", "+.0022"]
    assert "+.0048" in beside.caption and "PLE" in beside.caption


def test_published_numbers() -> None:
    stem = published.of_data("tiktok")
    assert stem is not None and stem.gain("stem_net", "is_like") == 0.0037 and stem.gain("ple", "finish") == 0.0006
    assert stem.auc("sluice", "like") is None and stem.auc("ple", "share") is None
    assert published.of_data("a log of your own") is None
    averages = {"tiktok": (0.8281, 0.8304), "qk_video": (0.9317, 0.9331), "kuairand_1k": (0.8433, 0.8480)}
    for data, printed in averages.items():  # the papers' own averages of the same rows
        table = published.of_data(data)
        assert table is not None
        for model, average in zip(("single_task", "stem_net"), printed, strict=True):
            assert np.mean(table.aucs[model]) == pytest.approx(average, abs=1.01e-4)
        assert {len(values) for values in table.aucs.values()} == {len(table.tasks)}


def test_seesaw(made: Made) -> None:
    section = seesaw.section(made(ARMS))
    assert "seesaw gains on click and loses on watched" in section.lead
    table = next(block for block in section.blocks if isinstance(block, Table))
    rows = {text(row[0]): row[1:] for row in table.rows}
    assert text(rows["seesaw"][2]) == "seesaw" and text(rows["same"][2]) == "undecided"
    worse = rows["seesaw"][1]
    assert isinstance(worse, Cell) and worse.shade == -1
    assert section.data["pairs"] == [["click", "watched"]]
    assert not any(isinstance(block, Details) for block in section.blocks)
    section = seesaw.section(made(ARMS, seeds=1))
    assert "no seesaw is established" in section.lead


def test_without_single_task_there_is_no_gain(made: Made) -> None:
    comparison = made({"ple": {"click": 0.0, "watched": 0.0}}, single=None)
    alone = made({"single_task": {"click": 0.0}})
    for module in (gain, seesaw):
        assert module.section(comparison).lead == gain.NO_SINGLE
        assert module.section(alone).lead == gain.NO_OTHER


def test_one_task_has_gains_and_no_seesaw(made: Made) -> None:
    comparison = made({"single_task": {"click": 0.0}, "b": {"click": 0.5}})
    assert not any(isinstance(block, Figure) for block in seesaw.section(comparison).blocks)
    assert "1 is above 0" in gain.section(comparison).lead


@pytest.mark.parametrize("name", ["<b>\"x\" & 'y'", "a|b`c*", "mean AUC", "tâche  1", "$x$"])
def test_names_of_tasks_and_arms_may_hold_any_character(made: Made, tmp_path: Path, name: str) -> None:
    arms = {"single_task": {name: 0.0, "watched": 0.0}, name: {name: 0.5, "watched": 0.5}}
    comparison = made(arms, rename={"click": name}, binary=True, incumbent=name)
    page.write("t", [module.section(comparison) for module in (verdict, gain, seesaw)], tmp_path)


@pytest.mark.parametrize(
    ("value", "options", "shown"),
    [
        (0.73214, {}, ".7321"),
        (0.0031, {"sign": True}, "+.0031"),
        (-0.0031, {"sign": True}, "-.0031"),
        (math.nan, {}, "-"),
        (12345.6, {"auc": False}, "1.23e+04"),
        (-0.000123, {"auc": False, "sign": True}, "-.000123"),
    ],
)
def test_numbers(value: float, options: dict[str, bool], shown: str) -> None:
    assert effects.number(value, **options) == shown
    assert effects.listed([]) == "" and effects.listed(["a"]) == "a" and effects.listed(["a", "b", "c"]) == "a, b and c"
