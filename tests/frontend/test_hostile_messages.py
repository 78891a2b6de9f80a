"""Whatever arrives at the engine's socket, the engine goes on serving.

HOSTILE_MESSAGES sets how many messages are sent (200 by default).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from itertools import count

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from manyheads.config import EngineConfig
from manyheads.frontend.engine_process import Loop
from manyheads.request import Abort, EngineRequest, FromEngine, RequestDelta, SamplingParams, StepOutputs
from tests.server.fake_engine import FakeEngine

NUM_MESSAGES = int(os.environ.get("HOSTILE_MESSAGES", "200"))
PARAMS = SamplingParams(max_tokens=3, stop=("x",), logit_bias={5: 1.0}, seed=1, temperature=0.5)
REQUEST = msgspec.msgpack.encode(EngineRequest(request_id="hostile", prompt_token_ids=[1, 2, 300], params=PARAMS))
ABORT = msgspec.msgpack.encode(Abort("hostile"))
NESTED = bytes([REQUEST[0] + 1]) + REQUEST[1:] + b"\xa1x" + b"\x91" * 100_000 + b"\x01"
"""A request with one more field, which is nested more deeply than a reader's stack."""
ENORMOUS = REQUEST.replace(b"\x93\x01\x02\xcd\x01\x2c", b"\xdd\xff\xff\xff\xff\x01")
"""A request whose prompt claims to have 2³² - 1 tokens."""


class Engine:
    """A loop with a fake engine in a thread, and the front end's ends of its sockets."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.requests, self.outputs = self.context.socket(zmq.PUSH), self.context.socket(zmq.PULL)
        inbox, outbox = self.context.socket(zmq.PULL), self.context.socket(zmq.PUSH)
        for socket, other, name in ((self.requests, inbox, "requests"), (self.outputs, outbox, "outputs")):
            socket.bind(f"inproc://{name}")
            other.connect(f"inproc://{name}")
        self.requests.sndtimeo = 1000  # nobody takes it where the loop has just ended
        engine = FakeEngine(EngineConfig(max_queue=10**6, max_model_len=64))
        self.failure: BaseException | None = None
        self.ids = map("honest-{}".format, count())
        self.decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

        def run() -> None:
            try:
                Loop(engine, inbox, outbox).run()  # type: ignore[arg-type]
            except BaseException as error:
                self.failure = error
            finally:
                inbox.close(linger=0)
                outbox.close(linger=0)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def send(self, message: bytes) -> None:
        assert self.thread.is_alive(), f"the engine has ended: {self.failure!r}"
        self.requests.send(message)

    def ask(self) -> RequestDelta:
        """Send an honest request, and return its last delta."""
        own_id = next(self.ids)
        params = SamplingParams(max_tokens=1)
        request = EngineRequest(request_id=own_id, prompt_token_ids=[1], params=params)
        self.send(msgspec.msgpack.encode(request))
        deadline = time.monotonic() + 10
        while True:
            while not self.outputs.poll(20):
                is_well = self.thread.is_alive() and time.monotonic() < deadline
                assert is_well, f"the engine does not answer any more: {self.failure!r}"
            message = self.decoder.decode(self.outputs.recv())
            for delta in message.deltas if isinstance(message, StepOutputs) else ():
                if delta.request_id == own_id and delta.finish_reason is not None:
                    return delta

    def close(self) -> None:
        for socket in (self.requests, self.outputs):
            socket.close(linger=0)
        self.context.term()
        self.thread.join(10)
        assert isinstance(self.failure, zmq.ContextTerminated)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


def truncated(message: bytes) -> st.SearchStrategy[bytes]:
    return st.integers(0, len(message) - 1).map(lambda size: message[:size])


@st.composite
def mutated(draw: st.DrawFn, message: bytes) -> bytes:
    """Some bytes of a message are replaced by others, of any number."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(message) - 1))
        end = draw(st.integers(start, min(len(message), start + 8)))
        message = message[:start] + draw(st.binary(max_size=8)) + message[end:]
    return message


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.lists(st.integers(-1, 400), max_size=80),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(-5, 5), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(SamplingParams.__struct_fields__)
WRONG_TYPES = st.fixed_dictionaries(
    {"type": st.sampled_from(["request", "abort"]) | VALUES},
    optional={
        "request_id": st.text(max_size=5) | VALUES,
        "prompt_token_ids": st.lists(st.integers(-1, 400), max_size=80) | VALUES,
        "params": st.dictionaries(FIELDS, VALUES, max_size=4) | VALUES,
        "more": VALUES,
    },
).map(msgspec.msgpack.encode)
MESSAGES = (
    st.binary(max_size=200)
    | st.sampled_from([REQUEST, ABORT]).flatmap(lambda message: truncated(message) | mutated(message))
    | VALUES.map(msgspec.msgpack.encode)
    | WRONG_TYPES
)


@settings(
    max_examples=NUM_MESSAGES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(message=MESSAGES)
@example(message=b"")
@example(message=b"\xff" * 1000)
@example(message=NESTED)
@example(message=ENORMOUS)
def test_the_engine_goes_on(engine: Engine, message: bytes) -> None:
    engine.send(message)
    assert engine.ask().finish_reason == "length"


def test_the_examples_are_what_they_claim() -> None:
    assert ENORMOUS != REQUEST
    msgspec.msgpack.decode(REQUEST, type=EngineRequest | Abort)
