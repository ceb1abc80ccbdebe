"""The best items, and lists that are written as text."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipelines.log import casts
from stem_client import FeatureError, RankingClient, values
from stem_client.metadata import Feature
from stem_client.ranking import best
from stem_client.separators import NotAnInteger, split

Given = dict[str, Any]


def test_the_best_items(client: RankingClient, user: Given, items: Given) -> None:
    items = items | {"seconds": [5, 9, 5]}
    top = client.top(user, items, "like", k=2)
    assert top.indices.tolist() == [1, 0] and top.scores.tolist() == [9, 5]  # of equal items the first
    assert client.top(user, items, "like").indices.tolist() == [1, 0, 2]  # there are only three
    assert client.top(user, items, {"like": -1, "click": 0.0}).indices.tolist() == [0, 2, 1]
    assert client.top(user, items, lambda scores: scores["like"] == 5, k=1).indices.tolist() == [0]
    nothing = client.top(user, {name: [] for name in items}, "like")
    assert nothing.indices.tolist() == nothing.scores.tolist() == []


@pytest.mark.parametrize(
    ("by", "k", "error", "words"),
    [
        (
            "likes",
            3,
            ValueError,
            r"'likes' is no task of the model \(did you mean 'like'\?\); its tasks are click, like",
        ),
        ({"like": 1, "x": 2}, 3, ValueError, "'x' is no task"),
        ({}, 3, ValueError, "there are no weights"),
        ({"like": float("nan")}, 3, ValueError, "the weight of 'like' is nan; a finite number"),
        ({"like": "1"}, 3, ValueError, "the weight of 'like' is '1'"),
        (7, 3, TypeError, "by is 7"),
        (lambda scores: scores["like"][:1], 3, ValueError, r"gives shape \(1,\); one number for each of 3 items"),
        (lambda scores: scores["like"] * np.nan, 3, ValueError, "gives NaN"),
        (lambda scores: "abc", 3, ValueError, "the function's values are no numbers"),
        ("like", 0, ValueError, "k is 0"),
        ("like", True, TypeError, "k is True"),
        ("like", 2.5, TypeError, "k is 2.5"),
    ],
)
def test_rankings_that_make_no_sense(
    client: RankingClient, user: Given, items: Given, by: Any, k: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        client.top(user, items, by, k)


def test_the_best_of_many_are_the_best() -> None:
    scores = {"click": np.random.default_rng(0).integers(0, 50, 1000).astype(np.float32)}
    indices, values_ = best(scores, "click", 100)
    order = sorted(range(1000), key=lambda place: (-scores["click"][place], place))[:100]
    assert indices.tolist() == order and values_.tolist() == scores["click"][order].tolist()


# Text


def test_texts_of_lists(ranker: Any, target: str, user: Given, items: Given) -> None:
    texts = items | {"topics": pd.Series(["1| 2", "", "3||4"])}
    with RankingClient(target, timeout=20, separators={"topics": "|", "interests": ","}) as client:
        client.rank(user | {"interests": "ski,jazz"}, pd.DataFrame(texts | {"image": items["image"]}))
        sent = ranker.arrays()
        e = -(2**63)
        assert sent["interests"].tolist() == [[b"ski", b"jazz"]]
        assert sent["topics"].tolist() == [[[1, 2, e], [e, e, e], [3, e, 4]]]
        client.rank(user, items)  # lists as ever
        with pytest.raises(FeatureError, match="item 1 is '1|x' .str., of which 'x' is no integer; the model takes"):
            client.rank(user, items | {"topics": ["1", "1|x", ""]})
        with pytest.raises(FeatureError, match="which is not UTF-8"):
            client.rank(user | {"interests": b"\xff"}, items)
    with RankingClient(target, timeout=20, separators={"hour": "|"}) as client:
        with pytest.raises(
            FeatureError, match="separators: 'hour' is no list of the model; its lists are interests, to"
        ):
            client.rank(user, items)
    for separators in ({"topics": ""}, {"topics": 7}):
        with pytest.raises(ValueError, match="separators: that of 'topics' is"):
            RankingClient(target, separators=separators)  # type: ignore[arg-type]


PIECES = {
    "string": ["a", "b", "", " ", " a", "b ", "a b", "é", "\t", "\x00", "None", "0"],
    "int64": [
        "1", "-5", "007", "", " 2", "3 ", "\u00a04", "18.0", "18.", "-18.00", "9007199254740992.0",
        "9223372036854775807", "0x1f", "0XFFFFFFFFFFFFFFFF", "-9223372036854775808", "0x8000000000000000",
    ],
}  # fmt: skip
BAD = [
    "+5", "x", " ", "1e3", "1.5", "--5", "１２", "1_000", "9007199254740993.0", "9223372036854775808", "-0x1", "0x",
    "-", "0x1f.0", "5\x00", "1" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["string", "int64"])
@pytest.mark.parametrize("separator", ["|", ", ", " ", " | ", "::", ".", "a"])
def test_texts_are_split_as_conversion_splits_them(dtype: str, separator: str) -> None:
    draw = random.Random(0)
    texts = [separator.join(draw.choices(PIECES[dtype], k=draw.randrange(6))) for _ in range(200)]
    texts += [separator, separator * 3, separator.strip(), f"1{separator}", f"1{separator.rstrip()}", f"{separator}1"]
    feature, kept = Feature("f", dtype, "list", 3, True), 0
    for text in texts:
        lists, [bad] = casts.to_lists(pa.array([text]), dtype, separator)
        if bad:
            with pytest.raises(FeatureError, match="is no integer"):
                values.encode(feature, [text], "f", "item", separator)
            continue
        present = [x if isinstance(x, int) else x.encode() for x in lists.values.to_pylist() if x is not None]
        empty: Any = b"" if dtype == "string" else -(2**63)
        expected = (present + [empty] * 3)[:3]
        assert values.encode(feature, [text], "f", "item", separator)[0].tolist() == expected, repr(text)
        kept += 1
    assert kept > 20


@pytest.mark.parametrize("text", BAD)
def test_texts_that_conversion_refuses(text: str) -> None:
    assert casts.to_lists(pa.array([text]), "int64", "|")[1].tolist() == [True]
    with pytest.raises(NotAnInteger):
        split(text, "|", "int64")
