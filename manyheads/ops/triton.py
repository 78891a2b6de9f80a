"""Every operation by kernels, for NVIDIA GPUs: a launch or two each, all of which a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyheads.attention.triton import TritonAttention
from manyheads.batch import Outcome, RowState, Trees
from manyheads.kernels import compact, compiling, cutoff, fused, guesses, settle, topk, trees, widen
from manyheads.kv_cache import KVCache
from manyheads.ops import kernel_experts, kernel_products
from manyheads.ops.adapters import Adapters
from manyheads.ops.base import GroupedProduct, Product
from manyheads.ops.kernel_adapters import KernelAdapters
from manyheads.ops.torch import TorchOps
from manyheads.quantization.base import CodedWeight, Weight
from manyheads.quantization.blocks import BlockWeight


class TritonOps(TorchOps):
    """`ops.base.Ops` by the kernels of `kernels/`; what is left to torch is said in `TorchOps`."""

    records = True
    noise_bytes = 0  # it is made where it is added
    cutoff_bytes = 1  # at most: room for 4,096 floats, of rows of 16,384 logits and more
    library_bytes = 96 * 2**20  # cuBLAS's workspaces on two streams (32 MiB each), and scratch of split attention
    widened_rows = widen.PIECE
    gathers_pages = False

    attention = staticmethod(TritonAttention)  # type: ignore[assignment]
    rms_norm = staticmethod(fused.rms_norm)
    norm_pairs = staticmethod(fused.norm_pairs)
    add_rms_norm = staticmethod(fused.add_rms_norm)  # type: ignore[assignment]
    layer_norm = staticmethod(fused.layer_norm)
    add_layer_norm = staticmethod(fused.add_layer_norm)  # type: ignore[assignment]
    silu_mul = staticmethod(fused.silu_mul)  # type: ignore[assignment]
    gelu_mul = staticmethod(fused.gelu_mul)  # type: ignore[assignment]
    clamped_swiglu = staticmethod(fused.clamped_swiglu)  # type: ignore[assignment]
    gelu = staticmethod(fused.gelu)  # type: ignore[assignment]
    head_input = staticmethod(fused.head_input)
    argmax = staticmethod(topk.argmax)
    best = staticmethod(topk.topk)
    cutoff = staticmethod(cutoff.cutoff)
    draw = staticmethod(topk.draw)
    expand = staticmethod(trees.expand)
    begin_guesses = staticmethod(guesses.begin_guesses)
    open_nodes = staticmethod(guesses.open_nodes)
    offer_children = staticmethod(guesses.offer_children)
    propose = staticmethod(settle.propose)
    pack = staticmethod(settle.pack)
    route = staticmethod(kernel_experts.route)
    watch = staticmethod(compiling.watch)

    def adapters(self, count: int) -> Adapters:
        return KernelAdapters(count)

    def product(self, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Product:
        if isinstance(weight, CodedWeight):
            if kernel_products.reads(weight):
                return kernel_products.QuantizedProduct(weight, bias)
            weight = weight.dequantize(dtype)
        if isinstance(weight, BlockWeight):
            weight = weight.dequantize(dtype)
        if isinstance(weight, Tensor) and bias is None and weight.dtype in (torch.float16, torch.bfloat16):
            return kernel_products.FewRowsProduct(weight)
        return super().product(weight, bias, dtype)

    def grouped(self, weights: Sequence[Weight], bias: Tensor | None, dtype: torch.dtype) -> GroupedProduct:
        return kernel_experts.grouped(weights, bias, dtype) or super().grouped(weights, bias, dtype)

    def settle(
        self, state: RowState, cache: KVCache, trees: Trees, target: Tensor, accepted: Tensor | None = None
    ) -> Outcome:
        if accepted is not None:
            return super().settle(state, cache, trees, target, accepted)
        return settle.settle(state, cache, trees, target)

    def compact(self, cache: KVCache, trees: Trees, path: Tensor, gained: Tensor) -> None:
        compact.compact(cache, trees.row_slots, trees.offset.gather(1, path), gained)
