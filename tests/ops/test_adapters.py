"""What adapters add to a batch against the same, token by token, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.ops.adapters import LowRank, TorchAdapters
from tests.kernels import relative_error

COUNT = 5


def random_weights(sizes: tuple[int, ...], rank: int, inputs: int, dtype: torch.dtype = torch.float32) -> LowRank:
    a = torch.randn(COUNT, inputs, len(sizes) * rank) / inputs**0.5
    return LowRank(a.to(dtype), torch.randn(COUNT * rank * sum(sizes)).to(dtype), sizes)


def by_token(x: Tensor, which: list[int], weights: LowRank) -> Tensor:
    """[T, out] float64"""
    rows = []
    for token, adapter in zip(x.double(), which, strict=True):
        inner = (token @ weights.a[adapter - 1].double() * (adapter > 0)).chunk(len(weights.parts))
        rows.append(torch.cat([h @ b[adapter - 1].double() for h, b in zip(inner, weights.parts, strict=True)]))
    return torch.stack(rows)


CASES = {
    "none": [0, 0, 0],
    "one alone": [3],
    "all alike": [2] * 9,
    "each another": [1, 2, 3, 4, 5],
    "mixed": [0, 3, 1, 0, 3, 5, 3, 1],
    "many beside few": [4] * 20 + [1, 1, 2, 0, 5],
    "two of each": [5, 1, 2, 5, 1, 2],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(24,), (16, 8, 40)])
def test_each_token_gets_what_its_own_adapter_adds(case: str, sizes: tuple[int, ...]) -> None:
    which = CASES[case]
    weights, x, y = random_weights(sizes, 3, 32), torch.randn(len(which), 32), torch.randn(len(which), sum(sizes))
    adapters, before = TorchAdapters(COUNT), y.clone()
    adapters.plan(torch.tensor(which))
    adapters.add(y, x, weights)
    torch.testing.assert_close(y, (before.double() + by_token(x, which, weights)).float(), atol=1e-4, rtol=1e-4)
    untouched = torch.tensor(which) == 0
    assert torch.equal(y[untouched], before[untouched])
    assert relative_error(y, before) > 0.1 or not any(which)
