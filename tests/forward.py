"""A model over one sequence without an engine: its pages are the first ones, in order."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.attention.torch import TorchAttention
from manyheads.medusa.tree import TreeTensors, chain_tensors
from manyheads.models.llama import Llama


@torch.inference_mode()
def hidden_states(model: Llama, tokens: Tensor, tree: TreeTensors | None = None) -> Tensor:
    """[T] → [T, hidden]; the tokens are a chain if no tree says otherwise."""
    config, n = model.config, len(tokens)
    tree = tree or chain_tensors(n, tokens.device)
    pages = -(-n // 16)
    cache = torch.zeros(config.num_layers, 2, pages, 16, config.num_kv_heads, config.head_dim, dtype=model.dtype)
    attention = TorchAttention(cache, config, model.rope)
    attention.plan([Group(0, 1, tree, torch.tensor([0]), torch.arange(pages)[None], 0)], tree.depth, torch.arange(n))
    return model.forward(tokens, attention)


@torch.inference_mode()
def logits(model: Llama, tokens: Tensor, tree: TreeTensors | None = None) -> Tensor:
    """[T] → [T, V]"""
    return model.logits(hidden_states(model, tokens, tree))
