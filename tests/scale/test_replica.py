"""A replica without Serve around it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from manyheads import EngineConfig, SamplingParams
from manyheads.request import EngineRequest, RequestDelta

if TYPE_CHECKING:  # importing Ray takes seconds, which only the process that runs these tests is to spend
    from manyheads.scale.replica import Replica


async def started() -> Replica:
    from manyheads.scale.replica import Replica

    replica: Any = Replica.__new__(Replica)  # Serve waits for what makes it
    config = msgspec.json.encode(EngineConfig(model="fake")).decode()
    await replica.__init__(config, 5.0, 1, "tests.server.fake_engine:build")
    return replica  # type: ignore[no-any-return]


def test_a_request_comes_again_before_its_first_stream_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("FAKE_ENGINE_STEP_SECONDS", "0.02")
    from manyheads.scale.replica import Replica
    from manyheads.scale.routing import Route

    monkeypatch.delattr(Replica, "__del__")  # Serve's, which awaits it

    async def asked() -> tuple[list[RequestDelta], int]:
        replica = await started()
        request = EngineRequest(request_id="a", prompt_token_ids=[5], params=SamplingParams(max_tokens=30))
        first = replica.generate(msgspec.msgpack.encode(request), Route.of([5]))
        begun = msgspec.msgpack.decode(await anext(first), type=RequestDelta).new_token_ids
        # a front end that cannot reach the replica for a moment, and so tells it nothing of its leaving
        request = msgspec.structs.replace(request, output_token_ids=begun, num_steps=1, resumes=True)
        second = replica.generate(msgspec.msgpack.encode(request), Route.of([5]))
        deltas = [msgspec.msgpack.decode(await anext(second), type=RequestDelta)]
        await first.aclose()
        deltas += [msgspec.msgpack.decode(data, type=RequestDelta) async for data in second]
        await replica._client.close()
        return deltas, len(begun)

    deltas, before = asyncio.run(asked())
    assert {delta.request_id for delta in deltas} == {"a"}
    assert (deltas[-1].finish_reason, deltas[-1].error) == ("length", None)
    assert sum(len(delta.new_token_ids) for delta in deltas) == 30 - before
