"""Attention of packed rows: each conversation by itself, without a mask, which the fast kernels do not take.

`packed_attention` is the base's. `chain_attention` is that of a drafter that goes on from its own features: chains of
tokens begin at the places of a conversation, and a chain sees the conversation up to where it begins, and itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each conversation, as transformers calls it: [R, L, heads, dim].

    Args:
        query: [R, heads, L, dim]
        key, value: [R, K/V heads, L, dim]
        cu_seq_lens_q: [conversations + 1] int32, where each begins in the R · L tokens, and the end.
        max_length_q: tokens of the longest.
        sliding_window, softcap: as `attention.base.Heads` has them.
        s_aux: [heads], the sinks.
    """
    num_rows, num_heads, length, dim = query.shape
    # rotary embeddings can leave float32 beside bfloat16 under autocast
    q, k, v = (t.transpose(1, 2).flatten(0, 1).to(value.dtype) for t in (query, key, value))  # [R · L, heads, dim]
    k, v = (t.repeat_interleave(num_heads // key.shape[1], dim=1) for t in (k, v))
    out: Any
    by_scores = softcap is not None or s_aux is not None
    if q.is_cuda and _has_flash_attention(q.device, dim) and not by_scores:
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest, behind = cu_seq_lens_q, max_length_q, -1 if sliding_window is None else sliding_window - 1
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(behind, 0))
    else:
        sizes = cu_seq_lens_q.diff().tolist()
        alone = zip(*(torch.split(t.transpose(0, 1), sizes, dim=1) for t in (q, k, v)), strict=True)  # [heads, n, dim]
        if by_scores or sliding_window is not None:
            done = [_attend_by_scores(a, b, c, scaling, sliding_window, softcap, s_aux) for a, b, c in alone]
        else:
            done = [F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scaling) for a, b, c in alone]
        out = torch.cat(done, dim=1).transpose(0, 1)
    return out.view(num_rows, length, num_heads, dim), None


def _attend_by_scores(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Causal attention of a conversation, [heads, n, dim], with what no kernel takes."""
    scores = (q @ k.transpose(1, 2)).float() * scale
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
    seen = seen if window is None else seen.triu(1 - window)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, len(seen), 1)), -1)
    return scores.softmax(-1)[..., : len(seen)].to(v.dtype) @ v


@functools.cache
def _has_flash_attention(device: torch.device, dim: int) -> bool:
    """Ampere and later; head sizes that its kernels take."""
    return torch.cuda.get_device_capability(device) >= (8, 0) and dim % 8 == 0 and dim <= 256


@dataclass(frozen=True, eq=False)
class Spans:
    """Which queries and keys belong to the C conversations of packed rows; those are the last places of these."""

    sizes: list[tuple[int, int]]
    """Queries and keys of each conversation."""
    device: torch.device

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where the queries, and the keys, of each conversation begin, and the end: [C + 1] int32 each."""
        ends = F.pad(torch.tensor(self.sizes).cumsum(0), (0, 0, 1, 0)).int()
        queries, keys = ends.to(self.device).T.contiguous()
        return queries, keys

    @property
    def longest(self) -> tuple[int, int]:
        """Queries and keys of the conversations that have most of them."""
        return max(q for q, _ in self.sizes), max(k for _, k in self.sizes)


def chain_attention(
    query: Tensor, key: Tensor, value: Tensor, own: list[tuple[Tensor, Tensor]], spans: Spans
) -> Tensor:
    """Attention of the last token of each chain: [M, heads, dim].

    Of its own chain a token sees one key a step, whose score is one product of two vectors (Li et al. 2025, 3.2); the
    rest is causal attention. Softmax joins the two by the sums of their exponentials.

    Args:
        query: [M, heads, dim], of the M chains, conversation by conversation.
        key, value: [T, K/V heads, dim], of all places. A chain sees its conversation up to the place where it begins.
        own: keys and values [M, K/V heads, dim] of each token of the chains after the first.
    """
    group = query.shape[1] // key.shape[1]
    keys, values = ([t.repeat_interleave(group, dim=1) for t in part] for part in zip((key, value), *own, strict=True))
    empty = query.new_empty(0, *query.shape)
    own_key, own_value = (torch.stack(part[1:]) if own else empty for part in (keys, values))  # [j, M, heads, dim]
    if query.is_cuda and len(query) and _has_flash_attention(query.device, query.shape[-1]):
        kernels = FlashAttention(spans)
        out: Tensor = _Joined.apply(query, keys[0], values[0], own_key, own_value, kernels)  # type: ignore[no-untyped-call]
        return out
    scale, parts = query.shape[-1] ** -0.5, []
    queries, rows = ([size[i] for size in spans.sizes] for i in (0, 1))
    alone = (torch.split(t, sizes) for t, sizes in ((query, queries), (keys[0], rows), (values[0], rows)))
    for q, k, v in zip(*alone, strict=True):
        later = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        scores = torch.einsum("qhd,khd->qhk", q, k).float() * scale
        scores = scores.masked_fill(later[:, None], -torch.inf)
        parts.append((torch.einsum("qhk,khd->qhd", scores.softmax(-1).to(v.dtype), v), scores.logsumexp(-1)))
    seen, lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return _join(seen, lse, query, own_key, own_value)[0]


def _join(out: Tensor, lse: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [M, heads, dim] and its sums (logsumexp of the scores, [M, heads]) with a chain's own tokens added."""
    own = (query.float() * own_key).sum(-1) * query.shape[-1] ** -0.5  # [j, M, heads]
    total = torch.cat([lse[None], own]).logsumexp(0)
    out = out * (lse - total).exp()[..., None] + ((own - total).exp()[..., None] * own_value).sum(0)
    return out.to(query.dtype), total


class FlashAttention:
    """The causal part by PyTorch's kernels, forward and backward."""

    def __init__(self, spans: Spans) -> None:
        self.bounds, self.longest = spans.bounds, spans.longest

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Attention [M, heads, dim] and its sums [M, heads] float32."""
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        aux = AuxRequest(lse=True)
        out, lse = varlen_attn(query, key, value, *self.bounds, *self.longest, window_size=(-1, 0), return_aux=aux)
        return out, lse.T  # [heads, M], whatever its documentation says

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> list[Tensor]:
        """Gradients of query, key and value, as if `out` and `lse` were those of these keys alone."""
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout
        given = (grad.contiguous(), query, key, value, out, lse.T.contiguous(), *self.bounds, *self.longest)
        return list(torch.ops.torch_attn._varlen_attn_backward(*given, True, unused, None, [-1, 0]))


class _Joined(torch.autograd.Function):
    """A causal part by kernels that give no gradient of their sums, and the chains' own tokens.

    A kernel's backward pass makes the weights anew from scores and sums, and takes from the output what all weights
    have in common. So with the sums and the output of both parts it gives the gradients of its own, and the few of the
    chains' tokens follow in the same way.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, kernels: FlashAttention
    ) -> Tensor:
        out, lse = kernels.forward(query, key, value)
        out, lse = _join(out, lse, query, own_key, own_value)
        ctx.save_for_backward(query, key, value, own_key, own_value, out, lse)
        ctx.kernels = kernels
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, out, lse = ctx.saved_tensors
        of_query, of_key, of_value = ctx.kernels.backward(grad, query, key, value, out, lse)
        scale = query.shape[-1] ** -0.5
        weights = ((query.float() * own_key).sum(-1) * scale - lse).exp()  # [j, M, heads]
        of_scores = weights * (grad.float() * (own_value - out)).sum(-1) * scale
        of_scores, weights = (t[..., None].to(query.dtype) for t in (of_scores, weights))
        of_query = of_query + (of_scores * own_key).sum(0)
        return of_query, of_key, of_value, of_scores * query, weights * grad, None
