"""The front end's end of an engine process starts it, talks to it and notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable

import msgspec
import zmq
import zmq.asyncio

from manyheads.config import ConfigError, EngineConfig
from manyheads.frontend.engine_process import BUILD_ENGINE, EngineLaunch
from manyheads.request import (
    Abort,
    EngineReady,
    EngineRequest,
    EngineStats,
    FromEngine,
    RequestDelta,
    StepOutputs,
    ToEngine,
)

DeltaQueue = asyncio.Queue[RequestDelta]
MOST_STEPS = 8
"""The client takes the outputs of at most so many further steps before it lets the readers of the first ones run."""


class EngineError(RuntimeError):
    """The engine could not start, or has died (HTTP 503)."""


class EngineClient:
    """The client owns one engine process and knows which requests are open there.

    It is made within a running event loop. The sockets live in a folder that only this user may enter; folder and
    process are gone after `close`.

    Args:
        build: `module:function` that makes the engine in its process (tests put their own here).
        verbose: let the engine report what it does on standard error.
    """

    def __init__(self, config: EngineConfig, *, build: str = BUILD_ENGINE, verbose: bool = False) -> None:
        self.config = config
        self.stats = EngineStats()
        self.failure: str | None = None
        """Once the engine is not there any more, this says why."""
        self._build = build
        self._verbose = verbose
        self._queues: dict[str, DeltaQueue] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._requests: zmq.Socket[bytes] | None = None
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._cleanup = contextlib.ExitStack()

    @property
    def alive(self) -> bool:
        """Tell whether the engine has started and serves."""
        return self._ready.done() and self.failure is None

    async def start(self) -> EngineReady:
        """Start the engine and wait until it serves.

        Raises:
            ConfigError: a setting or a checkpoint cannot hold.
            EngineError: it could not start; the message says why.
        """
        folder = tempfile.mkdtemp(prefix="manyheads-")
        self._cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        context = self._cleanup.enter_context(zmq.asyncio.Context())
        # requests go out through a plain socket: with no limit on its queue, sending never waits
        self._requests = self._cleanup.enter_context(zmq.Socket(context, zmq.PUSH))
        outputs = self._cleanup.enter_context(context.socket(zmq.PULL))
        for socket, name in ((self._requests, "requests"), (outputs, "outputs")):
            socket.set_hwm(0)
            socket.linger = 0
            try:
                socket.bind(f"ipc://{folder}/{name}")
            except zmq.ZMQError as error:
                raise EngineError(f"no socket can be made in {folder}: {error}; set TMPDIR") from error
        command = (sys.executable, "-m", "manyheads.frontend.engine_process")
        # in a session of its own, so that the terminal's Ctrl-C reaches the server alone
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        launch = EngineLaunch(config=self.config, folder=folder, build=self._build, verbose=self._verbose)
        self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self._tasks = [asyncio.create_task(self._receive(outputs)), asyncio.create_task(self._watch(self._process))]
        return await self._ready

    def submit(self, requests: Iterable[EngineRequest]) -> DeltaQueue:
        """Send requests and return the queue of all their deltas, of which each request's last has a finish_reason."""
        queue: DeltaQueue = asyncio.Queue()
        for request in requests:
            if self.failure is not None:
                queue.put_nowait(self._last(request.request_id))
                continue
            self._queues[request.request_id] = queue
            self._send(request)
        return queue

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request; its last delta follows. An unknown id is fine."""
        if request_id in self._queues:
            self._send(Abort(request_id))

    def abort_all(self) -> None:
        """Ask for the end of all open requests."""
        for request_id in self._queues:
            self._send(Abort(request_id))

    async def close(self) -> None:
        """End the process and remove the sockets. Open requests get a last delta that says so."""
        self._fail("the server is shutting down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()  # it owns nothing that would have to be saved
            await self._process.wait()
        self._cleanup.close()

    def _send(self, message: ToEngine) -> None:
        assert self._requests is not None
        self._requests.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)

    async def _receive(self, outputs: zmq.asyncio.Socket) -> None:
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        unread: zmq.Socket[bytes] = zmq.Socket.shadow(outputs.underlying)
        while True:
            self._take(decoder.decode(await outputs.recv()))
            # Steps that have come meanwhile, before any of their readers runs: a server that does not keep up writes
            # the tokens of several steps at once (`AsyncLLM.updates`).
            for _ in range(MOST_STEPS):
                try:
                    message = unread.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._take(decoder.decode(message))
            await asyncio.sleep(0)  # now the readers, even if more is there

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, StepOutputs):
            self.stats = message.stats or self.stats
            for delta in message.deltas:
                ended = delta.finish_reason is not None
                queue = self._queues.pop(delta.request_id, None) if ended else self._queues.get(delta.request_id)
                if queue is not None:
                    queue.put_nowait(delta)
        elif isinstance(message, EngineReady):
            if not self._ready.done():
                self._ready.set_result(message)
        else:
            self._fail(message.message, ConfigError if message.refused else EngineError)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        await asyncio.sleep(0.2)  # its last words come first
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        self._fail(f"the engine process ended {how}{hint}")

    def _fail(self, message: str, kind: type[Exception] = EngineError) -> None:
        if self.failure is not None:
            return
        self.failure = message
        if not self._ready.done():
            self._ready.set_exception(kind(message))
            self._ready.exception()  # retrieved: nobody may be waiting any more
        queues, self._queues = self._queues, {}
        for request_id, queue in queues.items():
            queue.put_nowait(self._last(request_id))

    def _last(self, request_id: str) -> RequestDelta:
        """Answer for the engine, which cannot answer any more."""
        return RequestDelta.failure(request_id, f"the engine has stopped: {self.failure}", "engine")
