"""What a report shows of a trained model beside its scores, measured in the process that has the model.

The rest of this package reads it from the run's ``comparison/measures.json`` without TensorFlow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipelines.batches.damage import naming_corrupt_records
from pipelines.batches.dataset import read_batches
from pipelines.manifest import Manifest
from stem_tf import configs, inspection, report
from stem_tf.compare import cost, embeddings, importance
from stem_tf.compare.measured import VERSION
from stem_tf.trained import Trained
from stem_tf.workdir import Workdir

SPLIT = "test"
MOST_ROWS = 20_000
"""Rows of a larger split are drawn at random, the same for every run on the same data."""
MOST_PRODUCTS, LEAST_ROWS = 4e11, 1000
"""Multiply-adds that shuffling features may take, about half a minute on two cores, before fewer rows are shuffled; and
the fewest rows."""
RESAMPLES = 100
_SEED = 0
_BATCH_ROWS = 4096


def measure(workdir: Workdir, config: Any, manifest: Manifest, found: Trained) -> dict[str, Any]:
    """Measures a trained model.

    Args:
      workdir: the run's directory.
      config: the run's config.
      manifest: manifest of the run's data, with the tasks that the run predicts.
      found: the run's model.

    Returns:
      A tree for JSON, whose numbers are finite or None: ``version``; ``split``, ``rows`` and ``rows_of_split``, the
      rows that were measured; ``gates`` and ``experts`` as `stem_tf.inspection.utilisation` returns them, empty for a
      model without gates; ``cost`` as `stem_tf.compare.cost.cost` returns it; ``abundance`` and ``distances`` as
      `stem_tf.compare.embeddings` returns them; ``importance``, as `stem_tf.compare.importance.importance` returns it,
      and ``importance_rows``, the rows that were shuffled.

    Raises:
      UserError: the data cannot be read.
      CorruptRecord: a damaged record.
    """
    rows = read(manifest, SPLIT, config.data, MOST_ROWS)
    batches = tf.data.Dataset.from_tensor_slices(rows).batch(_BATCH_ROWS)
    gates, experts = inspection.utilisation(found.model, batches)
    sets, schema = inspection.members(found.model), manifest.schema
    price = cost.cost(workdir, config, schema, found.model, rows["features"])
    products = price["multiply_adds"] * importance.SHUFFLES * len(rows["features"])
    chosen = _drawn(len(rows["row_id"]), max(LEAST_ROWS, int(MOST_PRODUCTS / products)))
    fewer = tf.nest.map_structure(lambda values: values[chosen], rows)
    return report.finite(
        {
            "version": VERSION,
            "split": SPLIT,
            "rows": len(rows["row_id"]),
            "rows_of_split": manifest.rows(SPLIT),
            "gates": gates,
            "experts": experts,
            "abundance": embeddings.abundance(sets),
            "distances": embeddings.distances(sets, schema, rows, rows.get("group"), RESAMPLES, _SEED),
            "importance": importance.importance(found.model, fewer, fewer.get("group"), RESAMPLES, _SEED),
            "importance_rows": len(chosen),
            "cost": price,
        }
    )


def read(manifest: Manifest, split: str, data: Any, most: int) -> dict[str, Any]:
    """Rows of a split as one batch of numpy arrays, in input order: all, or ``most`` of them at random."""
    chosen = _drawn(manifest.rows(split), most)
    parts: list[Mapping[str, Any]] = []
    first = 0
    with naming_corrupt_records(manifest, split, data.input_format):
        for batch in read_batches(manifest, split, training=False, **configs.reading(data)):
            end = first + int(np.count_nonzero(batch["row_id"] >= 0))  # the last batch is padded
            begin, stop = np.searchsorted(chosen, (first, end))
            inside = chosen[begin:stop] - first
            parts.append(tf.nest.map_structure(lambda values, of=inside: values.numpy()[of], batch))
            first = end
    whole: dict[str, Any] = tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *parts)
    return whole


def _drawn(rows: int, most: int) -> NDArray[np.int64]:
    """Places of all rows, or of ``most`` of them at random, ascending."""
    return np.sort(np.random.default_rng(_SEED).choice(rows, min(rows, most), replace=False))
