"""A link is one engine process with the sockets to it, from its start to its end; it knows no requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator

import msgspec
import zmq
import zmq.asyncio

from manyheads.errors import EngineError
from manyheads.frontend.engine_process import EngineLaunch
from manyheads.request import FromEngine, ToEngine

MOST_STEPS = 8
"""At most so many further messages are taken before the readers of the first ones run."""
MOST_UNSENT = 10_000
"""Requests that may wait for an engine that takes none; further ones are refused."""


class EngineLink:
    """It starts an engine process, carries messages both ways and tells when the process has ended.

    The sockets live in a folder that only this user may enter; folder and process are gone after `close`. It is made
    within a running event loop.

    Raises:
        OSError, EngineError: no folder or no socket can be made.
    """

    def __init__(self) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done when the process is no more; says how it ended."""
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._cleanup = contextlib.ExitStack()
        self.folder = tempfile.mkdtemp(prefix="manyheads-")
        self._cleanup.callback(shutil.rmtree, self.folder, ignore_errors=True)
        try:
            context = self._cleanup.enter_context(zmq.asyncio.Context())
            # requests go out through a plain socket: where its queue has room, sending never waits
            self._requests: zmq.Socket[bytes] = self._cleanup.enter_context(zmq.Socket(context, zmq.PUSH))
            self._requests.set_hwm(MOST_UNSENT)
            self._outputs = self._cleanup.enter_context(context.socket(zmq.PULL))
            self._outputs.set_hwm(MOST_STEPS)
            self._requests.linger = self._outputs.linger = 0
            self._outputs.bind(f"ipc://{self.folder}/outputs")
            # The queue of a socket that connects is there without the process, too: what is sent to an engine that
            # has just died is lost with it and goes to the next one.
            self._requests.connect(f"ipc://{self.folder}/requests")
        except zmq.ZMQError as error:
            self._cleanup.close()
            raise EngineError(f"no socket can be made in {self.folder} (see TMPDIR): {error}") from error

    async def start(self, launch: EngineLaunch) -> None:
        """Start the process; what it has to say comes through `messages`."""
        command = (sys.executable, "-m", "manyheads.frontend.engine_process")
        # in a session of its own, so that the terminal's Ctrl-C reaches the server alone
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        launch = msgspec.structs.replace(launch, folder=self.folder)
        self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self._watch = asyncio.create_task(self._wait(self._process))

    def send(self, message: ToEngine) -> None:
        """Send a message, which is lost where the process has ended. Raises EngineError if the engine has not taken any
        for long."""
        try:
            self._requests.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise EngineError("the engine does not take requests") from None

    async def messages(self) -> AsyncGenerator[FromEngine, None]:
        """Give what the engine says. Between bursts, others of the event loop run."""
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        unread: zmq.Socket[bytes] = zmq.Socket.shadow(self._outputs.underlying)
        while True:
            yield decoder.decode(await self._outputs.recv())
            # Steps that have come meanwhile, before any of their readers runs: a server that does not keep up writes
            # the tokens of several steps at once (`AsyncLLM.updates`).
            for _ in range(MOST_STEPS):
                try:
                    message = unread.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                yield decoder.decode(message)
            await asyncio.sleep(0)  # now the readers, even if more is there

    async def close(self) -> None:
        """End the process for good, stopped or not, and remove the sockets."""
        if self._watch is not None and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                # with the ranks that it started; they own nothing that would have to be saved
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._watch
        self._cleanup.close()

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        self.ended.set_result(f"the engine process ended {how}{hint}")
