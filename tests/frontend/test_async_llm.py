"""What readers of a stream get when the server does not keep up with the engine."""

from __future__ import annotations

import asyncio

import pytest

from manyheads.config import EngineConfig
from manyheads.frontend.engine_client import EngineClient
from manyheads.frontend.open_request import DeltaQueue
from manyheads.request import EngineRequest, RequestDelta, SamplingParams, StepOutputs, StepTrace, TokenLogprobs


def delta(request_id: str, *tokens: int, steps: int, **more: object) -> RequestDelta:
    logprobs = [TokenLogprobs(token, -1.0, 1, []) for token in tokens]
    return RequestDelta(request_id=request_id, new_token_ids=[*tokens], logprobs=logprobs, num_steps=steps, **more)  # type: ignore[arg-type]


def taken(*deltas: RequestDelta) -> list[RequestDelta]:
    queue = DeltaQueue()
    for one in deltas:
        queue.put(one)
    return asyncio.run(queue.take())


def test_one_step_as_it_is() -> None:
    one = delta("a", 1, 2, steps=1, num_cached_tokens=5)
    assert taken(one) == [one]


def test_steps_that_have_come_meanwhile_are_one() -> None:
    """Of each request, in the order of their tokens, and with the end that the last one brings."""
    end = RequestDelta(request_id="a", new_token_ids=[], finish_reason="abort", num_steps=2)
    got = taken(
        delta("a", 1, 2, steps=1, num_cached_tokens=5),
        delta("b", 7, steps=1),
        delta("a", 3, steps=2),
        delta("b", 8, 9, steps=3, finish_reason="stop", stop_token_id=9),
        end,
    )
    a, b = got
    assert (a.request_id, a.new_token_ids, a.num_steps, a.num_cached_tokens) == ("a", [1, 2, 3], 2, 5)
    assert a.finish_reason == "abort"
    assert a.logprobs is not None
    assert [entry.token_id for entry in a.logprobs] == [1, 2, 3]
    assert (b.request_id, b.new_token_ids, b.finish_reason, b.stop_token_id, b.num_steps) == (
        "b",
        [7, 8, 9],
        "stop",
        9,
        3,
    )


def test_without_logprobs_there_are_none() -> None:
    (got,) = taken(RequestDelta(request_id="a", new_token_ids=[1]), RequestDelta(request_id="a", new_token_ids=[2]))
    assert got.new_token_ids == [1, 2]
    assert got.logprobs is None


def test_steps_that_are_asked_for_stay_apart() -> None:
    """Those of another request are joined all the same, and an end that no step brought comes last."""
    first, second = (delta("a", 1, 2, steps=n, trace=StepTrace(2, [])) for n in (1, 2))
    end = RequestDelta(request_id="a", new_token_ids=[], finish_reason="abort")
    got = taken(first, delta("b", 7, steps=1), second, delta("b", 8, steps=2), end)
    assert [one for one in got if one.request_id == "a"] == [first, second, end]
    assert [one.new_token_ids for one in got if one.request_id == "b"] == [[7, 8]]


def test_a_reader_that_waits() -> None:
    """It gets what comes, and all of it if it looks late; one that is cancelled loses nothing."""

    async def work() -> None:
        queue = DeltaQueue()
        given_up = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        given_up.cancel()
        queue.put(delta("a", 1, steps=1))
        with pytest.raises(asyncio.CancelledError):
            await given_up
        (first,) = await queue.take()
        assert first.new_token_ids == [1]
        waiting = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        queue.put(delta("a", 2, steps=2))
        queue.put(delta("a", 3, steps=3))
        (both,) = await waiting
        assert both.new_token_ids == [2, 3]

    asyncio.run(work())


def test_first_tokens_come_first() -> None:
    """Of the readers that a step wakes, one whose text begins runs before those whose text goes on."""

    async def work() -> list[str]:
        client = EngineClient(EngineConfig(model="none"), watchdog=1.0, max_restarts=0)
        order: list[str] = []

        async def read(queue: DeltaQueue) -> None:
            for one in await queue.take():
                order.append(one.request_id)

        requests = [EngineRequest(request_id=name, prompt_token_ids=[1], params=SamplingParams()) for name in "abc"]
        queues = {one.request_id: client.submit([one]) for one in requests}
        for names in ("ab", "abc"):
            order.clear()
            readers = [asyncio.create_task(read(queues[name])) for name in names]
            await asyncio.sleep(0)
            step = StepOutputs(deltas=[delta(name, 7, steps=1) for name in names])
            client._take(None, step)  # type: ignore[arg-type] - no engine is there
            await asyncio.gather(*readers)
        return order

    assert asyncio.run(work()) == ["c", "a", "b"]
