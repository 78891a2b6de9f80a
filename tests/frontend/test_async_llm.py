"""What readers of a stream get when the server does not keep up with the engine."""

from __future__ import annotations

import asyncio

from manyheads.frontend.open_request import DeltaQueue
from manyheads.request import RequestDelta, StepTrace, TokenLogprobs


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
