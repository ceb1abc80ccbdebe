"""The serving graph: takes raw values, and returns one float32 score per task, and the outputs made of them.

::

    serving_default   user_id [B]  tags [B, L]  length [B]  image [B, n]           -> click [B]
    rank              user_id [B]  hour [B]  |  video_id [B, N]  tags [B, N, L]    -> click [B, N]
    examples          examples [B], serialised tf.Example                          -> click [B]

``rank`` takes user and context features once per request, and item features once per candidate. Empty values are -2^63,
``""`` and NaN (``pipelines.log.casts.EMPTY``).

L is the schema's ``max_length``: lists are padded with the empty value to that length. A server that joins requests of
different shapes pads them with a value of the request. This is harmless only on the axis of candidates, where the
padding's scores are cut off; so no other axis may differ between requests. In ``examples`` a list has any length.

The outputs of `pipelines.outputs` are computed from the scores and raw numeric features, in float64, and returned
beside the scores in every signature.

There is one lookup per vocabulary, even if several features share it, and one gather per packed table (in ``rank`` one
for the requests and one for the candidates). The ids of a feature with a hash are computed (:mod:`export.hashed_ids`).
"""

from __future__ import annotations

import hashlib
import keyword
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from export import derived, hashed_ids, tables, vocabulary_table
from pipelines.log.casts import EMPTY
from pipelines.schema import Feature, Schema
from pipelines.vocabulary import PADDING_ID
from stem_tf.layers.embedding import PackedTable
from stem_tf.layers.sides import gather_share
from stem_tf.models.predictor import Predictor
from stem_util import files

Tensors = Mapping[str, tf.Tensor]


def shape(feature: Feature, lead: int) -> list[int | None]:
    """The shape of a feature in a request: ``lead`` axes (1: ``[B]``, 2: ``[B, N]``), then that of a list or vector."""
    own: dict[str, list[int | None]] = {"multivalent": [feature.max_length], "dense": [feature.length]}
    return [*[None] * lead, *own.get(feature.kind, [])]


def example_spec(schema: Schema) -> dict[str, tf.io.FixedLenFeature | tf.io.FixedLenSequenceFeature]:
    """The specification by which a tf.Example of raw values is parsed; a missing key means the empty value."""
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
    """The reason why a model of this schema has no signature ``rank``; "" if it has one."""
    if all(feature.side == "item" for feature in schema.features):
        return "the schema has no user or context features: there is nothing that candidates share"
    if all(feature.side != "item" for feature in schema.features):
        return "the schema has no item features: candidates of a request would all score the same"
    return ""


class ServingModule(tf.Module):
    """The signatures of one trained model. Tracks only the vocabularies and the weights that scores depend on.

    Args:
      schema: the schema of the model's data.
      model: the trained model.
      vocabularies: path of the asset of each feature with a vocabulary, by name.
      stored: the model's packed tables in stored form; the model's own variables if not given.
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
        # One lookup table per distinct vocabulary, and the key of each feature's table.
        self.tables: dict[str, tf.lookup.StaticHashTable] = {}
        self._table_of: dict[str, str] = {}
        for name, path in vocabularies.items():
            dtype = schema.feature(name).dtype
            with open(path, "rb") as file:
                key = f"{dtype}_{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if key not in self.tables:
                self.tables[key] = vocabulary_table.lookup_table(path, dtype)
            self._table_of[name] = key
        # Through closures: a layer in an attribute would bring its own traced calls and counters into the SavedModel.
        self._schema, self._model = (lambda: schema), (lambda: model)

    def save(self, directory: Path) -> None:
        """Writes the SavedModel."""
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        with files.literal(directory) as path:
            tf.saved_model.save(self, path, signatures=self._signatures(), options=options)
        leads = {name: self._leads(name) for name in ("serving_default", "rank")}
        shapes = {
            signature: {f.name: shape(f, lead[f.name]) for f in self._schema().features}
            for signature, lead in leads.items()
        }
        _describe_inputs(directory, {alias: name for name, alias in self._aliases.items()}, shapes)

    @property
    def _aliases(self) -> dict[str, str]:
        """The names under which inputs are saved, by feature.

        TensorFlow turns names into keyword arguments while saving, and confuses names that differ in case only.
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
        # Shapes are left unknown: TensorFlow Serving does not check requests against the shapes of placeholders, but
        # TensorFlow would trust them, and fold away the checks of sizes in the graph. `_describe_inputs` publishes the
        # shapes.
        specs = {f.name: tf.TensorSpec(None, tf.as_dtype(f.dtype), aliases[f.name]) for f in schema.features}
        result = {
            "serving_default": _concrete(self.score, specs),
            "examples": _concrete(self.score_examples, {"examples": tf.TensorSpec([None], tf.string, name="examples")}),
        }
        if not why_no_rank(schema):
            result["rank"] = _concrete(self.rank, specs)
        return result

    def _leads(self, signature: str) -> dict[str, int]:
        """The number of leading axes (requests or rows, candidates), by feature."""
        ranks = signature == "rank"
        return {f.name: 2 if ranks and f.side == "item" else 1 for f in self._schema().features}

    def score(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """Scores raw features ``[B]``, ``[B, L]``, ``[B, n]``; returns ``[B]`` by task."""
        return self._score(self._checked(raw, "serving_default")[0])

    def score_examples(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """Scores serialised tf.Examples ``[B]``, whose lists have any length; returns ``[B]`` by task."""
        return self._score(tf.io.parse_example(raw["examples"], example_spec(self._schema())))

    def _score(self, raw: Tensors) -> dict[str, tf.Tensor]:
        numbers = self._numbers(raw)
        scores = self._scores(self._model()(numbers, read=self._read))
        return scores | derived.values(self._schema(), scores, numbers)

    def rank(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """Scores N candidates of B requests; returns ``[B, N]`` by task.

        User and context features are looked up, and multiplied by first-layer weights, once per request.
        """
        model, features = self._model(), self._schema().features
        once = [feature.name for feature in features if feature.side != "item"]
        each = [feature.name for feature in features if feature.side == "item"]
        flat, sizes = self._checked(raw, "rank")
        numbers = self._numbers(flat)
        outputs = model.rank(model.inputs(numbers), once, each, self._share, self._read)
        scores = {name: tf.reshape(s, sizes) for name, s in self._scores(outputs).items()}
        # [B, 1] of users and context, [B, N] of items: they spread over the candidates as they are computed with.
        names = [feature.name for feature in features if feature.kind == "numeric"]
        spread = {name: tf.reshape(numbers[name], sizes if name in each else [-1, 1]) for name in names}
        return scores | derived.values(self._schema(), scores, spread)

    def _checked(self, raw: Tensors, signature: str) -> tuple[Tensors, tf.Tensor]:
        """Checks the shapes of the tensors.

        Returns:
          The tensors, with features of candidates flat (``[B * N]``, ``[B * N, L]``, ``[B * N, n]``), and the sizes
          ``[B]`` or ``[B, N]`` of the scores.

        Raises (the graph, when it runs):
          tf.errors.InvalidArgumentError: a feature has a wrong number of axes or a list or vector of a wrong length, or
            features differ in their number of rows, requests or candidates; the message names the features.
        """
        features, leads = self._schema().features, self._leads(signature)
        shapes = {feature.name: shape(feature, leads[feature.name]) for feature in features}
        lengths = [len(sizes) for sizes in shapes.values()]
        starts = np.cumsum([0, *lengths])[:-1].tolist()
        each = [start for start, lead in zip(starts, leads.values(), strict=True) if lead == 2]
        axes = tf.stack([tf.rank(raw[name]) for name in shapes])
        # The sizes of all features one after another, [B, B, L, B, N, ...]; zeros keep the length if axes are missing.
        found = tf.concat([*(tf.shape(raw[name]) for name in shapes), tf.zeros([sum(lengths)], tf.int32)], axis=0)
        found = found[: sum(lengths)]
        # The size that each should have: that of the first feature with this axis, or L or n.
        own = [size for sizes in shapes.values() for size in sizes if size is not None]
        places, fixed = [], iter(range(sum(lengths), sum(lengths) + len(own)))
        for sizes in shapes.values():
            free = iter([starts[0], *(start + 1 for start in each[:1])])
            places += [next(free) if size is None else next(fixed) for size in sizes]
        wanted = tf.gather(tf.concat([found, tf.constant(own, tf.int32)], axis=0), places)
        fits = found == wanted

        def explain() -> tf.Tensor:
            words = tf.constant([_expected(feature, shapes[feature.name]) for feature in features])
            owner = [place for place, length in enumerate(lengths) for _ in range(length)]
            is_own = tf.constant([size is not None for sizes in shapes.values() for size in sizes])
            # TensorFlow runs them in this order.
            _assert(axes == tf.constant(lengths), words, "axes", axes)
            _assert(fits | ~is_own, tf.gather(words, owner), "size", found)
            _same_size("requests" if signature == "rank" else "rows", list(shapes), tf.gather(found, starts))
            if each:
                items = [name for name, lead in leads.items() if lead == 2]
                _same_size("candidates", items, tf.gather(found, [start + 1 for start in each]))
            return tf.constant(False)

        # All checks in one operation; the separate ones that explain a failure run only then.
        right = tf.reduce_all(tf.concat([axes == tf.constant(lengths), fits], axis=0))
        checked = tf.cond(right, lambda: tf.constant(True), explain)
        # A reshape hides the input's shape from TensorFlow's optimiser: otherwise it would infer the shape of the
        # request from what later operations need, and fold the checks away.
        targets = {name: tf.constant([-1, *sizes[leads[name] :]]) for name, sizes in shapes.items()}
        with tf.control_dependencies([checked]):
            flat = {name: tf.reshape(raw[name], target) for name, target in targets.items()}
            return flat, tf.gather(found, [each[0], each[0] + 1] if each else starts[:1])

    def _scores(self, outputs: Tensors) -> dict[str, tf.Tensor]:
        return self._model().scores(outputs)

    def _read(self, group: PackedTable, ids: tf.Tensor) -> tf.Tensor:
        """Reads rows ``ids`` ``[N]`` of a packed table in its stored form, ``[N, W]``."""
        return next(table for table in self.stored if table.group is group).read(ids)

    def _share(self, kernel: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
        """A first layer's weights for one side, as a separate variable, so that requests need not gather them."""
        places = tf.get_static_value(columns)
        weight = next(i for i, weight in enumerate(self.weights) if weight is kernel)
        key = f"{weight}_from_{places[0]}"  # the two sides have no column in common
        if key not in self.shares:
            with tf.init_scope():
                self.shares[key] = tf.Variable(gather_share(kernel, tf.constant(places)), trainable=False)
        return self.shares[key]

    def _numbers(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """The model's inputs: ids, int32 ``[R]`` and ``[R, max_length]``, and floats.

        A feature with two ids per value has int32 ``[R, 2]`` or ``[R, 2 max_length]``.
        """
        features = self._schema().features
        ids = self._ids({name: raw[name] for name in self._table_of})
        ids |= {f.name: hashed_ids.ids(raw[f.name], f.hash) for f in features if f.hash is not None}
        return {f.name: self._number(f, raw[f.name], ids.get(f.name)) for f in features}

    def _ids(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """The ids, int32, of raw values of any shape, with one lookup per vocabulary."""
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
        if ids is None:
            # Values that conversion refuses count as missing, because training never saw such values.
            known = tf.math.is_finite(x)
            if "log1p" in feature.transform:
                known &= x > -1.0
            return tf.where(known, x, EMPTY["float32"])
        if feature.kind == "categorical":
            return ids
        # As in conversion, empty values of a list are dropped and the first of the others kept.
        present = x != tf.constant(EMPTY[feature.dtype], x.dtype)
        shape = [feature.max_length, *ids.shape[2:]]
        kept = tf.ragged.boolean_mask(ids, present).to_tensor(PADDING_ID, shape=[None, *shape])
        return tf.reshape(kept, [-1, math.prod(shape)])


def _concrete(function: Callable[[Tensors], dict[str, tf.Tensor]], specs: Mapping[str, tf.TensorSpec]) -> Any:
    """A concrete function of the tensors in ``specs``, which calls ``function`` with a dict of them."""

    def serve(raw: Tensors) -> dict[str, tf.Tensor]:
        return function(raw)

    serve.__name__ = function.__name__  # appears in TensorFlow's errors
    return tf.function(serve, autograph=False).get_concrete_function(dict(specs))


def _describe_inputs(
    directory: Path, names: Mapping[str, str], shapes: Mapping[str, Mapping[str, Sequence[int | None]]]
) -> None:
    """Gives the inputs in the signatures of a SavedModel their names and shapes.

    Args:
      directory: the SavedModel.
      names: an input's name, by the name under which it was saved.
      shapes: shapes by signature and name; inputs without one keep the saved shape.
    """
    path = directory / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for key, signature in saved.meta_graphs[0].signature_def.items():
        inputs = {names.get(name, name): info.SerializeToString() for name, info in signature.inputs.items()}
        signature.inputs.clear()
        for name, info in inputs.items():
            signature.inputs[name].ParseFromString(info)
            if name in shapes.get(key, {}):
                signature.inputs[name].tensor_shape.CopyFrom(tf.TensorShape(shapes[key][name]).as_proto())
    path.write_bytes(saved.SerializeToString(deterministic=True))


def _expected(feature: Feature, sizes: Sequence[int | None]) -> str:
    """The shape that a feature should have in a request, for an error."""
    free = iter("BN")
    axes = ", ".join(next(free) if size is None else str(size) for size in sizes)
    text = f"feature {feature.name} should have shape [{axes}]"
    if feature.kind == "multivalent":
        empty = "an empty string" if feature.dtype == "string" else str(EMPTY["int64"])
        text += f": a list is padded with the empty value ({empty}) to {feature.max_length}"
    elif feature.kind == "dense":
        text += f": a vector has {feature.length} elements"
    return text


def _assert(right: tf.Tensor, words: tf.Tensor, what: str, sent: tf.Tensor) -> None:
    """Fails if ``right``, bool ``[n]``, is false anywhere, with ``words`` and ``sent``, ``[n]``, of these places."""
    wrong = tf.squeeze(tf.where(~right), axis=1)
    data = [tf.gather(words, wrong), f"{what} sent:", tf.gather(sent, wrong)]
    tf.debugging.Assert(tf.reduce_all(right), data, summarize=16)


def _same_size(what: str, names: Sequence[str], sizes: tf.Tensor) -> None:
    """Fails if features differ in their number of rows, requests or candidates; the error names them."""
    message = f"features differ in their number of {what} ({', '.join(names)}):"
    tf.debugging.Assert(tf.reduce_all(sizes == sizes[0]), [message, sizes], summarize=len(names))
