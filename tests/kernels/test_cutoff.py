"""What top-k, top-p and min-p leave of rows of logits, against float64 and a sort of all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from manyheads.kernels import cutoff as kernel
from manyheads.kernels.cutoff import cutoff
from manyheads.ops.torch import TorchOps
from tests.kernels import DEVICE


def of_long_rows(logits: Tensor, *limits: Tensor) -> Tensor:
    """Rows from 256 on are long ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_BLOCK", 64)
        patch.setattr(kernel, "_SMALL", 16)
        return cutoff(logits, *limits)


WAYS = {"torch": TorchOps().cutoff, "kernel": cutoff, "kernel, of long rows": of_long_rows}
PARAMETERS = [
    (None, 1.0, 0.0),
    (1, 1.0, 0.0),
    (20, 1.0, 0.0),
    (20, 0.8, 0.0),
    (None, 0.9, 0.0),
    (None, 0.1, 0.0),
    (None, 1e-6, 0.0),
    (None, 0.999, 0.0),
    (None, 1.0, 0.2),
    (70, 0.95, 0.05),
    (500, 0.9999, 0.0),
]

pytestmark = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def left(logits: Tensor, top_k: int | None, top_p: float, min_p: float) -> Tensor:
    """[V] bool."""
    x = logits.double().cpu()
    kept = x >= (x.sort(descending=True).values[min(top_k, len(x)) - 1] if top_k is not None else -torch.inf)
    chances = torch.softmax(x.masked_fill(~kept, -torch.inf), 0)
    before = torch.stack([chances[x > value].sum() for value in x])
    return kept & ((before < top_p) | (top_p == 1)) & (chances >= min_p * chances.max())


def found(way: Callable[..., Tensor], logits: Tensor, parameters: list[tuple[int | None, float, float]]) -> Tensor:
    """[T, V] bool."""
    width = logits.shape[1]
    top_k = torch.tensor([width if k is None else k for k, _, _ in parameters], device=DEVICE)
    top_p, min_p = (torch.tensor([of[i] for of in parameters], device=DEVICE) for i in (1, 2))
    return (logits >= way(logits, top_k, top_p, min_p)[:, None]).cpu()


def rows(width: int, spread: float = 3.0) -> Tensor:
    """Of all parameters one."""
    chance = torch.Generator().manual_seed(width)
    return (spread * torch.randn(len(PARAMETERS), width, generator=chance)).to(DEVICE)


@pytest.mark.parametrize(("width", "block"), [(700, 4096), (1500, 4096), (1003, 256)])
def test_what_is_left(way: Callable[..., Tensor], width: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_BLOCK", block)  # of the kernel: a row is several, the last one cut off
    for spread in (0.5, 3.0):  # flat: nearly all are left
        logits = rows(width, spread)
        for row, got, parameters in zip(logits, found(way, logits, PARAMETERS), PARAMETERS, strict=True):
            assert torch.equal(got, left(row, *parameters)), parameters


def test_of_equals_all_or_none_are_left(way: Callable[..., Tensor]) -> None:
    logits = rows(300).round()
    for row, got, parameters in zip(logits, found(way, logits, PARAMETERS), PARAMETERS, strict=True):
        assert torch.equal(got, left(row, *parameters)), parameters


def test_what_is_excluded_is_never_needed(way: Callable[..., Tensor]) -> None:
    logits = rows(400)
    logits[:, 3:] = -torch.inf
    got = found(way, logits, PARAMETERS)
    assert got[:, :3].any(dim=1).all()
    for row, kept, parameters in zip(logits, got, PARAMETERS, strict=True):
        assert torch.equal(kept[:3], left(row, *parameters)[:3]), parameters


def test_the_best_is_always_left(way: Callable[..., Tensor]) -> None:
    logits = rows(50)
    strict: list[tuple[int | None, float, float]] = [(1, 1e-12, 1.0)] * len(logits)
    assert torch.equal(found(way, logits, strict), (logits == logits.amax(dim=1, keepdim=True)).cpu())
    assert found(way, logits[:1, :1], strict[:1]).all()
    assert found(way, logits[:0], []).shape == (0, 50)


def test_a_row_does_not_depend_on_others(way: Callable[..., Tensor]) -> None:
    """Flat ones, for which more has to be looked at, and those that are no numbers."""
    logits, others = rows(1500), rows(1500, 0.01)
    others[::2] = torch.nan
    together = found(way, torch.cat((logits, others)), PARAMETERS * 2)[: len(logits)]
    for row, kept, parameters in zip(logits, together, PARAMETERS, strict=True):
        assert torch.equal(found(way, row[None], [parameters])[0], kept)
