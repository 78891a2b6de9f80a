"""What adapters add, by kernels, against the same token by token in float64."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from manyheads.kernels.adapters import group
from manyheads.ops.kernel_adapters import KernelAdapters
from tests.kernels import DEVICE, INTERPRETED, TOLERANCE, relative_error
from tests.ops.test_adapters import CASES, COUNT, by_token, random_weights


def drawn(count: int, adapters: int = COUNT) -> list[int]:
    rng = random.Random(count)
    return [rng.randint(0, adapters) for _ in range(count)]


@pytest.mark.parametrize("which", [*CASES.values(), drawn(150), drawn(520), [5] * 70], ids=len)
def test_tokens_stand_in_blocks_of_one_adapter(which: list[int]) -> None:
    """Each token with an adapter in one block, in its order; what is left over are no blocks."""
    blocks = group(torch.tensor(which, device=DEVICE), COUNT)
    order, table = blocks.order.tolist(), blocks.table.T.tolist()
    assert order == sorted(range(len(which)), key=lambda token: which[token])
    found = {
        token: adapter
        for adapter, first, last in table
        if adapter
        for token in order[first : min(first + blocks.size, last)]
    }
    assert found == {token: adapter for token, adapter in enumerate(which) if adapter}
    sizes = [min(first + blocks.size, last) - first for adapter, first, last in table if adapter]
    assert sum(sizes) == len(found)
    assert all(0 < size <= blocks.size for size in sizes)
    num_real = len(sizes)
    assert all(adapter == 0 for adapter, _, _ in table[num_real:])


TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # whose tl.dot multiplies bfloat16's bits


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("which", "sizes", "rank", "inputs"),
    [
        (CASES["mixed"], (16, 8, 40), 3, 32),
        (CASES["each another"], (130, 24), 16, 200),
        (CASES["many beside few"], (130,), 20, 520),
        (CASES["none"], (16,), 4, 32),
        (CASES["mixed"], (16, 24), 130, 32),
        (drawn(515), (24,), 8, 32),
    ],
    ids=["mixed", "each another", "many beside few", "none", "of a high rank", "many"],
)
def test_each_token_gets_what_its_own_adapter_adds(
    which: list[int], sizes: tuple[int, ...], rank: int, inputs: int, dtype: torch.dtype
) -> None:
    """Also into the first of a product's parts in float32."""
    weights = random_weights(sizes, rank, inputs, dtype)
    x, y = torch.randn(len(which), inputs).to(dtype), torch.randn(len(which), sum(sizes))
    added = by_token(x, which, weights)
    adapters = KernelAdapters(COUNT)
    adapters.plan(torch.tensor(which, device=DEVICE))
    on_device = type(weights)(weights.a.to(DEVICE), weights.b.to(DEVICE), sizes)
    for kind in (dtype, torch.float32):
        before = y.to(DEVICE, kind)
        found = before.clone()
        adapters.add(found, x.to(DEVICE), on_device)
        assert relative_error(found, before.double().cpu() + added) < 2 * TOLERANCE[dtype]
        untouched = torch.tensor(which, device=DEVICE) == 0
        assert torch.equal(found[untouched], before[untouched])
