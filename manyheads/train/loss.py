"""Losses without all logits at once: a few tokens of one head at a time, each with its own backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked(
    loss: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    index: Tensor,
    weight: float | Tensor,
    chunk: int,
    grad: Tensor | None = None,
) -> Tensor:
    """Sum of a loss over tokens, or of several [k], without a graph; the parameters get `weight` times its gradient.

    The most that exists at once is what `loss` makes of `chunk` tokens.

    Args:
        loss: (hidden states [n, …, hidden], which tokens [n] int64) → the sum of their losses.
        hidden: [N, …, hidden], without a graph.
        index: [M] int64, the tokens that count.
        weight: of all losses, or of each [k].
        grad: [N, …, hidden], takes the gradient of the hidden states; None: it is not needed.
    """
    total = torch.zeros((), device=hidden.device)
    for part in torch.split(index, chunk):
        leaf = hidden[part].requires_grad_(grad is not None)
        value = loss(leaf, part)
        (value * weight).sum().backward()  # type: ignore[no-untyped-call]
        total = total + value.detach()
        if grad is not None and leaf.grad is not None:
            grad.index_add_(0, part, leaf.grad.to(grad.dtype))
    return total


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [n, V] and targets [n], summed in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student), summed over [n, V] logits: the self-distillation loss (Cai et al. 2024, section 2.3.2)."""
    return F.kl_div(student.float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="sum", log_target=True)
