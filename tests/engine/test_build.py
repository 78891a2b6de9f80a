from __future__ import annotations

import pytest
import torch

from manyheads.engine.blueprint import _dtype

GPU = torch.device("cuda")


def test_bfloat16_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert _dtype("auto", GPU, torch.bfloat16) == _dtype("auto", GPU, torch.float16) == torch.float16
    assert _dtype("bfloat16", GPU, torch.float16) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert _dtype("auto", GPU, torch.bfloat16) == torch.bfloat16
