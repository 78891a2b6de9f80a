"""A process of an engine dies or stands still: the streams go on with the same texts."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manyheads import EngineConfig, SamplingParams
from manyheads.engine.build import build_engine
from manyheads.errors import EngineError
from manyheads.frontend.engine_client import EngineClient
from manyheads.request import EngineRequest
from tests.eagle3 import drafter_of
from tests.tiny import save_model

ENGINE = "manyheads.frontend.engine_process"
REQUESTS = [
    EngineRequest(
        request_id=name, prompt_token_ids=[1, 2, 3], params=SamplingParams(temperature=heat, seed=3, max_tokens=90)
    )
    for name, heat in (("greedy", 0.0), ("sampled", 1.0))
]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where engines keep what is temporary; a short path, as sockets want it."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def children(pid: int, module: str) -> list[int]:
    """Processes that a process has started to run a module."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    found = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    return [child for child in found if module.encode() in Path(f"/proc/{child}/cmdline").read_bytes()]


async def streamed(config: EngineConfig, strike: Callable[[int], None]) -> tuple[dict[str, list[int]], int]:
    """The tokens of each stream, in whose middle the engine's process is struck; and how often engines were
    replaced."""
    client = EngineClient(config, watchdog=3.0, max_restarts=3)
    await client.start()
    texts: dict[str, list[int]] = {request.request_id: [] for request in REQUESTS}
    is_struck = False
    try:
        queue = client.submit(REQUESTS)
        going = set(texts)
        while going:
            for delta in await queue.take():
                texts[delta.request_id] += delta.new_token_ids
                if delta.finish_reason is not None:
                    assert delta.finish_reason == "length", delta.error
                    going.remove(delta.request_id)
            if not is_struck and min(map(len, texts.values())) >= 10:
                [engine] = children(os.getpid(), ENGINE)
                strike(engine)
                is_struck = True
        return texts, client.num_restarts
    finally:
        await client.close()
        assert children(os.getpid(), ENGINE) == []


def texts_alone(config: EngineConfig) -> dict[str, list[int]]:
    engine = build_engine(config)
    texts: dict[str, list[int]] = {}
    for request in REQUESTS:
        engine.add_request(request)
        texts[request.request_id] = []
        while engine.has_work():
            texts[request.request_id] += [token for delta in engine.step() for token in delta.new_token_ids]
    return texts


def config_of(folder: Path, drafter: str) -> EngineConfig:
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_threads": 1, "num_blocks": 40}
    # with a tree of a given size, engines start without measuring which one pays
    return EngineConfig(model=str(folder), heads=str(drafter_of(folder, drafter)), tree_size=4, **settings)


def stop_rank(engine: int) -> None:
    [rank] = children(engine, "manyheads.engine.rank")
    os.kill(rank, signal.SIGSTOP)


def kill(engine: int) -> None:
    os.kill(engine, signal.SIGKILL)


@pytest.mark.parametrize(
    ("drafter", "ranks", "strike"),
    [("medusa", 2, stop_rank), ("eagle3", 1, kill)],
    ids=["a rank of two that stands still", "an engine that dies"],
)
def test_an_engine_that_fails_costs_a_pause(
    tmp_path: Path, temporary: Path, drafter: str, ranks: int, strike: Callable[[int], None]
) -> None:
    save_model(tmp_path / "model")
    config = config_of(tmp_path / "model", drafter)
    texts, restarts = asyncio.run(streamed(dataclasses.replace(config, tensor_parallel_size=ranks), strike))
    assert texts == texts_alone(dataclasses.replace(config, speculative=False))
    assert restarts == 1
    assert list(temporary.glob("manyheads-*")) == []  # two engines were killed


def test_requests_that_come_before_a_death_is_noticed_go_to_the_next_engine(tmp_path: Path, temporary: Path) -> None:
    save_model(tmp_path / "model")
    config = config_of(tmp_path / "model", "medusa")
    left = EngineRequest(request_id="left", prompt_token_ids=[1, 2, 3], params=REQUESTS[0].params)

    async def asked() -> dict[str, list[int]]:
        client = EngineClient(config, watchdog=3.0, max_restarts=3)
        await client.start()
        try:
            [engine] = children(os.getpid(), ENGINE)
            kill(engine)
            time.sleep(0.5)  # the socket's thread sees the end, the client nothing
            queue = client.submit([*REQUESTS, left])
            client.abort("left")
            texts: dict[str, list[int]] = {}
            reasons: dict[str, str] = {}
            while len(reasons) < 3:
                for delta in await queue.take():
                    texts.setdefault(delta.request_id, []).extend(delta.new_token_ids)
                    if delta.finish_reason is not None:
                        reasons[delta.request_id] = delta.error or delta.finish_reason
            assert reasons == {"greedy": "length", "sampled": "length", "left": "abort"}
            assert client.num_restarts == 1
            assert texts.pop("left") == []
            return texts
        finally:
            await client.close()

    assert asyncio.run(asked()) == texts_alone(dataclasses.replace(config, speculative=False))


def test_an_engine_whose_sockets_cannot_be_made_ends_those_who_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    config = EngineConfig(model="fake")
    settings: dict[str, Any] = {"watchdog": 3.0, "max_restarts": 1, "build": "tests.server.fake_engine:build"}
    deep = temporary / ("x" * 90)  # a socket's path has at most 107 characters
    deep.mkdir()

    async def first() -> None:
        client = EngineClient(config, **settings)
        with pytest.raises(EngineError, match="no socket can be made"):
            await asyncio.wait_for(client.start(), 10)
        await client.close()

    async def another() -> str | None:
        client = EngineClient(config, **settings)
        await client.start()
        monkeypatch.setattr(tempfile, "tempdir", str(deep))
        queue = client.submit([EngineRequest(request_id="a", prompt_token_ids=[5], params=SamplingParams())])
        kill(*children(os.getpid(), ENGINE))
        while (delta := (await asyncio.wait_for(queue.take(), 10))[-1]).finish_reason is None:
            pass
        assert not client.alive
        await client.close()
        return delta.error

    assert "no socket can be made" in str(asyncio.run(another()))
    asyncio.run(first())  # there still
    assert list(deep.iterdir()) == []
