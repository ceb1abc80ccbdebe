"""When a failed call is tried again."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

import grpc

_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
_NOT_LOADED = "Servable not found for request"


@dataclass(frozen=True)
class RetryPolicy:
    """Calls that another attempt may help are tried again, within their deadline.

    These are: UNAVAILABLE and RESOURCE_EXHAUSTED; CANCELLED where neither the caller nor ``close()`` cancelled; and
    NOT_FOUND of a replica that has not loaded the model or the version, which is asked of as many replicas as there are
    addresses, and of two where there is one address.

    Attempt k + 1 comes after a random time between 0 and min(max_backoff, first_backoff * 2^(k - 1)) seconds.

    Attributes:
      attempts: at most so many in all; 1 never tries again.
      first_backoff: see above.
      max_backoff: see above.
      budget: a bucket of so many tokens, shared by all calls of a client. A retry or a hedge takes one; without one the
        call fails at once, so that clients do not multiply the load of a server in trouble.
      refill: tokens a successful call puts back: the share of calls that may be retries for ever.
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
        """Seconds to wait after attempt 1, 2, ..."""
        return random.uniform(0, min(self.max_backoff, self.first_backoff * 2.0 ** min(attempt - 1, 60)))

    def may_help(self, code: grpc.StatusCode, details: str, attempt: int, addresses: int) -> bool:
        """Whether another attempt may succeed after this one, 1, 2, ... failed."""
        if code is grpc.StatusCode.NOT_FOUND and details.startswith(_NOT_LOADED):
            return attempt < min(self.attempts, max(2, addresses))
        # A message over a size limit is RESOURCE_EXHAUSTED too, but stays so.
        return code in _CODES and "larger than max" not in details and attempt < self.attempts


class Budget:
    """The token bucket; full at first."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._capacity, self._refill = policy.budget, policy.refill
        self._tokens = policy.budget
        self._lock = threading.Lock()

    def succeeded(self) -> None:
        with self._lock:
            self._tokens = min(self._capacity, self._tokens + self._refill)

    def take(self) -> bool:
        """Takes the token of one retry if there is one."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True
