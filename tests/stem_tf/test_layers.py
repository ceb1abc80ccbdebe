"""Tables, input transforms, MLPs and gates against hand-computed values."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipelines.manifest import Constants
from pipelines.schema import Feature
from stem_tf.layers import distinct, initializers
from stem_tf.layers.distinct import deduplicate, deduplicate_static
from stem_tf.layers.embedding import SHARED, Embeddings, Field
from stem_tf.layers.gate import Gate, mixture, observe
from stem_tf.layers.mlp import MLP
from stem_tf.layers.sides import Sides
from stem_tf.layers.transforms import InputTransform

USER = Field("user", rows=4)
ITEM = Field("item", rows=3)
TAGS = Field("tags", "multivalent", rows=5)
LENGTH = Field("length", "numeric")
IMAGE = Field("image", "dense", length=2)


def test_packed_row_holds_every_table() -> None:
    embeddings = Embeddings((USER, ITEM), 2, ["task:a", SHARED])
    (group,) = embeddings.groups
    group.table.assign(tf.reshape(tf.range(28.0), [7, 4]))  # row r: [4r, 4r+1 | 4r+2, 4r+3]
    h = embeddings({"user": tf.constant([1, 3, 1]), "item": tf.constant([2, 0, 0])})
    np.testing.assert_array_equal(h["task:a"], [[4, 5, 24, 25], [12, 13, 16, 17], [4, 5, 16, 17]])
    np.testing.assert_array_equal(h[SHARED], [[6, 7, 26, 27], [14, 15, 18, 19], [6, 7, 18, 19]])


def test_a_table_that_is_read_takes_no_memory_before() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with initializers.to_be_read():
        (group,) = Embeddings((Field("user", rows=1 << 23),), 16, ["task:a", SHARED]).groups
    assert group.table.shape == (1 << 23, 32) and resident() - before < 1 << 28  # of 2^30 bytes


def test_ids_are_places_in_the_packed_table() -> None:
    embeddings = Embeddings((USER, ITEM), 2, ["task:a", SHARED])
    (ids,) = embeddings.ids({"user": tf.constant([1, 3, 1]), "item": tf.constant([2, 0, 0])})
    assert ids is not None
    np.testing.assert_array_equal(ids, [1, 6, 3, 4, 1, 4])


def test_a_feature_outside_f_stands_with_its_shared_embedding() -> None:
    embeddings = Embeddings((USER, ITEM), 2, ["task:a", SHARED], ["user"])
    assert [group.width for group in embeddings.groups] == [4, 2]
    h = embeddings({"user": tf.constant([1]), "item": tf.constant([2])})
    np.testing.assert_array_equal(h["task:a"][:, 2:], h[SHARED][:, 2:])
    assert np.abs(h["task:a"][:, :2] - h[SHARED][:, :2]).max() > 0.0


def test_features_of_several_widths() -> None:
    wide = Field("wide", rows=3, dim=5)
    embeddings = Embeddings((USER, wide), 2, ["task:a", SHARED])
    h = embeddings({"user": tf.constant([1]), "wide": tf.constant([2])})
    assert {table: tuple(e.shape) for table, e in h.items()} == {"task:a": (1, 7), SHARED: (1, 7)}


@pytest.mark.parametrize(("pooling", "expected"), [("sum", [[3.0], [5.0], [0.0]]), ("mean", [[1.5], [5.0], [0.0]])])
def test_multivalent_pooling_skips_padding(pooling: str, expected: list) -> None:
    tags = Field("tags", "multivalent", rows=4, pooling=pooling)  # type: ignore[arg-type]
    embeddings = Embeddings((tags,), 1)
    embeddings.groups[0].table.assign([[100.0], [1.0], [2.0], [5.0]])
    h = embeddings({"tags": tf.constant([[1, 2], [3, 0], [0, 0]])})
    np.testing.assert_allclose(h[SHARED], expected)


@pytest.mark.parametrize(("pooling", "expected"), [("sum", [[9.0], [4.0], [0.0]]), ("mean", [[4.5], [4.0], [0.0]])])
def test_a_value_with_two_ids_is_the_sum_of_their_rows(pooling: str, expected: list) -> None:
    # The values (2, 3) and (4, 4); then (3, 1); then none. A mean is one over values, not over ids.
    tags = Field("tags", "multivalent", rows=5, pooling=pooling, ids_per_value=2)  # type: ignore[arg-type]
    embeddings = Embeddings((tags,), 1)
    embeddings.groups[0].table.assign([[100.0], [1.0], [2.0], [3.0], [2.0]])
    ids = tf.constant([[2, 3, 4, 4], [3, 1, 0, 0], [0, 0, 0, 0]])
    with tf.GradientTape() as tape:
        h = embeddings({"tags": ids})
    np.testing.assert_allclose(h[SHARED], expected)
    # Both rows of a value have its gradient; a row that is both of them has it twice.
    first = tf.convert_to_tensor(tape.gradient(h[SHARED], embeddings.groups[0].table)).numpy()[:, 0]
    share = 0.5 if pooling == "mean" else 1.0
    np.testing.assert_allclose(first, [0, 1, share, 1 + share, 2 * share])


def test_numeric_and_dense_features_are_values_times_learned_vectors() -> None:
    embeddings = Embeddings((LENGTH, IMAGE, Field("user", rows=3)), 2, ["task:a", SHARED])
    (group,) = embeddings.groups
    group.numeric_kernel.assign([[1.0, 2.0, 3.0, 4.0]])
    group.dense_kernels[0].assign([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 2.0]])
    group.table.assign(tf.ones([3, 4]))
    h = embeddings({"length": tf.constant([10.0]), "image": tf.constant([[3.0, 4.0]]), "user": tf.constant([1])})
    np.testing.assert_array_equal(h["task:a"], [[1, 1, 10, 20, 3, 4]])
    np.testing.assert_array_equal(h[SHARED], [[1, 1, 30, 40, 6, 8]])


def test_deduplicate() -> None:
    ids, place = deduplicate(tf.constant([5, 2, 5, 9, 2]))
    np.testing.assert_array_equal(ids, [5, 2, 9])
    np.testing.assert_array_equal(place, [0, 1, 0, 2, 1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 16, 17, 1000])
def test_deduplicate_in_static_shapes(size: int, compiled: bool) -> None:
    given = np.random.default_rng(size).integers(0, size, size).astype(np.int32)
    function = tf.function(lambda x: deduplicate_static(x, size), jit_compile=compiled, autograph=False)
    ids, place = (x.numpy() for x in function(tf.constant(given)))
    expected = np.unique(given)
    np.testing.assert_array_equal(ids, np.append(expected, np.full(size - len(expected), size)))
    np.testing.assert_array_equal(ids[place], given)


@pytest.mark.parametrize("bits", [11, 8])
@pytest.mark.parametrize("side", [4, 4096, 16384])
def test_places_are_exact_where_products_round_their_factors(
    monkeypatch: pytest.MonkeyPatch, bits: int, side: int
) -> None:
    """As a GPU does with TF32, or bfloat16. ``side`` rows of as many positions: 2^24 and 2^28 of them in the larger."""

    def rounded(x: tf.Tensor) -> np.ndarray:
        fraction, exponent = np.frexp(np.asarray(x, np.float64))
        return np.ldexp(np.round(np.ldexp(fraction, bits)), exponent - bits)

    def product(digits: tf.Tensor, triangle: None) -> tf.Tensor:
        sums = np.cumsum(rounded(digits), axis=-1)  # what a product with the triangle is
        assert sums.max() < 1 << 24
        return tf.constant(sums, tf.float32)

    monkeypatch.setattr(tf, "matmul", product)
    totals = np.random.default_rng(side).integers(0, side + 1, side).astype(np.int32)
    totals[:2] = side, side - 1
    expected = np.cumsum(totals) - totals
    np.testing.assert_array_equal(distinct._sums_before(tf.constant(totals), None), expected)
    if bits < np.log2(side):  # what the product of the totals themselves would be
        assert (np.cumsum(rounded(tf.constant(totals))) - totals != expected).mean() > 0.9


def test_no_batch_outgrows_exact_places() -> None:
    with pytest.raises(ValueError, match="at most 268,435,456 rows per step, but looks up 300,000,000"):
        tf.function(lambda: distinct._prefix_sum(tf.zeros([300_000_000], tf.int32)))()


def test_numeric_transforms_in_order_and_missing_values() -> None:
    feature = Feature("x", "numeric", "item", "x", "float32", transform=("log1p", "standardise"))
    transform = InputTransform((feature,), {"x": Constants(mean=1.0, std=2.0, mean_after=0.25)})
    x = tf.constant([0.0, np.e - 1.0, np.nan])
    np.testing.assert_allclose(transform({"x": x})["x"], [-0.5, 0.0, 0.25], atol=1e-7)


def test_buckets_count_the_boundaries_at_or_below() -> None:
    feature = Feature("x", "numeric", "item", "x", "float32", boundaries=(10.0, 20.0))
    transform = InputTransform((feature,), {"x": Constants(boundaries=(10.0, 20.0))})
    ids = transform({"x": tf.constant([9.9, 10.0, 19.9, 20.0, np.nan, np.inf])})["x"]
    assert ids.dtype == tf.int32
    np.testing.assert_array_equal(ids, [2, 3, 3, 4, 1, 4])


def test_a_missing_dense_vector_is_zero() -> None:
    image = Feature("image", "dense", "item", "image", "float32", length=2)
    transform = InputTransform((image,), {})
    np.testing.assert_array_equal(transform({"image": tf.constant([[1.0, np.nan]])})["image"], [[1.0, 0.0]])


def test_transforms_stay_float32_under_bfloat16() -> None:
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        length = Feature("length", "numeric", "item", "length", "float32")
        layers = InputTransform((length,), {"length": Constants()}), Embeddings((LENGTH,), 2)
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    assert layers[1](layers[0]({"length": tf.constant([1.0])}))[SHARED].dtype == tf.float32


def test_mlp_by_hand() -> None:
    mlp = MLP([2], out=1)
    x = tf.constant([[1.0, 2.0]])
    mlp(x)
    mlp.linears[0].kernel.assign([[1.0, -1.0], [1.0, -1.0]])
    mlp.linears[-1].kernel.assign([[2.0], [7.0]])
    mlp.linears[-1].bias.assign([0.5])
    np.testing.assert_allclose(mlp(x), [[6.5]])  # relu([3, -3]) = [3, 0]


def test_experts_side_by_side_are_the_experts_alone() -> None:
    group = MLP([4, 3], count=3)
    x = tf.random.Generator.from_seed(0).normal([5, 2])
    together = group(x)
    assert together.shape == (3, 5, 3)
    for k in range(3):
        alone = MLP([4, 3])
        alone(x)
        for one, many in zip(alone.linears, group.linears, strict=True):
            one.kernel.assign(many.kernel[k])
            one.bias.assign(many.bias[k, 0])
        np.testing.assert_allclose(alone(x), together[k], rtol=1e-6)


def test_an_mlp_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one of units and out"):
        MLP([])


def test_xavier_of_a_batched_kernel_is_that_of_one_matrix() -> None:
    group = MLP([200], count=8)
    group(tf.zeros([1, 100]))
    assert float(tf.math.reduce_std(group.linears[0].kernel)) == pytest.approx((2.0 / 300.0) ** 0.5, rel=0.02)


def test_gate_is_a_distribution() -> None:
    weights = Gate("a", ["a", "b 1", "b 2", "shared"], [3])(tf.random.Generator.from_seed(0).normal([6, 5]))
    np.testing.assert_allclose(tf.reduce_sum(weights, axis=1), np.ones(6), rtol=1e-6)


def test_gates_of_one_network_are_observed() -> None:
    ours, theirs, x = Gate("a", ["a", "b"]), Gate("b", ["a", "b"]), tf.ones([2, 3])
    network = tf.keras.Sequential([tf.keras.Input([3]), ours])
    with observe(network) as seen:
        weights = network(x)
        theirs(x)
    network(x)
    ((gate, observed),) = seen
    assert gate is ours
    np.testing.assert_array_equal(observed, weights)


def test_mixture_by_hand() -> None:
    weights = tf.constant([[0.5, 0.25, 0.25]])
    groups = [tf.constant([[[1.0, 2.0]]]), tf.constant([[[4.0, 0.0]], [[0.0, 8.0]]])]
    np.testing.assert_allclose(mixture(weights, groups), [[1.5, 3.0]])


def test_a_side_alone_is_its_columns_of_the_whole() -> None:
    features = (LENGTH, ITEM, TAGS, IMAGE, USER)
    embeddings = Embeddings(features, 2, ["task:a", SHARED], ["user", "length"])
    inputs = {
        "user": tf.constant([1, 3]),
        "item": tf.constant([2, 0]),
        "tags": tf.constant([[1, 2, 0], [4, 0, 0]]),
        "length": tf.constant([3.0, 4.0]),
        "image": tf.constant([[1.0, 2.0], [3.0, 4.0]]),
    }
    whole = embeddings(inputs)
    seen = []
    for side in ({"user"}, {"item", "tags", "length", "image"}):
        columns = embeddings.columns(side)
        part = embeddings({name: value for name, value in inputs.items() if name in side})
        for table in ("task:a", SHARED):
            np.testing.assert_array_equal(part[table], whole[table].numpy()[:, columns])
        seen += columns
    assert sorted(seen) == list(range(embeddings.flat_width))


@pytest.mark.parametrize("count", [None, 3])
def test_sides_are_the_joined_input(count: int | None) -> None:
    generator = tf.random.Generator.from_seed(0)
    once, each = generator.normal([2, 3]), generator.normal([2 * 4, 2])
    columns = tf.constant([0, 2, 4]), tf.constant([1, 3])
    joined = np.empty([8, 5], np.float32)
    joined[:, columns[0]], joined[:, columns[1]] = np.repeat(once, 4, axis=0), each
    mlp = MLP([4, 3], out=2, count=count)
    sides = Sides(once, each, *columns)
    np.testing.assert_allclose(mlp(joined), mlp(sides), atol=1e-6)
    np.testing.assert_allclose(mlp(2 * joined), mlp(sides + sides), atol=1e-6)
