"""The schema: what the log's columns mean. A frozen dataclass in memory, YAML on disk.

The schema travels with the converted data, with every run and with every export.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["categorical", "multivalent", "numeric", "dense"]
Side = Literal["user", "item", "context"]


@dataclass(frozen=True)
class Feature:
    """One model input.

    Attributes:
      name: key of the feature's tensor in a batch and in a request.
      kind: ``categorical`` (one id), ``multivalent`` (a bag of ids), ``numeric`` (one float) or ``dense`` (a fixed-length vector).
      side: who the feature describes: ``user``, ``item`` or ``context``.
      column: the log's column.
      dtype: ``int64`` or ``string`` for categorical and multivalent features (bool and narrower ints are ``int64``),
        ``float32`` for numeric and dense ones.
      dim: embedding width D, or None for the model's own (``config.model.dim``).
      min_count: values seen fewer times in train share the rare id.
      pooling: how a multivalent feature's embeddings combine: ``mean`` or ``sum``.
      max_length: L, the number of values of a multivalent feature that are kept (the first ones).
      separator: splits a multivalent feature's text column into values; None when the column holds lists.
      length: n, the number of elements of a dense vector.
      transform: steps of a numeric feature in order, from ``log1p`` and ``standardise``.
      boundaries: ascending bucket boundaries of a bucketised numeric feature, or ().
      quantiles: number of equal-frequency buckets fitted on train, or 0.
      missing: ``rare`` (a missing value is the empty value) or ``error``.
      allow_label_column: insist on a feature whose column a label uses.
    """

    name: str
    kind: Kind
    side: Side
    column: str
    dtype: Literal["int64", "string", "float32"]
    dim: int | None = None
    min_count: int = 1
    pooling: Literal["mean", "sum"] = "mean"
    max_length: int = 0
    separator: str | None = None
    length: int = 0
    transform: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    quantiles: int = 0
    missing: Literal["rare", "error"] = "rare"
    allow_label_column: bool = False

    @property
    def bucketised(self) -> bool:
        return bool(self.boundaries) or self.quantiles > 0


@dataclass(frozen=True)
class Label:
    """Where a task's label comes from: ``column``, ``column == equals`` or ``column / divide_by``, then ``clip``.

    ``missing`` says what a null (in either column) or a zero denominator means: ``error``, or ``outside``: the row is
    outside the task's sample space (PLE Eq. 9).
    """

    column: str
    equals: str | int | None = None
    divide_by: str | None = None
    clip: tuple[float, float] | None = None
    missing: Literal["error", "outside"] = "error"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,) if self.divide_by is None else (self.column, self.divide_by)


@dataclass(frozen=True)
class Task:
    """One kind of feedback to predict; ``weight`` multiplies its loss."""

    name: str
    label: Label
    type: Literal["binary", "regression"] = "binary"
    weight: float = 1.0


@dataclass(frozen=True)
class Schema:
    """Features, tasks and keys of one log.

    Attributes:
      name: of the data set.
      features: in the order in which their embeddings are concatenated.
      tasks: in the order in which reports list them; everything else is keyed by name.
      task_tables: features that get task-specific tables beside the shared one (STEM-Net-(F)): ``all``, ``none``,
        ``user`` side, ``item`` side, or a tuple of feature names.
      group: the log's column whose value groups rows for grouped AUC (usually the user), or None.
      item: the log's column that names the item, for the trivial per-item answer, or None.
    """

    name: str
    features: tuple[Feature, ...]
    tasks: tuple[Task, ...]
    task_tables: Literal["all", "none", "user", "item"] | tuple[str, ...] = "all"
    group: str | None = None
    item: str | None = None
