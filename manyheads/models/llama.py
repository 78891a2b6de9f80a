"""Llama-shaped models: Llama, Vicuna, Mistral, Qwen2 and Qwen3 differ in biases and in norms of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.models.config import ModelConfig, RopeScaling
from manyheads.models.linear import Linear

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, heads, d], k [T, kv_heads, d], v [T, kv_heads, d]) → [T, heads, d]"""

POSITION_MARGIN = 64
"""Rotary positions past the longest sequence: nodes of a tree may stick out, and are never kept."""


@dataclass(frozen=True, eq=False)
class Layer:
    input_norm: Tensor  # [hidden]
    qkv: Linear  # hidden → (heads + 2 · kv_heads) · head_dim
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    o: Linear  # heads · head_dim → hidden
    post_norm: Tensor  # [hidden]
    gate_up: Linear  # hidden → 2 · intermediate
    down: Linear  # intermediate → hidden


class Llama:
    """The forward pass over a flat ragged batch; attention and its cache are the caller's.

    Args:
        embedding: [V, hidden].
        lm_head: hidden → V.
    """

    def __init__(
        self, config: ModelConfig, embedding: Tensor, layers: list[Layer], norm: Tensor, lm_head: Linear
    ) -> None:
        self.config = config
        self.embedding, self.layers, self.norm, self.lm_head = embedding, layers, norm, lm_head
        self.device, self.dtype = embedding.device, embedding.dtype
        self.cos, self.sin = _rope_table(config, self.device, self.dtype)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens, positions: [T] int64.
            attend: attention over the row each token belongs to; it also stores k and v.

        Returns:
            [T, hidden]
        """
        config = self.config
        num_rotated = config.num_heads + config.num_kv_heads
        shape = (tokens.shape[0], num_rotated + config.num_kv_heads, config.head_dim)
        cos, sin = self.cos[positions], self.sin[positions]  # [T, 1, d]
        x = F.embedding(tokens, self.embedding)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(self._norm(x, layer.input_norm)).view(shape)
            qk, v = qkv[:, :num_rotated], qkv[:, num_rotated:]
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = qk[:, : config.num_heads], qk[:, config.num_heads :]
                qk = torch.cat((self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)), dim=1)
            half = config.head_dim // 2
            # sin is signed: x · cos + rotate_half(x) · sin, without the negation
            qk = torch.addcmul(qk * cos, qk.roll(half, dims=-1), sin)
            q, k = qk[:, : config.num_heads], qk[:, config.num_heads :]
            x = x + layer.o(attend(i, q, k, v).flatten(1))
            gate, up = layer.gate_up(self._norm(x, layer.post_norm)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        return self._norm(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] → [N, V] float32."""
        return self.lm_head(hidden).float()

    def memory_bytes(self) -> int:
        """Bytes of all weights."""
        total = self.embedding.nbytes + self.norm.nbytes + self.lm_head.nbytes
        for layer in self.layers:
            linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
            norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
            total += sum(linear.nbytes for linear in linears) + sum(n.nbytes for n in norms if n is not None)
        return total

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm, its statistics in float32 (Zhang and Sennrich 2019)."""
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)


def _rope_table(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin of every position, [positions, 1, head_dim]; the first half of sin is negated."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    if config.rope_scaling is not None:
        frequency = _scaled(frequency, config.rope_scaling)
    positions = torch.arange(config.max_position_embeddings + POSITION_MARGIN).float()
    angle = positions[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos[:, None].to(device, dtype), sin[:, None].to(device, dtype)


def _scaled(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # llama3: long wavelengths are slowed by the factor, short ones kept, those between interpolated
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequency
    smooth = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    slow = wavelength > original / scaling.low_freq_factor
    fast = wavelength < original / scaling.high_freq_factor
    return torch.where(slow, frequency / scaling.factor, torch.where(fast, frequency, blended))
