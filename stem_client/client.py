"""The client."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from stem_client import answers, features, metadata, protocol
from stem_client.deadline import Deadline
from stem_client.errors import FeatureError, RankingError
from stem_client.metadata import ModelMetadata
from stem_client.retry import Budget, RetryPolicy, may_help
from stem_client.version import __version__

_MEGABYTE = 1 << 20
_RETRY = RetryPolicy()
# A FeatureError may come from metadata of a model that has been replaced, so the metadata is fetched again before it
# is raised; but a caller that is simply wrong should not ask the server at every call.
_MISFIT_SECONDS = 1.0
# What a server answers when features do not fit, and what this package says of signatures that do not.
_MISFIT_CODES = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)

_Encode = Callable[[ModelMetadata], tuple[int, dict[str, np.ndarray]]]


class RankingClient:
    """Asks a server (TensorFlow Serving or stem-serve) for the scores of a model that stem-tf exported.

        with RankingClient("ranker:8500") as client:
            scores = client.rank({"user_id": 1042, "hour": 21}, {"video_id": ids, "duration_ms": lengths}, timeout=0.05)
            best = ids[scores["long_view"].argsort()[::-1]]

    One client is meant to be made at start-up and shared by all threads: it holds one channel, connects by itself
    and connects again when the server comes back. Make it after a fork, not before.

    Args:
      target: "host:port", or what else gRPC takes ("dns:///ranker:8500", "unix:/run/ranker").
      model: the name it is served under.
      timeout: seconds for a call that names none: retries, waiting between them and fetching metadata included.
      credentials: of a TLS channel (``grpc.ssl_channel_credentials()``); None for plain text.
      max_message_bytes: the longest answer taken (gRPC's own default is 4 MB).
      retry: what is tried again and how often.
      options: more gRPC channel options; they win over the client's own.

    Raises (all calls):
      FeatureError: the features do not fit the model; nothing was sent.
      RankingError: the call failed.
      ValueError: the timeout is not positive, or the client is closed.
    """

    def __init__(
        self,
        target: str,
        *,
        model: str = "ranker",
        timeout: float = 1.0,
        credentials: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = 64 * _MEGABYTE,
        retry: RetryPolicy = _RETRY,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        Deadline(timeout)  # refuses what is no timeout
        self._target, self._model, self._timeout, self._retry = target, model, timeout, retry
        settings: dict[str, Any] = {
            "grpc.primary_user_agent": f"stem-client/{__version__}",
            "grpc.max_receive_message_length": max_message_bytes,
            # gRPC's own retries would not know the budget.
            "grpc.enable_retries": 0,
            # By default a channel waits a second before it connects again: longer than most deadlines.
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 5000,
        }
        arguments = list((settings | dict(options)).items())
        if credentials is None:
            self._channel = grpc.insecure_channel(target, arguments)
        else:
            self._channel = grpc.secure_channel(target, credentials, arguments)
        self._predict_method = self._channel.unary_unary(
            protocol.PREDICT, response_deserializer=protocol.PredictResponse.FromString
        )
        self._metadata_method = self._channel.unary_unary(
            protocol.GET_MODEL_METADATA, response_deserializer=protocol.GetModelMetadataResponse.FromString
        )
        self._budget = Budget(retry)
        self._cache = metadata.MetadataCache(self._fetch_metadata)
        self._closed = threading.Event()

    def rank(
        self, user: Mapping[str, Any], items: Any, timeout: float | None = None, version: int | None = None
    ) -> dict[str, np.ndarray]:
        """Scores of one user's candidates.

        Args:
          user: each feature of the user and the context: a value, a list (multivalent) or a vector (dense).
          items: each feature of the items: a mapping of arrays or lists, a list of mappings, a DataFrame or a
            structured array, N items long. An entry is a value, a list or a vector.
          timeout: seconds for the whole call; None for the client's own.
          version: of the model; None for the one that the server serves.

        Returns:
          Scores by task, float32 [N] in the order of the items.
        """
        return self._predict(
            metadata.RANK, lambda model: features.rank(model.rank_features(), user, items), timeout, version
        )

    def score(self, rows: Any, timeout: float | None = None, version: int | None = None) -> dict[str, np.ndarray]:
        """Scores of rows that each have a user, a context and an item of their own.

        Args:
          rows: every feature of the model, in any form that ``rank`` takes items in, B rows long.
          timeout: as in ``rank``.
          version: as in ``rank``.

        Returns:
          Scores by task, float32 [B] in the order of the rows.
        """
        return self._predict(
            metadata.SERVING_DEFAULT, lambda model: features.score(model.features(), rows), timeout, version
        )

    def metadata(self, timeout: float | None = None, version: int | None = None) -> ModelMetadata:
        """What the served model takes and answers. Always asks the server, so it also tells whether one is there."""
        self._check_open()
        return self._cache.fetch(version, self._deadline(timeout))

    def close(self) -> None:
        """Ends calls in flight with CANCELLED and gives the connection back."""
        self._closed.set()
        self._channel.close()

    def __enter__(self) -> RankingClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _predict(
        self, signature: str, encode: _Encode, timeout: float | None, version: int | None
    ) -> dict[str, np.ndarray]:
        """Encodes and calls; once more where that failed because the server has moved to a model of other features."""
        self._check_open()
        deadline = self._deadline(timeout)
        model = self._cache.get(version, deadline)
        try:
            return self._predict_once(signature, encode, model, deadline, version)
        except FeatureError as error:
            failure: FeatureError | RankingError = error
            min_age = _MISFIT_SECONDS
        except RankingError as error:
            if error.code not in _MISFIT_CODES:
                raise
            failure, min_age = error, 0.0
        try:
            newer = self._cache.newer(model, version, deadline, min_age)
        except RankingError:  # says less than the failure
            newer = None
        if newer is None:
            raise failure
        return self._predict_once(signature, encode, newer, deadline, version)

    def _predict_once(
        self, signature: str, encode: _Encode, model: ModelMetadata, deadline: Deadline, version: int | None
    ) -> dict[str, np.ndarray]:
        count, arrays = encode(model)
        if count == 0:
            return {task: np.empty(0, np.float32) for task in sorted(model.signature(signature).outputs)}
        request = protocol.PredictRequest(model_spec=self._model_spec(version))
        request.model_spec.signature_name = signature
        for name, array in arrays.items():
            features.write(request.inputs[name], array)
        response = self._call(self._predict_method, request, deadline, signature)
        if response.model_spec.HasField("version"):
            self._cache.served(version, model, response.model_spec.version.value)
        return answers.read(response, (1, count) if signature == metadata.RANK else (count,))

    def _fetch_metadata(self, version: int | None, deadline: Deadline) -> ModelMetadata:
        request = protocol.GetModelMetadataRequest(
            model_spec=self._model_spec(version), metadata_field=["signature_def"]
        )
        return metadata.parse(self._call(self._metadata_method, request, deadline, "metadata"))

    def _model_spec(self, version: int | None) -> Any:
        spec = protocol.ModelSpec(name=self._model)
        if version is not None:
            spec.version.value = version
        return spec

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self._timeout if timeout is None else timeout)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise ValueError("the client is closed")

    def _call(self, method: Any, request: Any, deadline: Deadline, what: str) -> Any:
        """The answer, after as many attempts as the policy, the budget and the deadline allow. Raises RankingError."""
        payload = request.SerializeToString()
        for attempt in itertools.count(1):
            try:
                response = method(payload, timeout=max(deadline.remaining(), 0.0))
            except grpc.RpcError as error:
                code, details = error.code(), error.details() or ""
            else:
                self._budget.succeeded()
                return response
            wait = self._retry.backoff(attempt)
            again = may_help(code, details) and attempt < self._retry.attempts and wait < deadline.remaining()
            if not again or not self._budget.take() or self._closed.wait(wait):
                tries = f", {attempt} attempts" if attempt > 1 else ""
                raise RankingError(code, details, f"{what} of model '{self._model}' at {self._target}{tries}")
        raise AssertionError  # the loop ends by one of the two above
