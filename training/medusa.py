"""The heads as they are trained: residual blocks, one for each head, and one vocabulary projection for all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_HEADS = 4
DISCOUNT = 0.8
"""Each head's loss counts so much of the one before (Cai et al. 2024, section 2.2.1)."""


class Heads(torch.nn.Module):
    """Head h (from 0) predicts the token h + 2 places after the one whose hidden state it reads.

    With the base's own projection ("V2") they would be hardly better than guesses: what a block adds is almost
    nowhere negative (SiLU), so it cannot take back the next token that the hidden state stands for.

    Args:
        projection: [V, hidden], to begin with.
    """

    def __init__(self, projection: Tensor) -> None:
        super().__init__()
        hidden = projection.shape[1]
        self.weight = torch.nn.ParameterList(torch.zeros(hidden, hidden) for _ in range(NUM_HEADS))
        self.bias = torch.nn.ParameterList(torch.zeros(hidden) for _ in range(NUM_HEADS))
        self.projection = torch.nn.Parameter(projection.clone())

    def logits(self, h: int, hidden: Tensor) -> Tensor:
        """[..., hidden] → [..., V] of head h."""
        return F.linear(hidden + F.silu(F.linear(hidden, self.weight[h], self.bias[h])), self.projection)

    def loss(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Discounted sum of the heads' losses.

        Args:
            hidden: [N, hidden].
            wanted: [N, heads] int64, indices into the projection; -1 does not count.
        """
        total = torch.zeros((), device=hidden.device)
        for h in range(NUM_HEADS):
            counted = (wanted[:, h] >= 0).float()
            loss = F.cross_entropy(self.logits(h, hidden).float(), wanted[:, h].clamp(min=0), reduction="none")
            total = total + DISCOUNT**h * (loss * counted).sum() / counted.sum().clamp(min=1)
        return total


def ahead(tokens: Tensor, mask: Tensor) -> Tensor:
    """What the heads are to say at each position: [B, L, heads], -1 where the mask (the answer) ends before.

    Args:
        tokens, mask: [B, L] int64 and bool.
    """
    shifts = range(2, NUM_HEADS + 2)
    wanted = torch.stack([F.pad(tokens[:, s:], (0, s)) for s in shifts], dim=-1)
    # the token that comes next is the answer's too, and so is every one up to the wanted one
    valid = torch.stack([F.pad(mask[:, s:], (0, s)) for s in range(1, NUM_HEADS + 2)], dim=-1).cummin(-1).values
    return torch.where(valid[..., 1:], wanted, -1)
