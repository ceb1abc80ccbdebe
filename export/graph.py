"""The serving graph: raw values in, one float32 score a task out.

::

    serving_default   user_id [B]  tags [B, L]  length [B]  image [B, n]           -> click [B]
    rank              user_id [B]  hour [B]  |  video_id [B, N]  tags [B, N, L]    -> click [B, N]
    examples          examples [B], serialised tf.Example                          -> click [B]

In ``rank`` user and context features come once a request, item features once a candidate. Empty values are
``pipelines.casts.EMPTY_INT``, ``""`` and NaN.

A vocabulary is looked up once, whatever the number of features that share it, and a packed table is gathered from once
(in ``rank`` once for the requests and once for the candidates).
"""

from __future__ import annotations

import contextlib
import hashlib
import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from export import tables, vocabulary_asset
from pipelines import files
from pipelines.casts import EMPTY_INT
from pipelines.schema import Feature, Schema
from pipelines.vocabulary import PADDING_ID
from stem_tf.layers.sides import gather_share
from stem_tf.models.base import Predictor

Tensors = Mapping[str, tf.Tensor]

EMPTY = {"int64": EMPTY_INT, "string": b"", "float32": float("nan")}
"""The empty value by dtype: what a request sends for a missing one."""


def spec(feature: Feature, name: str, lead: int) -> tf.TensorSpec:
    """What a request holds of a feature: ``lead`` axes (1: ``[B]``, 2: ``[B, N]``), then a bag's or a vector's own."""
    own: dict[str, list[int | None]] = {"multivalent": [None], "dense": [feature.length]}
    return tf.TensorSpec([*[None] * lead, *own.get(feature.kind, [])], tf.as_dtype(feature.dtype), name)


def example_spec(schema: Schema) -> dict[str, tf.io.FixedLenFeature | tf.io.FixedLenSequenceFeature]:
    """How a tf.Example of raw values is parsed; a missing key is the empty value."""
    result = {}
    for feature in schema.features:
        dtype, empty = tf.as_dtype(feature.dtype), EMPTY[feature.dtype]
        if feature.kind == "multivalent":
            result[feature.name] = tf.io.FixedLenSequenceFeature([], dtype, allow_missing=True, default_value=empty)
        elif feature.kind == "dense":
            result[feature.name] = tf.io.FixedLenFeature([feature.length], dtype, [empty] * feature.length)
        else:
            result[feature.name] = tf.io.FixedLenFeature([], dtype, empty)
    return result


def why_no_rank(schema: Schema) -> str:
    """Why a model of this schema has no signature ``rank``; "" where it has one."""
    if all(feature.side == "item" for feature in schema.features):
        return "the schema has no user or context features: there is nothing that candidates share"
    if all(feature.side != "item" for feature in schema.features):
        return "the schema has no item features: candidates of a request would all score the same"
    return ""


class ServingModule(tf.Module):
    """The signatures of one trained model. Tracks the weights that scores depend on and the vocabularies, nothing else.

    Args:
      schema: of the model's data.
      model: trained.
      vocabularies: path of the asset of every categorical and multivalent feature, by name.
      stored: the model's packed tables as they are saved; the model's own variables when not given.
    """

    def __init__(
        self,
        schema: Schema,
        model: Predictor,
        vocabularies: Mapping[str, Path],
        stored: Sequence[tables.StoredTable] | None = None,
    ) -> None:
        super().__init__(name="serving")
        self.stored = tables.store(model, "float32") if stored is None else list(stored)
        replaced = {id(table.group.table) for table in self.stored}
        weights = [weight for part in model.weight_parts.values() for weight in part.weights]
        self.weights = [weight for weight in weights if id(weight) not in replaced]
        self.shares: dict[str, tf.Variable] = {}
        # A table for features that have the same vocabulary; which one is a feature's, by name.
        self.tables: dict[str, tf.lookup.StaticHashTable] = {}
        self._table_of: dict[str, str] = {}
        for name, path in vocabularies.items():
            dtype = schema.feature(name).dtype
            with open(path, "rb") as file:
                key = f"{dtype}_{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if key not in self.tables:
                self.tables[key] = vocabulary_asset.lookup_table(path, dtype)
            self._table_of[name] = key
        # Through closures: a layer in an attribute would bring its own traced calls and counters into the SavedModel.
        self._schema, self._model = (lambda: schema), (lambda: model)

    def save(self, directory: Path) -> None:
        """Writes the SavedModel."""
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        with files.literal(directory) as path:
            tf.saved_model.save(self, path, signatures=self._signatures(), options=options)
        _rename_inputs(directory, {alias: name for name, alias in self._aliases.items() if alias != name})

    @property
    def _aliases(self) -> dict[str, str]:
        """Under which names the inputs are saved.

        On their way TensorFlow makes keyword arguments of them, and takes names that differ in case for the same.
        """
        aliases: dict[str, str] = {}
        taken = {"self"}
        for feature in self._schema().features:
            alias = feature.name
            while keyword.iskeyword(alias) or alias.lower() in taken:
                alias += "_"
            taken.add(alias.lower())
            aliases[feature.name] = alias
        return aliases

    def _signatures(self) -> dict[str, Any]:
        """Concrete functions by signature name."""
        schema, aliases = self._schema(), self._aliases

        def specs(features: Iterable[Feature], lead: int) -> dict[str, tf.TensorSpec]:
            return {feature.name: spec(feature, aliases[feature.name], lead) for feature in features}

        rows = specs(schema.features, 1)
        result = {
            "serving_default": _concrete(self.score, rows),
            "examples": _concrete(self.score_examples, {"examples": tf.TensorSpec([None], tf.string, name="examples")}),
        }
        if not why_no_rank(schema):
            items = specs((feature for feature in schema.features if feature.side == "item"), 2)
            result["rank"] = _concrete(self.rank, rows | items)
        return result

    def score(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """Scores by task ``[B]`` of raw features ``[B]``, ``[B, L]``, ``[B, n]``."""
        raw = _checked(raw, [_same_size("rows", list(raw), raw, axis=0)])
        with self._reading():
            return self._scores(self._model()(self._numbers(raw)))

    def score_examples(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """Scores by task ``[B]`` of serialised tf.Examples ``[B]``."""
        return self.score(tf.io.parse_example(raw["examples"], example_spec(self._schema())))

    def rank(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """Scores by task ``[B, N]``: user and context features are looked up, and multiplied by weights, B times."""
        model, features = self._model(), self._schema().features
        once = [feature.name for feature in features if feature.side != "item"]
        each = [feature.name for feature in features if feature.side == "item"]
        sizes = [_same_size("requests", list(raw), raw, axis=0), _same_size("candidates", each, raw, axis=1)]
        raw = _checked(raw, sizes)
        requests, candidates = tf.shape(raw[once[0]])[0], tf.shape(raw[each[0]])[1]
        flat = {name: tf.reshape(raw[name], [requests * candidates, *_tail(raw[name])]) for name in each}
        inputs = model.inputs(self._numbers({name: raw[name] for name in once} | flat))
        with self._reading():
            outputs = model.rank(inputs, once, each, self._share)
        return {name: tf.reshape(s, [requests, candidates]) for name, s in self._scores(outputs).items()}

    def _scores(self, outputs: Tensors) -> dict[str, tf.Tensor]:
        return self._model().scores(outputs)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """The model reads the stored tables, row by row, instead of its own."""
        for table in self.stored:
            table.group.reader = table.read
        try:
            yield
        finally:
            for table in self.stored:
                table.group.reader = None

    def _share(self, kernel: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
        """A side's rows of a first layer's weights, as a variable of their own: no request has to gather them."""
        places = tf.get_static_value(columns)
        weight = next(i for i, weight in enumerate(self.weights) if weight is kernel)
        key = f"{weight}_from_{places[0]}"  # the two sides have no column in common
        if key not in self.shares:
            with tf.init_scope():
                self.shares[key] = tf.Variable(gather_share(kernel, tf.constant(places)), trainable=False)
        return self.shares[key]

    def _numbers(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """What the model reads: ids int32 ``[R]`` and ``[R, max_length]``, floats as they are."""
        ids = self._ids({name: raw[name] for name in self._table_of})
        return {f.name: self._number(f, raw[f.name], ids.get(f.name)) for f in self._schema().features}

    def _ids(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """Ids int32 of raw values of any shape, by one lookup a vocabulary."""
        ids: dict[str, tf.Tensor] = {}
        for key, table in self.tables.items():
            names = [name for name in raw if self._table_of[name] == key]
            if len(names) == 1:
                ids[names[0]] = table.lookup(raw[names[0]])
                continue
            flat = table.lookup(tf.concat([tf.reshape(raw[name], [-1]) for name in names], axis=0))
            parts = tf.split(flat, tf.stack([tf.size(raw[name]) for name in names]), num=len(names))
            ids |= {n: tf.reshape(part, tf.shape(raw[n])) for n, part in zip(names, parts, strict=True)}
        return ids

    def _number(self, feature: Feature, x: tf.Tensor, ids: tf.Tensor | None) -> tf.Tensor:
        if feature.kind == "categorical":
            return ids
        if feature.kind == "multivalent":
            # As conversion does it: empty values are dropped, then the first of the others kept.
            empty = x == tf.constant(EMPTY[feature.dtype], x.dtype)
            ids = tf.where(empty, PADDING_ID, ids)
            return tf.ragged.boolean_mask(ids, ids != PADDING_ID).to_tensor(shape=[None, feature.max_length])
        # Values that conversion refuses count as missing: training never saw what they would become.
        known = tf.math.is_finite(x)
        if "log1p" in feature.transform:
            known &= x > -1.0
        return tf.where(known, x, EMPTY["float32"])


def _concrete(function: Callable[[Tensors], dict[str, tf.Tensor]], specs: Mapping[str, tf.TensorSpec]) -> Any:
    """``function`` of a dict as a concrete function of the tensors that ``specs`` names."""

    def serve(raw: Tensors) -> dict[str, tf.Tensor]:
        return function(raw)

    serve.__name__ = function.__name__  # shows in TensorFlow's errors
    return tf.function(serve, autograph=False).get_concrete_function(dict(specs))


def _rename_inputs(directory: Path, names: Mapping[str, str]) -> None:
    """Gives inputs of the signatures of a SavedModel other names, where there are ``names`` (old to new)."""
    if not names:
        return
    path = directory / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for signature in saved.meta_graphs[0].signature_def.values():
        inputs = {names.get(name, name): info.SerializeToString() for name, info in signature.inputs.items()}
        signature.inputs.clear()
        for name, info in inputs.items():
            signature.inputs[name].ParseFromString(info)
    path.write_bytes(saved.SerializeToString(deterministic=True))


def _tail(x: tf.Tensor) -> list[int | tf.Tensor]:
    """The sizes of a ``[B, N, ...]`` tensor behind the second axis, static where they are known."""
    return [size if size is not None else tf.shape(x)[axis] for axis, size in enumerate(x.shape[2:], start=2)]


def _same_size(what: str, names: list[str], raw: Tensors, axis: int) -> tf.Operation:
    """Fails where features differ in their number of rows, requests or candidates, and names them."""
    sizes = tf.stack([tf.shape(raw[name])[axis] for name in names])
    message = f"features differ in their number of {what} ({', '.join(names)}):"
    return tf.debugging.Assert(tf.reduce_all(sizes == sizes[0]), [message, sizes], summarize=len(names))


def _checked(raw: Tensors, checks: list[tf.Operation]) -> Tensors:
    """The same tensors, to be read once the checks have passed."""
    with tf.control_dependencies(checks):
        return {name: tf.identity(x) for name, x in raw.items()}
