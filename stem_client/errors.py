"""The errors: a request that does not fit the model, and a call that failed."""

from __future__ import annotations

import grpc


class FeatureError(ValueError):
    """A feature is missing, unknown, or has a value that the model does not take. Raised before a request is sent."""


class RankingError(Exception):
    """A call failed.

    Attributes:
      code: the gRPC status code.
      details: the server's text, or what is wrong with its answer.
      context: server, model and number of attempts of the call.
    """

    def __init__(self, code: grpc.StatusCode, details: str, context: str = "") -> None:
        super().__init__(code, details, context)  # all three: the error survives pickling
        self.code, self.details, self.context = code, details, context

    def __str__(self) -> str:
        return f"{self.context}: {self.code.name}: {self.details}".removeprefix(": ")
