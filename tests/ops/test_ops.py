"""What a GPU lacks is said; the GPUs here are made up."""

from __future__ import annotations

import pytest
import torch

from manyheads import ops

GPU = torch.device("cuda")


@pytest.mark.parametrize(("capability", "count"), [((7, 5), 2), ((8, 6), 1), ((9, 0), 0), ((10, 0), 0)])
def test_shortfalls(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], count: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(ops, "_has_triton", lambda: True)
    assert len(ops.shortfalls(GPU)) == count
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    assert "Triton" in ops.shortfalls(GPU)[0]
    assert ops.shortfalls(torch.device("cpu")) == []


@pytest.mark.parametrize("has_triton", [True, False])
def test_operations_are_chosen_by_device(monkeypatch: pytest.MonkeyPatch, has_triton: bool) -> None:
    monkeypatch.setattr(ops, "_has_triton", lambda: has_triton)
    choose = ops.ops_for.__wrapped__  # past the cache
    assert not choose(torch.device("cpu")).records
    if has_triton:
        pytest.importorskip("triton")
    assert choose(GPU).records == has_triton
