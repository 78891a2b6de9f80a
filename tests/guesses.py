"""Random rows and templates for what stands between a drafter's passes."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.batch import Level, RowState
from manyheads.speculation.eagle3.template import Template

VOCAB, DRAFT_VOCAB = 1000, 50


class Passes:
    """Rows, some of which decline trees, with dummy rows behind them; and what a drafter says of their nodes.

    Args:
        levels: so many different chances there are, 0 among them; 0 is any.
    """

    def __init__(self, num_rows: int, padding: int, seed: int, levels: int = 0, ranks: int = 4) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.chance_levels = levels
        depth = self.draw(2, 6)
        prior = (torch.rand(depth, ranks, generator=self.random) / ranks).tolist()
        self.template = Template([[0.7, *rates] for rates in prior], self.draw(8, 64))
        page_size = self.draw(1, 20)
        self.state = RowState(num_rows + 3, 300, page_size, self.template.num_candidates, VOCAB, torch.device("cpu"))
        self.state.cached_len[:-1] = self.ints(0, 200, num_rows + 3)
        pages = self.state.page_table[:-1]
        pages[:] = 1 + torch.randperm(pages.numel(), generator=self.random).view(pages.shape)
        self.state.speculative[:-1] = self.ints(0, 4, num_rows + 3).clamp(max=1).float()
        rows = torch.randperm(num_rows + 3, generator=self.random)[:num_rows]
        self.index = torch.cat((rows, torch.full((padding,), num_rows + 3)))
        self.token_map = torch.randperm(VOCAB, generator=self.random)[:DRAFT_VOCAB] if seed % 3 else None
        self.counts = [self.draw(1, len(self.index) * len(level.columns)) for level in self.levels("cpu")[1:]]
        if seed % 2:
            self.counts = [min(count, self.draw(1, 2 * len(self.index))) for count in self.counts]

    def draw(self, low: int, high: int) -> int:
        return int(self.ints(low, high + 1))

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.random)

    def levels(self, device: torch.device | str) -> list[Level]:
        return [self.template.level(depth, torch.device(device)) for depth in range(self.template.max_depth)]

    def children(self, level: Level, count: int) -> tuple[Tensor, Tensor]:
        """Tokens of the draft vocabulary, and chances, for so many nodes."""
        shape = (count, level.families.shape[1])
        chances = torch.rand(shape, generator=self.random)
        if self.chance_levels:
            chances = (chances * self.chance_levels).floor() / max(self.chance_levels - 1, 1)
        return self.ints(0, DRAFT_VOCAB, *shape), chances
