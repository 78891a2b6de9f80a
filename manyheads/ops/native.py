"""The operations of a CPU with a C compiler: torch's, and in float32 those of `layers.c` between a layer's products."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.base import Heads
from manyheads.attention.native import NativeAttention, serves
from manyheads.attention.torch import TorchAttention
from manyheads.kv_cache import KVCache
from manyheads.native.layers import Layers
from manyheads.ops.torch import TorchOps
from manyheads.quantization.base import CodedScheme


class NativeOps(TorchOps):
    """`ops.base.Ops` where `layers.c` could be compiled.

    Args:
        layers: what came of it.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers

    def attention(self, cache: KVCache, heads: Heads) -> TorchAttention:
        if serves(cache, heads):
            return NativeAttention(cache, heads, self._layers)
        return super().attention(cache, heads)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if _are_plain(x, weight):
            return self._layers.rms_norm(x, weight, eps)
        return super().rms_norm(x, weight, eps)

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        scheme: CodedScheme | None = None,
        multiplier: float = 1.0,
    ) -> Tensor:
        if _are_plain(x, residual, weight):
            return self._layers.add_rms_norm(x, residual, weight, eps, multiplier)
        return super().add_rms_norm(x, residual, weight, eps, scheme, multiplier)

    def silu_mul(self, gate_up: Tensor, scheme: CodedScheme | None = None) -> Tensor:
        return self._layers.silu_mul(gate_up) if _are_plain(gate_up) else super().silu_mul(gate_up, scheme)


def _are_plain(*tensors: Tensor) -> bool:
    """Whether C can read them."""
    return all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
