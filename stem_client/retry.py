"""Rules for retries of failed calls."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

import grpc

_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
_NOT_LOADED = "Servable not found for request"


@dataclass(frozen=True)
class RetryPolicy:
    """Repeats failed calls that may succeed at another attempt, within their deadline.

    These are: UNAVAILABLE and RESOURCE_EXHAUSTED; CANCELLED if neither the caller nor ``close()`` cancelled; and
    NOT_FOUND of a replica that has not loaded the model or the version, which is tried once per address, or twice if
    there is one address.

    Attempt k + 1 comes after a random time between 0 and min(max_backoff, first_backoff * 2^(k - 1)) seconds.

    Attributes:
      attempts: the largest number in all; 1 never retries.
      first_backoff: see above.
      max_backoff: see above.
      budget: size of a bucket of tokens that all calls of a client share. A retry or a hedge takes one. Without a token
        the call fails at once, so that clients do not multiply the load of a server in trouble.
      refill: tokens that a successful call adds: in the long run, the largest share of calls that may be retries.
    """

    attempts: int = 4
    first_backoff: float = 0.01
    max_backoff: float = 0.5
    budget: float = 10.0
    refill: float = 0.1

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; it should be 1 or more")
        for name in ("first_backoff", "max_backoff", "budget", "refill"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it should be 0 or more")

    def backoff(self, attempt: int) -> float:
        """Returns the seconds to wait after attempt 1, 2, ..."""
        return random.uniform(0, min(self.max_backoff, self.first_backoff * 2.0 ** min(attempt - 1, 60)))

    def may_help(self, code: grpc.StatusCode, details: str, attempt: int, addresses: int) -> bool:
        """Whether another attempt may succeed after attempt 1, 2, ... failed."""
        if code is grpc.StatusCode.NOT_FOUND and details.startswith(_NOT_LOADED):
            return attempt < min(self.attempts, max(2, addresses))
        # A message over a size limit is RESOURCE_EXHAUSTED too, but a retry would not help.
        return code in _CODES and "larger than max" not in details and attempt < self.attempts


class Budget:
    """The token bucket; full at first.

    gRPC's own (``retryThrottling`` in a service config) counts the retries of one channel: it knows neither the other
    addresses nor hedges, and cannot tell a NOT_FOUND of a model that is still to be loaded from any other.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._capacity, self._refill = policy.budget, policy.refill
        self._tokens = policy.budget
        self._lock = threading.Lock()

    def succeeded(self) -> None:
        with self._lock:
            self._tokens = min(self._capacity, self._tokens + self._refill)

    def take(self) -> bool:
        """Takes the token of one retry; False if there is none."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True
