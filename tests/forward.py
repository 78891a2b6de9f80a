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
def hidden_states(model: Llama, tokens: Tensor, tree: TreeTensors | None = None) -> Tensor:
    """[T] → [T, hidden]; the tokens are a chain if no tree says otherwise."""
    config, n = model.config, len(tokens)
    pages = -(-n // 16)
    cache = KVCache.zeros(config.kv_shape, pages, 16, model.dtype, torch.device("cpu"))
    attention = TorchAttention(cache, model.heads)
    group = Group(
        start=0,
        stop=n,
        row_start=torch.tensor([0, n], dtype=torch.int32),
        bits=tree.bits if tree else torch.zeros(n, dtype=torch.int64),
        cached_len=torch.tensor([0]),
        page_table=torch.arange(pages)[None],
        max_tokens=n,
        max_cached_len=0,
        is_chain=tree is None,
    )
    attention.plan([group], tree.depth if tree else torch.arange(n), torch.arange(n))
    return model.forward(tokens, attention)


@torch.inference_mode()
def logits(model: Llama, tokens: Tensor, tree: TreeTensors | None = None) -> Tensor:
    """[T] → [T, V]"""
    return model.logits(hidden_states(model, tokens, tree))
