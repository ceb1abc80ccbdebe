"""Recipes: what all have in common, and generated logs."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from pipelines import manifest as manifests
from pipelines.convert.options import Options
from pipelines.log import source
from pipelines.recipes import statistics, truth
from pipelines.recipes.catalogue import RECIPES
from pipelines.recipes.contradictory import World, schema
from pipelines.recipes.mmoe_synthetic import Regression
from pipelines.recipes.recipe import Made, make
from pipelines.recipes.statistics import Compared
from stem_tf import configs
from stem_util.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
Job = Callable[..., subprocess.CompletedProcess[str]]
SMALL = {"rows": 20_000, "users": 300, "items": 200, "topics": 4, "strength": 2.0, "popularity": 0.0}


def made(name: str, output: Path, **settings: object) -> Made:
    defaults = {setting.name: setting.default for setting in RECIPES[name].settings}
    return make(RECIPES[name], None, str(output), {**defaults, **settings})


def world(**changed: object) -> World:
    settings = {name: value for name, value in SMALL.items() if name != "rows"}
    return World(**{"contradiction": 0.5, "rates": (0.28, 0.016), "seed": 0, **settings, **changed})  # type: ignore[arg-type]


def logit(block: object) -> np.ndarray:
    chances = np.array([block[truth.column(task)].to_numpy() for task in "ab"])  # type: ignore[index]
    return np.log(chances / (1 - chances))


@pytest.mark.parametrize("contradiction", [0.0, 0.3, 0.7, 1.0])
def test_contradiction_is_what_the_logits_of_two_tasks_do_not_share(contradiction: float) -> None:
    block = world(contradiction=contradiction, users=3000, items=3000, topics=12).block(0, 50_000)
    correlation = np.corrcoef(logit(block))[0, 1]
    assert correlation == pytest.approx(1 - contradiction, abs=1e-9 if contradiction == 0 else 0.05)


def test_labels_are_drawn_from_the_truth_at_the_rates_asked_for() -> None:
    block = world(rates=(0.28, 0.05)).block(0, 100_000)
    for task, rate in (("a", 0.28), ("b", 0.05)):
        labels, chances = block[task].to_numpy(), block[truth.column(task)].to_numpy()
        assert chances.mean() == pytest.approx(rate, rel=0.02)
        likely = chances > np.median(chances)
        for part in (likely, ~likely):
            deviation = np.sqrt((chances[part] * (1 - chances[part])).sum())
            assert abs(labels[part].sum() - chances[part].sum()) < 4 * deviation


@pytest.mark.parametrize(
    "extreme",
    [{"users": 1, "items": 1, "topics": 1}, {"strength": 1e4}, {"strength": 0.0}, {"popularity": 300.0}],
)
def test_extreme_logs_keep_their_rates(extreme: dict[str, object]) -> None:
    block = world(**extreme, rates=(0.28, 0.1)).block(0, 50_000)
    assert [block[task].to_numpy().mean() for task in "ab"] == pytest.approx([0.28, 0.1], abs=0.01)


def test_popular_items_follow_zipf() -> None:
    item = world(popularity=1.0, items=50).block(0, 200_000)["item"].to_numpy()
    counts = np.sort(np.bincount(item, minlength=50))[::-1]
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.1)


def test_blocks_do_not_depend_on_each_other() -> None:
    assert world().block(3, 100).equals(world().block(3, 100))
    assert not world().block(3, 100).equals(world().block(4, 100))
    assert not world().block(3, 100).equals(world(seed=1).block(3, 100))


def test_truth_belongs_to_the_rows_of_a_split(tmp_path: Path) -> None:
    done = made("contradictory", tmp_path / "data", **SMALL).manifest
    assert [done.rows(split) for split in manifests.SPLITS] == pytest.approx([16_000, 2000, 2000], rel=0.1)
    raw = pq.read_table(tmp_path / "data" / "raw" / "test").sort_by("row_id")
    found = truth.load(done, "test")
    assert found is not None and list(found) == ["a", "b"]
    assert np.array_equal(found["a"], raw["truth_a"].to_numpy())
    expected = roc_auc_score(raw["a"].to_numpy(), found["a"])
    assert expected > 0.7 and truth.best(done, "test")[0] == f"a AUC {expected:.4f}".replace("0.", ".")
    assert truth.load(done, "train") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]  # the prepared log is gone


def test_synthetic_regression_is_that_of_the_paper() -> None:
    """Its formula, term by term, for one row."""
    regression = Regression(dimensions=5, correlation=0.6, seed=3)
    w1, w2 = regression.weights
    assert np.linalg.norm(w1) == pytest.approx(1) and np.linalg.norm(w2) == pytest.approx(1)
    assert w1 @ w2 == pytest.approx(0.6)
    block = regression.block(0, 20_000)
    x = np.array(block["x"][7].as_py())
    for task, weights in (("y1", w1), ("y2", w2)):
        product = sum(a * b for a, b in zip(weights, x, strict=True))
        mean = product + sum(math.sin(regression.alpha[i] * product + regression.beta[i]) for i in range(10))
        assert block[truth.column(task)][7].as_py() == pytest.approx(mean, abs=1e-6)
        noise = block[task].to_numpy() - block[truth.column(task)].to_numpy()
        assert noise.var() == pytest.approx(0.01, rel=0.05) and noise.mean() == pytest.approx(0, abs=0.003)


@pytest.mark.parametrize("correlation", [-1.0, 0.0, 1.0])
def test_synthetic_regression_at_its_limits(correlation: float) -> None:
    block = Regression(dimensions=8, correlation=correlation, seed=0).block(0, 1000)
    same = np.allclose(block[truth.column("y1")].to_numpy(), block[truth.column("y2")].to_numpy())
    assert same == (correlation == 1)


def test_synthetic_regression_becomes_one_dense_feature(tmp_path: Path) -> None:
    done = made("mmoe_synthetic", tmp_path / "data", rows=500, dimensions=6).manifest
    assert [(f.kind, f.length) for f in done.schema.features] == [("dense", 6)]
    assert [task.type for task in done.schema.tasks] == ["regression", "regression"]
    best = truth.best(done, "test")
    assert [text.rsplit(" ", 1)[0] for text in best] == ["y1 MSE", "y2 MSE"]
    assert all(float(text.rsplit(" ", 1)[1]) == pytest.approx(0.01, abs=0.008) for text in best)


def test_other_data_have_no_truth(tiny_data: Path) -> None:
    done = manifests.load(str(tiny_data))
    assert truth.load(done, "test") is None and truth.best(done, "test") == []


def test_a_recipe_gives_the_same_records_again(tmp_path: Path) -> None:
    both = [made("contradictory", tmp_path / name, **SMALL).manifest for name in "ab"]
    first, second = ([shard.sha256 for shard in done.shards("train", "blocks")] for done in both)
    assert first == second


def test_an_output_that_holds_something_else_is_refused_before_work_begins(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        made("contradictory", tmp_path)
    made("contradictory", tmp_path / "data", **SMALL)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        made("contradictory", tmp_path / "data", **SMALL)


def test_what_a_killed_recipe_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".data.log"
    left.mkdir()
    (left / "mine.txt").write_text("not a recipe's")
    with pytest.raises(UserError, match="holds something else"):
        made("contradictory", tmp_path / "data", **SMALL)
    (left / "mine.txt").unlink()
    (left / ".stem-tf").write_text('{"holds": "a log that stem-recipe prepares"}')
    (left / "log.parquet").write_text("half a log")
    made("contradictory", tmp_path / "data", **SMALL)
    assert not left.exists()


@pytest.mark.parametrize(
    ("published", "found", "equal", "verdict"),
    [
        ("223.4M", 223_449_999, True, "equal"),
        ("223.4M", 223_450_001, False, "differs by +0.02%"),
        ("28.31%", 0.28314, True, "equal"),
        ("1.54%", 0.01546, False, "differs by +0.39%"),
        ("1,000,209", 1_000_209, True, "equal"),
        ("560K", 560_499, True, "equal"),
        ("8", 8, True, "equal"),
    ],
)
def test_a_statistic_equals_what_rounds_to_it(published: str, found: float, equal: bool, verdict: str) -> None:
    compared = Compared("x", published, found)
    assert (compared.equal, compared.verdict) == (equal, verdict)


def test_distinct_values_are_counted_over_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_MERGED", 3)
    monkeypatch.setattr(source, "CHUNK_ROWS", 10)
    values = np.random.default_rng(0).integers(70, size=1000).tolist()
    pq.write_table(pa.table({"user": [None, *values]}), tmp_path / "log.parquet")
    options = Options(schema=schema("a"), output="", log=str(tmp_path / "log.parquet"))
    assert statistics._distinct(options, "user") == len(set(values))


def test_job_makes_the_log_and_says_what_is_possible(tmp_path: Path, job_in_process: Job) -> None:
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    done = job_in_process(
        "pipelines.jobs.recipe", "contradictory", *flags, "--rates=.3,.1,.2", f"--output={tmp_path / 'data'}"
    )
    assert done.returncode == 0, done.stderr
    assert "the best that any model can reach on test, up to chance: a AUC ." in done.stdout
    assert f"next: stem-train --config=small --config.data.dir={tmp_path / 'data'}" in done.stdout
    assert manifests.load(str(tmp_path / "data")).schema.task_names == ("a", "b", "c")


def test_job_lists_recipes_and_describes_one(job_in_process: Job) -> None:
    whole = job_in_process("pipelines.jobs.recipe", "--help")
    assert whole.returncode == 0 and all(f"\n  {name} " in whole.stdout for name in RECIPES)
    one = job_in_process("pipelines.jobs.recipe", "contradictory", "--help")
    assert "--popularity" in one.stdout and "--popularity" not in whole.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=x"], "name a recipe, as in"),
        (["--output", "contradictory"], "name a recipe, as in"),
        (["more", "contradictory"], "there is no recipe 'more'. Recipes: census_income, "),
        (["contradictory", "--output=x", "--strength=nan"], "--strength=nan: should be a finite number"),
        (["contradictry", "--output=x"], "there is no recipe 'contradictry'; did you mean 'contradictory'?"),
        (["contradictory"], "--output is required"),
        (["contradictory", "more", "--output=x"], "unexpected argument 'more'"),
        (["contradictory", "--output=x", "--rates=.1,a"], "--rates=.1,a: should be numbers with commas between them"),
        (["contradictory", "--output=x", "--rates=.1,1"], "should be 1 to 26 rates above 0 and below 1"),
        (["contradictory", "--output=x", "--contradiction=2"], "--contradiction"),
        (["contradictory", "--output=x", "--raw=y"], "generates its rows and reads no files"),
        (["contradictory", "--output=x,y"], "choose another name"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, job_in_process: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = job_in_process("pipelines.jobs.recipe", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_on_the_page_and_name_a_shipped_experiment(name: str) -> None:
    recipe = RECIPES[name]
    row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |"))
    assert f"`--config={recipe.config}`" in row and recipe.config in configs.shipped()
    assert not recipe.files or recipe.get.startswith(("unpack ", "download "))
