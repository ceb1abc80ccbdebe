"""What tables have learned and what features are worth, against other implementations and by hand."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import mean_squared_error, roc_auc_score

from pipelines import manifest as manifests
from stem_tf import configs, models
from stem_tf.compare import embeddings, importance, measures
from stem_tf.inspection import members
from stem_tf.layers.embedding import Field, PackedTable
from stem_tf.models.ranking_model import RankingModel
from stem_tf.models.snapshots import Snapshots


def build(
    settings: dict[str, Any], data: Path, **other: Any
) -> tuple[RankingModel, dict[str, Any], manifests.Manifest]:
    """A model, test rows, and the manifest."""
    config = configs.checked(settings | {"data.dir": str(data)} | other)
    manifest = manifests.load(str(data))
    return models.build(config, manifest, training=False), measures.read(manifest, "test", config.data, 1000), manifest


def test_singular_values_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fields of two tables in one variable, read seven rows at a time."""
    monkeypatch.setattr(embeddings, "_ROWS_AT_A_TIME", 7)
    group = PackedTable([Field("a", rows=31), Field("b", rows=5)], dim=4, tables=["task:x", "shared"], init_std=1.0)
    whole = group.table.numpy()
    for field, start, stop in (("a", 2, 31), ("b", 33, 36)):
        for table, columns in (("task:x", slice(0, 4)), ("shared", slice(4, 8))):
            expected = np.linalg.svd(whole[start:stop, columns], compute_uv=False)
            np.testing.assert_allclose(embeddings.singular_values(group, field, table), expected, rtol=1e-5)


def test_abundance_of_collapsed_full_and_empty_tables(tiny_settings: dict[str, Any], tiny_data: Path) -> None:
    model, _, manifest = build(tiny_settings, tiny_data)
    (group,) = model.embeddings.groups
    rows = {feature.name: manifest.num_ids(feature.name) for feature in manifest.schema.features[:3]}
    whole = np.zeros(group.table.shape, np.float32)
    user = group.offsets["user"]
    whole[user : user + rows["user"], 0:4] = np.outer(np.arange(rows["user"]), [1, -2, 0, 3])  # on one line
    whole[user : user + 2, 4:8] = 1e6  # padding and rare: not read
    whole[user + 2 : user + 6, 4:8] = 5 * np.eye(4)
    group.table.assign(whole)
    found = {(entry["table"], entry["feature"]): entry for entry in embeddings.abundance(members(model))}
    tables = ("task:click", "task:watched", "shared")
    assert list(found) == list(itertools.product(tables, ("user", "item", "tags")))
    assert found["task:click", "user"]["abundance"] == pytest.approx(1, abs=1e-6)
    assert found["task:watched", "user"] == {
        "table": "task:watched",
        "feature": "user",
        "rows": rows["user"] - 2,
        "most": 4,
        "abundance": pytest.approx(4),
    }
    assert np.isnan(found["shared", "item"]["abundance"])


def test_distances_of_contradictory_pairs(tiny_settings: dict[str, Any], chain_data: Path) -> None:
    """Every number again, row by row; buy has a sample space, and ids 0 and 1 are no pairs."""
    model, rows, manifest = build(tiny_settings, chain_data, **{"model.init_std": 1.0})
    rows["features"]["item"][:5] = 1
    found = embeddings.distances(members(model), manifest.schema, rows, rows["group"], 20, seed=0)
    assert (found["user"], found["item"]) == ("user", "item")
    known = np.flatnonzero((rows["features"]["user"] >= 2) & (rows["features"]["item"] >= 2))
    assert found["rows"] == len(known) < len(rows["row_id"])
    (group,) = model.embeddings.groups
    whole = group.table.numpy()
    asked = {(pair["positive"], pair["negative"]): pair for pair in found["pairs"]}
    assert ("buy", "click") not in asked  # where there is a label of buy, click is 1
    for place, table in enumerate(group.tables):
        distance = {}
        for row in known:
            u, i = (
                whole[group.offsets[name] + rows["features"][name][row]][4 * place : 4 * place + 4]
                for name in ("user", "item")
            )
            distance[row] = np.linalg.norm(u / np.linalg.norm(u) - i / np.linalg.norm(i))
        assert found["tables"][table]["mean"] == pytest.approx(np.mean(list(distance.values())))
        assert sum(found["tables"][table]["counts"]) == len(known)
        for (a, b), pair in asked.items():
            inside = [row for row in known if rows["weights"][a][row] and rows["weights"][b][row]]
            contradictory = [rows["labels"][a][row] == 1 and rows["labels"][b][row] == 0 for row in inside]
            assert pair["rows"] == sum(contradictory) == sum(pair["tables"][table]["counts"])
            auc = roc_auc_score(contradictory, [distance[row] for row in inside])
            assert pair["tables"][table]["auc"] == pytest.approx(auc)
        assert 0 < asked["click", "cart"]["tables"][table]["sd"] < 0.2


def test_rows_of_zeros_have_no_distance(tiny_settings: dict[str, Any], chain_data: Path) -> None:
    u, i = np.array([[3.0, 0], [0, 2], [0, 0]]), np.array([[1.0, 0], [0, -1], [1, 0]])
    np.testing.assert_allclose(embeddings.unit_distances(u, i), [0, 2, np.nan])
    model, rows, manifest = build(tiny_settings, chain_data)
    model.embeddings.groups[0].table.assign(tf.zeros_like(model.embeddings.groups[0].table))
    found = embeddings.distances(members(model), manifest.schema, rows, None, 20, seed=0)
    assert np.isnan(found["tables"]["shared"]["mean"]) and sum(found["tables"]["shared"]["counts"]) == 0
    assert all(np.isnan(of["auc"]) and np.isnan(of["sd"]) for pair in found["pairs"] for of in pair["tables"].values())


def test_why_there_are_no_distances(tiny_settings: dict[str, Any], chain_data: Path) -> None:
    model, rows, manifest = build(tiny_settings, chain_data)
    arguments = (rows, None, 20, 0)
    known = rows["features"]["user"].copy()
    rows["features"]["user"][:] = 1
    found = embeddings.distances(members(model), manifest.schema, *arguments)
    assert found == {"reason": "no row has a user and an item, both of which occur in train: user, item"}
    rows["features"]["user"][:] = known
    schema = dataclasses.replace(manifest.schema, group=None, item=None, features=manifest.schema.features[2:])
    found = embeddings.distances(members(model), schema, *arguments)
    assert found == {"reason": "the schema has no user and no item feature with one id per row"}
    wide = [PackedTable([Field("user", rows=manifest.num_ids("user"))], 8, ["shared"])]
    rest = [PackedTable([Field("item", rows=manifest.num_ids("item"))], 4, ["shared"])]
    model.embeddings.groups = [*wide, *rest]
    model.embeddings.tables = ("shared",)
    found = embeddings.distances(members(model), manifest.schema, *arguments)
    assert found == {"reason": "the embeddings of user and item differ in width"}


def test_tables_of_two_sets_of_weights(tiny_settings: dict[str, Any], chain_data: Path) -> None:
    """Each task's table is that of the set that scores the task; the shared ones are told apart."""
    first, rows, manifest = build(tiny_settings, chain_data, seed=1)
    second, _, _ = build(tiny_settings, chain_data, seed=2)
    both = Snapshots([(first, ["click"]), (second, ["cart", "buy"])])
    tables = ["task:click", "shared, for click", "task:cart", "task:buy", "shared, for cart and buy"]
    assert list(dict.fromkeys(entry["table"] for entry in embeddings.abundance(members(both)))) == tables
    found = embeddings.distances(members(both), manifest.schema, rows, rows["group"], 20, seed=0)
    alone = embeddings.distances(members(second), manifest.schema, rows, rows["group"], 20, seed=0)
    assert found["tables"]["task:cart"] == alone["tables"]["task:cart"]
    assert found["tables"]["shared, for cart and buy"] == alone["tables"]["shared"]


def test_importance_is_what_shuffling_costs(tiny_settings: dict[str, Any], tiny_data: Path) -> None:
    """The item's embeddings are zeros: the model does not read it, and shuffling it costs nothing at all."""
    model, rows, manifest = build(tiny_settings, tiny_data, **{"model.init_std": 1.0})
    (group,) = model.embeddings.groups
    whole, start = group.table.numpy(), group.offsets["item"]
    whole[start : start + manifest.num_ids("item")] = 0
    group.table.assign(whole)
    found = importance.importance(model, rows, rows["group"], 30, seed=7)
    assert list(found) == ["user", "item", "tags", "length"]
    assert found["item"] == {task: {"lost": 0, "sd_shuffles": 0, "sd_rows": 0} for task in ("click", "watched")}

    def metrics(features: Any) -> list[float]:
        scores = model.scores(model(features))
        inside = rows["weights"]["watched"] > 0
        auc = roc_auc_score(rows["labels"]["click"], scores["click"])
        return [auc, -mean_squared_error(rows["labels"]["watched"][inside], scores["watched"].numpy()[inside])]

    for number, name in enumerate(found):
        shuffled = []
        for again in range(importance.SHUFFLES):
            order = np.random.default_rng((7, number, again)).permutation(150)
            shuffled.append(metrics({**rows["features"], name: rows["features"][name][order]}))
        lost = metrics(rows["features"]) - np.array(shuffled)
        for task, losses in zip(("click", "watched"), lost.T, strict=True):
            assert found[name][task]["lost"] == pytest.approx(losses.mean(), abs=1e-6)
            assert found[name][task]["sd_shuffles"] == pytest.approx(losses.std(ddof=1) / 3**0.5, abs=1e-6)
    assert found["user"]["click"]["sd_rows"] > 0 and found["tags"]["watched"]["lost"] > 0


def test_importance_where_a_task_cannot_be_measured(tiny_settings: dict[str, Any], tiny_data: Path) -> None:
    model, rows, _ = build(tiny_settings, tiny_data)
    rows["labels"]["click"][:] = 1
    rows["weights"]["watched"][:] = 0
    found = importance.importance(model, rows, None, 10, seed=0)
    assert all(np.isnan(value) for of in found["user"].values() for value in of.values())
