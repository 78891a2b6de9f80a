"""What a device must do, chosen once for a device: by torch's operations, or by kernels where Triton knows the GPU or
a C compiler the CPU."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

from torch import cuda  # NOTE: not `torch`, which is the module ops/torch.py in this namespace
from torch import device as Device

from manyheads.native.layers import library
from manyheads.ops.base import Ops
from manyheads.ops.native import NativeOps
from manyheads.ops.torch import TorchOps


@lru_cache(maxsize=16)
def ops_for(device: Device) -> Ops:
    """The operations that serve a device."""
    if device.type == "cuda" and _has_triton():
        from manyheads.ops.triton import TritonOps

        return TritonOps()
    layers = library() if device.type == "cpu" else None
    return TorchOps() if layers is None else NativeOps(layers)


def shortfalls(device: Device) -> list[str]:
    """What this GPU or this installation does not get of what there is, a line each."""
    if device.type != "cuda":
        return []
    if not _has_triton():
        return ["Triton is not installed: attention by torch, no fused kernels and no CUDA graphs, which is slower"]
    name, capability = cuda.get_device_name(device), cuda.get_device_capability(device)
    lines = []
    if capability < (9, 0):
        lines.append(f"{name}: kernels wait for each other's end, and cuBLAS multiplies few rows (more from Hopper on)")
    if capability < (8, 0):
        lines.append(f"{name}: attention without tensor cores, which Triton uses from Ampere on")
    return lines


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
