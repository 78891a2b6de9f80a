"""Draws on a CPU, which makes noise for those tokens alone that can be drawn, against noise for all."""

from __future__ import annotations

import pytest
import torch

from manyheads.ops.noise import LEAST, MOST, gumbel
from manyheads.ops.torch import TorchOps


@pytest.mark.parametrize("spread", [0.1, 4.0, 20.0], ids=["flat", "peaked", "very peaked"])
def test_a_draw_is_the_greatest_with_noise(spread: float) -> None:
    chance = torch.Generator().manual_seed(0)
    rows, width, depths = 5, 900, 3
    row = torch.arange(rows).repeat_interleave(4)
    depth = torch.tensor([0, 1, 1, 2]).repeat(rows)
    temperature = torch.tensor([1.0, 0.0, 0.7, 2.0, 1e-20])
    for seed_of_all in range(20):
        logits = spread * torch.randn(len(row), width, generator=chance)
        logits[::3, 5:] = -torch.inf  # few are left
        logits[6, 3] = torch.nan
        seed = torch.arange(rows) * 2**40 + seed_of_all
        first = torch.tensor([3, 10, 70, 100_000, 5])
        noise = gumbel(seed, first[:, None] + torch.arange(depths), width)
        heat = temperature[row]
        wanted = (logits / heat.clamp(min=1e-20)[:, None] + noise[row, depth]).argmax(dim=-1)
        wanted = torch.where(heat > 0, wanted, logits.argmax(dim=-1))
        wanted[6] = -1
        drawn = TorchOps().draw(logits, temperature, seed, first, row, depth, depths - 1)
        assert drawn.tolist() == wanted.tolist()


def test_noise_is_within_its_bounds() -> None:
    noise = gumbel(torch.arange(40), torch.arange(40)[None].expand(40, -1), 3000)
    assert LEAST < float(noise.min()) < LEAST + 1
    assert MOST - 4 < float(noise.max()) < MOST
