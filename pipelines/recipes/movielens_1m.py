"""MovieLens-1M: the three raw files joined to one row per rating."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pipelines import schema_yaml
from pipelines.convert.options import Options
from pipelines.recipes import text
from pipelines.recipes.recipe import Prepare, RawFile, Recipe, Setting, write
from stem_util.errors import UserError

_GET = "unpack ml-1m.zip of https://grouplens.org/datasets/movielens/1m/ and give its directory ml-1m as --raw"
_RATINGS, _USERS, _MOVIES = "ratings.dat", "users.dat", "movies.dat"
_COLUMNS = {
    _RATINGS: ("UserID", "MovieID", "Rating", "Timestamp"),
    _USERS: ("UserID", "Gender", "Age", "Occupation", "Zip-code"),
    _MOVIES: ("MovieID", "Title", "Genres"),
}
_YEAR = re.compile(r"\((\d{4})\)\s*$")
_BLOCK = 1 << 17


def _prepare(given: Prepare) -> Options:
    users = {int(values[0]): values[1:] for values in _values(given, _USERS, ("UserID", "Age", "Occupation"))}
    movies = {int(values[0]): values[1:] for values in _values(given, _MOVIES, ("MovieID",))}
    path = write(given.scratch, _ratings(given, users, movies))
    by_time = given.settings["split"] == "time"
    return Options(
        schema=schema_yaml.load("movielens_1m"),
        output="",
        log=str(path),
        split=given.settings["split"],
        split_column="timestamp" if by_time else None,
    )


def _values(given: Prepare, name: str, integers: tuple[str, ...]) -> Iterator[list[str]]:
    """The values of each line of a raw file, those of ``integers`` checked."""
    path, columns = given.files[name], _COLUMNS[name]
    places = [columns.index(column) for column in integers]
    for line, values in enumerate(text.split_lines(path, columns, "::", "latin-1", _GET), start=1):
        for place in places:
            text.integer(path, line, columns[place], values[place], _GET)
        yield values


def _ratings(given: Prepare, users: dict[int, list[str]], movies: dict[int, list[str]]) -> Iterator[pa.Table]:
    rows: list[tuple[object, ...]] = []
    path = given.files[_RATINGS]
    for line, values in enumerate(_values(given, _RATINGS, _COLUMNS[_RATINGS]), start=1):
        user, movie, rating, timestamp = map(int, values)
        gender, age, occupation, zip_code = _known(users, user, path, line, given.files[_USERS])
        title, genres = _known(movies, movie, path, line, given.files[_MOVIES])
        year = _YEAR.search(title)
        rows.append(
            (
                user,
                gender,
                int(age),
                int(occupation),
                zip_code,
                movie,
                title,
                year and int(year[1]),
                genres,
                rating,
                timestamp,
            )
        )
        if len(rows) == _BLOCK:
            yield _table(rows)
            rows = []
    if rows:
        yield _table(rows)


def _known(found: dict[int, list[str]], key: int, path: Path, line: int, where: Path) -> list[str]:
    if key not in found:
        raise UserError(
            f"{path}, line {line:,}: {key} is not in {where}: one of the two files is cut or another one; {_GET}"
        )
    return found[key]


_SCHEMA = pa.schema(
    {
        "user_id": pa.int64(),
        "gender": pa.string(),
        "age": pa.int64(),
        "occupation": pa.int64(),
        "zip_code": pa.string(),
        "movie_id": pa.int64(),
        "title": pa.string(),
        "year": pa.int64(),
        "genres": pa.string(),
        "rating": pa.int64(),
        "timestamp": pa.int64(),
    }
)


def _table(rows: list[tuple[object, ...]]) -> pa.Table:
    return pa.table(
        [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), _SCHEMA, strict=True)], schema=_SCHEMA
    )


RECIPE = Recipe(
    name="movielens_1m",
    title="MovieLens-1M: 4 stars or more, and the number of stars",
    about="""\
One row is a rating, with the user's gender, age group, occupation and zip code, and the movie's genres and year (from
its title). liked: 4 or 5 stars; rating: the stars, a regression. There is no common protocol for several tasks on
these data. --split=random divides ratings at random, 80, 10 and 10 %, as work on predicting ratings does (AutoRec, WWW
2015: 90 and 10 %). --split=time trains on the oldest 80 %, which is closer to use, but most users rated within a few
days only, so most users of test are new then.""",
    source="https://grouplens.org/datasets/movielens/1m/; Harper and Konstan, The MovieLens Datasets, ACM TiiS 2015, "
    "https://doi.org/10.1145/2827872",
    licence="GroupLens: research use with acknowledgement; no redistribution or commercial use without permission",
    get=_GET,
    files=(
        RawFile(_RATINGS, f"values with :: between them, no header: {', '.join(_COLUMNS[_RATINGS])}"),
        RawFile(_USERS, f"the same: {', '.join(_COLUMNS[_USERS])}"),
        RawFile(_MOVIES, f"the same, in latin-1: {', '.join(_COLUMNS[_MOVIES])}, the genres with | between them"),
    ),
    prepare=_prepare,
    published={"samples": "1,000,209", "users": "6,040"},
    published_in="its README",
    config="small",
    settings=(Setting("split", "random", "How ratings are divided: random, or time.", choices=("random", "time")),),
)
