"""The block ``ranking``: read, written, replaced, and what a person may get wrong in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipelines import outputs, ranking, schema_yaml
from pipelines.schema import Parameter, Ranking, Schema
from stem_util.errors import UserError

HEAD = """
name: shop
features:
  who: {kind: categorical, side: user, dtype: int64}
  length: {kind: numeric, side: item, transform: [log1p]}
  buy: {kind: numeric, side: item, column: bought_before}
tasks:
  click: {label: {column: clicked}}
  like: {label: {column: liked}}
  buy: {label: {column: bought}}
  seconds: {type: regression, label: {column: seconds}}
"""
BLOCK = """ranking:
  score: click^a * like^b * log1p(default(length, 0))
  gain: click + max(seconds - 3, 0)
  parameters:
    a: 2.0
    b: {value: 1.0, low: 0.5, high: 4.0, log: true}
"""


def schema(block: str = BLOCK) -> Schema:
    return schema_yaml.loads(HEAD + block, "shop.yaml")


def test_a_block_is_read_and_written() -> None:
    read = schema()
    parameters = (Parameter("a", 2), Parameter("b", 1, (0.5, 4), log=True))
    formulas = ("click^a * like^b * log1p(default(length, 0))", "click + max(seconds - 3, 0)")
    assert read.ranking == Ranking(*formulas, parameters)
    assert schema_yaml.loads(schema_yaml.dumps(read)) == read
    assert schema_yaml.dumps(read).replace("'", "").endswith(BLOCK)


def test_an_output_by_hand() -> None:
    (output,) = outputs.of(schema())
    assert (output.name, output.features, output.tasks) == ("ranking_score", ("length",), ("click", "like"))
    scores = {"click": np.array([0.5, 0.5, 0.5, 1e-40], np.float32), "like": np.array([1, 0.25, 0.5, 1], np.float32)}
    length = np.array([np.e - 1, np.nan, np.inf, 1], np.float32)
    found = output.values(scores, {"length": length})
    np.testing.assert_allclose(found, [0.25, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("score", "gain"),
    [("click * like * seconds", "click + like"), ("exp(seconds)", "seconds"), ("seconds + 0 * like", "like")],
)
def test_the_gain_is_the_labels_of_the_score(score: str, gain: str) -> None:
    read = schema(f"ranking: {{score: {score}}}\n")
    assert read.ranking is not None
    assert ranking.gain(read.ranking, read.features, read.tasks).text == gain


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("ranking: click", "ranking: should be a mapping with the keys score, gain, parameters; got 'click'"),
        ("ranking: {score: click, weight: 1}", "ranking: unknown key 'weight' of a ranking"),
        ("ranking: {gain: click}", "ranking: the key 'score' is missing"),
        ("ranking: {score: 2 * click^}", "ranking.score: position 11: a number, a name or a bracket is missing"),
        ("ranking: {score: clik}", "ranking.score: position 1: nothing is named 'clik'; did you mean 'click'?"),
        ("ranking: {score: click * who}", "position 9: 'who' is a categorical feature; a formula takes numeric"),
        ("ranking: {score: click * buy}", "position 9: 'buy' is a feature and a task; rename one of them"),
        ("ranking: {score: click * length}", "position 9: 'length' may be missing: write default(length, 0)"),
        ("ranking: {score: 'default(length, 0)'}", "names no task, so that it does not depend on scores"),
        ("ranking: {score: click, gain: '1'}", "ranking.gain: names no task, so that it does not depend on labels"),
        (
            "ranking: {score: click^a, gain: click^a, parameters: {a: 1}}",
            "gain: position 7: nothing is named 'a'",
        ),
        ("ranking: {score: click, parameters: {a: 1}}", "ranking.parameters.a: is not in the formula of score"),
        ("ranking: {score: click^a, parameters: {a: yes}}", "parameters.a: should be a finite number; got 'yes'"),
        ("ranking: {score: click^a, parameters: {a: .nan}}", "parameters.a: should be a finite number; got nan"),
        ("ranking: {score: click^a, parameters: {a: {low: 0, high: 1}}}", "parameters.a: the key 'value' is missing"),
        (
            "ranking: {score: click^a, parameters: {a: {value: 2, low: 0, high: 1}}}",
            "parameters.a.value: 2 should be between low and high, 0 and 1",
        ),
        ("ranking: {score: click^a, parameters: {a: {value: 1, low: 1, high: 1}}}", "a.high: 1 should be above low, 1"),
        (
            "ranking: {score: click^a, parameters: {a: {value: 1, low: 0, high: 1, log: true}}}",
            "parameters.a.low: 0 should be above 0 on a logarithmic scale",
        ),
        ("ranking: {score: click, parameters: {like: 1}}", "parameters.like: a task is named 'like' already"),
        ("ranking: {score: click, parameters: {ä: 1}}", "'ä' cannot be a parameter's name"),
    ],
)
def test_mistakes(block: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        schema(f"{block}\n")
    assert words in str(caught.value) and str(caught.value).startswith("shop.yaml: ranking")


def test_a_task_may_not_have_the_name_of_an_output() -> None:
    head = HEAD.replace("  like:", "  Ranking_Score:")
    assert schema_yaml.loads(head).ranking is None
    with pytest.raises(UserError, match="the task 'Ranking_Score' has the name of an output of the model"):
        schema_yaml.loads(f"{head}ranking: {{score: click}}\n")


def test_another_ranking(tmp_path: Path) -> None:
    before = schema()
    assert ranking.replaced(before, "click^a").ranking == Ranking(
        "click^a", "click + max(seconds - 3, 0)", (Parameter("a", 2),)
    )
    assert ranking.replaced(schema(""), "click").ranking == Ranking("click")
    path = tmp_path / "other.yaml"
    path.write_text("ranking:\n  score: click\n")
    assert ranking.replaced(before, str(path)).ranking == Ranking("click")
    for given, words in (
        ("clik", "--ranking: position 1: nothing is named 'clik'"),
        ("0", "--ranking: names no task"),
        ("click" * 300_000, "--ranking: the formula has 1,500,000 characters"),
        ("click\x00", r"--ranking: position 6: '\x00' has no meaning"),
        ("none.yaml", "--ranking=none.yaml: cannot be read (No such file or directory)"),
        (str(tmp_path / "text.yaml"), "text.yaml: unknown key 'score' of a ranking's file"),
        (str(tmp_path / "bytes.yaml"), "bytes.yaml: cannot be read ("),
    ):
        (tmp_path / "text.yaml").write_text("score: click\n")
        (tmp_path / "bytes.yaml").write_bytes(b"\xff")
        with pytest.raises(UserError) as caught:
            ranking.replaced(before, given)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_some_of_the_tasks_have_the_ranking_if_it_needs_no_other() -> None:
    whole = schema()
    less = dataclasses.replace(whole, tasks=tuple(task for task in whole.tasks if task.name != "buy"))
    assert ranking.for_tasks(less) == less
    for name in ("like", "seconds"):  # of score, of gain
        without = dataclasses.replace(whole, tasks=tuple(task for task in whole.tasks if task.name != name))
        assert ranking.for_tasks(without).ranking is None
