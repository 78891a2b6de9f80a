"""Made-up records and results."""

from __future__ import annotations

from typing import Any

from manyheads.bench.record import Record
from manyheads.bench.result import Level, Memory, Point, Result
from manyheads.bench.stats import make_level

OBJECTIVES = {"ttft": 0.5, "tpot": 0.05}


def record(sent: float, chunks: list[float], **more: Any) -> Record:
    """A good answer, two tokens a chunk."""
    given = {"seconds": chunks[-1] if chunks else 0.0, "prompt_tokens": 7, "tokens": 2 * len(chunks)} | more
    return Record(sent=sent, chunks=chunks, **given)


def level(load: float, ttft: float = 0.1, n: int = 40) -> Level:
    """A second and more of answers that take `ttft` + 0.2 s."""
    records = [record(i * 0.02, [ttft, ttft + 0.1, ttft + 0.2]) for i in range(n)]
    made = make_level(records, (0.0, 2.0), load, "users", OBJECTIVES)
    made.tokens_per_step, made.acceptance = 1.5, [0.4, 0.1]
    return made


def result(name: str = "one", **more: Any) -> Result:
    """A whole result."""
    levels = [level(1.0), level(2.0, ttft=0.2, n=60), level(4.0, ttft=0.4, n=61)]
    given: dict[str, Any] = {
        "name": name,
        "created": "2026-01-01 00:00 UTC",
        "kind": "users",
        "settings": {"mode": "users", "prompt_tokens": 7, "output_tokens": 6},
        "target": {"model": "mock", "server": "tests", "url": "http://127.0.0.1:1"},
        "machine": {"cpu": "a processor", "cores": 2, "gpus": []},
        "objectives": OBJECTIVES,
        "levels": levels,
        "whole": level(4.0, n=80),
        "memory": [Memory(0.0, 2**30), Memory(1.0, 2**31)],
        "timeline": [Point(0.5, 1.0, 2.0, 3.0, 0.0, 0.1), Point(1.5, 1.0, 2.0, 3.0, 0.0, None)],
        "counted_by": {"usage": 161},
    }
    return Result(**given | more)
