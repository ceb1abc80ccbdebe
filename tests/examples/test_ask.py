"""The example that asks a server: which candidates it takes, and how it shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples import ask
from pipelines import schema_yaml
from stem_util.errors import UserError

SCHEMA = schema_yaml.loads("""
name: small
features:
  user: {kind: categorical, side: user, dtype: int64}
  hour: {kind: categorical, side: context, dtype: int64}
  item: {kind: categorical, side: item, dtype: string}
  length: {kind: numeric, side: item}
tasks:
  click: {label: {column: clicked, missing: outside}}
  share: {type: regression, label: {column: shared, missing: outside}}
""")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Users 1 and 2 differ in what they see: 1 sees an item twice, and at two hours; 2 never clicks; 3 does both."""
    rows = [
        # user, hour, item, length, clicked, shared
        (1, 9, "a", 5.0, 1, 0.5),
        (1, 9, "a", 5.0, 0, 0.5),
        (2, 9, "a", 5.0, 0, 0.5),
        (1, 8, "b", 5.0, 0, 0.5),
        (2, 9, "b", None, 0, 0.5),
        (3, 7, "a", 1.0, 0, 0.25),
        (3, 7, "c", 2.5, 1, None),
        (3, 7, "d", 2.5, None, 1.0),
    ]
    names = ["user", "hour", "item", "length", "clicked", "shared"]
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    directory = tmp_path / "raw" / "test"
    directory.mkdir(parents=True)
    pq.write_table(pa.table(columns | {"row_id": range(70, 78)}), directory / "part-00000.parquet")
    return tmp_path


def test_candidates_share_their_user_and_context_and_differ_in_what_happened(data: Path) -> None:
    asked = ask.find(data, SCHEMA, "click", 2)
    assert asked.user == {"user": 3, "hour": 7}
    assert asked.items["item"].tolist() == [b"a", b"c"] and asked.items["length"].tolist() == [1.0, 2.5]
    assert asked.row_ids.tolist() == [75, 76] and asked.labels["click"].tolist() == [0, 1]
    assert ask.find(data, SCHEMA, "click", 3).row_ids.tolist() == [75, 76, 77]
    with pytest.raises(UserError, match="no user of the test split of .* has 4 candidates with and without 'click'"):
        ask.find(data, SCHEMA, "click", 4)


def test_the_table_shows_scores_and_labels(data: Path) -> None:
    asked = ask.find(data, SCHEMA, "click", 3)
    scores = {"click": np.array([0.5, 0.25, 0.75]), "share": np.array([0.5, 0.0, 1.0])}
    assert ask.table(SCHEMA, asked, scores, "click").splitlines() == [
        "   item  length      click  share",
        "1     d     2.5  .7500   -  1.0000 1.00",
        "2     a       1  .5000  no  .5000  .25",
        "3     c     2.5  .2500 yes  .0000    -",
    ]


def test_served_scores_are_compared_by_row(data: Path) -> None:
    asked = ask.find(data, SCHEMA, "click", 2)
    scores = {"click": np.array([0.5, 0.25], np.float32)}
    path = data / "test.parquet"
    pq.write_table(pa.table({"row_id": [76, 70, 75], "score_click": np.array([0.25, 1, 0.25], np.float32)}), path)
    assert ask.worst_difference(path, asked, scores) == 0.25
    pq.write_table(pa.table({"row_id": [76], "score_click": np.array([0.25], np.float32)}), path)
    with pytest.raises(UserError, match="does not hold row 75 of the test split; run stem-evaluate again"):
        ask.worst_difference(path, asked, scores)
