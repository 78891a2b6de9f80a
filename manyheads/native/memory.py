"""Memory in large pages, for weights: every step reads all of them, and small pages hold that up."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_CHUNK = 2**25
_ALIGNMENT = 64
"""Bytes of a cache line."""


class LargePages:
    """Gives tensors places side by side. Memory that is mapped goes back when the last tensor in it does."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def placed(self, tensor: Tensor) -> Tensor:
        """A copy in such memory, if the system has it."""
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > len(self._free):
            self._free = torch.frombuffer(_mapped(max(size, _CHUNK)), dtype=torch.uint8)
        place, self._free = self._free[: tensor.nbytes], self._free[size:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _mapped(size: int) -> mmap.mmap:
    """So many bytes of memory, which becomes the process's when it is written to."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


WEIGHTS = LargePages()
"""Where weights of this process are."""
