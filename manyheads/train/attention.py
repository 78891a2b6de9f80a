"""Attention of packed rows: each conversation by itself, without a mask, which the fast kernels do not take."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "manyheads_packed"
"""Among transformers' attention implementations."""


def register() -> str:
    """Tell transformers of `packed_attention`, and return the name that it has there."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each conversation, as transformers calls it: [R, L, heads, dim].

    Args:
        query: [R, heads, L, dim]
        key, value: [R, K/V heads, L, dim]
        cu_seq_lens_q: [conversations + 1] int32, where each begins in the R · L tokens, and the end.
        max_length_q: tokens of the longest.
    """
    num_rows, num_heads, length, dim = query.shape
    # rotary embeddings can leave float32 beside bfloat16 under autocast
    q, k, v = (t.transpose(1, 2).flatten(0, 1).to(value.dtype) for t in (query, key, value))  # [R · L, heads, dim]
    k, v = (t.repeat_interleave(num_heads // key.shape[1], dim=1) for t in (k, v))
    out: Any
    if q.is_cuda and _has_flash_attention(q.device, dim):
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = cu_seq_lens_q, max_length_q
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0))
    else:
        sizes = cu_seq_lens_q.diff().tolist()
        alone = zip(*(torch.split(t.transpose(0, 1), sizes, dim=1) for t in (q, k, v)), strict=True)  # [heads, n, dim]
        done = [F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scaling) for a, b, c in alone]
        out = torch.cat(done, dim=1).transpose(0, 1)
    return out.view(num_rows, length, num_heads, dim), None


@functools.cache
def _has_flash_attention(device: torch.device, dim: int) -> bool:
    """Ampere and later; head sizes that its kernels take."""
    return torch.cuda.get_device_capability(device) >= (8, 0) and dim % 8 == 0 and dim <= 256
