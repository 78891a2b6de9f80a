"""The best of rows of logits against a stable sort and float64 probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from manyheads.kernels.topk import argmax, draw, topk
from manyheads.ops.torch import TorchOps
from tests.kernels import DEVICE

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(logits: Tensor, count: int) -> None:
    wanted = logits.double().sort(dim=-1, descending=True, stable=True)
    tokens, chances = topk(logits, count)
    assert (tokens.dtype, chances.dtype) == (torch.int64, torch.float32)
    assert torch.equal(tokens, wanted.indices[:, :count])
    probabilities = torch.softmax(logits.double(), -1).gather(1, tokens)
    torch.testing.assert_close(chances.double(), probabilities, rtol=1e-5, atol=1e-30)
    assert bool((chances <= 1).all())
    assert torch.equal(argmax(logits), wanted.indices[:, 0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("rows", "width", "count"),
    [(1, 1, 1), (3, 10, 10), (2, 1000, 3), (4, 1024, 10), (5, 1025, 16), (2, 5000, 10), (1, 32003, 10)],
)
def test_best_tokens(rows: int, width: int, count: int, dtype: torch.dtype) -> None:
    check(randn(rows, width, dtype=dtype) * 4, count)


@pytest.mark.parametrize("dtype", TYPES)
def test_of_equals_the_earlier(dtype: torch.dtype) -> None:
    check(randn(4, 3000, dtype=dtype).round(), 16)
    check(torch.zeros(2, 2100, dtype=dtype, device=DEVICE), 10)
    signs = torch.zeros(1, 50, dtype=dtype, device=DEVICE)
    signs[0, ::3] = -0.0
    check(signs, 10)


@pytest.mark.parametrize("dtype", TYPES)
def test_excluded_tokens(dtype: torch.dtype) -> None:
    logits = randn(3, 4000, dtype=dtype)
    logits[0, 1000:3500] = float("-inf")
    logits[1, :3997] = float("-inf")  # three are left, and the first of the others
    logits[2, 1:] = float("-inf")
    check(logits, 10)


@pytest.mark.parametrize("dtype", TYPES)
def test_large_values(dtype: torch.dtype) -> None:
    check(randn(2, 2000, dtype=dtype) * 1000, 10)
    check(randn(2, 2000, dtype=dtype) * 10 - 300, 10)
    certain = torch.full((1, 1500), -100.0, dtype=dtype, device=DEVICE)
    certain[0, 1100] = 100.0
    check(certain, 2)
    assert float(topk(certain, 1)[1]) == 1.0


def test_rows_without_a_sum_have_no_chances() -> None:
    logits = randn(3, 1500, dtype=torch.float32)
    logits[0] = float("-inf")
    logits[1, 7] = float("nan")
    logits[2] = float("nan")
    tokens, chances = topk(logits, 10)
    assert chances.count_nonzero() == 0
    assert tokens[0].tolist() == list(range(10))
    assert int(tokens[1, 0]) == 7
    assert argmax(logits).tolist() == [-1, -1, -1]  # what is no number is no token
    assert bool(((tokens >= 0) & (tokens < 1500)).all())


@pytest.mark.parametrize("width", [7, 1024, 2500])
def test_draws(width: int) -> None:
    """Noise of large seeds and far positions, rows at temperature 0, and tokens that must not be drawn."""
    logits = randn(12, width, dtype=torch.float32) * 3
    logits[3:6, 1::2] = float("-inf")
    logits[8], logits[9, 5] = float("-inf"), float("nan")
    temperature = torch.tensor([0.7, 0.0, 1.5, 1e-3], device=DEVICE)
    seed = torch.tensor([3, 4, 2**62 + 12345, -1], device=DEVICE)
    first = torch.tensor([1, 2, 100_000, 5], device=DEVICE)
    row = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3], device=DEVICE)
    depth = torch.tensor([0, 1, 1, 0, 1, 0, 1, 2, 3, 0, 1, 1], device=DEVICE)
    seen = set()
    for _ in range(5):
        given = (logits, temperature, seed, first, row, depth)
        drawn = draw(*given, 3)
        assert drawn.tolist() == TorchOps().draw(*given, 3).tolist()
        assert drawn[8:10].tolist() == [-1, -1]
        assert drawn[3:5].tolist() == argmax(logits[3:5]).tolist()
        assert bool((drawn[3:6] % 2 == 0).all())
        seen.add(tuple(drawn.tolist()))
        first = first + 1
    assert len(seen) > 1
    # two nodes of a depth that have the same logits draw the same
    logits[2] = logits[1]
    assert len(set(draw(logits, temperature, seed, first, row, depth, 3)[1:3].tolist())) == 1


def test_strided_rows_and_none() -> None:
    logits = randn(6, 2100, dtype=torch.float16)
    assert torch.equal(topk(logits[::2, :2050], 5)[0], topk(logits[::2, :2050].contiguous(), 5)[0])
    assert topk(logits[:0], 5)[0].shape == (0, 5)
    assert argmax(logits[:0]).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 128256), (1024, 32000), (2048, 151936)])
def test_large(rows: int, width: int, dtype: torch.dtype) -> None:
    logits = torch.randn(rows, width, device=DEVICE).to(dtype)
    tokens, chances = topk(logits, 10)
    wanted = logits[:16].sort(dim=-1, descending=True, stable=True).indices[:, :10]
    assert torch.equal(tokens[:16], wanted)
    assert torch.equal(logits.gather(1, tokens), logits.topk(10, dim=-1).values)
    best = logits.gather(1, tokens).float() - logits.float().logsumexp(-1, keepdim=True)
    torch.testing.assert_close(chances, best.exp(), rtol=1e-5, atol=0)
