"""An engine of two ranks, one of which stands still: the stream goes on with the same text."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from manyheads import EngineConfig, SamplingParams
from manyheads.engine.build import build_engine
from manyheads.frontend.engine_client import EngineClient
from manyheads.request import EngineRequest
from tests.tiny import save_model

PROMPT = [1, 2, 3]
ENGINE = "manyheads.frontend.engine_process"
PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=90)


def children(pid: int, module: str) -> list[int]:
    """Processes that a process has started to run a module."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    found = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    return [child for child in found if module.encode() in Path(f"/proc/{child}/cmdline").read_bytes()]


async def streamed(config: EngineConfig, signals: list[signal.Signals]) -> tuple[list[list[int]], int]:
    """The tokens of a stream for each signal, which the process of rank 1 gets in its middle; and how often engines
    were replaced."""
    client = EngineClient(config, watchdog=3.0, max_restarts=3)
    await client.start()
    texts: list[list[int]] = []
    try:
        for number in signals:
            [engine] = children(os.getpid(), ENGINE)
            [rank] = children(engine, "manyheads.engine.rank")
            texts.append([])
            queue = client.submit([EngineRequest(request_id="a", prompt_token_ids=PROMPT, params=PARAMS)])
            reason = None
            while reason is None:
                delta = await queue.get()
                texts[-1] += delta.new_token_ids
                reason = delta.finish_reason
                if len(texts[-1]) >= 10 and rank:
                    os.kill(rank, number)
                    rank = 0
            assert reason == "length", delta.error
        return texts, client.num_restarts
    finally:
        await client.close()
        assert children(os.getpid(), ENGINE) == []


def text_alone(config: EngineConfig) -> list[int]:
    engine = build_engine(config)
    engine.add_request(EngineRequest(request_id="a", prompt_token_ids=PROMPT, params=PARAMS))
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token for delta in engine.step() for token in delta.new_token_ids]
    return tokens


def test_a_rank_that_stands_still_costs_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model")
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_threads": 1, "num_blocks": 40}
    # with a tree of a given size, engines start without measuring which one pays
    config = EngineConfig(model=str(tmp_path / "model"), max_num_seqs=2, tree_size=4, **settings)
    shared = dataclasses.replace(config, tensor_parallel_size=2)
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        texts, restarts = asyncio.run(streamed(shared, [signal.SIGSTOP]))
        assert texts == [text_alone(config)]
        assert restarts == 1
        assert list(Path(folder).glob("manyheads-*")) == []  # two engines were killed
