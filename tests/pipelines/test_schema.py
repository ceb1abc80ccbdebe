"""Reading schemas: what is accepted, and the message of every mistake a person can make."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import schema_yaml
from pipelines.schema import Feature, Label, Schema, Space, Task, Threshold
from stem_util.errors import UserError

DATASETS = Path(__file__).parents[2] / "datasets"

FULL = """
name: everything
group: uid
item: vid
task_tables: [user, tags]
features:
  user: {kind: categorical, side: user, dtype: int64, column: uid, dim: 8, min_count: 2, missing: error}
  vid: {kind: categorical, side: item, dtype: string}
  tags: {kind: multivalent, side: item, dtype: string, max_length: 4, separator: "|", pooling: sum}
  cats: {kind: multivalent, side: item, dtype: int64, max_length: 3}
  ms: {kind: numeric, side: item, transform: [log1p, standardise], allow_label_column: true}
  age: {kind: numeric, side: user, bucketise: {boundaries: [18, 25.5, 1e2]}}
  price: {kind: numeric, side: item, bucketise: {quantiles: 20}}
  image: {kind: dense, side: item, length: 64, dtype: float32}
tasks:
  click: {label: {column: is_click}}
  rich: {weight: 0.5, label: {column: income, equals: "50000+.", missing: outside}}
  kind3: {label: {column: kind, equals: 3}}
  watched: {type: regression, weight: 1e-3, label: {column: play, divide_by: ms, clip: [0, 1], missing: outside}}
  buy: {label: {column: is_buy}, space: {task: click}}
  share: {type: regression, output: sigmoid, label: {column: shared, clip: [0, 1]}, space: {column: shown}}
  ms_watched: {type: regression, label: {column: play, standardise: true}}
  loved: {label: {column: rating, at_least: 4.5}}
  meh: {label: {column: rating, at_least: 2, at_most: 3}}
  rated: {label: {column: rating, in: [1, 4.5]}}
  long: {label: {column: play, at_least: {column: ms, times: 0.5}, at_most: {column: cap}}}
"""

# The smallest schema; tests change one line of it.
SMALL = """
name: small
features:
  user: {kind: categorical, side: user, dtype: int64}
  vid: {kind: categorical, side: item, dtype: int64}
tasks:
  click: {label: {column: is_click}}
  watched: {type: regression, label: {column: play, divide_by: total}}
"""


def test_every_key_arrives_in_the_dataclass() -> None:
    read = schema_yaml.loads(FULL)
    assert read == Schema(
        name="everything",
        group="uid",
        item="vid",
        task_tables=("user", "tags"),
        features=(
            Feature("user", "categorical", "user", "uid", "int64", dim=8, min_count=2, missing="error"),
            Feature("vid", "categorical", "item", "vid", "string"),
            Feature("tags", "multivalent", "item", "tags", "string", max_length=4, separator="|", pooling="sum"),
            Feature("cats", "multivalent", "item", "cats", "int64", max_length=3),
            Feature(
                "ms", "numeric", "item", "ms", "float32", transform=("log1p", "standardise"), allow_label_column=True
            ),
            Feature("age", "numeric", "user", "age", "float32", boundaries=(18.0, 25.5, 100.0)),
            Feature("price", "numeric", "item", "price", "float32", quantiles=20),
            Feature("image", "dense", "item", "image", "float32", length=64),
        ),
        tasks=(
            Task("click", Label("is_click")),
            Task("rich", Label("income", equals="50000+.", missing="outside"), weight=0.5),
            Task("kind3", Label("kind", equals=3)),
            Task("watched", Label("play", divide_by="ms", clip=(0.0, 1.0), missing="outside"), "regression", 0.001),
            Task("buy", Label("is_buy"), space=Space(task="click")),
            Task(
                "share", Label("shared", clip=(0.0, 1.0)), "regression", output="sigmoid", space=Space(column="shown")
            ),
            Task("ms_watched", Label("play", standardise=True), "regression"),
            Task("loved", Label("rating", at_least=4.5)),
            Task("meh", Label("rating", at_least=2.0, at_most=3.0)),
            Task("rated", Label("rating", one_of=(1, 4.5))),
            Task("long", Label("play", at_least=Threshold("ms", 0.5), at_most=Threshold("cap"))),
        ),
    )
    assert read.task_names[:6] == ("click", "rich", "kind3", "watched", "buy", "share")
    assert read.tasks[5].columns == ("shared", "shown") and read.tasks[-1].columns == ("play", "ms", "cap")
    assert [feature.name for feature in read.task_features] == ["user", "tags"]
    assert read.feature("price").bucketised and not read.feature("ms").bucketised


def test_dumps_is_read_back_as_the_same_schema() -> None:
    read = schema_yaml.loads(FULL)
    text = schema_yaml.dumps(read)
    assert schema_yaml.loads(text) == read
    assert (
        "\n  user: {kind: categorical, side: user, column: uid, dtype: int64, dim: 8, min_count: 2, missing: error}\n"
        in text
    )
    assert "\n  buy: {label: {column: is_buy}, space: {task: click}}\n" in text
    assert "\n  share: {type: regression, output: sigmoid, label: {" in text
    assert "\n  rated: {label: {column: rating, in: [1, 4.5]}}\n" in text
    assert "label: {column: play, at_least: {column: ms, times: 0.5}, at_most: {column: cap}}" in text


def test_a_mask_known_beforehand_may_be_a_feature() -> None:
    masked = SMALL.replace(CLICK, "click: {label: {column: is_click}, space: {column: user}}")
    read = schema_yaml.loads(masked.replace("side: user", "side: user, allow_label_column: true"))
    assert read.feature("user").column == "user" and read.tasks[0].space == Space(column="user")


def test_sigmoid_needs_no_clip() -> None:
    """A log may hold shares already; conversion checks that it does."""
    read = schema_yaml.loads(SMALL.replace("type: regression", "type: regression, output: sigmoid"))
    assert (read.tasks[1].output, read.tasks[1].label.clip) == ("sigmoid", None)


@pytest.mark.parametrize(
    "text", ["yes", "1e-3", "010", "10:30", "2024-01-01", "~", "é\n\t\"'", "1", ".nan", "<<", "#x"]
)
def test_any_text_survives_the_round_trip(text: str) -> None:
    before = Schema(
        "s", (Feature("null", "categorical", "user", text, "string"),), (Task("true", Label("y", equals=text)),)
    )
    assert schema_yaml.loads(schema_yaml.dumps(before)) == before


def test_words_that_yaml_1_1_misreads_are_text() -> None:
    read = schema_yaml.loads(SMALL.replace("is_click}", "is_click, equals: no}"))
    assert read.tasks[0].label.equals == "no"


@pytest.mark.parametrize(
    ("tables", "names"),
    [("all", ["user", "vid"]), ("none", []), ("user", ["user"]), ("item", ["vid"]), ("[vid]", ["vid"])],
)
def test_task_features(tables: str, names: list[str]) -> None:
    read = schema_yaml.loads(SMALL + f"task_tables: {tables}\n")
    assert [feature.name for feature in read.task_features] == names


USER = "user: {kind: categorical, side: user, dtype: int64}"
CLICK = "click: {label: {column: is_click}}"
WATCHED = "{column: play, divide_by: total}"
NUMERIC = "user: {kind: numeric, side: user, bucketise: {boundaries: %s}}"
CATEGORICAL = "kind, side, dtype, min_count, hash, column, dim, missing, allow_label_column"
NUMERIC_KEYS = "kind, side, dtype, transform, bucketise, column, dim, missing, allow_label_column"
NAMES = "; use letters, digits and '_', a letter first (and column: or label: {column: ...} for the log's own name)"
GIVES_AWAY = (
    ", so the feature may give the label away; drop it, or set allow_label_column: true if it is known before the label"
)
# ruff: noqa: E501 - one case a line
# fmt: off
UNREADABLE = [
    # (text of SMALL, what stands there instead, the message behind "s.yaml: ")
    ("name: small", "name: small\nseed: 1", "unknown key 'seed' of a schema; allowed: name, features, tasks, group, item, time, task_tables, weight, ranking"),
    ("name: small", "nmae: small", "unknown key 'nmae' of a schema; did you mean 'name'? Allowed: name, features, tasks, group, item, time, task_tables, weight, ranking"),
    ("name: small\n", "", "the key 'name' is missing (of the data set)"),
    ("name: small", "name: 3", "name: should be text (put it in quotes); got 3"),
    ("name: small", "name: ''", "name: should not be empty"),
    ("name: small", "name: a/b", "name: 'a/b' should be letters, digits, '_', '.' and '-', a letter first"),
    ("name: small", "name: small\ngroup: [user]", "group: should be text; got ['user'] (a list)"),
    ("name: small", "name: small\ngroup:", "group: should be text; got nothing"),
    (USER, USER + "\n  " + USER, "features.user: given twice, on lines 4 and 5; keep one"),
    ("side: user,", "side: user, side: item,", "features.user.side: given twice, on lines 4 and 4; keep one"),
    ("name: small", "name: small\nname: small", "name: given twice, on lines 2 and 3; keep one"),
    ("name: small", "name: [", "line 4, column 7: while parsing a flow sequence, expected ',' or ']', but got ':'"),
    ("name: small", "name: a: b", "line 2, column 8: mapping values are not allowed here"),
    ("name: small", "\tname: x", "line 2, column 1: while scanning for the next token, found character '\\t' that cannot start any token"),
    ("name: small", "name: !!python/name:os.system x", "line 2, column 7: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'"),
    ("name: small", "[a]: b", "line 2, column 1: a key should be text"),
    ("user: {", "true: {", "features: the key true (a bool) should be text; put it in quotes"),
    ("user: {", "3: {", "features: the key 3 should be text; put it in quotes"),
    ("user: {", "user-id: {", "features: 'user-id' cannot be a feature's name" + NAMES),
    ("user: {", "_user: {", "features: '_user' cannot be a feature's name" + NAMES),
    ("click: {", "clicks/day: {", "tasks: 'clicks/day' cannot be a task's name" + NAMES),
    (USER, "user: int64", "features.user: should be a mapping with the keys kind, side, ...; got 'int64' (text)"),
    ("kind: categorical, side: user", "side: user", "features.user: the key 'kind' is missing (categorical, multivalent, numeric, dense)"),
    ("kind: categorical, side: user", "kind: categorical", "features.user: the key 'side' is missing (user, item, context)"),
    (", dtype: int64}\n  vid", "}\n  vid", "features.user: the key 'dtype' is missing (int64 or string)"),
    ("kind: categorical, side: user", "kind: categorcal, side: user", "features.user.kind: 'categorcal' (text) is not allowed; did you mean 'categorical'? Allowed: categorical, multivalent, numeric, dense"),
    ("side: user", "side: usr", "features.user.side: 'usr' (text) is not allowed; did you mean 'user'? Allowed: user, item, context"),
    ("side: user, dtype: int64", "side: user, dtype: int32", "features.user.dtype: 'int32' (text) is not allowed; did you mean 'int64'? Allowed: int64, string"),
    ("side: user, dtype: int64", "side: user, dtype: 64", "features.user.dtype: 64 is not allowed; allowed: int64, string"),
    ("side: user", "side: user, mincount: 3", "features.user: unknown key 'mincount' of a categorical feature; did you mean 'min_count'? Allowed: " + CATEGORICAL),
    ("side: user", "side: user, min_count: 0", "features.user.min_count: should be a whole number of at least 1; got 0"),
    ("side: user", "side: user, min_count: -1", "features.user.min_count: should be a whole number of at least 1; got -1"),
    ("side: user", "side: user, min_count: true", "features.user.min_count: should be a whole number of at least 1; got true (a bool)"),
    ("side: user", "side: user, min_count: 1.5", "features.user.min_count: should be a whole number of at least 1; got 1.5"),
    ("side: user", "side: user, min_count: '3'", "features.user.min_count: should be a whole number of at least 1; got '3' (text)"),
    ("side: user", "side: user, hash: {buckets: 1}", "features.user.hash.buckets: should be a whole number of at least 2, at most 2,147,483,645; got 1"),
    ("side: user", "side: user, hash: {buckets: 2147483646}", "features.user.hash.buckets: should be a whole number of at least 2, at most 2,147,483,645; got 2147483646"),
    ("side: user", "side: user, hash: 1000", "features.user.hash: should be a mapping with the keys buckets, hashes; got 1000"),
    ("side: user", "side: user, hash: {hashes: 2}", "features.user.hash: the key 'buckets' is missing (how many rows the values share)"),
    ("side: user", "side: user, hash: {buckets: 9, hashes: 3}", "features.user.hash.hashes: should be a whole number of at least 1, at most 2; got 3"),
    ("side: user", "side: user, hash: {buckets: 9}, min_count: 2", "features.user.min_count: cannot be combined with hash, which counts no values; drop one of them"),
    (USER, "user: {kind: numeric, side: user, hash: {buckets: 9}}", "features.user.hash: does not apply to a numeric feature, only to categorical and multivalent ones; a numeric feature takes: " + NUMERIC_KEYS),
    ("side: user", "side: user, dim: 0", "features.user.dim: should be a whole number of at least 1; got 0"),
    ("side: user", "side: user, missing: outside", "features.user.missing: 'outside' (text) is not allowed; allowed: rare, error"),
    ("side: user", "side: user, allow_label_column: 1", "features.user.allow_label_column: should be true or false; got 1"),
    ("side: user", "side: user, column: 7", "features.user.column: should be text (put it in quotes); got 7"),
    ("side: user", "side: user, pooling: mean", "features.user.pooling: does not apply to a categorical feature, only to multivalent ones; a categorical feature takes: " + CATEGORICAL),
    ("side: user", "side: user, length: 3", "features.user.length: does not apply to a categorical feature, only to dense ones; a categorical feature takes: " + CATEGORICAL),
    (USER, "user: {kind: numeric, side: user, min_count: 3}", "features.user.min_count: does not apply to a numeric feature, only to categorical and multivalent ones; a numeric feature takes: " + NUMERIC_KEYS),
    (USER, "user: {kind: numeric, side: user, dtype: int64}", "features.user.dtype: 'int64' (text) is not allowed; allowed: float32"),
    (USER, "user: {kind: numeric, side: user, transform: log1p}", "features.user.transform: should be a list of log1p and standardise; got 'log1p' (text)"),
    (USER, "user: {kind: numeric, side: user, transform: [log]}", "features.user.transform[0]: 'log' (text) is not allowed; did you mean 'log1p'? Allowed: log1p, standardise"),
    (USER, "user: {kind: numeric, side: user, transform: [standardise, log1p]}", "features.user.transform: ['standardise', 'log1p'] should be [log1p], [standardise] or [log1p, standardise]"),
    (USER, "user: {kind: numeric, side: user, transform: [log1p], bucketise: {quantiles: 3}}", "features.user.transform: cannot be combined with bucketise: buckets do not depend on the scale; drop one of them"),
    (USER, "user: {kind: numeric, side: user, bucketise: {boundaries: [1], quantiles: 3}}", "features.user.bucketise: should hold one of boundaries: [a, b, ...] and quantiles: n"),
    (USER, "user: {kind: numeric, side: user, bucketise: {}}", "features.user.bucketise: should hold one of boundaries: [a, b, ...] and quantiles: n"),
    (USER, "user: {kind: numeric, side: user, bucketise: 20}", "features.user.bucketise: should be a mapping with the keys boundaries, quantiles; got 20"),
    (USER, "user: {kind: numeric, side: user, bucketise: {quantile: 3}}", "features.user.bucketise: unknown key 'quantile'; did you mean 'quantiles'? Allowed: boundaries, quantiles"),
    (USER, "user: {kind: numeric, side: user, bucketise: {quantiles: 1}}", "features.user.bucketise.quantiles: should be a whole number of at least 2; got 1"),
    (USER, NUMERIC % "[]", "features.user.bucketise.boundaries: should be a list of ascending numbers; got [] (a list)"),
    (USER, NUMERIC % "[3, 1]", "features.user.bucketise.boundaries[1]: 1 should be greater than 3 before it, in float32 too"),
    (USER, NUMERIC % "[1, 1]", "features.user.bucketise.boundaries[1]: 1 should be greater than 1 before it, in float32 too"),
    (USER, NUMERIC % "[16777216, 16777217]", "features.user.bucketise.boundaries[1]: 16777217 should be greater than 16777216 before it, in float32 too"),
    (USER, NUMERIC % "[.inf]", "features.user.bucketise.boundaries[0]: should be a finite number; got inf"),
    (USER, NUMERIC % "[1, .nan]", "features.user.bucketise.boundaries[1]: should be a finite number; got nan"),
    (USER, NUMERIC % "[1e39]", "features.user.bucketise.boundaries[0]: 1e+39 is too large for float32"),
    (USER, NUMERIC % "[true]", "features.user.bucketise.boundaries[0]: should be a finite number; got true (a bool)"),
    (USER, "user: {kind: multivalent, side: user, dtype: string}", "features.user: the key 'max_length' is missing (how many values to keep)"),
    (USER, "user: {kind: multivalent, side: user, dtype: string, max_length: 0}", "features.user.max_length: should be a whole number of at least 1; got 0"),
    (USER, "user: {kind: multivalent, side: user, dtype: string, max_length: 3, separator: ''}", "features.user.separator: should not be empty"),
    (USER, "user: {kind: multivalent, side: user, dtype: string, max_length: 3, pooling: max}", "features.user.pooling: 'max' (text) is not allowed; allowed: mean, sum"),
    (USER, "user: {kind: dense, side: user}", "features.user: the key 'length' is missing (how many elements the vector has)"),
    (USER, "user: {kind: dense, side: user, length: -4}", "features.user.length: should be a whole number of at least 1; got -4"),
    (CLICK, "click: {lable: {column: is_click}}", "tasks.click: unknown key 'lable' of a task; did you mean 'label'? Allowed: label, type, weight, row_weight, output, space"),
    (CLICK, "click: {}", "tasks.click: the key 'label' is missing (as in label: {column: is_click})"),
    (CLICK, "click: {label: is_click}", "tasks.click.label: should be a mapping with the keys column, equals, in, at_least, at_most, divide_by, clip, standardise, missing; got 'is_click' (text)"),
    (CLICK, "click: {label: {equals: 1}}", "tasks.click.label: the key 'column' is missing (of the log)"),
    (CLICK, "click: {label: {column: c, equal: 1}}", "tasks.click.label: unknown key 'equal' of a label; did you mean 'equals'? Allowed: column, equals, in, at_least, at_most, divide_by, clip, standardise, missing"),
    (CLICK, "click: {type: classification, label: {column: c}}", "tasks.click.type: 'classification' (text) is not allowed; allowed: binary, regression"),
    (CLICK, "click: {weight: -1, label: {column: c}}", "tasks.click.weight: should be a finite number of at least 0; got -1"),
    (CLICK, "click: {weight: .inf, label: {column: c}}", "tasks.click.weight: should be a finite number of at least 0; got inf"),
    (CLICK, "click: {label: {column: c, clip: [0, 1]}}", "tasks.click.label.clip: does not apply to a binary task, only to a regression one (type: regression)"),
    (CLICK, "click: {label: {column: c, divide_by: d}}", "tasks.click.label.divide_by: does not apply to a binary task, only to a regression one (type: regression)"),
    (CLICK, "click: {label: {column: c, missing: rare}}", "tasks.click.label.missing: 'rare' (text) is not allowed; allowed: error, outside"),
    (CLICK, "click: {label: {column: c, equals: true}}", "tasks.click.label.equals: should be text (in quotes) or a finite number; got true (a bool). A bool column is a label without a condition"),
    (CLICK, "click: {label: {column: c, equals: .inf}}", "tasks.click.label.equals: should be text (in quotes) or a finite number; got inf"),
    (CLICK, "click: {label: {column: c, equals: }}", "tasks.click.label.equals: should be text (in quotes) or a finite number; got nothing"),
    (CLICK, "click: {label: {column: c, equals: 9223372036854775808}}", "tasks.click.label.equals: 9223372036854775808 does not fit int64"),
    (CLICK, "click: {label: {column: c, in: buy}}", "tasks.click.label.in: should be a list of the values that mean 1, as in [click, buy]; got 'buy' (text)"),
    (CLICK, "click: {label: {column: c, in: []}}", "tasks.click.label.in: should be a list of the values that mean 1, as in [click, buy]; got [] (a list)"),
    (CLICK, "click: {label: {column: c, in: [a, 1]}}", "tasks.click.label.in[1]: 1 stands beside 'a'; a column holds texts or numbers, not both"),
    (CLICK, "click: {label: {column: c, in: [1, 2, 1.0]}}", "tasks.click.label.in[2]: 1 is listed twice; keep one"),
    (CLICK, "click: {label: {column: c, in: [true]}}", "tasks.click.label.in[0]: should be text (in quotes) or a finite number; got true (a bool). A bool column is a label without a condition"),
    (CLICK, "click: {label: {column: c, equals: 1, in: [1]}}", "tasks.click.label.in: cannot be combined with equals; only at_least and at_most go together"),
    (CLICK, "click: {label: {column: c, in: [1], at_most: 3}}", "tasks.click.label.at_most: cannot be combined with in; only at_least and at_most go together"),
    (CLICK, "click: {label: {column: c, at_least: 4, at_most: 3.5}}", "tasks.click.label.at_most: no value is at least 4 and at most 3.5"),
    (CLICK, "click: {label: {column: c, at_least: high}}", "tasks.click.label.at_least: should be a number, or another column as in {column: duration_ms, times: 0.5}; got 'high' (text)"),
    (CLICK, "click: {label: {column: c, at_least: }}", "tasks.click.label.at_least: should be a number, or another column as in {column: duration_ms, times: 0.5}; got nothing"),
    (CLICK, "click: {label: {column: c, at_least: true}}", "tasks.click.label.at_least: should be a finite number; got true (a bool)"),
    (CLICK, "click: {label: {column: c, at_most: .nan}}", "tasks.click.label.at_most: should be a finite number; got nan"),
    (CLICK, "click: {label: {column: c, at_most: {times: 2}}}", "tasks.click.label.at_most: the key 'column' is missing (the column to compare with)"),
    (CLICK, "click: {label: {column: c, at_most: {column: d, times: 0}}}", "tasks.click.label.at_most.times: 0 should be above 0"),
    (CLICK, "click: {label: {column: c, at_most: {column: c}}}", "tasks.click.label.at_most.column: 'c' would be compared with itself; name another column"),
    (CLICK, "click: {label: {column: c, at_least: {column: user}}}", "features.user: column 'user' is used by the label of task 'click', so the feature may give the label away; drop it, or set allow_label_column: true if it is known before the label"),
    ("name: small", "name: small\nweight: 2", "weight: should be a column that holds row weights; got 2 (a number belongs to a task, as the weight of its loss)"),
    (CLICK, CLICK[:-1] + ", weight: w, row_weight: v}", "tasks.click.weight: names a column of row weights, which row_weight is for; weight is a number that multiplies the loss"),
    (CLICK, CLICK[:-1] + ", row_weight: 2}", "tasks.click.row_weight: should be text (put it in quotes); got 2"),
    (CLICK, CLICK[:-1] + ", weight: user}", "features.user: column 'user' is used by the row weight of task 'click', so the feature may give the label away; drop it, or set allow_label_column: true if it is known before the label"),
    (CLICK, "click: {label: {column: c, standardise: true}}", "tasks.click.label.standardise: does not apply to a binary task, only to a regression one (type: regression)"),
    (WATCHED, "{column: play, standardise: 1}", "tasks.watched.label.standardise: should be true or false; got 1"),
    (WATCHED, "{column: play, standardise: true}, output: sigmoid", "tasks.watched.label.standardise: cannot be combined with output: sigmoid, whose scores lie in [0, 1]; drop one of them"),
    (WATCHED, "{column: play, at_least: 3}", "tasks.watched.label.at_least: does not apply to a regression task, only to a binary one (type: binary)"),
    (WATCHED, "{column: play, equals: 3}", "tasks.watched.label.equals: does not apply to a regression task, only to a binary one (type: binary)"),
    (WATCHED, "{column: play, divide_by: play}", "tasks.watched.label.divide_by: 'play' divided by itself is always 1"),
    (WATCHED, "{column: play, clip: [1, 0]}", "tasks.watched.label.clip: [1, 0] (a list) should be [low, high] with low below high"),
    (WATCHED, "{column: play, clip: [1]}", "tasks.watched.label.clip: [1] (a list) should be [low, high] with low below high"),
    (WATCHED, "{column: play, clip: 1}", "tasks.watched.label.clip: should be a list [low, high]; got 1"),
    (WATCHED, "{column: play, clip: [0, .inf]}", "tasks.watched.label.clip[1]: should be a finite number; got inf"),
    ("name: small", "name: small\ntask_tables: al", "task_tables: 'al' (text) is not allowed; did you mean 'all'? Allowed: all, none, user, item, [feature, ...]"),
    ("name: small", "name: small\ntask_tables:", "task_tables: nothing is not allowed; allowed: all, none, user, item, [feature, ...]"),
    ("name: small", "name: small\ntask_tables: vid", "task_tables: 'vid' is a feature; write a list: [vid]"),
    ("name: small", "name: small\ntask_tables: []", "task_tables: should be a list of feature names; write none for no feature; got [] (a list)"),
    ("name: small", "name: small\ntask_tables: [vid, usr]", "task_tables[1]: 'usr' is not a feature; did you mean 'user'? Allowed: user, vid"),
    ("name: small", "name: small\ntask_tables: [vid, vid]", "task_tables[1]: 'vid' is listed twice; keep one"),
    (USER, "user: {kind: categorical, side: user, dtype: int64, column: is_click}", "features.user: column 'is_click' is used by the label of task 'click'" + GIVES_AWAY),
    (USER, "user: {kind: numeric, side: user, column: total}", "features.user: column 'total' is used by the label of task 'watched'" + GIVES_AWAY),
    (CLICK, "click: {output: linear, label: {column: is_click}}", "tasks.click.output: does not apply to a binary task, whose score is a probability; remove it"),
    (CLICK, "click: {label: {column: is_click}, space: {}}", "tasks.click.space: should hold one of column: is_shown and task: click"),
    (CLICK, "click: {label: {column: is_click}, space: {task: clck}}", "tasks.click.space.task: 'clck' is not a task; did you mean 'click'? Allowed: click, watched"),
    (CLICK, "click: {label: {column: is_click}, space: {task: watched}}", "tasks.click.space.task: 'watched' is a regression; only the label of a binary task can be 1"),
    (CLICK, "click: {label: {column: is_click}, space: {task: click}}", "tasks.click.space.task: the space of a task cannot depend on itself (click -> click)"),
    (CLICK, "click: {label: {column: is_click}, space: {task: b}}\n  b: {label: {column: b}, space: {task: click}}", "tasks.b.space.task: the space of a task cannot depend on itself (click -> b -> click)"),
    (CLICK, "click: {label: {column: is_click}, space: {column: user}}", "features.user: column 'user' is used by the space of task 'click'" + GIVES_AWAY),
    (CLICK, "click: {label: {column: is_click}, space: click}", "tasks.click.space: should be a mapping with the keys column, task; got 'click' (text)"),
    (CLICK, "click: {label: {column: is_click}, space: {colunm: shown}}", "tasks.click.space: unknown key 'colunm' of a space; did you mean 'column'? Allowed: column, task"),
    (CLICK, "click: {label: {column: is_click}, space: {column: shown, task: watched}}", "tasks.click.space: should hold one of column: is_shown and task: click"),
    (CLICK, "click: {label: {column: is_click}, space: {column: true}}", "tasks.click.space.column: should be text (put it in quotes); got true (a bool)"),
    (CLICK, "click: {label: {column: is_click}, space: {column: is_click}}", "tasks.click.space.column: 'is_click' is the label's own column, which is always 1 in that space; name another, or leave space out"),
    (CLICK, CLICK + "\n  a: {label: {column: a}, space: {task: b}}\n  b: {label: {column: b}, space: {task: c}}\n  c: {label: {column: c}, space: {task: b}}", "tasks.c.space.task: the space of a task cannot depend on itself (b -> c -> b)"),
    ("tasks:\n  " + CLICK, "group: shown\ntasks:\n  click: {label: {column: is_click}, space: {column: shown}}", "group: column 'shown' is used by the space of task 'click'; it cannot name rows too"),
    (WATCHED, WATCHED + ", output: tanh", "tasks.watched.output: 'tanh' (text) is not allowed; allowed: linear, sigmoid"),
    ("divide_by: total}", "divide_by: total, clip: [-0.1, 1]}, output: sigmoid", "tasks.watched.label.clip: [-0.1, 1.0] is not inside [0, 1], where scores of output: sigmoid lie; clip to [0, 1], or write output: linear"),
    ("divide_by: total}", "divide_by: total, clip: [0, 2]}, output: sigmoid", "tasks.watched.label.clip: [0.0, 2.0] is not inside [0, 1], where scores of output: sigmoid lie; clip to [0, 1], or write output: linear"),
    ("name: small", "name: small\ngroup: is_click", "group: column 'is_click' is used by the label of task 'click'; it cannot name rows too"),
    ("name: small", "name: small\nitem: total", "item: column 'total' is used by the label of task 'watched'; it cannot name rows too"),
]
# fmt: on


@pytest.mark.parametrize(("old", "new", "message"), UNREADABLE)
def test_each_mistake_has_its_message(old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(UserError) as caught:
        schema_yaml.loads(SMALL.replace(old, new, 1), source="s.yaml")
    assert str(caught.value) == f"s.yaml: {message}"


def test_the_wrong_encoding_an_empty_file_and_binary_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    for content, message in [
        (b"", "is empty"),
        (b"# nothing yet\n", "is empty"),
        (b"name: caf\xe9", "is not UTF-8 text (byte 9)"),
        (b"name: \x00", "is not YAML: unacceptable character #x0000: special characters are not allowed"),
        (
            b"- a",
            "should be a mapping with the keys name, features, tasks, group, item, time, task_tables, weight, ranking; got ['a'] (a list)",
        ),
        (b"{name: a, features: {}, tasks: {}}", "features: is empty; at least one feature is needed"),
        (
            b"&a {name: *a, features: {}, tasks: {}}",
            "name: should be text; got {'name': {...}, 'features': {}, 'tasks': {}} (a mapping)",
        ),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            schema_yaml.load(path)
        assert str(caught.value).split("\n")[0] == f"{path}: {message}"


def test_no_tasks_and_no_learning() -> None:
    with pytest.raises(UserError, match="tasks: is empty; at least one task is needed"):
        schema_yaml.loads("{name: a, features: {f: {kind: numeric, side: user}}, tasks: {}}")
    with pytest.raises(UserError, match="tasks: every task has weight 0: nothing would be learned"):
        schema_yaml.loads(
            SMALL.replace("label:", "weight: 0, label:").replace("regression, label:", "regression, weight: 0, label:")
        )


def test_task_tables_of_a_side_without_features() -> None:
    with pytest.raises(UserError, match="task_tables: no feature has side 'item', so no feature would get task tables"):
        schema_yaml.loads(SMALL.replace("side: item", "side: user") + "task_tables: item\n")


def test_a_feature_that_is_not_there() -> None:
    with pytest.raises(UserError, match="schema small: no feature 'usr'; did you mean 'user'\\? Allowed: user, vid"):
        schema_yaml.loads(SMALL).feature("usr")


def test_load_finds_files_and_shipped_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text(SMALL)
    (tmp_path / "kuairand_sample").mkdir()
    monkeypatch.chdir(tmp_path)
    assert schema_yaml.load("own.yaml").name == "small"
    assert schema_yaml.load("kuairand_sample").name == "kuairand_sample"  # a directory of that name does not hide it
    with pytest.raises(
        UserError,
        match=re.escape("kuairand_smaple: no such schema file; did you mean 'kuairand_sample'? Shipped: ali_ccp, "),
    ):
        schema_yaml.load("kuairand_smaple")
    with pytest.raises(UserError, match=re.escape("nowhere/x.yaml: no such schema file. Shipped: ali_ccp,")):
        schema_yaml.load("nowhere/x.yaml")
    with pytest.raises(UserError, match="is a directory, not a schema"):
        schema_yaml.load(tmp_path)


def test_shipped_schemas_fit_their_logs() -> None:
    for name, log in [
        ("kuairand_sample", "kuairand_sample/log.parquet"),
        ("census_income", "census_income/train.parquet"),
        ("census_income", "census_income/test.parquet"),
    ]:
        found = pq.read_schema(DATASETS / log)
        shipped = schema_yaml.load(name)
        shipped.validate_columns(dict(zip(found.names, found.types, strict=True)), log)
        assert schema_yaml.loads(schema_yaml.dumps(shipped)) == shipped
    census = schema_yaml.load("census_income")
    assert len(census.features) == 39
    assert {(feature.kind, feature.min_count) for feature in census.features} == {("categorical", 5)}
    assert census.task_names == ("income", "never_married")
    sample = schema_yaml.load("kuairand_sample")
    assert sample.task_names == ("click", "long_view", "like", "comment", "profile_enter", "completion")
    assert [feature.name for feature in sample.features] == ["user_id", "video_id", "hour", "duration_ms"]


LOG = {
    "user": pa.int32(),
    "vid": pa.dictionary(pa.int32(), pa.int64()),
    "is_click": pa.bool_(),
    "play": pa.float64(),
    "total": pa.uint16(),
}
INT, STRING, LIST = pa.int64(), pa.string(), pa.list_(pa.int64())
MULTI = "kind: multivalent, side: user, dtype: %s, max_length: 3"
CATEGORY = "kind: categorical, side: user, dtype: int64"
MASKED = "click: {label: {column: is_click}, space: {column: shown}}"
# fmt: off
# (text of SMALL, what stands there instead, changed columns, the message behind "schema small: ")
MISFITS = [
    ("", "", {"user": None}, "features.user.column: 'user' is not in log.parquet. Columns: vid, is_click, play, total"),
    ("column: is_click", "column: is_clik", {}, "tasks.click.label.column: 'is_clik' is not in log.parquet; did you mean 'is_click'? Columns: user, vid, is_click, play, total"),
    ("", "", {"total": None}, "tasks.watched.label.divide_by: 'total' is not in log.parquet. Columns: user, vid, is_click, play"),
    ("name: small", "name: small\ngroup: usr", {}, "group: 'usr' is not in log.parquet; did you mean 'user'? Columns: user, vid, is_click, play, total"),
    ("name: small", "name: small\nitem: movie", {}, "item: 'movie' is not in log.parquet. Columns: user, vid, is_click, play, total"),
    ("", "", {"user": pa.float64()}, "features.user: column 'user' of log.parquet holds double; floats are not reliable as ids. Use kind: numeric, or write whole numbers. Cast it when the log is written (pyarrow: table['user'].cast('int64'); pandas: frame['user'].astype('Int64'))"),
    ("", "", {"user": STRING}, "features.user: column 'user' of log.parquet holds string, not int64; write dtype: string"),
    ("", "", {"user": pa.dictionary(pa.int32(), STRING)}, "features.user: column 'user' of log.parquet holds string, not int64; write dtype: string"),
    (CATEGORY, CATEGORY.replace("int64", "string"), {}, "features.user: column 'user' of log.parquet holds int32, not text; write dtype: int64"),
    ("", "", {"user": pa.timestamp("s")}, "features.user: column 'user' of log.parquet holds timestamp[s]; ids are int64 or string. Cast it when the log is written (pyarrow: table['user'].cast('int64'); pandas: frame['user'].astype('Int64'))"),
    ("", "", {"user": LIST}, "features.user: column 'user' of log.parquet holds list<item: int64>; a categorical feature has one value per row. Use kind: multivalent with max_length"),
    (CATEGORY, "kind: numeric, side: user", {"user": LIST}, "features.user: column 'user' of log.parquet holds list<item: int64>; a numeric feature has one number per row. Use kind: dense for vectors"),
    (CATEGORY, "kind: numeric, side: user", {"user": STRING}, "features.user: column 'user' of log.parquet holds string; a numeric feature needs numbers. Cast it when the log is written (pyarrow: table['user'].cast('float32'); pandas: frame['user'].astype('float32'))"),
    (CATEGORY, MULTI % "int64", {}, "features.user: column 'user' of log.parquet holds int32; a multivalent feature needs a list column, or text with a separator, as in separator: \"|\""),
    (CATEGORY, MULTI % "string", {"user": LIST}, "features.user: column 'user' of log.parquet holds list<item: int64>, not text; write dtype: int64"),
    (CATEGORY, MULTI % "int64", {"user": pa.list_(pa.float32())}, "features.user: column 'user' of log.parquet holds list<item: float>; floats are not reliable as ids. Use kind: numeric, or write whole numbers. Cast it when the log is written (pyarrow: table['user'].cast('int64'); pandas: frame['user'].astype('Int64'))"),
    (CATEGORY, MULTI % "int64" + ", separator: ','", {"user": LIST}, "features.user: column 'user' of log.parquet holds list<item: int64>, which needs no separator; remove it"),
    (CATEGORY, MULTI % "int64" + ", separator: ','", {}, "features.user: column 'user' of log.parquet holds int32; only a text column can be split by a separator; remove it"),
    (CATEGORY, "kind: dense, side: user, length: 4", {}, "features.user: column 'user' of log.parquet holds int32; a dense feature needs a list of numbers, as list<float>"),
    (CATEGORY, "kind: dense, side: user, length: 4", {"user": pa.list_(STRING)}, "features.user: column 'user' of log.parquet holds list<item: string>; a dense feature needs a list of numbers, as list<float>"),
    (CATEGORY, "kind: dense, side: user, length: 4", {"user": pa.list_(pa.float32(), 3)}, "features.user: column 'user' of log.parquet holds vectors of 3 elements, not 4; write length: 3"),
    ("", "", {"is_click": STRING}, "tasks.click.label: column 'is_click' of log.parquet holds string; the label of a binary task needs numbers. Say which value means 1, as in equals: \"yes\""),
    ("", "", {"is_click": LIST}, "tasks.click.label: column 'is_click' of log.parquet holds list<item: int64>; the label of a binary task needs numbers"),
    ("", "", {"total": STRING}, "tasks.watched.label: column 'total' of log.parquet holds string; the label of a regression task needs numbers"),
    ("column: is_click", "column: is_click, equals: '1'", {"is_click": INT}, "tasks.click.label: column 'is_click' of log.parquet holds int64, never the text '1'; write equals: 1"),
    ("column: is_click", "column: is_click, equals: 'yes'", {}, "tasks.click.label: column 'is_click' of log.parquet holds bool, never the text 'yes'"),
    ("column: is_click", "column: is_click, equals: 1", {"is_click": STRING}, "tasks.click.label: column 'is_click' of log.parquet holds string, never the number 1; write equals: \"1\""),
    ("column: is_click", "column: total, in: ['1', '2']", {}, "tasks.click.label: column 'total' of log.parquet holds uint16, never the text '1'; write in: [1, 2]"),
    ("column: is_click", "column: is_click, in: [1, 2]", {"is_click": STRING}, "tasks.click.label: column 'is_click' of log.parquet holds string, never the number 1; write in: [\"1\", \"2\"]"),
    ("column: is_click", "column: is_click, at_least: 1", {}, "tasks.click.label: column 'is_click' of log.parquet holds bool, which is 0 or 1 as it stands; remove at_least"),
    ("column: is_click", "column: is_click, at_least: 1, at_most: 3", {"is_click": STRING}, "tasks.click.label: column 'is_click' of log.parquet holds string; at_least and at_most need numbers. Say which values mean 1, as in in: [\"yes\", \"maybe\"]"),
    ("column: is_click", "column: play, at_least: {column: total}", {"total": LIST}, "tasks.click.label: column 'total' of log.parquet holds list<item: int64>; at_least need numbers"),
    ("column: is_click", "column: play, at_least: {column: totl}", {}, "tasks.click.label.at_least.column: 'totl' is not in log.parquet; did you mean 'total'? Columns: user, vid, is_click, play, total"),
    (CLICK, CLICK[:-1] + ", weight: worth}", {"worth": STRING}, "tasks.click.row_weight: column 'worth' of log.parquet holds string; a weight is a number of 0 or more. Cast it when the log is written (pyarrow: table['worth'].cast('float32'); pandas: frame['worth'].astype('float32'))"),
    (CLICK, CLICK[:-1] + ", weight: wort}", {"worth": INT}, "tasks.click.row_weight: 'wort' is not in log.parquet; did you mean 'worth'? Columns: user, vid, is_click, play, total, worth"),
    (CLICK, MASKED, {"shown": STRING}, "tasks.click.space: column 'shown' of log.parquet holds string; a space is a column of bools, or of 0 and 1. Cast it when the log is written (pyarrow: table['shown'].cast('bool'); pandas: frame['shown'].astype('boolean'))"),
    (CLICK, MASKED, {"show": pa.bool_()}, "tasks.click.space.column: 'shown' is not in log.parquet; did you mean 'show'? Columns: user, vid, is_click, play, total, show"),
    ("name: small", "name: small\ngroup: session", {"session": pa.float32()}, "group: column 'session' of log.parquet holds float; a key is int64 or string. Cast it when the log is written (pyarrow: table['session'].cast('int64'); pandas: frame['session'].astype('Int64'))"),
]
# fmt: on


@pytest.mark.parametrize(("old", "new", "changes", "message"), MISFITS)
def test_each_column_that_does_not_fit_has_its_message(
    old: str, new: str, changes: dict[str, pa.DataType | None], message: str
) -> None:
    assert old in SMALL
    columns = {name: kind for name, kind in {**LOG, **changes}.items() if kind is not None}
    with pytest.raises(UserError) as caught:
        schema_yaml.loads(SMALL.replace(old, new, 1)).validate_columns(columns, "log.parquet")
    assert str(caught.value) == f"schema small: {message}"


@pytest.mark.parametrize(
    ("feature", "kind"),
    [
        (CATEGORY, pa.uint64()),
        (CATEGORY, pa.bool_()),
        (CATEGORY.replace("int64", "string"), pa.large_string()),
        (CATEGORY.replace("int64", "string"), pa.dictionary(pa.int8(), STRING)),
        ("kind: numeric, side: user", pa.float16()),
        ("kind: numeric, side: user", pa.bool_()),
        (MULTI % "int64", pa.large_list(pa.int32())),
        (MULTI % "string", pa.list_(pa.dictionary(pa.int8(), STRING))),
        (MULTI % "int64" + ", separator: ','", STRING),
        ("kind: dense, side: user, length: 4", pa.list_(pa.float64(), 4)),
        ("kind: dense, side: user, length: 4", pa.list_(pa.int8())),
        (CATEGORY, pa.null()),
        ("kind: numeric, side: user", pa.null()),
        (MULTI % "int64", pa.null()),
        (MULTI % "string", pa.list_(pa.null())),
        ("kind: dense, side: user, length: 4", pa.null()),
    ],
)
def test_columns_that_fit(feature: str, kind: pa.DataType) -> None:
    schema_yaml.loads(SMALL.replace(CATEGORY, feature)).validate_columns({**LOG, "user": kind})


@pytest.mark.parametrize(
    ("feature", "kind", "message"),
    [
        (CATEGORY, STRING, "holds string; the model takes one int64 per row. Cast it when the log is written .pyarrow"),
        (CATEGORY.replace("int64", "string"), INT, "holds int64; the model takes one string per row. Cast it when"),
        ("kind: numeric, side: user", STRING, "holds string; the model takes one float32 per row. Cast it when"),
        (MULTI % "int64", INT, "holds int64; the model takes lists of int64: write the log as Parquet with such a"),
        (MULTI % "int64" + ", separator: ','", INT, "holds int64; the model takes text with values separated by ','"),
        ("kind: dense, side: user, length: 4", INT, "holds int64; the model takes lists of 4 numbers: write the log"),
    ],
)
def test_the_schema_of_a_model_is_not_to_be_changed(feature: str, kind: pa.DataType, message: str) -> None:
    with pytest.raises(UserError, match=f"features.user: column 'user' of the log {message}"):
        schema_yaml.loads(SMALL.replace(CATEGORY, feature)).validate_columns({**LOG, "user": kind}, served=True)


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8(), pa.float64(), pa.dictionary(pa.int8(), pa.int64())])
def test_spaces_that_fit(kind: pa.DataType) -> None:
    schema_yaml.loads(SMALL.replace(CLICK, MASKED)).validate_columns({**LOG, "shown": kind})


def test_columns_of_csv_are_text() -> None:
    columns = dict.fromkeys(LOG, pa.binary())
    schema_yaml.loads(SMALL).validate_columns(columns, "log.csv", text=True)
    schema_yaml.loads(SMALL.replace(CLICK, MASKED)).validate_columns(columns | {"shown": pa.binary()}, text=True)
    with pytest.raises(UserError, match="tasks.click.space.column: 'shown' is not in log.csv"):
        schema_yaml.loads(SMALL.replace(CLICK, MASKED)).validate_columns(columns, "log.csv", text=True)
    schema_yaml.loads(SMALL.replace(CATEGORY, MULTI % "int64" + ", separator: ','")).validate_columns(
        columns, text=True
    )
    for feature, message in [
        (MULTI % "int64", "is CSV text: a multivalent feature needs the separator of its values"),
        ("kind: dense, side: user, length: 4", "is CSV text, which holds no vectors; write the log as Parquet"),
    ]:
        with pytest.raises(UserError, match=f"features.user: column 'user' of log.csv {message}"):
            schema_yaml.loads(SMALL.replace(CATEGORY, feature)).validate_columns(columns, "log.csv", text=True)
    with pytest.raises(UserError, match="'vid' is not in log.csv"):
        schema_yaml.loads(SMALL).validate_columns({"user": pa.binary()}, "log.csv", text=True)
