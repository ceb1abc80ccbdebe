"""Scoring without a service: logs in every form, candidates from JSON and files, by a model and by a server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from export import candidates, raw, scoring
from export.published import Published
from pipelines import schema_yaml
from stem_client import RankingClient
from stem_tf.evaluation.scoring import predict
from stem_util import files
from stem_util.errors import JobError, UserError

Job = Callable[..., subprocess.CompletedProcess[str]]

FLAT = """
name: flat
group: who
features:
  who: {kind: categorical, side: user, dtype: int64}
  city: {kind: categorical, side: user, dtype: string}
  night: {kind: categorical, side: context, dtype: int64}
  tags: {kind: multivalent, side: item, dtype: string, separator: "|", max_length: 2}
  length: {kind: numeric, side: item, transform: [log1p]}
tasks:
  click: {label: {column: clicked}}
"""
EMPTY = -(2**63)


@pytest.fixture(scope="module")
def run(nasty_run: Callable[[str], Any]) -> Any:
    return nasty_run("float32")


@pytest.fixture(scope="module")
def exported(nasty_export: Path) -> Path:
    """The directory that holds the version."""
    return nasty_export


@pytest.fixture(scope="module")
def model(exported: Path) -> Published:
    return Published(exported)


@pytest.fixture(scope="module")
def test_rows(run: Any) -> pa.Table:
    return pq.read_table(Path(run.manifest.data_dir) / "raw" / "test")


def test_scores_of_a_log_are_the_trainers(run: Any, model: Published, test_rows: pa.Table, tmp_path: Path) -> None:
    trained = predict(run.model(), run.manifest, "test", run.config.data, desc="")
    done = scoring.score_log(
        model,
        str(Path(run.manifest.data_dir) / "raw" / "test"),
        tmp_path / "out.parquet",
        keep=["row_id", "user", "tags"],
    )
    out = pq.read_table(tmp_path / "out.parquet")
    assert (
        out.column_names
        == done.columns
        == [
            *("row", "user", "row_id", "tags"),
            *("ranking_score", "score_click", "score_watched"),
        ]
    )
    assert done.rows == out.num_rows == test_rows.num_rows > 50
    assert out.schema.field("score_click").type == pa.float32()
    assert out["row"].to_pylist() == list(range(out.num_rows))
    assert out["user"].equals(test_rows["user"]) and out["tags"].equals(test_rows["tags"])
    places = {row_id: place for place, row_id in enumerate(trained.row_id.tolist())}
    index = [places[row_id] for row_id in out["row_id"].to_pylist()]
    for task, scores in trained.scores.items():
        np.testing.assert_allclose(out[f"score_{task}"], scores[index], rtol=1e-6, atol=1e-6)
    click, watched = (out[f"score_{task}"].to_numpy().astype(np.float64) for task in ("click", "watched"))
    length, warm = (test_rows[name].to_pandas().to_numpy(np.float64) for name in ("length", "temperature"))
    by_hand = click**2 * np.log1p(np.nan_to_num(length, nan=10)) + 0.001 * np.nan_to_num(warm, nan=20) * watched
    np.testing.assert_allclose(out["ranking_score"], by_hand, rtol=1e-5, atol=1e-5)
    assert np.isnan(length).any() and np.isnan(warm).any() and len(np.unique(by_hand)) > 40


def test_other_types_of_the_same_values_score_the_same(model: Published, test_rows: pa.Table, tmp_path: Path) -> None:
    def scores(table: pa.Table) -> pa.Table:
        pq.write_table(table, tmp_path / "log.parquet", row_group_size=7)
        scoring.score_log(model, str(tmp_path / "log.parquet"), tmp_path / "out.parquet")
        return pq.read_table(tmp_path / "out.parquet")

    # No labels: what is to be scored has not happened yet.
    table = test_rows.drop(["clicked", "seconds", "row_id"])
    other = {
        "user": pa.large_string(),
        "hour": pa.int64(),
        "weekend": pa.int8(),
        "temperature": pa.float64(),
        "history": pa.large_list(pa.int64()),
        "image": pa.large_list(pa.float64()),
        "length": pa.float64(),
    }
    changed = table
    for name, kind in other.items():
        changed = changed.set_column(changed.column_names.index(name), name, table[name].cast(kind))
    tags = changed.column_names.index("tags")
    changed = changed.set_column(tags, "tags", table["tags"].dictionary_encode())
    before, after = scores(table), scores(changed)
    for column in ("row", "score_click", "score_watched"):
        np.testing.assert_allclose(before[column], after[column], rtol=1e-6)


def test_csv_and_parquet_give_the_same_tensors(tmp_path: Path) -> None:
    schema = raw.without_outcomes(schema_yaml.loads(FLAT))
    table = pa.table(
        {
            "who": pa.array([7, None, EMPTY, 2**63 - 1], pa.int64()),
            "city": pa.array(["ü", None, "", 'a,"b'], pa.large_string()).dictionary_encode(),
            "night": pa.array([1, 0, None, 1], pa.uint8()),
            "tags": ["a||b|c", None, "", "ü"],
            "length": pa.array([1.5, None, 0.0, 7.0]),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    pyarrow.csv.write_csv(table.set_column(1, "city", table["city"].cast(pa.string())), tmp_path / "log.csv")
    expected: dict[str, list[Any]] = {
        "who": [7, EMPTY, EMPTY, 2**63 - 1],
        "city": ["ü".encode(), b"", b"", b'a,"b'],
        "night": [1, 0, EMPTY, 1],
        "tags": [[b"a", b"b"], [b"", b""], [b"", b""], ["ü".encode(), b""]],
        "length": [1.5, np.nan, 0.0, 7.0],
    }
    kinds = {"who": pa.int64(), "length": pa.float64()}
    for name in ("log.parquet", "log.csv"):
        log = raw.open_log(str(tmp_path / name), schema)
        [(rows, kept, bad)] = [part for part in raw.read(log, schema, ["who", "length"]) if len(part[0].row_ids)]
        arrays = raw.tensors(schema, rows)
        for feature, values in expected.items():
            np.testing.assert_array_equal(arrays[feature], np.array(values, arrays[feature].dtype), feature)
        assert not bad and kept["who"].type == pa.int64()
        if log.text:
            assert {n: column.type for n, column in kept.items()} == kinds


def test_rows_are_numbered_through_files_and_bad_ones(tmp_path: Path) -> None:
    schema = raw.without_outcomes(schema_yaml.loads(FLAT))
    (tmp_path / "a.csv").write_text("who,city,night,tags,length\n1,x,0,t,2\n1,x,0,t,-5\n1,x,0\n3,x,0,t,2\n")
    (tmp_path / "b.csv").write_text("who,city,night,tags,length\n4,x,0,t,2\n")
    log = raw.open_log(str(tmp_path), schema)
    with pytest.raises(UserError, match=r"a.csv, row 2: 3 values, but the file has 5 columns \(--on_bad_rows=drop"):
        list(raw.read(log, schema, []))
    parts = list(raw.read(log, schema, ["who"], drop_bad_rows=True))
    assert np.concatenate([rows.row_ids for rows, _, _ in parts]).tolist() == [0, 3, 4]
    assert pa.concat_arrays([kept["who"] for _, kept, _ in parts]).to_pylist() == [1, 3, 4]
    bad = sum((counts for _, _, counts in parts), start=parts[0][2].__class__())
    assert bad == {("length", "log1p of -1 or less"): 1, ("", "wrong number of columns"): 1}


def test_nothing_is_written_when_a_log_cannot_be_scored(model: Published, test_rows: pa.Table, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    pq.write_table(pa.table({"row": [1], "score_click": [0.5]}), output)
    before = output.read_bytes()
    pq.write_table(test_rows, tmp_path / "a.parquet")
    lengths = pa.array([-7] * test_rows.num_rows, pa.int64())
    bad = test_rows.set_column(test_rows.column_names.index("length"), "length", lengths)
    pq.write_table(bad, tmp_path / "b.parquet")
    log = f"{tmp_path}/a.parquet,{tmp_path}/b.parquet"
    with pytest.raises(UserError, match=r"b.parquet, row 0: feature 'length' is -7; log1p needs values above -1"):
        scoring.score_log(model, log, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet", "out.parquet"]
    assert output.read_bytes() == before
    done = scoring.score_log(model, log, output, drop_bad_rows=True)
    assert done.rows == pq.read_metadata(output).num_rows == test_rows.num_rows
    assert sum(done.bad.values()) == test_rows.num_rows

    pq.write_table(test_rows.slice(0, 0), tmp_path / "a.parquet")
    assert scoring.score_log(model, f"{tmp_path}/a.parquet", output).rows == 0
    assert pq.read_table(output).column_names == ["row", "user", "ranking_score", "score_click", "score_watched"]


def test_logs_that_do_not_fit(model: Published, test_rows: pa.Table, tmp_path: Path) -> None:
    log, output = tmp_path / "log.parquet", tmp_path / "out.parquet"
    pq.write_table(test_rows.rename_columns({"temperature": "temprature"}), log)
    with pytest.raises(UserError, match=r"features.temperature.column: 'temperature' is not in .*'temprature'\?"):
        scoring.score_log(model, str(log), output)
    pq.write_table(test_rows, log)
    with pytest.raises(UserError, match=r"--keep=tag: not in the log; did you mean 'tags'\? Columns: user, age"):
        scoring.score_log(model, str(log), output, keep=["tag"])
    with pytest.raises(UserError, match="--keep: the output has a column 'row' of its own"):
        scoring.score_log(model, str(log), output, keep=["row"])
    with pytest.raises(UserError, match="is a file of the log"):
        scoring.score_log(model, str(log), log)
    with files.locked(files.hidden(output, "lock"), output), pytest.raises(UserError, match="another job is writing"):
        scoring.score_log(model, str(log), output)
    pq.write_table(test_rows, output)
    with pytest.raises(UserError, match="out.parquet exists and does not hold scores of rows: choose another output"):
        scoring.score_log(model, str(log), output)
    assert pq.read_table(output).equals(test_rows)


def test_what_is_no_model(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        Published(tmp_path / "none")
    with pytest.raises(UserError, match="neither saved_model.pb nor a version"):
        Published(tmp_path)
    (tmp_path / "3").mkdir()
    with pytest.raises(UserError, match=r"3/saved_model.pb is missing"):
        Published(tmp_path)
    for name in ("saved_model.pb", "schema.yaml", "manifest.json"):
        (tmp_path / "3" / name).write_bytes((exported / "1" / name).read_bytes())
    tree = json.loads((tmp_path / "3" / "manifest.json").read_text())
    (tmp_path / "3" / "manifest.json").write_text(json.dumps(tree | {"files": {}}))
    with pytest.raises(JobError, match=r"/3 cannot be loaded: "):
        Published(tmp_path).signature("serving_default")
    assert Published(exported / "1").directory == Published(exported).directory


@pytest.mark.parametrize("name", ["variables/variables.data-00000-of-00001", "assets/user.vocabulary", "schema.yaml"])
def test_a_version_whose_files_are_others_is_refused(tmp_path: Path, exported: Path, name: str) -> None:
    """As the server refuses it: TensorFlow would load most of them, and score something else."""
    version = shutil.copytree(exported / "1", tmp_path / "1")
    data = bytearray((version / name).read_bytes())
    data[len(data) // 2] ^= 1
    (version / name).write_bytes(data)
    words = f"1 is not the version that was published: {name} is not the file of manifest.json: its SHA-256 differs$"
    with pytest.raises(UserError, match=words):
        Published(tmp_path)
    (version / name).unlink()
    with pytest.raises(UserError, match=f"{name}.* is missing"):
        Published(tmp_path)


USER = {"user": "plain", "age": 20, "history": [1, None, 2, 4, 5], "hour": 3, "weekend": 1, "temperature": 20.5}
ITEMS: dict[str, Any] = {
    "item": [1, 0, 2**40],
    "never_twice": ["x", None, ""],
    "never_again": [1, 2, None],
    "tags": [["plain", "unseen"], [], None],
    "length": [10, None, 2.5],
    "image": [[0.1, 0.2, 0.3], [1, 2, 3], None],
}


def test_candidates_score_as_rows_of_a_log(model: Published, tmp_path: Path) -> None:
    """From JSON objects, JSON lists, JSON files, and Parquet (there the tags are text with a separator)."""
    texts = ["plain|unseen", "", None]
    columns = {"row" if name == "never_again" else name: values for name, values in ITEMS.items()}
    table = pa.table(columns | {"tags": texts, "title": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "items.parquet")
    log = table.drop("title")
    for name, value in USER.items():
        log = log.append_column(name, pa.array([value] * 3))
    pq.write_table(log, tmp_path / "log.parquet")
    scoring.score_log(model, str(tmp_path / "log.parquet"), tmp_path / "out.parquet")
    expected = pq.read_table(tmp_path / "out.parquet")

    user = json.dumps(USER)
    (tmp_path / "items.json").write_text(json.dumps(ITEMS))
    (tmp_path / "user.json").write_text(user)
    rows = [dict(zip(ITEMS, values, strict=True)) for values in zip(*ITEMS.values(), strict=True)]
    for who, what in (
        (user, json.dumps(ITEMS)),
        (user, json.dumps(rows)),
        (str(tmp_path / "user.json"), str(tmp_path / "items.json")),
        (user, str(tmp_path / "items.parquet")),
    ):
        items, scores = candidates.from_model(model, who, what)
        assert list(items) == list(ITEMS) and list(scores) == ["ranking_score", "click", "watched"]
        for name, values in scores.items():
            column = name if name == "ranking_score" else f"score_{name}"
            np.testing.assert_allclose(values, expected[column], rtol=1e-5, atol=1e-6)


def test_the_table_is_ranked() -> None:
    items = {"item": [7, 8, 9], "tags": [["a", "b"], None, ["x" * 40]], "length": [1.0, float("nan"), 2.5]}
    scores = {"click": np.array([0.1, 0.3, 0.3]), "watched": np.array([1.5, 0.25, 2])}
    assert candidates.table(items, scores, "watched").splitlines() == [
        "   item                              tags  length  watched  click",
        "1     9  xxxxxxxxxxxxxxxxxxxxxxxxxxxxx...     2.5   2.0000  .3000",
        "2     7                             a | b     1.0   1.5000  .1000",
        "3     8                                 -       -    .2500  .3000",
    ]
    ranked = candidates.table(items, scores, "click").splitlines()
    assert [line.split()[1] for line in ranked[1:]] == ["8", "9", "7"] and ranked[0].endswith("click  watched")
    assert candidates.check_task(None, ["click", "watched"]) == "click"
    assert candidates.check_task(None, ["click", "ranking_score"]) == "ranking_score"
    with pytest.raises(UserError, match=r"--by=clik: no such task; did you mean 'click'\? Tasks: click, watched"):
        candidates.check_task("clik", ["click", "watched"])


@pytest.mark.parametrize(
    ("user", "items", "why"),
    [
        ("{'user': 1}", ITEMS, r"--user is not JSON: Expecting .*, line 1, column 2, before \"'user'.*shell"),
        ('{"user": "a"', ITEMS, r"--user is not JSON: .*, line 1, column 13, where it ends"),
        ('{"user": "a", "user": "b"}', ITEMS, "--user: 'user' occurs twice"),
        ("[1]", ITEMS, r"--user is a JSON list; an object is expected"),
        ("nobody.json", ITEMS, "--user=nobody.json cannot be read"),
        ({"huor": 1}, ITEMS, r"'hour' is missing.*'huor' is no feature of the model \(did you mean 'hour'\?\)"),
        ({"length": 1}, ITEMS, "'length' is a feature of items"),
        ({"hour": "late"}, ITEMS, r"user feature 'hour' is 'late' \(str\); the model takes int64"),
        ({}, "[1, 2]", "--items is a JSON list; expected is an object of lists"),
        ({}, ITEMS | {"item": 5}, "--items: 'item' is a JSON number; a list with one value per item is expected"),
        ({}, ITEMS | {"item": [5]}, "item feature 'image' has 3 items and 'item' has 1"),
        ({}, ITEMS | {"image": [[1, 2]] * 3}, "item feature 'image', item 0 has 2 elements; the model takes 3"),
        ({}, dict.fromkeys(ITEMS, []), "--items: there are no items"),
        ({}, "[]", "there are no items"),
        ({}, "none.csv", "none.csv: no such file or directory"),
    ],
)  # fmt: skip
def test_mistakes_in_candidates(model: Published, user: Any, items: Any, why: str) -> None:
    if isinstance(user, dict):
        given = {name: value for name, value in USER.items() if "huor" not in user or name != "hour"} | user
        user = json.dumps(given)
    with pytest.raises(UserError, match=why):
        candidates.from_model(model, user, items if isinstance(items, str) else json.dumps(items))


def test_mistakes_in_files_of_candidates(model: Published, tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item,never_twice,row,tags,lenght,image\n1,a,1,t,5,0\n")
    with pytest.raises(
        UserError, match=r"--items=.*items.csv: no column 'length'; did you mean 'lenght'\? Columns: item"
    ):
        candidates.from_model(model, json.dumps(USER), str(path))
    path.write_text("item,never_twice,row,tags,length,image\n1,a,1,t,5,0\n1,a,1,t,long,0\n")
    with pytest.raises(UserError, match=r"items.csv, column 'length', row 1: 'long'; the model takes float32"):
        candidates.from_model(model, json.dumps(USER), str(path))
    path.write_text("item,never_twice,row,tags,length,image\n1,a,1,t,5,0\n")
    with pytest.raises(UserError, match=r"column 'image' holds binary; the model takes a vector for each item: write"):
        candidates.from_model(model, json.dumps(USER), str(path))


@pytest.fixture(scope="module")
def target(nasty_target: str) -> str:
    """host:port of a server of the model."""
    return nasty_target


def test_a_server_scores_the_same(model: Published, target: str) -> None:
    _, here = candidates.from_model(model, json.dumps(USER), json.dumps(ITEMS))
    items, there = candidates.from_server(target, "nasty", json.dumps(USER), json.dumps(ITEMS))
    assert items == ITEMS and there.keys() == here.keys()
    for task, scores in here.items():
        np.testing.assert_allclose(there[task], scores, atol=1e-6)
    with pytest.raises(UserError, match="'lenght' is no feature of the model"):
        candidates.from_server(target, "nasty", json.dumps(USER), json.dumps(ITEMS | {"lenght": [1, 2, 3]}))
    with pytest.raises(JobError, match="NOT_FOUND.*--model_name says which model"):
        candidates.from_server(target, "tasty", json.dumps(USER), json.dumps(ITEMS))


def test_a_server_ranks_by_the_ranking_score(nasty_server: Any) -> None:
    """Metadata, the client's `top`, REST and the metrics, of a running server."""
    items = {name: (values[0], values[0]) for name, values in ITEMS.items()} | {"length": (1, 1000)}
    with RankingClient(nasty_server.grpc, model="nasty", timeout=30) as client:
        assert set(client.metadata().tasks) == {"click", "watched", "ranking_score"}
        scores = client.rank(USER, items)
        top = client.top(USER, items, k=2)
    # click^2 log1p(length) + .001 temperature watched
    by_hand = scores["click"] ** 2 * np.log1p([1, 1000]) + 0.001 * 20.5 * scores["watched"]
    np.testing.assert_allclose(scores["ranking_score"], by_hand, rtol=1e-4)
    assert top.indices.tolist() == np.argsort(-by_hand).tolist() == [1, 0]

    one = USER | {"history": [1, 2, 4]}
    body = {"signature_name": "rank", "inputs": {k: [v] for k, v in (one | items).items()}}
    url = f"http://{nasty_server.rest}/v1/models/nasty"
    with urllib.request.urlopen(f"{url}:predict", json.dumps(body).encode(), timeout=30) as answer:
        outputs = json.load(answer)["outputs"]
    assert outputs.keys() == {"click", "watched", "ranking_score"} and outputs["ranking_score"][0][1] > 0
    with urllib.request.urlopen(f"{url}/metadata", timeout=30) as answer:
        signature = json.load(answer)["metadata"]["signature_def"]["signature_def"]["rank"]
    assert "ranking_score" in signature["outputs"]

    counted = 0.0
    for _ in range(100):  # calls are counted after they were answered
        with urllib.request.urlopen(f"http://{nasty_server.metrics}/metrics", timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if 'task="ranking_score"' in line]
        counted = sum(
            float(line.split()[-1]) for line in lines if line.startswith("stem_serve_task_score") and "+Inf" in line
        )
        if counted >= 6:
            break
        time.sleep(0.05)
    assert counted >= 6, lines  # two items in three calls


def test_the_job_scores_a_log(run_job: Job, exported: Path, run: Any, tmp_path: Path) -> None:
    output = tmp_path / "new" / "scores.parquet"
    log = f"{run.manifest.data_dir}/raw/test"
    done = run_job("export.jobs.predict", log, f"--model={exported}", f"--output={output}", "--keep=row_id")
    assert done.returncode == 0 and not done.stderr, done.stderr
    rows = pq.read_metadata(output).num_rows
    said, written = done.stdout.splitlines()
    assert re.fullmatch(rf"nasty version 1: {rows} rows in [\d.]+ s, [\d,]+ rows/s", said)
    assert written == f"written: {output} (row, user, row_id, ranking_score, score_click, score_watched)"


def test_the_job_ranks_candidates(run_job: Job, target: str) -> None:
    done = run_job(
        "export.jobs.predict", f"--server={target}", "--model_name=nasty", f"--user={json.dumps(USER)}",
        f"--items={json.dumps(ITEMS)}", "--by=watched",
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    heading, *lines = done.stdout.splitlines()
    assert heading.split()[-3:] == ["watched", "click", "ranking_score"] and len(lines) == 3
    watched = [float(line.split()[-3]) for line in lines]
    assert watched == sorted(watched, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        ([], 2, "--user is required to score candidates (or name a log"),
        (["log.csv"], 2, "--model is required"),
        (["log.csv", "--model=m", "--output=scores.csv"], 2, "--output=scores.csv: scores are written as Parquet"),
        (["--user={}", "--items={}"], 2, "give --model=EXPORT_DIR or --server=HOST:PORT, one of the two"),
        (["--user={}", "--items={}", "--server=127.0.0.1:1"], 1, "is a server running there? stem-serve starts one"),
    ],
)
def test_the_job_says_what_is_wrong(job_in_process: Job, arguments: list[str], code: int, why: str) -> None:
    done = job_in_process("export.jobs.predict", *arguments)
    assert done.returncode == code and why in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
