"""Llama-shaped models: Llama, Vicuna, Mistral, Qwen2 and Qwen3 differ in biases and in norms of queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.attention.base import AttentionBackend
from manyheads.models import ops
from manyheads.models.config import ModelConfig, RopeScaling
from manyheads.models.linear import Linear

if TYPE_CHECKING:
    from manyheads.kernels.rows import QuantizedRows

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
        self.rope = _rope_table(config, self.device, self.dtype)

    def forward(self, tokens: Tensor, attention: AttentionBackend) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: [T] int64.
            attention: planned for these tokens.

        Returns:
            [T, hidden]
        """
        eps = self.config.rms_norm_eps
        residual = F.embedding(tokens, self.embedding)
        x: Tensor | QuantizedRows = ops.rms_norm(residual, self.layers[0].input_norm, eps)
        for i, layer in enumerate(self.layers):
            y = layer.o.parts(attention(i, layer.qkv(x), layer.q_norm, layer.k_norm))
            x = ops.add_rms_norm(y, residual, layer.post_norm, eps, layer.gate_up.takes(residual))
            y = layer.down.parts(ops.silu_mul(layer.gate_up(x), layer.down.takes(residual)))
            if i + 1 < len(self.layers):
                following = self.layers[i + 1]
                x = ops.add_rms_norm(y, residual, following.input_norm, eps, following.qkv.takes(residual))
        return ops.add_rms_norm(y, residual, self.norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] → [N, V] float32."""
        return self.lm_head(hidden).float()

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph may hold a forward pass."""
        return all(layer.qkv.can_be_captured for layer in self.layers)

    def memory_bytes(self) -> int:
        """Bytes of all weights; a vocabulary projection that is the embedding itself counts once."""
        total = self.embedding.nbytes + self.norm.nbytes
        total += 0 if self.lm_head.weight is self.embedding else self.lm_head.nbytes
        for layer in self.layers:
            linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
            norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
            total += sum(linear.nbytes for linear in linears) + sum(n.nbytes for n in norms if n is not None)
        return total


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
