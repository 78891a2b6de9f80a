"""A model over one sequence without an engine: its pages are the first ones, in order."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.attention.torch import TorchAttention
from manyheads.batch import TreeTensors
from manyheads.kv_cache import KVCache
from manyheads.models.llama import Llama


@torch.inference_mode()
def hidden_states(
    model: Llama,
    tokens: Tensor,
    tree: TreeTensors | None = None,
    read: Tensor | None = None,
    is_finite: Tensor | None = None,
) -> Tensor:
    """[T] → [T, hidden], or [N, hidden] of those that are read; the tokens are a chain if no tree says otherwise."""
    config, n, device = model.config, len(tokens), tokens.device
    pages = -(-n // 16)
    kept = config.kv_shape
    cache = KVCache.zeros(kept, 1 + pages * len(kept.groups), 16, model.dtype, device)
    attention = TorchAttention(cache, model.heads)
    group = Group(
        start=0,
        stop=n,
        row_start=torch.tensor([0, n], dtype=torch.int32, device=device),
        bits=tree.bits if tree else torch.zeros(n, dtype=torch.int64, device=device),
        cached_len=torch.tensor([0], device=device),
        page_table=torch.arange(1, pages + 1, device=device)[None],
        max_tokens=n,
        max_cached_len=0,
        is_chain=tree is None,
    )
    places = torch.arange(n, device=device)
    attention.plan([group], tree.depth if tree else places, places + 16)
    return model.forward(tokens, attention, read=read, is_finite=is_finite)


@torch.inference_mode()
def logits(model: Llama, tokens: Tensor, tree: TreeTensors | None = None) -> Tensor:
    """[T] → [T, V]"""
    return model.logits(hidden_states(model, tokens, tree))
