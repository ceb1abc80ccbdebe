"""What both clients share: requests, answers, retries and hedges."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Generic, NamedTuple, TypeVar

import grpc
import numpy as np

from stem_client import answers, features, metadata, protocol, ranking
from stem_client.addresses import Addresses
from stem_client.deadline import Deadline, checked_seconds
from stem_client.errors import FeatureError, RankingError
from stem_client.metadata import ModelMetadata
from stem_client.ranking import By, Top
from stem_client.retry import Budget, RetryPolicy
from stem_client.transport import Attempt, Transport
from stem_client.version import __version__

MEGABYTE = 1 << 20
RETRY = RetryPolicy()
NO_SEPARATORS: Mapping[str, str] = {}
# A FeatureError may come from metadata of a replaced model, so the metadata is fetched again before the error
# is raised. But a caller that is simply wrong should not cause a fetch at every call.
_MISFIT_SECONDS = 1.0
# The codes of servers for features that do not fit, and of this package for signatures that do not.
_MISFIT_CODES = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
# After one of these, an address is avoided for a while, if there are others.
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED)

_AnyTransport = TypeVar("_AnyTransport", bound=Transport)
_Value = TypeVar("_Value")
_Encode = Callable[[ModelMetadata], tuple[int, dict[str, np.ndarray]]]


class _OtherVersion(RankingError):
    """The answer is of another version than was asked for."""


class _Scores(NamedTuple):
    """The scores of one request.

    Attributes:
      by_task: float32 [n] each.
      version: that answered, if the answer names it.
      checked: whether the tasks were compared with those of that version.
    """

    by_task: dict[str, np.ndarray]
    version: int | None
    checked: bool


class _Request(NamedTuple):
    """The common part of the requests of a call."""

    signature: str
    encode: _Encode
    asked: int | None
    deadline: Deadline


class Calls(Generic[_AnyTransport]):
    """A client except for how it waits; `RankingClient` has the arguments."""

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        model: str = "ranker",
        label: str | None = None,
        timeout: float = 1.0,
        credentials: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = 64 * MEGABYTE,
        retry: RetryPolicy = RETRY,
        hedge_after: float | None = None,
        chunk_rows: int = 5000,
        extra: str = "refuse",
        separators: Mapping[str, str] = NO_SEPARATORS,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        checked_seconds(timeout, "timeout")
        if hedge_after is not None:
            checked_seconds(hedge_after, "hedge_after")
        if isinstance(chunk_rows, bool) or operator.index(chunk_rows) < 1:
            raise ValueError(f"chunk_rows is {chunk_rows!r}; it should be 1 or more")
        for name, separator in separators.items():
            if not isinstance(separator, str) or not separator:
                raise ValueError(f"separators: that of '{name}' is {separator!r}; a text is expected")
        if label is not None and (not isinstance(label, str) or not label):
            raise ValueError(f"label is {label!r}; the name of a version's label is expected")
        self._targets = (target,) if isinstance(target, str) else tuple(target)
        if not self._targets or not all(isinstance(name, str) and name for name in self._targets):
            raise ValueError(f"target is {target!r}; host:port or several of them are expected")
        self._model, self._label, self._timeout = model, label, timeout
        self._retry, self._hedge_after = retry, hedge_after
        self._chunk_rows, self._ignore_extra, self._separators = chunk_rows, _ignores(extra), dict(separators)
        settings: dict[str, Any] = {
            "grpc.primary_user_agent": f"stem-client/{__version__}",
            "grpc.max_receive_message_length": max_message_bytes,
            # gRPC's own retries would ignore the budget.
            "grpc.enable_retries": 0,
            # Calls to a name with several addresses, and their retries, go to them in turn.
            "grpc.lb_policy_name": "round_robin",
            # By default a channel waits one second before it reconnects, longer than most deadlines, and two minutes
            # later on. A restarted server should have calls before the next one restarts.
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 250,
        }
        self._addresses, self._budget = Addresses(len(self._targets)), Budget(retry)
        self._transport = self._connect(self._targets, credentials, list((settings | dict(options)).items()))
        self._cache = metadata.MetadataCache(self._fetch_metadata, self._transport.lock)

    def _connect(
        self,
        targets: Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]],
    ) -> _AnyTransport:
        raise NotImplementedError

    async def _rank(
        self, user: Mapping[str, Any], items: Any, timeout: Any, version: Any, extra: str | None
    ) -> dict[str, np.ndarray]:
        ignore, separators = self._ignores(extra), self._separators

        def encode(model: ModelMetadata) -> tuple[int, dict[str, np.ndarray]]:
            return features.rank(model.rank_features(), user, items, separators, ignore_extra=ignore)

        return await self._predict(metadata.RANK, encode, timeout, version)

    async def _score(self, rows: Any, timeout: Any, version: Any, extra: str | None) -> dict[str, np.ndarray]:
        ignore, separators = self._ignores(extra), self._separators

        def encode(model: ModelMetadata) -> tuple[int, dict[str, np.ndarray]]:
            return features.score(model.features, rows, separators, ignore_extra=ignore)

        return await self._predict(metadata.SERVING_DEFAULT, encode, timeout, version)

    async def _top(
        self,
        user: Mapping[str, Any],
        items: Any,
        by: By,
        k: int,
        timeout: Any,
        version: Any,
        extra: str | None,
    ) -> Top:
        k = ranking.check(k, by)
        return ranking.best(await self._rank(user, items, timeout, version, extra), by, k)

    async def _metadata(self, timeout: Any, version: Any) -> ModelMetadata:
        self._transport.check()
        return await self._cache.fetch(_checked_version(version), self._deadline(timeout))

    async def _predict(self, signature: str, encode: _Encode, timeout: Any, version: Any) -> dict[str, np.ndarray]:
        """Encodes and calls; repeats this once if it failed because the server changed to a model of other features."""
        self._transport.check()
        request = _Request(signature, encode, _checked_version(version), self._deadline(timeout))
        model = await self._cache.get(request.asked, request.deadline)
        try:
            return await self._ask(request, model)
        except FeatureError as error:
            failure: FeatureError | RankingError = error
            min_age = _MISFIT_SECONDS
        except RankingError as error:
            if error.code not in _MISFIT_CODES:
                raise
            failure, min_age = error, 0.0
        try:
            newer = await self._cache.newer(model, request.asked, request.deadline, min_age)
        except RankingError:  # it says less than the failure
            newer = None
        if newer is None:
            raise failure
        return await self._ask(request, newer)

    async def _ask(self, request: _Request, model: ModelMetadata) -> dict[str, np.ndarray]:
        """Scores all rows, in one request or in several that the same version answers."""
        count, arrays = request.encode(model)
        if count == 0:
            return {task: np.empty(0, np.float32) for task in sorted(model.signature(request.signature).outputs)}
        if count <= self._chunk_rows:
            return (await self._ask_once(request, model, arrays, count, request.asked)).by_task
        try:
            return await self._ask_in_chunks(request, model, count, arrays)
        except RankingError as error:
            moved = isinstance(error, _OtherVersion) or error.code is grpc.StatusCode.NOT_FOUND
            if request.asked is not None or not moved:
                raise
        # The version that answered the first chunks is gone: begin again, once, with the one that serves now.
        model = await self._cache.fetch(None, request.deadline)
        count, arrays = request.encode(model)
        return await self._ask_in_chunks(request, model, count, arrays)

    async def _ask_in_chunks(
        self, request: _Request, model: ModelMetadata, count: int, arrays: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        ranks = request.signature == metadata.RANK
        each = {feature.name for feature in model.features if feature.per_item or not ranks}
        version, parts = request.asked, []
        for start in range(0, count, self._chunk_rows):
            chunk = slice(start, start + self._chunk_rows)
            chosen = {
                name: array if name not in each else array[:, chunk] if ranks else array[chunk]
                for name, array in arrays.items()
            }
            scores = await self._ask_once(request, model, chosen, min(self._chunk_rows, count - start), version)
            parts.append(scores.by_task)
            version = scores.version if version is None else version
        return {task: np.concatenate([part[task] for part in parts]) for task in parts[0]}

    async def _ask_once(
        self,
        request: _Request,
        model: ModelMetadata,
        arrays: Mapping[str, np.ndarray],
        count: int,
        version: int | None,
    ) -> _Scores:
        message = protocol.PredictRequest(model_spec=self._model_spec(version))
        message.model_spec.signature_name = request.signature
        for name, array in arrays.items():
            features.write(message.inputs[name], array)
        shape = (1, count) if request.signature == metadata.RANK else (count,)

        def tasks(of: ModelMetadata) -> Set[str]:
            return of.signature(request.signature).outputs.keys()

        def read(payload: bytes) -> _Scores:
            response = answers.parse(protocol.PredictResponse, payload)
            answered = answers.version(response)
            if version is not None and answered not in (None, version):
                raise _OtherVersion(
                    grpc.StatusCode.INTERNAL, f"version {answered} answered; version {version} was asked for"
                )
            scores = answers.read(response, shape)
            expected = model if answered in (None, model.version) else self._cache.known(answered)
            if expected is not None:
                answers.check_tasks(scores.keys(), tasks(expected))
            return _Scores(scores, answered, expected is not None)

        scores = await self._call(protocol.PREDICT, message, request.deadline, request.signature, read)
        if scores.version is not None and scores.version != model.version:
            if request.asked is None:
                self._cache.served(scores.version)
            if not scores.checked and scores.by_task.keys() != tasks(model):
                # The tasks differ from the earlier version's: they are right if the new version has them.
                newer = await self._cache.get(scores.version, request.deadline)
                answers.check_tasks(scores.by_task.keys(), tasks(newer))
        return scores

    async def _fetch_metadata(self, version: int | None, deadline: Deadline) -> ModelMetadata:
        message = protocol.GetModelMetadataRequest(
            model_spec=self._model_spec(version), metadata_field=["signature_def"]
        )

        def read(payload: bytes) -> ModelMetadata:
            return metadata.parse(payload, version)

        return await self._call(protocol.GET_MODEL_METADATA, message, deadline, "metadata", read)

    def _model_spec(self, version: int | None) -> Any:
        spec = protocol.ModelSpec(name=self._model)
        if version is not None:
            spec.version.value = version
        elif self._label is not None:
            spec.version_label = self._label
        return spec

    def _deadline(self, timeout: Any) -> Deadline:
        return Deadline(self._timeout if timeout is None else timeout)

    def _ignores(self, extra: str | None) -> bool:
        return self._ignore_extra if extra is None else _ignores(extra)

    async def _call(
        self, method: str, message: Any, deadline: Deadline, what: str, read: Callable[[bytes], _Value]
    ) -> _Value:
        """Calls, and returns ``read`` of the answer, after as many attempts as policy, budget and deadline allow.

        Raises:
          RankingError: no attempt was answered, or ``read`` raised it.
        """
        payload = message.SerializeToString()
        tried: list[int] = []
        for attempt in itertools.count(1):
            place = self._addresses.pick(tried)
            tried.append(place)
            free = self._addresses.is_probe(place)  # it puts no load on a server in trouble, so it costs no budget
            try:
                value = await self._attempt(place, method, payload, deadline, read)
            except RankingError as error:
                failure = error
            else:
                self._budget.succeeded()
                return value
            wait = self._retry.backoff(attempt)
            again = self._retry.may_help(failure.code, failure.details, attempt, len(self._addresses))
            again = again and wait < deadline.remaining() and (free or self._budget.take())
            if not again or not await self._transport.sleep(wait):
                tries = f", {attempt} attempts" if attempt > 1 else ""
                context = f"{what} of model '{self._model}' at {self._targets[place]}{tries}"
                raise type(failure)(failure.code, failure.details, context)
        raise AssertionError  # the loop ends with one of the two above

    async def _attempt(
        self, place: int, method: str, payload: bytes, deadline: Deadline, read: Callable[[bytes], _Value]
    ) -> _Value:
        """Makes one attempt and, with hedging, a second one beside it if the first is slow."""
        timeout = max(deadline.remaining(), 0.0)
        if self._hedge_after is None or self._hedge_after >= timeout:
            try:
                answer = await self._transport.call(place, method, payload, timeout)
            except grpc.RpcError as error:
                raise self._failed(place, error) from None
            return self._answered(place, answer, read)
        running = {self._transport.start(place, method, payload, timeout): place}
        try:
            first = await self._transport.first(list(running), self._hedge_after)
            if first is None and self._budget.take():
                other = self._addresses.pick([place])
                attempt = self._transport.start(other, method, payload, max(deadline.remaining(), 0.0))
                running[attempt] = other
            return await self._best_of(running, read)
        finally:
            for attempt in running:
                attempt.cancel()

    async def _best_of(self, running: dict[Attempt, int], read: Callable[[bytes], _Value]) -> _Value:
        """The first good answer or, if there is none, the last failure. Removes ended attempts from ``running``."""
        while True:
            ended = await self._transport.first(list(running), None)
            assert ended is not None
            place = running.pop(ended)
            try:
                try:
                    answer = ended.result()
                except grpc.RpcError as error:
                    raise self._failed(place, error) from None
                return self._answered(place, answer, read)
            except RankingError:
                if not running:
                    raise

    def _answered(self, place: int, answer: bytes, read: Callable[[bytes], _Value]) -> _Value:
        self._addresses.answered(place)
        return read(answer)

    def _failed(self, place: int, error: Any) -> RankingError:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._addresses.failed(place, surely=False)
        elif code in _GONE:
            self._addresses.failed(place, surely=True)
        else:
            self._addresses.answered(place)
        return RankingError(code, details)


def _ignores(extra: Any) -> bool:
    if extra not in ("refuse", "ignore"):
        raise ValueError(f"extra is {extra!r}; 'refuse' or 'ignore' is expected")
    return bool(extra == "ignore")


def _checked_version(version: Any) -> int | None:
    """``version`` as an int; raises TypeError or ValueError if no model can have it."""
    if version is None:
        return None
    if isinstance(version, bool) or not hasattr(version, "__index__"):
        raise TypeError(f"version is {version!r} ({type(version).__name__}); an integer is expected")
    number = operator.index(version)
    if not 0 <= number < 2**63:
        raise ValueError(f"version is {version}; it should be from 0 to 2^63 - 1")
    return number
