"""Searches how many calls per second a server answers in time: up in steps until a limit breaks, then half-way back."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from export.loading.generator import Measurement
from stem_util.errors import UserError

_MOST_STEPS = 24
_BISECTIONS = 2
_SHARE_GOOD = 0.99
_SHARE_LATE, _LATE = 0.1, 0.002


@dataclass(frozen=True)
class Plan:
    """The rates to try: given ones, or a first one that is multiplied by a factor.

    Attributes:
      rates: calls per second, ascending; only the first one if there is a factor.
      factor: None if all rates are given.
    """

    rates: tuple[float, ...]
    factor: float | None = None

    def after(self, step: int) -> float | None:
        """The rate of step ``step``; None if there is none."""
        if self.factor is not None:
            return self.rates[0] * self.factor**step if step < _MOST_STEPS else None
        return self.rates[step] if step < len(self.rates) else None


def parse(text: str, rate: float | None) -> Plan:
    """Reads ``x1.25`` (from ``rate`` on, by this factor) or ``100,200,400`` (these rates).

    Raises:
      UserError: it is neither, or ``rate`` is missing or not needed.
    """
    try:
        if text.startswith("x"):
            factor = float(text[1:])
            if not 1 < factor <= 10:
                raise ValueError
            if rate is None:
                raise UserError(f"--steps={text} begins at --rate; give both")
            return Plan((rate,), factor)
        rates = tuple(map(float, text.split(",")))
        if list(rates) != sorted(set(rates)) or not all(0 < each < math.inf for each in rates):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--steps={text}: should be a factor, as in x1.25, or ascending rates, as in 100,200,400"
        ) from None
    if rate is not None:
        raise UserError(f"--steps={text} lists all rates; leave out --rate")
    return Plan(rates)


def late(measured: Measurement, limit: float) -> bool:
    """Whether calls were sent so late (p99) that the measurement shows the generator, not the server."""
    return len(measured.late) > 0 and measured.late.quantile(0.99) > max(_LATE, _SHARE_LATE * limit)


def broken(measured: Measurement, limit: float) -> str:
    """Says which limit a measurement breaks; "" if none."""
    if not measured.calls:
        return "no call was due"
    p99 = measured.latency.quantile(0.99)
    if not p99 <= limit:
        return f"p99 {1000 * p99:.1f} ms"
    if measured.share_good < _SHARE_GOOD:
        return f"{100 * measured.share_good:.1f} % in time"
    return ""


@dataclass(frozen=True)
class Capacity:
    """The result of a search.

    Attributes:
      rate: the highest one that kept the limits; None if no claim can be made.
      why: why no claim can be made, or why it is only a lower bound.
    """

    rate: float | None
    why: str = ""


async def search(plan: Plan, limit: float, measure: Callable[[float], Awaitable[Measurement]]) -> Capacity:
    """Tries rates until p99 is twice above ``limit`` seconds, or twice fewer than 99 % of calls are answered in time.

    If a limit breaks while the generator was late, the search ends without a claim, because the generator may be the
    cause. If it was late and the limits were kept, the server keeps them, because latencies count from the due time.
    """
    best: float | None = None
    worst, step = None, 0
    while (rate := plan.after(step)) is not None:
        verdict = await _try(rate, limit, measure)
        if isinstance(verdict, Capacity):
            return _beside(verdict, best)
        if verdict:
            worst = rate
            break
        best, step = rate, step + 1
    if best is None:
        return Capacity(None, f"the first rate, {plan.rates[0]:g} calls/s, breaks the limits: begin lower")
    if worst is None:
        return Capacity(best, "the highest rate that was tried kept the limits")
    for _ in range(_BISECTIONS):
        rate = (best + worst) / 2
        verdict = await _try(rate, limit, measure)
        if isinstance(verdict, Capacity):
            return _beside(verdict, best)
        best, worst = (best, rate) if verdict else (rate, worst)
    return Capacity(best)


def _beside(outcome: Capacity, best: float | None) -> Capacity:
    """A result without a claim, which names the highest rate that kept the limits."""
    return outcome if best is None else Capacity(None, f"{outcome.why}; {best:g} calls/s kept the limits")


async def _try(rate: float, limit: float, measure: Callable[[float], Awaitable[Measurement]]) -> str | Capacity:
    """Says which limit a rate breaks twice (once may be a pause of the machine), or ends the search."""
    for _ in range(2):
        measured = await measure(rate)
        if measured.stopped:
            return Capacity(None, "interrupted")
        if not (verdict := broken(measured, limit)):
            return ""
    if late(measured, limit):
        behind = 1000 * measured.late.quantile(0.99)
        return Capacity(
            None,
            f"{verdict} at {rate:g} calls/s, but the generator sent calls {behind:.1f} ms late (p99): that is its "
            "limit, or its machine's, not the server's. Run it on a machine of its own",
        )
    return verdict


def sizes(text: str) -> dict[int, float]:
    """Reads sizes of requests with their frequencies: ``200``, or ``50:3,200:6,1000:1``.

    Raises:
      UserError: it is not of that form.
    """
    result: dict[int, float] = {}
    for part in text.split(","):
        size, _, weight = part.partition(":")
        try:
            number, often = int(size), float(weight or 1)
        except ValueError:
            number = 0
        if not (0 < number <= 100_000 and number not in result and 0 < often < math.inf):
            raise UserError(f"--candidates={text}: should be numbers with their frequencies, as in 50:3,200:6,1000:1")
        result[number] = often
    return result
