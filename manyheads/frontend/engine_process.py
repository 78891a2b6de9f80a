"""This process runs an engine: requests and aborts come in, step outputs go out, over local ZeroMQ sockets.

`EngineClient` starts it as `python -m manyheads.frontend.engine_process`, with an `EngineLaunch` as the first line of
standard input. Standard input stays open as long as the parent lives: when it closes, this process ends.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pkgutil
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from typing import TYPE_CHECKING

import msgspec
import zmq

from manyheads.config import EngineConfig
from manyheads.errors import QueueFull, RequestError
from manyheads.request import (
    Abort,
    Beat,
    EngineFailed,
    FromEngine,
    RequestDelta,
    StepOutputs,
    ToEngine,
)
from manyheads.say import say

if TYPE_CHECKING:
    from manyheads.engine.engine import Engine

BUILD_ENGINE = "manyheads.engine.build:build_engine"
STATS_INTERVAL = 0.2
"""So many seconds pass between two snapshots of the statistics while there is work."""
MOST_UNREAD = 1000
"""Steps that may wait for a parent that does not read; then the engine waits, too."""
BEAT_SECONDS = 1.0
"""An engine that has nothing to say says so after as many seconds."""


class EngineLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """The parent tells its engine process this on standard input."""

    config: EngineConfig
    folder: str
    """This private folder holds the sockets `requests` and `outputs`, and what else the process leaves behind."""
    build: str = BUILD_ENGINE
    """`module:function` makes the engine from a config and a callback for progress lines."""
    verbose: bool = False


class Loop:
    """The loop feeds an engine from one socket and sends what it says to another."""

    def __init__(self, engine: Engine, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
        self.engine = engine
        self._inbox = inbox
        self._outbox = outbox
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._stats_at = self._sent_at = 0.0
        engine.listen(lambda ids: self.send(StepOutputs(admitted=ids)), self._beat)

    def run(self) -> None:
        """Serve until the process is ended. With nothing to do it sleeps in the socket, and says that it is alive."""
        while True:
            if not self.engine.has_work():
                self._inbox.poll(int(BEAT_SECONDS * 1000))
            self.turn()

    def turn(self) -> None:
        """Take what has arrived, run a step, and send what came of both."""
        deltas = self._receive()
        deltas += self.engine.step()
        now = time.monotonic()
        stats = None
        if now - self._stats_at >= STATS_INTERVAL or not self.engine.has_work():
            stats, self._stats_at = self.engine.stats(), now
        if deltas or stats is not None:
            self.send(StepOutputs(deltas=deltas, stats=stats))

    def send(self, message: FromEngine) -> None:
        """Send a message to the parent; it waits while the parent takes none."""
        self._outbox.send(msgspec.msgpack.encode(message))
        self._sent_at = time.monotonic()

    def _beat(self) -> None:
        """Say in the middle of a long step that the engine is alive."""
        if time.monotonic() - self._sent_at >= BEAT_SECONDS:
            self.send(Beat())

    def _receive(self) -> list[RequestDelta]:
        """Give the engine everything that has arrived; return a last delta for each request that it refuses."""
        refused: list[RequestDelta] = []
        while True:
            try:
                data = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return refused
            try:
                message = self._decoder.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                say(f"engine: dropped a message of {len(data)} bytes: {error}")
                continue
            if isinstance(message, Abort):
                self.engine.abort(message.request_id)
                continue
            try:
                self.engine.add_request(message)
            except (RequestError, QueueFull) as error:
                refused.append(RequestDelta.refusal(message.request_id, error))
            except Exception as error:  # a defect that one request meets is the end of that request alone
                say(traceback.format_exc())
                why = f"the engine cannot take this request: {type(error).__name__}: {error}"
                refused.append(RequestDelta.failure(message.request_id, why, "engine"))


def main() -> None:
    """Build the engine and serve until the parent or a signal ends this process; it tells the parent what fails."""
    # Ctrl-C is the parent's to handle; SIGTERM keeps its default and ends this process at once: it owns no state
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineLaunch)
    tempfile.tempdir = launch.folder  # this process may be killed, and removes nothing then
    threading.Thread(target=_end_with_parent, args=(launch.folder,), daemon=True).start()
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.set_hwm(MOST_UNREAD)
    outbox.set_hwm(MOST_UNREAD)
    inbox.bind(f"ipc://{launch.folder}/requests")
    outbox.connect(f"ipc://{launch.folder}/outputs")
    serving = False
    try:

        def progress(line: str) -> None:
            outbox.send(msgspec.msgpack.encode(Beat()))
            if launch.verbose:
                say(f"engine: {line}")

        engine = pkgutil.resolve_name(launch.build)(launch.config, progress)
        loop = Loop(engine, inbox, outbox)
        gc.collect()
        gc.freeze()  # what is there now stays: no step waits while it is looked at again
        loop.send(engine.ready)
        loop.send(StepOutputs(stats=engine.stats()))
        serving = True
        loop.run()
    except Exception as error:
        expected = not serving and isinstance(error, (ValueError, OSError))
        if launch.verbose or not expected:
            say(traceback.format_exc())
        text = str(error) if expected and str(error) else f"{type(error).__name__}: {error}"
        outbox.send(msgspec.msgpack.encode(EngineFailed(text, refused=expected and isinstance(error, ValueError))))
        context.destroy(linger=2000)
        sys.exit(1)


def _end_with_parent(folder: str) -> None:
    # NOTE: this also runs while the main thread computes or loads, where no signal or socket would be looked at
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
