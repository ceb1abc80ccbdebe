"""Slices of a split: the rows of one hour, of users that train has not seen, of one value of any column of the raw log.

A slice is spelled

- ``COLUMN``: one slice per value (the most frequent ones; the others together), or, for numbers of many values, per
  range of equally many rows; rows without a value are a slice, too;
- ``COLUMN=VALUE``: the rows with that value; ``COLUMN=`` those without one;
- ``COLUMN:new``: the rows whose value is not in the feature's vocabulary, so that it shares the rare id;
- ``COLUMN:rare``: the rows whose value is in the vocabulary, but among those that train has seen least.

COLUMN is a feature of the schema or a column of the raw log, which conversion keeps for validation and test. A row with
several values (a multivalent feature) is in the slice of each. Does not import TensorFlow.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray

from pipelines import vocabulary
from pipelines.log import casts
from pipelines.manifest import Manifest
from pipelines.schema import Feature, Task
from stem_tf.evaluation import metrics
from stem_tf.evaluation.predictions import Predictions, raw_values
from stem_util.errors import UserError, did_you_mean, message

VALUES = 10
"""How many values of a column get a slice of their own."""
RANGES = 5
"""Into how many ranges numbers are divided."""
RARE_SHARE = 0.1
"""Values are rare if they and all that are no more frequent make up at most this share of what train has seen."""
FEWEST = 10
"""A slice has an AUC if it has at least so many positives and as many negatives."""


@dataclass(frozen=True)
class Slice:
    """Some rows of a split.

    Attributes:
      name: how the slice is spelled, or a range such as ``10<=seconds<20``.
      column: the feature or column that it is made from.
      about: what the name does not say, as a phrase; "" where there is nothing to add.
      rows: bool [N].
    """

    name: str
    column: str
    about: str
    rows: NDArray[np.bool_]


class Slicer:
    """Makes the slices of a split.

    Args:
      manifest: manifest of the data.
      split: ``validation`` or ``test``.
      row_ids: int64 [N], the split's rows in the order of the predictions.

    Raises:
      UserError: the split's raw rows are not kept, or cannot be read.
    """

    def __init__(self, manifest: Manifest, split: str, row_ids: NDArray[np.int64]) -> None:
        self._raw = Path(manifest.data_dir) / "raw" / split
        if not self._raw.is_dir():
            raise UserError(
                f"{self._raw}: no raw rows, which slices are made from; they are kept of validation and test"
            )
        manifest.check_raw(split)
        self._manifest, self._row_ids = manifest, row_ids
        self._features = {feature.name: feature for feature in manifest.schema.features}
        try:
            kept = ds.dataset(self._raw, format="parquet").schema.names
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self._raw}: cannot be read ({message(error)}); convert the log again") from error
        self.columns: tuple[str, ...] = tuple(dict.fromkeys([*self._features, *(c for c in kept if c != "row_id")]))
        """The names that a slice can start with: features in the schema's order, then the raw log's columns."""

    def __call__(self, spelled: str) -> list[Slice]:
        """The slices of ``spelled`` that have rows, the most frequent value first, or the lowest range.

        Raises:
          UserError: no such column, one that this spelling is not for, or a value that no row has.
        """
        name, kind, value = self.check(spelled)
        if kind:
            return self._by_train(name, kind)
        return self._by_value(name) if value is None else self._of_value(name, value)

    def check(self, spelled: str) -> tuple[str, str, str | None]:
        """The column of ``spelled``, ``new`` or ``rare`` or "", and the value after ``=`` or None; reads no rows.

        Raises:
          UserError: no such column, or one that this spelling is not for.
        """
        if spelled in self.columns:
            return spelled, "", None
        name, colon, kind = spelled.rpartition(":")
        if colon and name in self.columns and kind in ("new", "rare"):
            if name not in self._manifest.vocabularies:
                raise UserError(
                    f"slice '{spelled}': {name} has no vocabulary; these have one: "
                    f"{', '.join(self._manifest.vocabularies) or 'none'}"
                )
            return name, kind, None
        for place in (at for at, letter in enumerate(spelled) if letter == "="):
            if spelled[:place] in self.columns:
                return spelled[:place], "", spelled[place + 1 :]
        name = name if kind in ("new", "rare") else spelled.partition("=")[0]
        raise UserError(
            f"slice '{spelled}': the data keep no column '{name}'{did_you_mean(name, self.columns) or '.'} They keep: "
            f"{', '.join(self.columns)}"
        )

    def _by_value(self, name: str) -> list[Slice]:
        values, rows = self._values(name)
        feature = self._features.get(name)
        encoded = values.dictionary_encode()
        ids = feature is not None and feature.kind in ("categorical", "multivalent")
        if len(encoded.dictionary) > VALUES and not ids and not casts.is_text(values.type):
            return self._ranges(name, values, rows) + self._missing(name, rows)
        codes = encoded.indices.to_numpy()
        order = np.argsort(-np.bincount(codes, minlength=len(encoded.dictionary)), kind="stable")
        own = order if len(order) <= VALUES + 1 else order[:VALUES]
        texts = _texts(encoded.dictionary.take(pa.array(own)))
        found = [
            Slice(f"{name}={text}", name, "", self._mask(rows[codes == code]))
            for code, text in zip(own, texts, strict=True)
        ]
        if len(own) < len(order):
            rest = self._mask(rows[~np.isin(codes, own)])
            found.append(Slice(f"{name}: other values", name, f"{len(order) - len(own):,} values", rest))
        return found + self._missing(name, rows)

    def _ranges(self, name: str, values: pa.Array, rows: NDArray[np.int64]) -> list[Slice]:
        """Ranges of equally many rows, as far as ties allow."""
        known = values.to_numpy(zero_copy_only=False)
        edges = np.unique(np.sort(known)[np.arange(1, RANGES) * len(known) // RANGES])
        place = np.searchsorted(edges, known, side="right")
        texts = _texts(pa.array(edges))
        names = [f"{name}<{texts[0]}", *(f"{low}<={name}<{high}" for low, high in itertools.pairwise(texts))]
        names.append(f"{name}>={texts[-1]}")
        found = [Slice(text, name, "", self._mask(rows[place == number])) for number, text in enumerate(names)]
        return [one for one in found if one.rows.any()]

    def _missing(self, name: str, rows: NDArray[np.int64]) -> list[Slice]:
        missing = ~self._mask(rows)
        return [Slice(f"{name}=", name, "rows without a value", missing)] if missing.any() else []

    def _of_value(self, name: str, text: str) -> list[Slice]:
        values, rows = self._values(name)
        if not text:
            found = self._missing(name, rows)
        else:
            try:
                value = pa.scalar(text).cast(values.type)
                same = casts.to_numpy(pc.equal(values, value))
            except pa.ArrowException:
                raise UserError(f"slice '{name}={text}': '{text}' is no value of type {values.type}") from None
            found = [Slice(f"{name}={text}", name, "", self._mask(rows[same]))] if same.any() else []
        if not found:
            raise UserError(f"slice '{name}={text}': no row of {self._raw} has this value")
        return found

    def _by_train(self, name: str, kind: str) -> list[Slice]:
        values, rows = self._values(name)
        table = vocabulary.load(self._manifest.vocabulary_path(name))
        ids = vocabulary.Lookup(table["value"]).plain(values)
        sizes = self._manifest.vocabularies[name]
        if kind == "new":
            about = (
                ""
                if sizes.size - sizes.free == sizes.distinct
                else f"or seen fewer than {self._features[name].min_count} times"
            )
            found = Slice(
                f"{name}:new", name, f"not seen in train {about}".strip(), self._mask(rows[ids == vocabulary.RARE_ID])
            )
        else:
            counts = np.r_[0, 0, table["count"].to_numpy()]  # by id
            most = _most_of_rare(counts[counts > 0])
            rare = (ids >= vocabulary.FIRST_ID) & (counts[ids] <= most)
            times = "once" if most == 1 else f"at most {most:,} times"
            found = Slice(f"{name}:rare", name, f"seen {times} in train", self._mask(rows[rare]))
        return [found] if found.rows.any() else []

    def _values(self, name: str) -> tuple[pa.Array, NDArray[np.int64]]:
        """The values of a column and the row [0, N) of each; rows without a value have none."""
        feature = self._features.get(name)
        array = raw_values(self._raw, name if feature is None else feature.column, self._row_ids).combine_chunks()
        if feature is not None and feature.kind == "multivalent":
            lists = casts.to_lists(array, feature.dtype, feature.separator)[0]
            rows, values = np.repeat(np.arange(len(lists.lengths)), lists.lengths), lists.values
        else:
            rows, values = np.arange(len(array)), self._plain(name, feature, array)
        known = casts.to_numpy(values.is_valid())
        return (values, rows) if known.all() else (values.filter(pa.array(known)), rows[known])

    def _plain(self, name: str, feature: Feature | None, array: pa.Array) -> pa.Array:
        """One value per row: int64, float64, text, bool or a time."""
        array = casts.plain(array)
        if casts.is_list(array.type) or pa.types.is_nested(array.type):
            raise UserError(f"slices are not made from lists, and column '{name}' holds lists ({array.type})")
        if feature is not None and feature.kind == "categorical":
            return (casts.to_int64 if feature.dtype == "int64" else casts.to_text)(array)[0]
        if feature is not None or pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
            return casts.to_float64(array)[0]
        return casts.to_text(array)[0] if casts.is_text(array.type) or pa.types.is_time(array.type) else array

    def _mask(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        mask = np.zeros(len(self._row_ids), bool)
        mask[rows] = True
        return mask


def _texts(values: pa.Array) -> list[str]:
    """The values as they are spelled in a slice's name."""
    if pa.types.is_temporal(values.type):
        return [str(value) for value in values.to_numpy(zero_copy_only=False)]
    return [text.removesuffix(".0") for text in values.cast(pa.string()).to_pylist()]


def _most_of_rare(counts: NDArray[np.int64]) -> int:
    """How often train has seen the most frequent of the rare values; at least as often as the least frequent value."""
    distinct, values = np.unique(counts, return_counts=True)
    if not len(distinct):
        return 0
    share = np.cumsum(distinct * values) / counts.sum()
    within = int(np.count_nonzero(share <= RARE_SHARE))
    return int(distinct[max(within, 1) - 1])


def too_few(positives: int, negatives: int) -> str:
    """Why rows have no AUC worth showing, as ``7 positives``; "" where they have one."""
    rows, what = (positives, "positive") if positives <= negatives else (negatives, "negative")
    return "" if rows >= FEWEST else f"{rows:,} {what}{'' if rows == 1 else 's'}"


def evaluate(tasks: tuple[Task, ...], predicted: Predictions, rows: NDArray[np.bool_]) -> dict[str, dict[str, Any]]:
    """The metrics of a slice, by task.

    Args:
      tasks: the schema's tasks that the predictions have.
      predicted: scores and labels of N rows.
      rows: bool [N], those of the slice.

    Returns:
      By task ``rows`` inside its space, ``rate`` and ``predicted`` (mean label and score) and
      ``predicted_over_observed`` (NaN where the rate is not above 0). A binary task also has ``auc``, ``logloss`` and
      ``too_few``: "" or, where the AUC is NaN because of it, ``7 positives``. A regression has ``mse``.
    """
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        w = predicted.weights_of(task.name)
        inside = rows & (w != 0)
        y, s, w = predicted.labels[task.name][inside], predicted.scores[task.name][inside], w[inside]
        mean = float(np.average(s.astype(np.float64), weights=w)) if len(s) else float("nan")
        rate = float(np.average(y.astype(np.float64), weights=w)) if len(y) else float("nan")
        result: dict[str, Any] = {
            "rows": len(y),
            "rate": rate,
            "predicted": mean,
            "predicted_over_observed": mean / rate if rate > 0 and mean >= 0 else float("nan"),
        }
        if task.type == "binary":
            positives = int(np.count_nonzero(y > 0.5))
            result["too_few"] = too_few(positives, len(y) - positives)
            result["auc"] = float("nan") if result["too_few"] else metrics.auc(y, s, w)
            result["logloss"] = metrics.logloss(y, s, w)
        else:
            result["mse"] = metrics.mse(y, s, w)
        found[task.name] = result
    return found
