"""How many calls a second a server answers in time: up step by step until a limit breaks, then between the last two."""

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
    """Which rates are tried: those given, or ever higher ones by a factor.

    Attributes:
      rates: calls a second, ascending; the first one alone where there is a factor.
      factor: None where all rates are given.
    """

    rates: tuple[float, ...]
    factor: float | None = None

    def after(self, step: int) -> float | None:
        """The rate of step ``step``; None where there is none."""
        if self.factor is not None:
            return self.rates[0] * self.factor**step if step < _MOST_STEPS else None
        return self.rates[step] if step < len(self.rates) else None


def parse(text: str, rate: float | None) -> Plan:
    """``x1.25``: from ``rate`` by a factor; ``100,200,400``: these.

    Raises:
      UserError: it is neither, or there is a rate too many or too few.
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
        raise UserError(f"--steps={text} says all rates; leave out --rate")
    return Plan(rates)


def late(measured: Measurement, limit: float) -> bool:
    """Whether calls went out so late (p99) that the measurement is one of the generator."""
    return len(measured.late) > 0 and measured.late.quantile(0.99) > max(_LATE, _SHARE_LATE * limit)


def broken(measured: Measurement, limit: float) -> str:
    """Which limit a measurement breaks; "" if none."""
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
    """The outcome.

    Attributes:
      rate: the highest one that kept the limits; None where no claim can be made.
      why: no claim can be made; or why it is only a lower bound.
    """

    rate: float | None
    why: str = ""


async def search(plan: Plan, limit: float, measure: Callable[[float], Awaitable[Measurement]]) -> Capacity:
    """Tries rates until, twice, p99 is more than ``limit`` seconds or fewer than 99 % of calls are answered in time.

    Where a limit breaks and the generator itself was late, the search ends without a claim: what was measured may be
    the generator. Where it was late and the limits were kept all the same, the server keeps them: latencies are from
    when calls were due.
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
    """No claim, and the highest rate that kept the limits until then."""
    return outcome if best is None else Capacity(None, f"{outcome.why}; {best:g} calls/s kept the limits")


async def _try(rate: float, limit: float, measure: Callable[[float], Awaitable[Measurement]]) -> str | Capacity:
    """Which limit a rate breaks, twice: once may be a hiccup of the machine; or an end of the search."""
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
    """``200``, or ``50:3,200:6,1000:1``: sizes of requests, and how often each.

    Raises:
      UserError: it is not written so.
    """
    result: dict[int, float] = {}
    for part in text.split(","):
        size, _, weight = part.partition(":")
        try:
            number, often = int(size), float(weight or 1)
        except ValueError:
            number = 0
        if not (0 < number <= 100_000 and number not in result and 0 < often < math.inf):
            raise UserError(f"--candidates={text}: should be numbers with how often each, as in 50:3,200:6,1000:1")
        result[number] = often
    return result
