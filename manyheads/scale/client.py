"""The front end's end of many replicas: it sends each request to one, and on to another where that one dies."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any

import msgspec
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from manyheads.config import EngineConfig
from manyheads.errors import EngineError
from manyheads.frontend.engine_client import MOST_DEATHS
from manyheads.frontend.open_request import DeltaQueue, OpenRequest
from manyheads.request import EngineReady, EngineRequest, RequestDelta
from manyheads.scale import heard
from manyheads.scale.routing import Route
from manyheads.scale.stats import summed
from manyheads.stats import EngineStats


class ReplicaClient:
    """A `frontend.backend.Backend` of many engines. What a request needs to go on elsewhere is its prompt, its seed and
    the tokens that came of it (`OpenRequest`), and all that is here; so a replica may go at any time.

    Args:
        config: of each engine.
        find: gets a handle of the deployment of `Replica`, which may have to be started.
        leave: lets go what `find` has started.
        watch: returns once no replica can come any more, and says why.
    """

    def __init__(
        self,
        config: EngineConfig,
        find: Callable[[], Awaitable[DeploymentHandle[Any]]],
        leave: Callable[[], Awaitable[None]] | None = None,
        watch: Callable[[], Coroutine[Any, Any, str]] | None = None,
    ) -> None:
        self.config = config
        self.failure: str | None = None
        self._find, self._leave, self._watch = find, leave, watch
        self._watching: asyncio.Task[str] | None = None
        self._generate: DeploymentHandle[Any] | None = None
        self._open: dict[str, OpenRequest] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._random = random.Random(config.seed)
        self._dead: set[str] = set()  # replicas, by their actors' ids, whose deaths requests have met
        self._num_resumed = 0

    @property
    def num_restarts(self) -> int:
        """Count engines that were replaced: by their replicas, and with replicas that requests saw die."""
        return len(self._dead) + sum(mended.restarts for mended in heard.mended.values())

    @property
    def num_resumed(self) -> int:
        """Count requests that went on in another engine, of the same replica or of another."""
        return self._num_resumed + sum(mended.resumed for mended in heard.mended.values())

    @property
    def stats(self) -> EngineStats:
        """All replicas' together: sums, but the shortest wait, and the largest tree."""
        return summed(list(heard.by_replica.values()))

    @property
    def by_engine(self) -> dict[str, EngineStats]:
        """Each replica's, by its name."""
        return heard.by_replica

    @property
    def serving(self) -> bool:
        """Tell whether a replica is there; Serve starts what is missing."""
        return self.failure is None and bool(heard.by_replica)

    @property
    def alive(self) -> bool:
        """Tell whether replicas may come yet."""
        return self.failure is None

    @property
    def num_open(self) -> int:
        """Count the requests that have not ended."""
        return len(self._open)

    async def start(self) -> EngineReady:
        """Wait until a replica is ready.

        Raises:
            ConfigError, EngineError: none can be started.
        """
        try:
            handle = await self._find()
            self._generate = handle.options(method_name="generate", stream=True)
            ready: EngineReady = msgspec.msgpack.decode(await handle.ready.remote(), type=EngineReady)
        except (RayError, RayServeException) as error:
            raise EngineError(f"no replica answers: {_reason(error)}") from error
        if self._watch is not None:
            self._watching = asyncio.create_task(self._watch())
            self._watching.add_done_callback(self._lost)
        return ready

    def _lost(self, watching: asyncio.Task[str]) -> None:
        if not watching.cancelled():
            self._fail(str(watching.exception() or watching.result()))

    def submit(self, requests: Iterable[EngineRequest]) -> DeltaQueue:
        """Send requests and return the queue of all their deltas."""
        queue = DeltaQueue()
        for request in requests:
            request_id = request.request_id
            if self.failure is not None:
                queue.put(self._last(request_id))
                continue
            self._open[request_id] = entry = OpenRequest.of(request, queue, self._random)
            self._tasks[request_id] = task = asyncio.create_task(self._follow(entry))
            task.add_done_callback(partial(self._forget, request_id))
        return queue

    def _forget(self, request_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(request_id, None)

    def abort(self, request_id: str) -> None:
        """End a request here; the replica notices that nobody reads."""
        if request_id in self._open:
            self._add(RequestDelta(request_id=request_id, new_token_ids=[], finish_reason="abort"))
        if (task := self._tasks.get(request_id)) is not None:
            task.cancel()

    def abort_all(self) -> None:
        """End all open requests."""
        for request_id in list(self._open):
            self.abort(request_id)

    async def close(self) -> None:
        """End what is open; the replicas are Serve's."""
        if self._watching is not None:
            self._watching.cancel()
        tasks = list(self._tasks.values())
        self._fail("the server is shutting down")
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._leave is not None:
            await self._leave()

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why
        for request_id in list(self._open):
            self._add(self._last(request_id))
        for task in self._tasks.values():
            task.cancel()

    def _last(self, request_id: str) -> RequestDelta:
        """Answer for engines that cannot answer any more."""
        return RequestDelta.failure(request_id, f"the engine has stopped: {self.failure}", "engine")

    async def _follow(self, entry: OpenRequest) -> None:
        """Follow a request through one replica after the other, to its end."""
        request_id = entry.request.request_id
        while request_id in self._open:
            try:
                async with contextlib.aclosing(self._deltas(entry)) as deltas:
                    async for delta in deltas:
                        self._add(delta)
                cause = "a replica ended its stream too early"
            except (RayActorError, RayServeException) as error:  # the replica is gone, or was going
                cause = _reason(error)
                if isinstance(error, RayActorError):  # as many requests get as it had
                    self._dead.add(error.actor_id)
            except RayError as error:  # what the replica raised, which another would as well
                self._add(RequestDelta.failure(request_id, _reason(error), "engine"))
                return
            if request_id in self._open:
                self._died(entry, cause)

    async def _deltas(self, entry: OpenRequest) -> AsyncGenerator[RequestDelta, None]:
        request = entry.to_send()
        entry.sent = True
        tokens = [*request.prompt_token_ids, *request.output_token_ids]
        route = Route.of(tokens, request.session, request.cache_salt, request.lora)
        assert self._generate is not None
        stream: Any = self._generate.remote(msgspec.msgpack.encode(request), route)
        ended = False
        try:
            async for data in stream:
                delta = msgspec.msgpack.decode(data, type=RequestDelta)
                ended = delta.finish_reason is not None
                yield delta
        finally:
            if not ended:
                stream.cancel()

    def _died(self, entry: OpenRequest, cause: str) -> None:
        """A request has lost its replica; it goes on, unless that has happened too often."""
        entry.deaths += 1
        if entry.deaths > MOST_DEATHS:
            request_id = entry.request.request_id
            why = f"{entry.deaths} replicas in a row died while this request ran: {cause}"
            self._add(RequestDelta.failure(request_id, why, "engine"))
        else:
            self._num_resumed += 1

    def _add(self, delta: RequestDelta) -> None:
        entry = self._open.get(delta.request_id)
        if entry is None:
            return
        if delta.new_token_ids:
            entry.deaths = 0
        if delta.finish_reason is not None:
            del self._open[delta.request_id]
        entry.add(delta)


def _reason(error: Exception) -> str:
    """The first line of what is wrong; Ray's errors carry the remote traceback."""
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
