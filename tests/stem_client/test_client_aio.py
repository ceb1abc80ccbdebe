"""The client of asyncio, where it differs from that of threads: tasks, cancellation, event loops."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from stem_client import AsyncRankingClient, FeatureError, RankingError, RetryPolicy

Given = dict[str, Any]
UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "no")


def test_calls_run_beside_each_other(ranker: Any, target: str, user: Given, items: Given) -> None:
    async def run() -> None:
        async with AsyncRankingClient(target, timeout=20) as client:
            calls = [client.rank(user, items | {"seconds": [number] * 3}) for number in range(100)]
            for number, scores in enumerate(await asyncio.gather(*calls)):
                assert scores["like"].tolist() == [number] * 3
            top = await client.top(user, items, "like", k=2)
            assert top.indices.tolist() == [2, 1]
        assert ranker.metadata_requests == 1 and len(ranker.peers) == 1

    asyncio.run(run())


def test_a_cancelled_task_ends_its_call_and_nobody_elses(ranker: Any, target: str, user: Given, items: Given) -> None:
    async def run() -> None:
        async with AsyncRankingClient(target, timeout=20, hedge_after=0.01) as client:
            await client.metadata()
            ranker.faults.extend([0.5, 0.5, None])
            slow = asyncio.create_task(client.rank(user, items))
            while not ranker.requests:
                await asyncio.sleep(0.01)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            assert (await client.rank(user, items))["like"].shape == (3,)
            # In the wait before a retry.
            ranker.faults.clear()
        async with AsyncRankingClient(
            target, timeout=60, retry=RetryPolicy(first_backoff=40, max_backoff=40)
        ) as client:
            await client.metadata()
            ranker.faults.append(UNAVAILABLE)
            waits = asyncio.create_task(client.rank(user, items))
            await asyncio.sleep(0.1)
            waits.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waits

    asyncio.run(run())


def test_whoever_fetches_metadata_may_be_cancelled(
    ranker: Any, target: str, user: Given, items: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ranker.signature

    def slow(name: str) -> Any:
        time.sleep(0.3)
        return answer(name)

    async def run() -> None:
        async with AsyncRankingClient(target, timeout=20) as client:
            calls = [asyncio.create_task(client.rank(user, items)) for _ in range(5)]
            hasty = asyncio.create_task(client.rank(user, items, timeout=0.1))
            await asyncio.sleep(0.05)
            calls[0].cancel()  # the one that fetches
            calls[2].cancel()  # one that waits for it
            with pytest.raises(RankingError, match="DEADLINE_EXCEEDED"):
                await hasty
            done = await asyncio.gather(*calls, return_exceptions=True)
            assert [isinstance(result, asyncio.CancelledError) for result in done] == [True, False, True, False, False]
            assert await client.rank(user, items)

    monkeypatch.setattr(ranker, "signature", slow)
    asyncio.run(run())


def test_close_ends_calls_and_waits_with_cancelled(ranker: Any, target: str, user: Given, items: Given) -> None:
    async def run() -> None:
        retry = RetryPolicy(first_backoff=40, max_backoff=40)
        client = AsyncRankingClient(target, timeout=60, retry=retry)
        await client.metadata()
        ranker.faults.extend([1.0, UNAVAILABLE])
        calls = [asyncio.create_task(client.rank(user, items)) for _ in range(2)]
        while len(ranker.requests) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await client.close()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {error.code for error in errors if isinstance(error, RankingError)} == {
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.UNAVAILABLE,
        }
        for call in (client.metadata(), client.rank(user, items), client.score([])):
            with pytest.raises(ValueError, match="the client is closed"):
                await call
        await client.close()

    asyncio.run(run())


def test_a_client_belongs_to_one_event_loop(target: str, user: Given, items: Given) -> None:
    client = AsyncRankingClient(target, timeout=20)  # made outside of any

    async def ask() -> Any:
        return await client.rank(user, items)

    assert asyncio.run(ask())
    with pytest.raises(ValueError, match="belongs to the event loop of its first call"):
        asyncio.run(ask())
    asyncio.run(client.close())
    with pytest.raises(ValueError, match="the client is closed"):
        asyncio.run(ask())


def test_an_event_loop_that_is_closed_under_its_calls(
    ranker: Any, target: str, user: Given, items: Given, caplog: pytest.LogCaptureFixture
) -> None:
    ranker.faults.append(0.5)

    async def leave() -> None:
        client = AsyncRankingClient(target, timeout=20)
        asyncio.get_running_loop().create_task(client.rank(user, items))
        while not ranker.requests:
            await asyncio.sleep(0.01)

    asyncio.run(leave())  # cancels the task
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_errors_are_those_of_the_other_client(ranker: Any, target: str, user: Given, items: Given) -> None:
    async def run() -> None:
        async with AsyncRankingClient(target, timeout=20, retry=RetryPolicy(first_backoff=0)) as client:
            with pytest.raises(FeatureError, match="'hour' is '21' .str.; the model takes int64"):
                await client.rank(user | {"hour": "21"}, items)
            ranker.faults.extend([UNAVAILABLE] * 4)
            with pytest.raises(RankingError) as caught:
                await client.rank(user, items)
            assert str(caught.value) == f"rank of model 'ranker' at {target}, 4 attempts: UNAVAILABLE: no"
            ranker.faults.append(1.0)
            with pytest.raises(RankingError, match="DEADLINE_EXCEEDED"):
                await client.rank(user, items, timeout=0.1)
            rows = [user | dict(zip(items, row, strict=True)) for row in zip(*items.values(), strict=True)]
            assert (await client.score(rows))["like"].tolist() == [1.5, 2, 30]

    asyncio.run(run())


def test_the_two_have_the_same_methods() -> None:
    import inspect

    from stem_client import RankingClient

    def shape(method: Callable[..., Any]) -> list[Any]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]

    for name in ("rank", "score", "top", "metadata", "close", "__init__"):
        assert shape(getattr(RankingClient, name)) == shape(getattr(AsyncRankingClient, name))
