"""The client for threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from stem_client.calls import Calls
from stem_client.metadata import ModelMetadata
from stem_client.ranking import RANKING_SCORE, By, Top
from stem_client.transport import Blocking, run


class RankingClient(Calls[Blocking]):
    """Asks a server (TensorFlow Serving or stem-serve) for the scores of a model that stem-tf exported.

        with RankingClient("ranker:8500") as client:
            scores = client.rank({"user_id": 1042, "hour": 21}, {"video_id": ids, "duration_ms": lengths}, timeout=0.05)
            best = ids[scores["long_view"].argsort()[::-1]]

    Make one client at start-up and share it between all threads: it holds one channel to each address, connects by
    itself, and reconnects when the server is back. Make it after a fork, not before.

    Args:
      target: "host:port", or another target of gRPC ("dns:///ranker:8500", "unix:/run/ranker"); or several, among which
        calls are distributed.
      model: the name under which it is served.
      label: of the version for calls that name no version ("stable", "canary"); None for the newest that serves.
      timeout: seconds for a call that gives none, including retries, waits between them and fetching metadata.
      credentials: for TLS (``grpc.ssl_channel_credentials()``); None for plain text.
      max_message_bytes: the largest answer that is accepted (gRPC's default is 4 MB).
      retry: how often failed calls are tried again.
      hedge_after: after this many seconds without an answer, another address is asked too, paid from the retry budget;
        the first good answer is taken. None for never.
      chunk_rows: the most items or rows of one request; more are sent in several.
      extra: "refuse" or "ignore" names that are not features of the model.
      separators: by list feature, for lists that are written as one text ("a|b|c"): those of the schema.
      options: more gRPC channel options; they override the client's own.

    Raises (all calls):
      FeatureError: the features do not fit the model; nothing was sent.
      RankingError: the call failed, or its answer cannot be used.
      TypeError, ValueError: a timeout, a version, ``extra``, ``k`` or ``by`` is not valid, or the client is closed or
        was made before a fork.
    """

    def _connect(
        self,
        targets: Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]],
    ) -> Blocking:
        return Blocking(targets, credentials, options)

    def rank(
        self,
        user: Mapping[str, Any],
        items: Any,
        timeout: float | None = None,
        version: int | None = None,
        *,
        extra: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Scores one user's candidates.

        Args:
          user: each feature of the user and the context: a value, a list (multivalent) or a vector (dense).
          items: each feature of the items: a mapping of arrays or lists, a list of mappings, a DataFrame or a
            structured array, N items long. An entry is a value, a list or a vector.
          timeout: seconds for the whole call, at most a day; None for the client's own.
          version: of the model; None for the one that has the client's ``label``, or the newest one that serves.
          extra: "refuse" or "ignore" names that are not features of the model; None for the client's own.

        Returns:
          Scores by task and by other output, as ``ranking_score``, float32 [N] in the order of the items.
        """
        return run(self._rank(user, items, timeout, version, extra))

    def score(
        self, rows: Any, timeout: float | None = None, version: int | None = None, *, extra: str | None = None
    ) -> dict[str, np.ndarray]:
        """Scores rows that each have their own user, context and item.

        Args:
          rows: every feature of the model, in any form that ``rank`` takes items in, B rows long.
          timeout: as in ``rank``.
          version: as in ``rank``.
          extra: as in ``rank``.

        Returns:
          Scores as of ``rank``, float32 [B] in the order of the rows.
        """
        return run(self._score(rows, timeout, version, extra))

    def top(
        self,
        user: Mapping[str, Any],
        items: Any,
        by: By = RANKING_SCORE,
        k: int = 10,
        timeout: float | None = None,
        version: int | None = None,
        *,
        extra: str | None = None,
    ) -> Top:
        """Returns the best of one user's candidates.

        Args:
          user: as in ``rank``.
          items: as in ``rank``.
          by: a task or another output, as the model's own score to rank by; weights by task, whose weighted scores are
            added; or a function from scores by task [N] to one number per item.
          k: how many; all if there are fewer.
          timeout: as in ``rank``.
          version: as in ``rank``.
          extra: as in ``rank``.

        Returns:
          Positions in ``items`` and their ranking scores, the best first; among equal items the first one wins.
        """
        return run(self._top(user, items, by, k, timeout, version, extra))

    def metadata(self, timeout: float | None = None, version: int | None = None) -> ModelMetadata:
        """Returns features and tasks of the served model. Always asks the server, so it also tests the connection."""
        return run(self._metadata(timeout, version))

    def close(self) -> None:
        """Ends calls in flight with CANCELLED and closes the connections."""
        self._transport.close()

    def __enter__(self) -> RankingClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
