"""Every operation by kernels, for NVIDIA GPUs: a launch or two each, all of which a CUDA graph can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.triton import TritonAttention
from manyheads.batch import Outcome, RowState, Trees, TreeTensors
from manyheads.kernels import compact, fused, settle, topk, trees
from manyheads.kernels.rows import QuantizedRows
from manyheads.kv_cache import KVCache
from manyheads.ops import kernel_products
from manyheads.ops.base import Product
from manyheads.ops.torch import TorchOps
from manyheads.quantization.base import CodedScheme, CodedWeight, Weight


class TritonOps(TorchOps):
    """`ops.base.Ops` by the kernels of `kernels/`; what is left to torch is said in `TorchOps`."""

    records = True
    library_bytes = 96 * 2**20  # cuBLAS's workspaces on two streams (32 MiB each), and scratch of split attention
    gathers_pages = False

    def attention(  # type: ignore[override]
        self, cache: KVCache, num_heads: int, eps: float, rope: tuple[Tensor, Tensor]
    ) -> TritonAttention:
        return TritonAttention(cache, num_heads, eps, rope)

    def product(self, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Product:
        if isinstance(weight, CodedWeight):
            if kernel_products.reads(weight):
                return kernel_products.QuantizedProduct(weight, bias)
            weight = weight.dequantize(dtype)
        if isinstance(weight, Tensor) and bias is None and weight.dtype in (torch.float16, torch.bfloat16):
            return kernel_products.FewRowsProduct(weight)
        return super().product(weight, bias, dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return fused.rms_norm(x, weight, eps)

    def add_rms_norm(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, scheme: CodedScheme | None = None
    ) -> Tensor | QuantizedRows:
        return fused.add_rms_norm(x, residual, weight, eps, scheme)

    def silu_mul(  # type: ignore[override]
        self, gate_up: Tensor, scheme: CodedScheme | None = None
    ) -> Tensor | QuantizedRows:
        return fused.silu_mul(gate_up, scheme)

    def head_input(self, hidden: Tensor, block_out: Tensor) -> Tensor:
        return fused.head_input(hidden, block_out)

    def argmax(self, logits: Tensor) -> Tensor:
        return topk.argmax(logits)

    def best(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return topk.topk(logits, count)

    def expand(
        self, state: RowState, index: Tensor, tree: TreeTensors, num_tokens: int, sizes: Tensor | None = None
    ) -> Trees:
        return trees.expand(state, index, tree, num_tokens, sizes)

    def settle(
        self, state: RowState, cache: KVCache, trees: Trees, target: Tensor, accepted: Tensor | None = None
    ) -> Outcome:
        if accepted is not None:
            return super().settle(state, cache, trees, target, accepted)
        return settle.settle(state, cache, trees, target)

    def compact(self, cache: KVCache, trees: Trees, path: Tensor, gained: Tensor) -> None:
        compact.compact(cache, trees.row_slots, trees.offset.gather(1, path), gained)

    def propose(self, state: RowState, index: Tensor, candidates: Tensor, chances: Tensor) -> None:
        settle.propose(state, index, candidates, chances)
