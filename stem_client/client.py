"""The client of threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from stem_client.calls import Calls
from stem_client.metadata import ModelMetadata
from stem_client.ranking import By, Top
from stem_client.transport import Blocking, run


class RankingClient(Calls[Blocking]):
    """Asks a server (TensorFlow Serving or stem-serve) for the scores of a model that stem-tf exported.

        with RankingClient("ranker:8500") as client:
            scores = client.rank({"user_id": 1042, "hour": 21}, {"video_id": ids, "duration_ms": lengths}, timeout=0.05)
            best = ids[scores["long_view"].argsort()[::-1]]

    One client is meant to be made at start-up and shared by all threads: it holds one channel to each address, connects
    by itself and connects again when the server comes back. Make it after a fork, not before.

    Args:
      target: "host:port", or what else gRPC takes ("dns:///ranker:8500", "unix:/run/ranker"); or several, over which
        calls are spread.
      model: the name it is served under.
      label: of the version that answers calls which name none ("stable", "canary"); None for the newest that serves.
      timeout: seconds for a call that names none: retries, waiting between them and fetching metadata included.
      credentials: of a TLS channel (``grpc.ssl_channel_credentials()``); None for plain text.
      max_message_bytes: the longest answer taken (gRPC's own default is 4 MB).
      retry: what is tried again and how often.
      hedge_after: seconds after which a call that has not been answered is asked of another address too, paid from the
        retry budget; the first good answer is taken. None for never.
      chunk_rows: the most items or rows of one request; more are sent in several.
      extra: "refuse" or "ignore" what is no feature of the model.
      separators: by list feature, of lists that are written as one text ("a|b|c"): those of the schema.
      options: more gRPC channel options; they win over the client's own.

    Raises (all calls):
      FeatureError: the features do not fit the model; nothing was sent.
      RankingError: the call failed, or its answer is none.
      TypeError, ValueError: a timeout, a version, ``extra``, ``k`` or ``by`` makes no sense, or the client is closed or
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
        """Scores of one user's candidates.

        Args:
          user: each feature of the user and the context: a value, a list (multivalent) or a vector (dense).
          items: each feature of the items: a mapping of arrays or lists, a list of mappings, a DataFrame or a
            structured array, N items long. An entry is a value, a list or a vector.
          timeout: seconds for the whole call, at most a day; None for the client's own.
          version: of the model; None for the one that has the client's ``label``, or the newest one that serves.
          extra: "refuse" or "ignore" what is no feature of the model; None for the client's own.

        Returns:
          Scores by task, float32 [N] in the order of the items.
        """
        return run(self._rank(user, items, timeout, version, extra))

    def score(
        self, rows: Any, timeout: float | None = None, version: int | None = None, *, extra: str | None = None
    ) -> dict[str, np.ndarray]:
        """Scores of rows that each have a user, a context and an item of their own.

        Args:
          rows: every feature of the model, in any form that ``rank`` takes items in, B rows long.
          timeout: as in ``rank``.
          version: as in ``rank``.
          extra: as in ``rank``.

        Returns:
          Scores by task, float32 [B] in the order of the rows.
        """
        return run(self._score(rows, timeout, version, extra))

    def top(
        self,
        user: Mapping[str, Any],
        items: Any,
        by: By,
        k: int = 10,
        timeout: float | None = None,
        version: int | None = None,
        *,
        extra: str | None = None,
    ) -> Top:
        """The best of one user's candidates.

        Args:
          user: as in ``rank``.
          items: as in ``rank``.
          by: a task; a weight for each of some tasks, whose weighted scores are added; or a function from scores by
            task [N] to one number for each item.
          k: how many; all where there are fewer.
          timeout: as in ``rank``.
          version: as in ``rank``.
          extra: as in ``rank``.

        Returns:
          Places among the items and what they were ranked by, the best first; of equal items the first one.
        """
        return run(self._top(user, items, by, k, timeout, version, extra))

    def metadata(self, timeout: float | None = None, version: int | None = None) -> ModelMetadata:
        """What the served model takes and answers. Always asks the server, so it also tells whether one is there."""
        return run(self._metadata(timeout, version))

    def close(self) -> None:
        """Ends calls in flight with CANCELLED and gives the connections back."""
        self._transport.close()

    def __enter__(self) -> RankingClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
