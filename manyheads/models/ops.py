"""What stands between a model's matrix products: torch's operations, or fused kernels on a GPU that Triton knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from manyheads.kernels.rows import QuantizedRows

fused: Any
linear: Any
quantized: Any
topk: Any
try:
    from manyheads.kernels import fused, linear, quantized, topk
except ImportError:  # a build of torch without Triton
    fused = linear = quantized = topk = None


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels of `kernels/` serve this device."""
    return device.type == "cuda" and fused is not None


def shortfalls(device: torch.device) -> list[str]:
    """What this GPU or this installation does not get of what there is, a line each."""
    if device.type != "cuda":
        return []
    if fused is None:
        return ["Triton is not installed: attention by torch, no fused kernels and no CUDA graphs, which is slower"]
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    lines = []
    if capability < (9, 0):
        lines.append(f"{name}: kernels wait for each other's end, and cuBLAS multiplies few rows (more from Hopper on)")
    if capability < (8, 0):
        lines.append(f"{name}: attention without tensor cores, which Triton uses from Ampere on")
    return lines


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [T, D], its statistics in float32 (Zhang and Sennrich 2019)."""
    if has_kernels(x.device):
        return fused.rms_norm(x, weight, eps)  # type: ignore[no-any-return]
    if x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    # F.rms_norm on a CPU is a dozen operations, which for few rows costs twice as much
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


@overload
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor: ...


@overload
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scheme: str | None
) -> Tensor | QuantizedRows: ...


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scheme: str | None = None
) -> Tensor | QuantizedRows:
    """Add x to the residual [T, D] in place, and norm the sum. x may be in parts (`Linear.parts`).

    Args:
        scheme: what the product that comes next `takes`.
    """
    if has_kernels(x.device):
        return fused.add_rms_norm(x, residual, weight, eps, scheme)  # type: ignore[no-any-return]
    return rms_norm(residual.add_(x), weight, eps)


def silu_mul(gate_up: Tensor, scheme: str | None = None) -> Tensor | QuantizedRows:
    """silu(gate) · up: [T, 2 · I] → [T, I]; for the product that comes next as `add_rms_norm`."""
    if has_kernels(gate_up.device):
        return fused.silu_mul(gate_up, scheme)  # type: ignore[no-any-return]
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def head_input(hidden: Tensor, block_out: Tensor) -> Tensor:
    """A Medusa head's residual block: hidden [R, D] + silu(block_out [R, H, D])."""
    if has_kernels(hidden.device):
        return fused.head_input(hidden, block_out)  # type: ignore[no-any-return]
    return hidden[:, None] + F.silu(block_out)


def argmax(logits: Tensor) -> Tensor:
    """[N, V] → [N] int64, of equals the first."""
    if has_kernels(logits.device):
        return topk.argmax(logits)  # type: ignore[no-any-return]
    return logits.argmax(dim=-1)


def best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best tokens of [N, V] logits, best first, and their probabilities: [N, count] int64 and float32."""
    if has_kernels(logits.device):
        return topk.topk(logits, count)  # type: ignore[no-any-return]
    values, tokens = logits.topk(count, dim=-1)
    return tokens, (values.float() - logits.float().logsumexp(dim=-1, keepdim=True)).exp_()
