"""Recipes of public logs, from a few hand-made rows in the exact format of their authors' files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import manifest as manifests
from pipelines.convert import constant_labels
from pipelines.log.parts import CsvOptions
from pipelines.recipes import census_income, text
from pipelines.recipes.catalogue import RECIPES
from pipelines.recipes.recipe import Made, make
from stem_util.errors import UserError


def made(name: str, raw: Path, output: Path, **settings: object) -> Made:
    defaults = {setting.name: setting.default for setting in RECIPES[name].settings}
    return make(RECIPES[name], str(raw), str(output), {**defaults, **settings})


def raw_rows(output: Path, split: str) -> list[dict[str, object]]:
    return pq.read_table(output / "raw" / split).sort_by("row_id").to_pylist()


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.files])
def test_a_missing_or_empty_file_is_named_with_the_way_to_get_it(name: str, tmp_path: Path) -> None:
    recipe, output = RECIPES[name], tmp_path / "data"
    with pytest.raises(UserError, match="--raw is required: the directory with"):
        make(recipe, None, str(output), {})
    with pytest.raises(UserError) as error:
        made(name, tmp_path, output)
    assert str(error.value) == f"{tmp_path / recipe.files[0].name} is missing: {recipe.get}"
    (tmp_path / recipe.files[0].name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / recipe.files[0].name).touch()
    with pytest.raises(UserError, match="is empty: "):
        made(name, tmp_path, output)
    assert not output.exists()


# Census-Income: UCI writes 42 values with ", " between them, labels "- 50000." and " 50000+.", and no header.

UCI_LINE = (
    "{age}, Private, 40, 10, Some college but no degree, 1200, Not in universe, {marital}, Entertainment, Sales, White,"
    " NA, Female, No, Not in universe, Full-time schedules, 0, 0, 0, Single, Not in universe, Not in universe,"
    " Householder, Householder, 162.61, ?, ?, ?, Not in universe under 1 year old, ?, 1, Not in universe, Philippines,"
    " United-States, United-States, Native- Born in the United States, 2, Not in universe, 2, 52, 95, {income}\n"
)


def census(directory: Path) -> Path:
    """Ten train rows and six test rows, whose ages count up from 30."""
    for name, rows in (("census-income.data", 10), ("census-income.test", 6)):
        lines = []
        for row in range(rows):
            marital, income = ("Never married", "Widowed")[row % 2], (" 50000+.", "- 50000.")[row % 5 > 0]
            lines.append(UCI_LINE.format(age=30 + row, marital=marital, income=income))
        (directory / name).write_text("".join(lines))
    return directory


def test_census_income_divides_the_test_file_into_the_known_halves(tmp_path: Path) -> None:
    done = made("census_income", census(tmp_path), tmp_path / "data")
    assert [done.manifest.rows(split) for split in manifests.SPLITS] == [10, 3, 3]
    assert [done.manifest.task_rate("train", task) for task in ("income", "never_married")] == [0.2, 0.5]
    order = np.random.RandomState(1).permutation(6)
    for split, places in (("validation", order[:3]), ("test", order[3:])):
        rows = raw_rows(tmp_path / "data", split)
        assert [row["age"] for row in rows] == [30 + place for place in places]
        assert {(row["hisp_origin"], row["mig_chg_msa"], row["det_ind_code"]) for row in rows} == {("NA", "?", 40)}
    assert {found.name: found.verdict for found in done.statistics} == {
        "samples": "differs by -99.99%",
        "train samples": "differs by -99.99%",
        "fields": "differs by -2.50%",
        "tasks": "equal",
    }


def test_census_income_as_parquet_gives_the_same_records(tmp_path: Path) -> None:
    whole = made("census_income", census(tmp_path), tmp_path / "text").manifest
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    integers = {f.column for f in whole.schema.features if f.dtype == "int64"}
    kinds: dict[str, text.Kind] = {
        name: "optional integer" if name in integers else "text" for name in census_income.COLUMNS
    }
    for name, stored in (("census-income.data", "train"), ("census-income.test", "test")):
        pq.write_table(pa.concat_tables(text.tables(tmp_path / name, kinds, "")), bundled / f"{stored}.parquet")
    same = made("census_income", bundled, tmp_path / "parquet").manifest
    for split in manifests.SPLITS:
        assert [s.sha256 for s in whole.shards(split, "blocks")] == [s.sha256 for s in same.shards(split, "blocks")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "37, Private, 40",
            "census-income.data, line 4: should have 42 values (age, class_worker, det_ind_code, ...): ",
        ),
        (
            UCI_LINE.format(age="old", marital="x", income="y").strip(),
            "census-income.data, line 4: age is 'old', no integer",
        ),
        (UCI_LINE.format(age="1", marital="\udcff", income="y").strip(), "line 4: marital_stat is not UTF-8"),
    ],
)
def test_a_damaged_line_of_census_income_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = census(tmp_path) / "census-income.data"
    lines = path.read_text().splitlines()
    path.write_bytes("\n".join([*lines[:3], line, *lines[3:]]).encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        made("census_income", tmp_path, tmp_path / "data")
    assert message in str(error.value) and "archive.ics.uci.edu" in str(error.value)
    assert not (tmp_path / "data").exists()


def test_a_cut_last_line_and_another_parquet_file_are_noticed(tmp_path: Path) -> None:
    path = census(tmp_path) / "census-income.test"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match=r"census-income.test, line 6: should have 42 values"):
        made("census_income", tmp_path, tmp_path / "data")
    (tmp_path / "other").mkdir()
    for name in ("train", "test"):
        pq.write_table(pa.table({"x": [1]}), tmp_path / "other" / f"{name}.parquet")
    with pytest.raises(UserError, match=r"train.parquet is no Parquet file of Census-Income"):
        made("census_income", tmp_path / "other", tmp_path / "data")


# MovieLens-1M: "::" between values; movies.dat is latin-1, and titles hold single colons.

USERS = ("1::F::1::10::48067", "2::M::56::16::70072-1234", "6040::M::25::6::11106")
MOVIES = (
    "1::Toy Story (1995)::Animation|Children's|Comedy",
    "260::Star Wars: Episode IV - A New Hope (1977)::Action|Adventure|Fantasy|Sci-Fi",
    "73::Mis\u00e9rables, Les (1995)::Drama|Musical",
)
RATINGS = [f"{(1, 2, 6040)[i % 3]}::{(1, 260, 73)[i % 3]}::{i % 5 + 1}::{978300000 + i}" for i in range(40)]


def movielens(
    directory: Path, users: tuple[str, ...] = USERS, movies: tuple[str, ...] = MOVIES, ratings: list[str] = RATINGS
) -> Path:
    for name, lines in (("users", users), ("movies", movies), ("ratings", ratings)):
        (directory / f"{name}.dat").write_bytes("".join(f"{line}\n" for line in lines).encode("latin-1"))
    return directory


def test_movielens_joins_users_and_movies_to_ratings(tmp_path: Path) -> None:
    done = made("movielens_1m", movielens(tmp_path), tmp_path / "data", split="time").manifest
    assert [done.rows(split) for split in manifests.SPLITS] == [32, 4, 4]
    rows = raw_rows(tmp_path / "data", "test")
    assert [row["timestamp"] for row in rows] == [978300036 + i for i in range(4)]
    assert rows[2] == {
        "user_id": 6040, "gender": "M", "age": 25, "occupation": 6, "zip_code": "11106", "movie_id": 73,
        "title": "Mis\u00e9rables, Les (1995)", "year": 1995, "genres": "Drama|Musical", "rating": 4,
        "timestamp": 978300038, "row_id": 38,
    }  # fmt: skip
    assert rows[1]["title"] == "Star Wars: Episode IV - A New Hope (1977)" and rows[1]["year"] == 1977
    assert done.task_rate("test", "liked") == 0.5 and done.task_rate("test", "rating") == 3.5  # 2, 3, 4, 5 stars
    assert done.vocabularies["genres"].distinct == 9


def test_movielens_counts_users_of_the_whole_log(tmp_path: Path) -> None:
    done = made("movielens_1m", movielens(tmp_path), tmp_path / "data")
    assert {found.name: found.found for found in done.statistics} == {"samples": 40, "users": 3}
    assert sum(done.manifest.rows(split) for split in manifests.SPLITS) == 40


def test_a_label_of_one_value_is_said_although_the_log_is_gone(tmp_path: Path) -> None:
    done = made("movielens_1m", movielens(tmp_path, ratings=RATINGS[3:5]), tmp_path / "data", split="time").manifest
    assert constant_labels.warnings(done, CsvOptions()) == ["task 'liked': every label is 1"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"ratings": [*RATINGS, "1::1::5"]},
            "ratings.dat, line 41: should have 4 values (UserID, MovieID, Rating, ...)",
        ),
        ({"ratings": ["1::1::five::978300000"]}, "ratings.dat, line 1: Rating is 'five', no integer"),
        ({"ratings": [f"1::1::5::{10**19}"]}, "ratings.dat, line 1: Timestamp is '10000000000000000000', no integer"),
        ({"ratings": ["1::1::5::978_300_000"]}, "ratings.dat, line 1: Timestamp is '978_300_000', no integer"),
        ({"users": USERS[1:]}, "ratings.dat, line 1: 1 is not in "),
        ({"movies": MOVIES[:1]}, "ratings.dat, line 2: 260 is not in "),
        ({"users": ("1,F,1,10,48067",)}, "users.dat, line 1: should have 5 values"),
        ({"users": ("1::F::young::10::48067",)}, "users.dat, line 1: Age is 'young', no integer"),
    ],
)
def test_damaged_files_of_movielens_are_named(changed: dict[str, list[str]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        made("movielens_1m", movielens(tmp_path, **changed), tmp_path / "data")  # type: ignore[arg-type]
    assert message in str(error.value) and "grouplens.org" in str(error.value)
    assert not (tmp_path / "data").exists()
