"""Programmatic dependent launch, on GPUs from Hopper on: a kernel is set up while the one before it still runs.

A decoding step is hundreds of kernels of a few microseconds each; between two of them the GPU idles for about one. A
kernel launched this way begins before its predecessor is done, and waits inside, before it touches what others write.

Measured on an H200, 7B shape, one row: a step takes 3.85 ms instead of 4.04. To announce the next kernel before waiting
for the last makes 3.91 of it, and to fetch the next weights into the cache meanwhile 3.96 and more. To load a program's
first block of them before it waits makes a step of 1 to 64 tokens up to 3 % slower (H100, half precision and fp8).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@lru_cache(maxsize=16)
def dependent(device: torch.device) -> dict[str, Any]:
    """Arguments for the launch of a kernel that begins with `begin`."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """To be called by every program of a kernel before its first access to what another kernel writes or reads.

    NOTE: a program that ends without it lets the next kernel run before those are done that came before this one.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def announce(DEPENDENT: tl.constexpr):
    """To be called by every program of a kernel whose next one does something before it begins.

    NOTE: until that one has begun, it may read only what was written when the kernel before this one began.
    """
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """`begin` of a program that has announced the next kernel."""
    if DEPENDENT:
        gdc_wait()
