"""Tables as an export stores them: what rounding gives, and that the packed table gets exactly that."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from export import tables
from stem_tf.layers.embedding import Field, PackedTable


def group(rows: int = 7) -> PackedTable:
    """Three tables whose sizes differ by orders of magnitude; row 2 is zeros."""
    made = PackedTable([Field("f", rows=rows)], 4, ["a", "b", "shared"], 1.0, train_tables=False)
    values = np.random.default_rng(0).normal(size=(rows, 3, 4)) * np.array([1e-4, 1.0, 1e3])[:, None]
    values[2] = 0
    made.table.assign(values.reshape(rows, 12))
    return made


@pytest.mark.parametrize(("kind", "error"), [("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_rounding_is_relative_to_a_rows_own_slice(kind: tables.Kind, error: float) -> None:
    packed = group()
    exact = packed.table.numpy().reshape(-1, 3, 4)
    stored = tables.StoredTable(packed, kind)
    rounded = packed.table.numpy().reshape(-1, 3, 4)
    assert stored.values.dtype == kind
    assert 0 < np.abs(rounded - exact).max() and not rounded[2].any()
    assert (np.abs(rounded - exact) <= error * 1.001 * np.abs(exact).max(axis=2, keepdims=True)).all()


@pytest.mark.parametrize("kind", tables.KINDS)
def test_what_is_read_is_the_packed_table(kind: tables.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROWS_AT_A_TIME", 3)
    packed = group()
    stored = tables.StoredTable(packed, kind)
    ids = tf.constant([6, 0, 2, 2, 5])
    np.testing.assert_array_equal(stored.read(ids), tf.gather(packed.table, ids))
    again = packed.table.numpy()
    tables.StoredTable(packed, kind)
    np.testing.assert_allclose(packed.table, again, rtol=1e-6)  # rounded values round to themselves


def test_zeros_and_the_largest_values_of_float32_stay_numbers() -> None:
    packed = group(3)
    packed.table.assign(np.array([[3e38, -3e38, 1e-45, 0] * 3, [1e-40, -1e-45, 0, 0] * 3, [0.0] * 12], np.float32))
    tables.StoredTable(packed, "int8")
    assert np.isfinite(packed.table).all()
    np.testing.assert_allclose(packed.table[0], [3e38, -3e38, 0, 0] * 3, rtol=1e-6)
