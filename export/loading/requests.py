"""Serialised requests, made before the measurement."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export import raw
from pipelines import schema_yaml
from pipelines.log.casts import EMPTY
from pipelines.log.parts import CsvOptions
from pipelines.schema import Feature, Schema
from stem_client import features as client_features
from stem_client import metadata, protocol
from stem_util import copies, owned, stores
from stem_util.errors import UserError

_DISTINCT = 256
_MOST_ROWS = 20_000


@dataclass(frozen=True)
class Request:
    """A serialised PredictRequest.

    Attributes:
      data: its bytes.
      size: candidates for `rank`, rows for another signature.
    """

    data: bytes
    size: int


@dataclass(frozen=True)
class Spec:
    """The model and signature to ask.

    Attributes:
      model: its name.
      version: None for the one that the server serves.
      signature: `rank` or `serving_default`.
    """

    model: str
    version: int | None
    signature: str

    def fill(self, spec: protocol.ModelSpec) -> None:
        spec.name, spec.signature_name = self.model, self.signature
        if self.version is not None:
            spec.version.value = self.version

    def features(self, served: metadata.ModelMetadata) -> tuple[metadata.Feature, ...]:
        """The inputs of the signature; raises RankingError if stem-tf did not export the model."""
        return served.rank_features() if self.signature == metadata.RANK else served.features


def from_rows(
    spec: Spec,
    served: metadata.ModelMetadata,
    arrays: Mapping[str, np.ndarray],
    sizes: Mapping[int, float],
    random: np.random.Generator,
) -> list[Request]:
    """Makes requests from rows drawn at random: for `rank`, one row's user with the items of N rows.

    Args:
      spec: of the model.
      served: its inputs.
      arrays: tensors of ``serving_default``, with at least one row.
      sizes: values of N with their frequencies.
      random: draws the rows.
    """
    features = spec.features(served)
    count = len(next(iter(arrays.values())))
    weights = np.array(list(sizes.values()), float)
    requests = []
    for size in random.choice(list(sizes), _DISTINCT, p=weights / weights.sum()).tolist():
        user, chosen = random.integers(count), random.integers(count, size=size)
        message = protocol.PredictRequest()
        spec.fill(message.model_spec)
        for feature in features:
            array = arrays[feature.name]
            if spec.signature != metadata.RANK:
                array = array[chosen]
            else:
                array = array[chosen][np.newaxis] if feature.per_item else array[user : user + 1]
            client_features.write(message.inputs[feature.name], array)
        requests.append(Request(message.SerializeToString(), size))
    return requests


def from_warm_up(spec: Spec, served: metadata.ModelMetadata, version: Path) -> list[Request]:
    """The warm-up requests of an exported version.

    Raises:
      UserError: it has none for this signature.
    """
    from export import warmup  # imports TensorFlow, which requests from rows do not need

    items = {feature.name for feature in served.features if feature.per_item}
    requests = []
    for message in warmup.read(version / warmup.IN_A_VERSION):
        if message.model_spec.signature_name == spec.signature:
            message.model_spec.Clear()
            spec.fill(message.model_spec)
            name = next((name for name in message.inputs if spec.signature != metadata.RANK or name in items), None)
            if name is None:
                raise UserError(f"{version} is not of the model that is served: it takes none of its item features")
            axis = 1 if spec.signature == metadata.RANK else 0
            size = message.inputs[name].tensor_shape.dim[axis].size
            requests.append(Request(message.SerializeToString(), size))
    if not requests:
        raise UserError(f"{version} has no warm-up requests of {spec.signature}; give --rows")
    return requests


def find_schema(rows: str, model: Path | None, given: str | None) -> tuple[str, Schema | None]:
    """Finds the raw rows, and the schema that maps columns to features; None without one.

    Args:
      rows: files of a log, or a directory or URI of converted data, whose raw rows of test (or else validation) are
        taken.
      model: an exported version.
      given: the path or name of a schema.
    """
    if given is not None:
        schema: Schema | None = schema_yaml.load(given)
    else:
        schema = schema_yaml.load(model / "schema.yaml") if model is not None else None
    if stores.is_uri(rows) and copies.COMPLETE in stores.listing(rows):
        rows = copies.local(rows, owned.DATA)
    if os.path.isdir(os.path.join(rows, "raw")) and os.path.isfile(os.path.join(rows, "schema.yaml")):
        schema = schema or schema_yaml.load(os.path.join(rows, "schema.yaml"))
        for split in ("test", "validation"):
            if os.path.isdir(os.path.join(rows, "raw", split)) and os.listdir(os.path.join(rows, "raw", split)):
                return os.path.join(rows, "raw", split), schema
        raise UserError(f"--rows={rows}: the data has no raw rows of test or validation; give a log")
    return rows, schema


def read(
    rows: str, schema: Schema | None, served: metadata.ModelMetadata, csv: CsvOptions | None = None
) -> dict[str, np.ndarray]:
    """Reads tensors of ``serving_default`` from the first 20,000 rows of a log; rows that do not fit are left out.

    Args:
      rows: see `pipelines.log.find.find_files`.
      schema: of the log; None if its columns are named like the features.
      served: the inputs of the model.
      csv: how CSV files are written.

    Raises:
      UserError: the log does not fit the model, or has no row that does.
    """
    taken = served.features
    unmapped = schema is None
    schema = raw.without_outcomes(schema or _schema(taken))
    if missing := sorted({feature.name for feature in taken} - {feature.name for feature in schema.features}):
        raise UserError(
            f"the schema has no feature {', '.join(missing)}, which {served.model} takes; give its own --schema"
        )
    try:
        log = raw.open_log(rows, schema, csv)
    except UserError as error:
        if unmapped:
            error.add_note("--schema says which column is which feature's")
        raise
    parts, count = [], 0
    for found, _, _ in raw.read(log, schema, [], drop_bad_rows=True):
        parts.append(raw.tensors(schema, found))
        count += len(found.row_ids)
        if count >= _MOST_ROWS:
            break
    if not count:
        raise UserError(f"--rows={rows}: no row fits the model")
    return {feature.name: _joined(feature, [part[feature.name] for part in parts])[:_MOST_ROWS] for feature in taken}


def _joined(feature: metadata.Feature, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenates parts; lists ``[n, L]`` get the model's length, or that of the longest."""
    if feature.kind != "list":
        return np.concatenate(parts)
    width = feature.length or max(part.shape[1] for part in parts)
    lists = np.full((sum(map(len, parts)), width), EMPTY[feature.dtype], parts[0].dtype)
    row = 0
    for part in parts:
        lists[row : row + len(part), : part.shape[1]] = part[:, :width]
        row += len(part)
    return lists


def _schema(features: Sequence[metadata.Feature]) -> Schema:
    """The schema of a log whose columns are named like the features."""

    def one(feature: metadata.Feature) -> Feature:
        dtype: Any = feature.dtype
        side: Any = "item" if feature.per_item else "user"
        if feature.kind == "list":
            return Feature(feature.name, "multivalent", side, feature.name, dtype, max_length=feature.length or 100)
        if feature.kind == "vector":
            return Feature(feature.name, "dense", side, feature.name, dtype, length=feature.length or 0)
        kind: Any = "numeric" if dtype == "float32" else "categorical"
        return Feature(feature.name, kind, side, feature.name, dtype)

    return Schema("the model", tuple(map(one, features)), ())
