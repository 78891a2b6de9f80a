"""The front end's end of an engine starts the process, knows which requests are open there, and starts another where
one dies or hangs. Open requests go on in the new one with the tokens that they have, and their readers see a pause."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

from manyheads.config import ConfigError, EngineConfig
from manyheads.errors import EngineError
from manyheads.frontend.engine_link import EngineLink
from manyheads.frontend.engine_process import BUILD_ENGINE, EngineLaunch
from manyheads.frontend.open_request import DeltaQueue, OpenRequest
from manyheads.request import Abort, EngineFailed, EngineReady, EngineRequest, FromEngine, RequestDelta, StepOutputs
from manyheads.say import say
from manyheads.stats import EngineStats

START_SECONDS = 1800.0
"""While it loads and measures, an engine may be silent for so long: a checkpoint may have to come over the network."""
RESTART_WINDOW = 600.0
"""Deaths of engines are counted within so many seconds."""
MOST_BACKOFF = 30.0
"""The longest pause before a restart, in seconds."""
MOST_DEATHS = 2
"""A request that ran at so many deaths in a row is not tried again."""


class EngineClient:
    """The client owns an engine process at a time and supervises it. It is made within a running event loop.

    Args:
        watchdog: an engine that says nothing for so many seconds is ended; it speaks once a second at least.
        max_restarts: in RESTART_WINDOW seconds; one death more is the end.
        build: `module:function` that makes the engine in its process (tests put their own here).
        verbose: let the engine report what it does on standard error.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        watchdog: float,
        max_restarts: int,
        build: str = BUILD_ENGINE,
        verbose: bool = False,
    ) -> None:
        self.config = config
        self.stats = EngineStats()
        self.failure: str | None = None
        """Once there will be no engine any more, this says why."""
        self.num_restarts = 0
        self.num_resumed = 0
        """Requests that went on in another engine, each time counted."""
        self._launch = EngineLaunch(config=config, folder="", build=build, verbose=verbose)
        self._watchdog, self._max_restarts = watchdog, max_restarts
        self._open: dict[str, OpenRequest] = {}
        self._link: EngineLink | None = None  # of an engine that serves
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._supervisor: asyncio.Task[None] | None = None
        self._random = random.Random(config.seed)
        self._heard = 0.0
        self._deaths: deque[float] = deque()
        self._idle_deaths = 0  # in a row, of engines that finished no request

    @property
    def by_engine(self) -> dict[str, EngineStats]:
        """There is one."""
        return {}

    @property
    def serving(self) -> bool:
        """Tell whether an engine is there that takes requests."""
        return self._link is not None and self.failure is None

    @property
    def alive(self) -> bool:
        """Tell whether the engine speaks, or another is being started."""
        return self.failure is None and (self._link is None or time.monotonic() - self._heard <= self._watchdog)

    @property
    def num_open(self) -> int:
        """Count the requests that have not ended."""
        return len(self._open)

    async def start(self) -> EngineReady:
        """Start the engine and wait until it serves.

        Raises:
            ConfigError: a setting or a checkpoint cannot hold.
            EngineError: it could not start; the message says why.
        """
        self._supervisor = asyncio.create_task(self._supervise())
        return await self._ready

    def submit(self, requests: Iterable[EngineRequest]) -> DeltaQueue:
        """Send requests and return the queue of all their deltas, of which each request's last has a finish_reason."""
        queue = DeltaQueue()
        for request in requests:
            if self.failure is not None:
                queue.put(self._last(request.request_id))
                continue
            self._open[request.request_id] = entry = OpenRequest.of(request, queue, self._random)
            if self._link is not None:
                self._send(self._link, entry)
        return queue

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request; its last delta follows. An unknown id is fine."""
        entry = self._open.get(request_id)
        if entry is None or entry.aborted:
            return
        entry.aborted = True
        if self._link is None:
            self._end(request_id)
            return
        try:
            self._link.send(Abort(request_id))
        except EngineError:  # it takes no messages: nobody waits for it
            self._end(request_id)

    def abort_all(self) -> None:
        """Ask for the end of all open requests."""
        for request_id in list(self._open):
            self.abort(request_id)

    async def close(self) -> None:
        """End the process and remove its sockets. Open requests get a last delta that says so."""
        self._fail(EngineFailed("the server is shutting down"))
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor

    async def _supervise(self) -> None:
        """Run an engine after another until one cannot be replaced."""
        try:
            while True:
                try:
                    cause = await self._run()
                except (OSError, EngineError) as error:  # no process or socket can be made
                    cause = EngineFailed(str(error))
                delay = self._bury(cause)
                if delay is None:
                    return
                say(f"engine: {cause.message}; starting another")
                await asyncio.sleep(delay)
        except Exception as error:  # a defect: nobody must wait for an engine that nobody starts
            self._fail(EngineFailed(f"{type(error).__name__}: {error}"))
            raise

    async def _run(self) -> EngineFailed:
        """Run one engine from its start to its end, and return why it ended."""
        link = EngineLink()
        tasks: list[asyncio.Task[EngineFailed]] = []
        try:
            await link.start(self._launch)
            self._heard = time.monotonic()
            tasks = [asyncio.create_task(self._read(link)), asyncio.create_task(self._watch_silence())]
            ends: list[asyncio.Future[Any]] = [*tasks, link.ended]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if link.ended.done():
                await asyncio.wait(tasks[:1], timeout=0.2)  # its last words come first
            told = [task.result() for task in tasks if task.done()]
            return told[0] if told else EngineFailed(await link.ended)
        finally:
            self._link = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await link.close()

    async def _read(self, link: EngineLink) -> EngineFailed:
        """Take what an engine says until it says why it ends."""
        async with contextlib.aclosing(link.messages()) as messages:
            async for message in messages:
                self._heard = time.monotonic()
                if isinstance(message, EngineFailed):
                    return message
                self._take(link, message)
        raise AssertionError("an engine's messages do not end")

    async def _watch_silence(self) -> EngineFailed:
        """Wait until the engine has said nothing for too long. Time in which this process stood still does not count:
        it has read nothing, and the engine may have stood still with it (a machine or container that was paused)."""
        now = time.monotonic()
        while True:
            limit = START_SECONDS if self._link is None else self._watchdog
            left = self._heard + limit - now
            if left <= 0:
                return EngineFailed(f"the engine did nothing for {limit:g} s (--watchdog)")
            until = now + min(max(left, 0.05), 1.0)
            await asyncio.sleep(until - now)
            now = time.monotonic()
            self._heard = min(self._heard + max(now - until, 0.0), now)

    def _take(self, link: EngineLink, message: FromEngine) -> None:
        if isinstance(message, StepOutputs):
            self.stats = message.stats or self.stats
            for request_id in message.admitted:
                if request_id in self._open:
                    self._open[request_id].runs = True
            # first tokens before the others of the step: they kept their readers waiting for longest
            for delta in sorted(message.deltas, key=self._has_begun):
                self._add(delta)
                if delta.finish_reason is not None:
                    self._idle_deaths = 0
        elif isinstance(message, EngineReady):
            self._serve(link, message)

    def _has_begun(self, delta: RequestDelta) -> bool:
        entry = self._open.get(delta.request_id)
        return entry is not None and bool(entry.tokens)

    def _add(self, delta: RequestDelta) -> None:
        entry = self._open.get(delta.request_id)
        if entry is None:
            return
        if delta.finish_reason is not None:
            del self._open[delta.request_id]
        entry.add(delta)

    def _serve(self, link: EngineLink, ready: EngineReady) -> None:
        """Give an engine that has started what is open."""
        self._link = link
        if self._ready.done():
            self.num_restarts += 1
            self.num_resumed += sum(entry.sent for entry in self._open.values())
        else:
            self._ready.set_result(ready)
            # another engine has the same room, or what runs here could not go on there
            config = dataclasses.replace(self.config, num_blocks=ready.num_pages, max_model_len=ready.max_model_len)
            self._launch = msgspec.structs.replace(self._launch, config=config)
        for entry in list(self._open.values()):
            self._send(link, entry)

    def _send(self, link: EngineLink, entry: OpenRequest) -> None:
        try:
            link.send(entry.to_send())
        except EngineError as error:
            self._add(RequestDelta.failure(entry.request.request_id, str(error), "queue_full"))
            return
        entry.sent = True

    def _bury(self, cause: EngineFailed) -> float | None:
        """Say which requests died with an engine, and after how many seconds another is to start; None: never."""
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW:
            self._deaths.popleft()
        if not self._ready.done() or len(self._deaths) > self._max_restarts:
            self._fail(cause)
            return None
        for request_id, entry in list(self._open.items()):
            entry.deaths = entry.deaths + 1 if entry.runs else 0
            entry.runs = False
            if entry.aborted:
                self._end(request_id)
            elif entry.deaths >= MOST_DEATHS:
                why = f"the engine died {MOST_DEATHS} times in a row while this request ran: {cause.message}"
                self._add(RequestDelta.failure(request_id, why, "engine"))
        self._idle_deaths += 1
        return 0.0 if self._idle_deaths == 1 else min(2.0 ** (self._idle_deaths - 2), MOST_BACKOFF)

    def _fail(self, cause: EngineFailed) -> None:
        if self.failure is not None:
            return
        self.failure = cause.message
        if not self._ready.done():
            self._ready.set_exception((ConfigError if cause.refused else EngineError)(cause.message))
            self._ready.exception()  # retrieved: nobody may be waiting any more
        opened, self._open = self._open, {}
        for request_id, entry in opened.items():
            entry.queue.put(self._last(request_id))

    def _end(self, request_id: str) -> None:
        """Answer an abort for an engine that is not there."""
        self._add(RequestDelta(request_id=request_id, new_token_ids=[], finish_reason="abort"))

    def _last(self, request_id: str) -> RequestDelta:
        """Answer for the engine, which cannot answer any more."""
        return RequestDelta.failure(request_id, f"the engine has stopped: {self.failure}", "engine")
