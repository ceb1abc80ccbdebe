"""The schema: what the log's columns mean, as frozen dataclasses.

Converted data, runs and exports each have a copy of it. :mod:`pipelines.schema_yaml` reads and writes it as YAML;
docs/schema.md explains every key.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import pyarrow as pa

from pipelines.log import columns
from pipelines.yaml_reader import hint
from stem_util.errors import UserError

Kind = Literal["categorical", "multivalent", "numeric", "dense"]
Side = Literal["user", "item", "context"]


@dataclass(frozen=True)
class Hash:
    """Ids that are computed from a value rather than looked up in a vocabulary; see :mod:`pipelines.hashed_ids`.

    Attributes:
      buckets: B, the number of rows that values share, beside those of padding and of missing values.
      hashes: how many rows a value reads: 1, or 2 whose sum is its embedding.
    """

    buckets: int
    hashes: Literal[1, 2] = 1


@dataclass(frozen=True)
class Feature:
    """One model input.

    Attributes:
      name: key of the feature's tensor in a batch and in a request.
      kind: ``categorical`` (one id), ``multivalent`` (a bag of ids), ``numeric`` (one float) or ``dense`` (a vector of
        fixed length).
      side: what the feature describes: ``user``, ``item`` or ``context``.
      column: the log's column.
      dtype: ``int64`` or ``string`` for categorical and multivalent features (bool and narrower ints are ``int64``),
        ``float32`` for numeric and dense ones.
      dim: embedding width D, or None to use the model's (``config.model.dim``).
      min_count: values seen fewer times in train share the rare id.
      hash: how ids are computed from values, or None if they are looked up in a vocabulary.
      pooling: how a multivalent feature's embeddings combine: ``mean`` or ``sum``.
      max_length: L: of a multivalent feature's values, the first L are kept.
      separator: splits a multivalent feature's text column into values; None when the column holds lists.
      length: n, the number of elements of a dense vector.
      transform: steps of a numeric feature in order, from ``log1p`` and ``standardise``.
      boundaries: ascending bucket boundaries of a bucketised numeric feature, or ().
      quantiles: number of equal-frequency buckets fitted on train, or 0.
      missing: ``rare`` (missing values share the rare id; with a hash they have it for themselves) or ``error``.
      allow_label_column: accept a feature whose column a label uses.
    """

    name: str
    kind: Kind
    side: Side
    column: str
    dtype: Literal["int64", "string", "float32"]
    dim: int | None = None
    min_count: int = 1
    hash: Hash | None = None
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

    @property
    def has_ids(self) -> bool:
        """Whether its values become ids."""
        return self.kind in ("categorical", "multivalent")

    @property
    def has_vocabulary(self) -> bool:
        """Whether these ids are looked up in a vocabulary."""
        return self.has_ids and self.hash is None

    @property
    def ids_per_value(self) -> int:
        """How many ids a value has."""
        return 1 if self.hash is None else self.hash.hashes


@dataclass(frozen=True)
class Threshold:
    """A threshold that is computed for each row: ``times * column``."""

    column: str
    times: float = 1.0


@dataclass(frozen=True)
class Label:
    """Where a task's label comes from.

    A binary label is the column itself, if it holds 0 and 1, or 1 where its value meets a condition: ``equals``,
    ``one_of``, or ``at_least`` and ``at_most``. A regression label is the column, divided by another one, then clipped.

    Attributes:
      column: of the log.
      equals: the value that means 1; all others mean 0.
      one_of: several such values (``in`` in YAML), or ().
      at_least: values of at least this mean 1; a number, or a multiple of another column's value.
      at_most: values of at most this mean 1; with ``at_least``, those that meet both.
      divide_by: column of the denominator.
      clip: (low, high), after the division.
      standardise: train on (y - mean) / std with constants from the train split, after all of the above; scores are
        converted back.
      missing: what a null (in any of the columns) or a zero denominator means: ``error``, or ``outside``: the row is
        outside the task's sample space (PLE Eq. 9).
    """

    column: str
    equals: str | float | None = None
    one_of: tuple[str | float, ...] = ()
    at_least: float | Threshold | None = None
    at_most: float | Threshold | None = None
    divide_by: str | None = None
    clip: tuple[float, float] | None = None
    standardise: bool = False
    missing: Literal["error", "outside"] = "error"

    @property
    def values(self) -> tuple[str | float, ...]:
        """The values that mean 1 (``equals`` or ``in``), or ()."""
        return self.one_of if self.equals is None else (self.equals,)

    @property
    def thresholds(self) -> dict[str, float | Threshold]:
        """``at_least`` and ``at_most``, if they are set."""
        limits = {"at_least": self.at_least, "at_most": self.at_most}
        return {key: limit for key, limit in limits.items() if limit is not None}

    @property
    def uses(self) -> dict[str, str]:
        """The columns of the log that the label is made of, by the key that names them."""
        others = {
            f"{key}.column": limit.column for key, limit in self.thresholds.items() if isinstance(limit, Threshold)
        }
        return {"column": self.column, **others, **({"divide_by": self.divide_by} if self.divide_by else {})}

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.uses.values()))


@dataclass(frozen=True)
class Space:
    """A task's sample space (delta of PLE Eq. 9), beside rows without a label: one of the two attributes is set.

    Attributes:
      column: rows where this column of the log is 1 or true; a null is outside.
      task: rows where the label of this other, binary task is 1; rows outside its space are outside this one too.
    """

    column: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class Task:
    """One kind of feedback to predict.

    Attributes:
      name: key of its label in a batch and of its score in a response.
      label: where it comes from.
      type: ``binary`` or ``regression``.
      weight: factor of the task's loss.
      output: how the score of a regression is made of the model's output: ``linear`` (unchanged) or ``sigmoid`` (for
        labels in [0, 1]).
      space: rows that the task is about; all rows when None.
      row_weight: column with the weight of each row in the task's loss, rates and metrics; each row counts 1 when None.
        A row of weight 0 is outside the task's space.
    """

    name: str
    label: Label
    type: Literal["binary", "regression"] = "binary"
    weight: float = 1.0
    output: Literal["linear", "sigmoid"] = "linear"
    space: Space | None = None
    row_weight: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the log that decide the task's labels and row weights."""
        space = self.space.column if self.space else None
        return *self.label.columns, *filter(None, (space, self.row_weight))


@dataclass(frozen=True)
class Parameter:
    """A number in a ranking formula that has a name.

    Attributes:
      name: in the formula.
      value: what it is.
      range: lowest and highest value that a search may try; None where the value is fixed.
      log: search on a logarithmic scale.
    """

    name: str
    value: float
    range: tuple[float, float] | None = None
    log: bool = False


@dataclass(frozen=True)
class Ranking:
    """One score to rank by, made of the tasks' scores; :mod:`pipelines.ranking` reads and explains it.

    Attributes:
      score: a formula of scores by task, numeric features and parameters.
      gain: a formula of labels by task and numeric features: what a shown item was worth. None for the sum of the
        labels of the binary tasks that ``score`` names, or of all tasks that it names if none is binary.
      parameters: the named numbers of ``score``.
    """

    score: str
    gain: str | None = None
    parameters: tuple[Parameter, ...] = ()


@dataclass(frozen=True)
class Schema:
    """Features, tasks and keys of one log.

    Attributes:
      name: the name of the data set.
      features: in the order in which their embeddings are concatenated.
      tasks: in the order in which reports list them; everything else goes by name.
      task_tables: features that get task-specific tables beside the shared one (STEM-Net-(F)): ``all``, ``none``,
        ``user`` side, ``item`` side, or a tuple of feature names.
      group: the log's column whose value groups rows for grouped AUC (usually the user), or None.
      item: the log's column that names the item, for the mean label per item that reports compare with, or None.
      time: the log's column that says when a row happened, or None.
      ranking: one score to rank by, or None. It may be replaced when a run is evaluated or exported.
    """

    name: str
    features: tuple[Feature, ...]
    tasks: tuple[Task, ...]
    task_tables: Literal["all", "none", "user", "item"] | tuple[str, ...] = "all"
    group: str | None = None
    item: str | None = None
    time: str | None = None
    ranking: Ranking | None = None

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def row_weights(self) -> tuple[str, ...]:
        """The columns of row weights, each once."""
        return tuple(dict.fromkeys(task.row_weight for task in self.tasks if task.row_weight))

    @property
    def task_features(self) -> tuple[Feature, ...]:
        """The features that have task-specific tables, in the schema's order."""
        chosen = self.task_tables
        if isinstance(chosen, tuple):
            return tuple(feature for feature in self.features if feature.name in chosen)
        return tuple(feature for feature in self.features if chosen in ("all", feature.side))

    def feature(self, name: str) -> Feature:
        """The feature of that name.

        Raises:
          UserError: there is no such feature.
        """
        for feature in self.features:
            if feature.name == name:
                return feature
        names = [feature.name for feature in self.features]
        raise UserError(f"schema {self.name}: no feature {name!r}{hint(name, names)}")

    def validate_columns(
        self,
        log_columns: Mapping[str, pa.DataType],
        source: str = "the log",
        *,
        text: bool = False,
        directories: Collection[str] = (),
        problems: Mapping[str, str] = MappingProxyType({}),
        served: bool = False,
    ) -> None:
        """Refuses a log whose columns do not fit the schema.

        Args:
          log_columns: type of each column of the log.
          source: name of the log, for errors.
          text: the log is CSV: its columns have no types, and those given here are ignored.
          directories: columns whose values are in the names of directories; they have no types either.
          problems: columns that cannot be read, and why.
          served: the schema came with an exported model, so errors do not suggest to change it.

        Raises:
          UserError: the first column that is missing or has a type that its use does not allow.
        """
        columns.validate(
            self, log_columns, source, text=text, directories=directories, problems=problems, served=served
        )
