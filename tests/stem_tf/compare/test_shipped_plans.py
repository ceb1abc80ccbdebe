"""The plans that come with the package load on the data they are for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import stem_tf
from pipelines.recipes import mmoe_synthetic, recipe
from pipelines.recipes.catalogue import RECIPES
from stem_tf.compare import plan

DATASETS = Path(__file__).parents[3] / "datasets"


@pytest.fixture(scope="module")
def data_of(chain_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Data that a plan is for: small parts of the bundled logs, and any data for plans that name no task."""
    directory = tmp_path_factory.mktemp("plans")

    def converted(name: str) -> Path:
        output = directory / name
        if not output.exists():
            log = pq.read_table(next((DATASETS / name).glob("*.parquet"))).slice(0, 2000)
            stem_tf.convert(log, name, output, split="random", layouts=("blocks",))
        return output

    def regressions() -> Path:
        settings = {setting.name: setting.default for setting in mmoe_synthetic.RECIPE.settings} | {"rows": 200}
        recipe.make(mmoe_synthetic.RECIPE, None, str(directory / "regressions"), settings)
        return directory / "regressions"

    def data(name: str) -> Path:
        if name == "correlation":
            return regressions()
        of_log = dict.fromkeys(("sample", "sample_all", "task_groups"), "kuairand_sample")
        of_log |= dict.fromkeys(("census", "census_all"), "census_income")
        return converted(of_log[name]) if name in of_log else chain_data

    return data


def test_there_is_one_for_each_table_of_the_papers() -> None:
    assert {"task_fields", "gates", "capacity", "task_groups", "correlation", "contradiction"} <= set(plan.shipped())


@pytest.mark.parametrize("name", sorted(plan.shipped()))
def test_a_shipped_plan_loads(name: str, data_of: Callable[[str], Path]) -> None:
    found = plan.load(plan.changed(plan.read(name), data=str(data_of(name))))
    assert found.single == "single_task"
    assert len(found.arms) > 2
    assert not any(arm.left_out for arm in found.arms.values())  # each key of the plan does something for each arm


@pytest.mark.parametrize("name", sorted(plan.shipped()))
def test_the_commands_of_a_shipped_plan_are_complete(name: str) -> None:
    text = plan.shipped()[name].read_text("utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^# +(stem-\w+ .*)$", text, re.MULTILINE)]
    for job, first, *flags in commands[:-1]:
        if job == "stem-recipe":
            assert any(flag.startswith("--raw=") for flag in flags) == bool(RECIPES[first].files)
        else:
            assert (DATASETS.parent / first).exists()
    compared = commands[-1]
    data = [flag.partition("=")[2] for flag in compared if flag.startswith("--data=")]
    data += [node.text() for key, node in plan.read(name).mapping().items() if key == "data"]
    assert compared[:2] == ["stem-compare", name] and len(data) == 1
    for words in commands[:-1]:  # those that make its data
        assert f"--output={data[0]}" in words
