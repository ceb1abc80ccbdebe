"""What can go wrong: a request that does not fit the model, and a call that failed."""

from __future__ import annotations

import grpc


class FeatureError(ValueError):
    """A feature is missing, unknown, or has a value the model does not take. Raised before anything is sent."""


class RankingError(Exception):
    """A call failed.

    Attributes:
      code: the gRPC status code.
      details: what the server said, or what the client found wrong with its answer.
      context: which call it was: server, model, number of attempts.
    """

    def __init__(self, code: grpc.StatusCode, details: str, context: str = "") -> None:
        super().__init__(code, details, context)  # all three: the error survives pickling
        self.code, self.details, self.context = code, details, context

    def __str__(self) -> str:
        return f"{self.context}: {self.code.name}: {self.details}".removeprefix(": ")
