"""Slices of converted data: each against what pandas says about the raw rows."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import manifest as manifests
from stem_tf.evaluation import slices
from stem_tf.evaluation.predictions import Predictions
from stem_tf.evaluation.slices import Slicer
from stem_util.errors import UserError

SCHEMA = """
name: sliced
group: user
features:
  user: {kind: categorical, side: user, dtype: string}
  item: {kind: categorical, side: item, dtype: int64, min_count: 3}
  tags: {kind: multivalent, side: item, dtype: string, separator: "|", max_length: 3}
  seconds: {kind: numeric, side: item}
tasks:
  click: {label: {column: clicked}}
  stars: {type: regression, label: {column: stars, missing: outside}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, run_job: Callable) -> SimpleNamespace:
    """The slicer of 200 test rows, and their raw rows."""
    random = np.random.default_rng(0)
    rows = 1200
    user = np.minimum(random.geometric(0.05, rows), 70) + np.where(np.arange(rows) > 1100, 3, 0)
    tags = [f"t{n % 3}|t{n % 5}" if n % 7 else "" for n in range(rows)]
    log = pa.table(
        {
            "user": [f"u={n}:new, <é>" if n < 3 else f"u{n}" for n in user],
            "item": pa.array(random.geometric(0.02, rows)),
            "tags": tags,
            "seconds": pa.array(random.integers(100, size=rows) * 1.0, mask=random.random(rows) < 0.1),
            "clicked": random.integers(2, size=rows),
            "stars": pa.array(random.integers(-5, 5, size=rows) * 1.0, mask=random.random(rows) < 0.5),
            "clock": np.arange(rows).astype("datetime64[ms]"),
            "kind:x=y": pa.array(random.integers(3, size=rows), mask=random.random(rows) < 0.2),
            "flag": random.random(rows) < 0.5,
            "void": pa.nulls(rows),
            "list": [[1, 2]] * rows,
        }
    )
    directory = tmp_path_factory.mktemp("sliced")
    pq.write_table(log, directory / "log.parquet")
    (directory / "schema.yaml").write_text(SCHEMA, encoding="utf-8")
    arguments = ["--schema=schema.yaml", "--split=time", "--split_column=clock", "--output=data", "--processes=1"]
    job = run_job("pipelines.jobs.convert", "log.parquet", *arguments, "--layouts=rows", cwd=directory)
    assert job.returncode == 0, job.stderr
    manifest = manifests.load(str(directory / "data"))
    raw = pq.read_table(directory / "data" / "raw" / "test").to_pandas()
    train = log.slice(0, manifest.rows("train")).to_pandas()
    slicer = Slicer(manifest, "test", raw["row_id"].to_numpy())
    return SimpleNamespace(slicer=slicer, raw=raw, train=train, manifest=manifest, directory=directory)


def test_values_of_an_id(made: SimpleNamespace) -> None:
    found = made.slicer("user")
    counts = made.raw["user"].value_counts()
    assert len(found) == slices.VALUES + 1
    assert [one.rows.sum() for one in found[:-1]] == sorted(counts, reverse=True)[: slices.VALUES]
    for one in found[:-1]:
        np.testing.assert_array_equal(one.rows, made.raw["user"] == one.name.removeprefix("user="))
    assert found[-1].about == f"{len(counts) - slices.VALUES} values"
    assert sum(one.rows.astype(int) for one in found).tolist() == [1] * len(made.raw)


def test_new_and_rare(made: SimpleNamespace) -> None:
    (new,) = made.slicer("user:new")
    np.testing.assert_array_equal(new.rows, ~made.raw["user"].isin(made.train["user"]))
    assert new.about == "not seen in train"
    (new,) = made.slicer("item:new")
    counts = made.raw["item"].map(made.train["item"].value_counts()).fillna(0)
    np.testing.assert_array_equal(new.rows, counts < 3)
    assert new.about == "not seen in train or seen fewer than 3 times"
    (rare,) = made.slicer("item:rare")
    seen = made.train["item"].value_counts()
    seen = seen[seen >= 3]
    most = int(rare.about.split()[3])
    np.testing.assert_array_equal(rare.rows, (counts >= 3) & (counts <= most))
    assert seen[seen <= most].sum() <= slices.RARE_SHARE * seen.sum() < seen[seen <= most + 1].sum()


def test_lists_are_in_the_slice_of_each_value(made: SimpleNamespace) -> None:
    found = {one.name: one.rows for one in made.slicer("tags")}
    for tag in ("t0", "t4"):
        np.testing.assert_array_equal(
            found[f"tags={tag}"], made.raw["tags"].str.split("|").map(lambda t, tag=tag: tag in t)
        )
    np.testing.assert_array_equal(found["tags="], made.raw["tags"] == "")
    np.testing.assert_array_equal(made.slicer("tags=t4")[0].rows, found["tags=t4"])


def test_ranges(made: SimpleNamespace) -> None:
    *found, missing = made.slicer("seconds")
    np.testing.assert_array_equal(missing.rows, made.raw["seconds"].isna())
    sizes = [one.rows.sum() for one in found]
    assert len(sizes) == slices.RANGES
    assert max(sizes) - min(sizes) < 10
    low, high = found[1].name.split("<=seconds<")
    np.testing.assert_array_equal(found[1].rows, (made.raw["seconds"] >= int(low)) & (made.raw["seconds"] < int(high)))
    np.testing.assert_array_equal(found[0].rows, made.raw["seconds"] < int(found[0].name.removeprefix("seconds<")))
    times = made.slicer("clock")
    assert sum(one.rows.sum() for one in times) == len(made.raw)
    assert times[0].name.startswith("clock<1970-01-01T00:00:01.1")


def test_columns_that_the_schema_does_not_name(made: SimpleNamespace) -> None:
    found = {one.name: one.rows for one in made.slicer("kind:x=y")}
    assert set(found) == {"kind:x=y=0", "kind:x=y=1", "kind:x=y=2", "kind:x=y="}
    np.testing.assert_array_equal(found["kind:x=y=1"], made.raw["kind:x=y"] == 1)
    np.testing.assert_array_equal(made.slicer("kind:x=y=1")[0].rows, found["kind:x=y=1"])
    np.testing.assert_array_equal(made.slicer("kind:x=y=")[0].rows, made.raw["kind:x=y"].isna())
    np.testing.assert_array_equal(made.slicer("flag=true")[0].rows, made.raw["flag"])
    assert [one.name for one in made.slicer("void")] == ["void="]
    odd = made.raw["user"].str.contains("é")
    name = made.raw["user"][odd].iloc[0]
    np.testing.assert_array_equal(made.slicer(f"user={name}")[0].rows, made.raw["user"] == name)


@pytest.mark.parametrize(
    ("spelled", "says"),
    [
        ("usr:new", "slice 'usr:new': the data keep no column 'usr'; did you mean 'user'? They keep: user, item, tags"),
        ("hour", "no column 'hour'. They keep"),
        ("row_id", "no column 'row_id'"),
        ("seconds:new", "'seconds:new': seconds has no vocabulary; these have one: user, item, tags"),
        ("clicked:rare", "clicked has no vocabulary"),
        ("item=x", "'x' is no value of type int64"),
        ("item=123456", "has this value"),
        ("user=", "has this value"),
        ("list", "column 'list' holds lists"),
        ("", "no column ''"),
    ],
)
def test_refusals(made: SimpleNamespace, spelled: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        made.slicer(spelled)
    assert says in str(error.value)


def test_train_has_no_raw_rows(made: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="kept of validation and test"):
        Slicer(made.manifest, "train", np.arange(5))


def test_metrics_of_a_slice(made: SimpleNamespace) -> None:
    random = np.random.default_rng(1)
    labels = random.integers(2, size=100).astype(np.float32)
    stars = np.where(random.random(100) < 0.5, np.nan, 2.0).astype(np.float32)
    weights = random.random(100).astype(np.float32)
    scores = {"click": random.random(100).astype(np.float32), "stars": np.full(100, 3, np.float32)}
    predicted = Predictions(np.arange(100), {"click": labels, "stars": stars}, scores, {"click": weights}, None, None)
    tasks = made.manifest.schema.tasks
    rows = np.arange(100) < 60
    found = slices.evaluate(tasks, predicted, rows)
    frame = pd.DataFrame({"y": labels, "s": scores["click"], "w": weights})[:60]
    assert found["click"]["rows"] == 60
    assert found["click"]["rate"] == pytest.approx(np.average(frame.y, weights=frame.w))
    assert found["click"]["predicted_over_observed"] == pytest.approx(
        (frame.s * frame.w).sum() / (frame.y * frame.w).sum()
    )
    assert found["click"]["too_few"] == ""
    assert 0 < found["click"]["auc"] < 1
    assert found["stars"]["mse"] == pytest.approx(1)
    assert found["stars"]["rows"] == np.count_nonzero(~np.isnan(stars[:60]))
    few = slices.evaluate(tasks, predicted, (np.cumsum(labels) == 1) | (labels == 0))["click"]
    assert (few["too_few"], np.isnan(few["auc"]), few["logloss"] > 0) == ("1 positive", True, True)
    none = slices.evaluate(tasks, predicted, np.zeros(100, bool))["click"]
    assert (none["rows"], none["too_few"], np.isnan(none["logloss"])) == (0, "0 positives", True)
