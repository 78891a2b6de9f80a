"""A request that an engine has not ended yet, with all that another engine needs to go on with it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import msgspec

from manyheads.request import EngineRequest, RequestDelta


class DeltaQueue:
    """A delta queue holds what came of some requests until their one reader takes it, all at once.

    It holds at most what its requests may gain: a reader that is behind costs no more than the context's tokens.
    """

    def __init__(self) -> None:
        self._deltas: list[RequestDelta] = []
        self._reader: asyncio.Future[None] | None = None
        """Done when there is something for a reader that waits."""

    def put(self, delta: RequestDelta) -> None:
        """Add a delta."""
        self._deltas.append(delta)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[RequestDelta]:
        """Wait for a delta and take what has come beside it; if this process did not keep up, several steps of a
        request become one delta. So a server that lags behind writes fewer and larger events, and its readers wait no
        longer. A request that asks for its steps has a delta for each all the same."""
        if self._deltas:  # a task that only waits for what is there already cannot be cancelled
            await asyncio.sleep(0)
        else:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        deltas, self._deltas = self._deltas, []
        return deltas if len(deltas) == 1 else _by_request(deltas)


@dataclass(eq=False)
class OpenRequest:
    """A request that has not ended, and what came of it."""

    request: EngineRequest
    queue: DeltaQueue
    tokens: list[int] = field(default_factory=list)
    num_steps: int = 0
    sent: bool = False
    """Whether an engine has got it."""
    runs: bool = False
    """Whether the engine that is there now has begun with it."""
    deaths: int = 0
    """Of engines in a row, at which it ran."""
    aborted: bool = False

    @classmethod
    def of(cls, request: EngineRequest, queue: DeltaQueue, seeds: random.Random) -> OpenRequest:
        """One that begins. A seed that it does not bring is drawn here, so that another engine can go on with it."""
        if request.params.seed is None:
            params = msgspec.structs.replace(request.params, seed=seeds.getrandbits(62))
            request = msgspec.structs.replace(request, params=params)
        return cls(request, queue)

    def add(self, delta: RequestDelta) -> None:
        """Keep what a delta brings, and hand it to the reader."""
        self.tokens += delta.new_token_ids
        self.num_steps = max(self.num_steps, delta.num_steps)
        self.queue.put(delta)

    def to_send(self) -> EngineRequest:
        """What an engine that knows nothing of it needs."""
        if not self.sent:
            return self.request
        return msgspec.structs.replace(
            self.request, output_token_ids=list(self.tokens), num_steps=self.num_steps, resumes=True
        )


def _by_request(deltas: list[RequestDelta]) -> list[RequestDelta]:
    """Join the steps of each request, but for those that were asked for."""
    found: dict[tuple[str, int], RequestDelta] = {}
    for delta in deltas:
        key = (delta.request_id, len(found) if delta.trace is not None else -1)
        found[key] = _joined(found[key], delta) if key in found else delta
    return list(found.values())


def _joined(earlier: RequestDelta, later: RequestDelta) -> RequestDelta:
    """Join what two steps added to a request, as if one had."""
    return msgspec.structs.replace(
        later,
        new_token_ids=earlier.new_token_ids + later.new_token_ids,
        logprobs=[*(earlier.logprobs or ()), *(later.logprobs or ())] or None,
        prompt_logprobs=earlier.prompt_logprobs,
        num_cached_tokens=max(earlier.num_cached_tokens, later.num_cached_tokens),
        num_steps=max(earlier.num_steps, later.num_steps),
    )
