from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from manyheads import EngineConfig
from manyheads.engine import build
from manyheads.engine.blueprint import _dtype
from manyheads.ops.torch import TorchOps

GPU = torch.device("cuda")


def test_bfloat16_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert _dtype("auto", GPU, torch.bfloat16) == _dtype("auto", GPU, torch.float16) == torch.float16
    assert _dtype("bfloat16", GPU, torch.float16) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert _dtype("auto", GPU, torch.bfloat16) == torch.bfloat16


def test_what_a_start_compiles_is_not_said_of_the_engine_before_it(
    folder: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are in one process, which has one place for whoever is told."""
    told: list[Callable[[str], None]] = []
    monkeypatch.setattr(TorchOps, "watch", lambda self, tell: told.append(tell))
    config = EngineConfig(model=str(folder), device="cpu", num_blocks=9)
    first = build.build_engine(config)
    measure = build.measure_costs

    def measured(*args: Any) -> None:
        told[-1]("kernel that only the second needs")
        measure(*args)

    monkeypatch.setattr(build, "measure_costs", measured)
    second = build.build_engine(config)
    assert first.stats().num_compiled == second.stats().num_compiled == 0
    told[-1]("kernel")
    assert second.stats().num_compiled == 1
