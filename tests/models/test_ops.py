"""What a GPU lacks is said; the GPUs here are made up."""

from __future__ import annotations

import pytest
import torch

from manyheads.engine.build import _dtype
from manyheads.models import ops

GPU = torch.device("cuda")


@pytest.mark.parametrize(("capability", "count"), [((7, 5), 2), ((8, 6), 1), ((9, 0), 0), ((10, 0), 0)])
def test_shortfalls(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], count: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(ops, "fused", object())
    assert len(ops.shortfalls(GPU)) == count
    monkeypatch.setattr(ops, "fused", None)
    assert "Triton" in ops.shortfalls(GPU)[0]
    assert ops.shortfalls(torch.device("cpu")) == []


def test_bfloat16_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert _dtype("auto", GPU, torch.bfloat16) == _dtype("auto", GPU, torch.float16) == torch.float16
    assert _dtype("bfloat16", GPU, torch.float16) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert _dtype("auto", GPU, torch.bfloat16) == torch.bfloat16
