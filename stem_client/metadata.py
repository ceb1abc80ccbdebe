"""The inputs and outputs of a served model, from GetModelMetadata."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from stem_client import answers, protocol
from stem_client.deadline import Deadline
from stem_client.errors import RankingError

RANK = "rank"
SERVING_DEFAULT = "serving_default"
_DTYPES = {protocol.DT_FLOAT: "float32", protocol.DT_STRING: "string", protocol.DT_INT64: "int64"}
_VERSIONS_KEPT = 16
_LONGEST = 1 << 20  # elements of a list or vector


@dataclass(frozen=True)
class Tensor:
    """An input or an output.

    Attributes:
      dtype: "int64", "string" or "float32".
      shape: its dimensions; None for those that a request chooses.
    """

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs are features, outputs are tasks and what is made of their scores, as ``ranking_score``; both by name."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Feature:
    """One input of a model.

    Attributes:
      name: its name in a request.
      dtype: "int64", "string" or "float32".
      kind: "value", "list" (any number of values) or "vector".
      length: of a vector, or of a list if the model fixes it; else None.
      per_item: whether ``rank`` takes it once per item; otherwise once per request.
    """

    name: str
    dtype: str
    kind: str
    length: int | None
    per_item: bool


@dataclass(frozen=True)
class ModelMetadata:
    """A served version of a model and its signatures by name."""

    model: str
    version: int
    signatures: Mapping[str, Signature]

    def signature(self, name: str) -> Signature:
        """Returns the signature; raises RankingError if the model does not have it."""
        if name not in self.signatures:
            raise self._unfit(f"has no signature '{name}', it has {sorted(self.signatures)}")
        return self.signatures[name]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks and other outputs (``ranking_score``); a call returns scores of each.

        Raises RankingError as ``features``.
        """
        return tuple(sorted(self.signature(SERVING_DEFAULT).outputs))

    @functools.cached_property
    def features(self) -> tuple[Feature, ...]:
        """The inputs of ``serving_default``: a value [B], list [B, L] or vector [B, n] per feature.

        Raises RankingError if stem-tf did not export the model.
        """
        ranked = self.signatures[RANK].inputs if RANK in self.signatures else {}
        features = []
        for name, tensor in self.signature(SERVING_DEFAULT).inputs.items():
            if tensor.dtype not in _DTYPES.values() or len(tensor.shape) not in (1, 2):
                raise self._unfit(f"has an input '{name}' of {tensor.dtype} {list(tensor.shape)}, which is no feature")
            length = tensor.shape[1] if len(tensor.shape) == 2 else None
            if length is not None and length > _LONGEST:
                raise self._unfit(f"has an input '{name}' of {length} elements a row, which no memory holds")
            kind = "value" if len(tensor.shape) == 1 else "list" if length is None else "vector"
            if kind == "vector" and tensor.dtype != "float32":
                kind = "list"
            # A list [B, L] of one user and [B, N] of N items look alike; only the other signature tells them apart.
            per_item = name in ranked and len(ranked[name].shape) == len(tensor.shape) + 1
            features.append(Feature(name, tensor.dtype, kind, length, per_item))
        return tuple(features)

    def rank_features(self) -> tuple[Feature, ...]:
        """``features`` of a model that has a fitting signature ``rank``; raises RankingError for another."""
        features = self.features
        names = {feature.name for feature in features}
        if self.signature(RANK).inputs.keys() != names:
            raise self._unfit(f"takes other features for '{RANK}' than for '{SERVING_DEFAULT}'")
        if not any(feature.per_item for feature in features):
            raise self._unfit("has no feature of items, so that there is nothing to rank: use score()")
        return features

    def _unfit(self, what: str) -> RankingError:
        return RankingError(grpc.StatusCode.FAILED_PRECONDITION, f"model '{self.model}' version {self.version} {what}")


def _tensors(infos: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: Tensor(
            _DTYPES.get(infos[name].dtype, f"data type {infos[name].dtype}"),
            tuple(dim.size if dim.size >= 0 else None for dim in infos[name].tensor_shape.dim),
        )
        for name in sorted(infos)
    }


def parse(payload: bytes, asked: int | None) -> ModelMetadata:
    """The metadata in a GetModelMetadataResponse.

    Raises:
      RankingError: it cannot be read, or is not of the version that was ``asked`` for.
    """
    response = answers.parse(protocol.GetModelMetadataResponse, payload)
    definitions = answers.parse(protocol.SignatureDefMap, response.metadata["signature_def"].value).signature_def
    version = response.model_spec.version.value
    if asked is not None and version != asked:
        raise answers.wrong(f"the metadata is of version {version}; version {asked} was asked for")
    signatures = {
        name: Signature(_tensors(definitions[name].inputs), _tensors(definitions[name].outputs))
        for name in sorted(definitions)
    }
    return ModelMetadata(response.model_spec.name, version, signatures)


class Lock(Protocol):
    """A lock for threads or for tasks."""

    async def acquire(self, timeout: float) -> bool:
        """Takes the lock; False if it was not free within ``timeout`` seconds."""

    def release(self) -> None: ...


class MetadataCache:
    """Metadata by version, fetched when first needed, by one caller while the others wait.

    The server may change to another version at any time, so the metadata may be out of date. The client notices this
    when an answer names its version (``served``), when the server refuses a request, or when a request does not fit the
    metadata (``newer``). During a roll-out, servers of several versions may be behind one address: known versions are
    not fetched again when answers alternate between them.
    """

    def __init__(self, fetch: Callable[[int | None, Deadline], Awaitable[ModelMetadata]], lock: Lock) -> None:
        self._fetch = fetch
        self._lock = lock
        self._known: dict[int, ModelMetadata] = {}
        self._current: ModelMetadata | None = None
        self._answered: int | None = None  # the latest version that answered
        self._fetched_at = float("-inf")

    async def get(self, version: int | None, deadline: Deadline) -> ModelMetadata:
        """Returns the metadata of ``version``, or of the version that the server serves (None)."""
        found = self._lookup(version)
        if found is not None:
            return found
        answered = self._answered
        if version is None and answered is not None:
            # By number, because another of several servers may answer this.
            try:
                self._current = await self._load(answered, deadline, self._lookup)
                return self._current
            except RankingError as error:
                if error.code is not grpc.StatusCode.NOT_FOUND:
                    raise
                self._answered = None  # it is gone again
        return await self._load(version, deadline, self._lookup)

    async def fetch(self, version: int | None, deadline: Deadline) -> ModelMetadata:
        """The same, always from the server."""
        return await self._load(version, deadline, lambda _: None)

    def known(self, version: int) -> ModelMetadata | None:
        """Returns the metadata of ``version`` if it was fetched."""
        return self._known.get(version)

    def served(self, answered: int) -> None:
        """Notes that version ``answered`` has answered a request that named no version."""
        self._answered, self._current = answered, self._known.get(answered)

    async def newer(
        self, used: ModelMetadata, asked: int | None, deadline: Deadline, min_age: float = 0.0
    ) -> ModelMetadata | None:
        """Fetches again. Returns None if the signatures are still those of ``used``.

        Also None, without fetching, within ``min_age`` seconds of the last fetch.
        """
        if time.monotonic() - self._fetched_at < min_age:
            return None
        fetched = await self.fetch(asked, deadline)
        return None if fetched.signatures == used.signatures else fetched

    def _lookup(self, version: int | None) -> ModelMetadata | None:
        return self._current if version is None else self._known.get(version)

    async def _load(
        self, version: int | None, deadline: Deadline, lookup: Callable[[int | None], ModelMetadata | None]
    ) -> ModelMetadata:
        if not await self._lock.acquire(max(deadline.remaining(), 0)):
            raise RankingError(grpc.StatusCode.DEADLINE_EXCEEDED, "waited for the model's metadata")
        try:
            found = lookup(version)
            if found is None:
                found = await self._fetch(version, deadline)
                self._fetched_at = time.monotonic()
                self._known.pop(found.version, None)
                self._known[found.version] = found
                while len(self._known) > _VERSIONS_KEPT:
                    del self._known[next(iter(self._known))]
                if version is None:
                    self._current = found
            return found
        finally:
            self._lock.release()
