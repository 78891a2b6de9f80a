"""Memory on the engine's device: what there is to have, and what was taken. On a CPU it is the process's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from manyheads.config import EngineConfig
from manyheads.sizes import format_size
from manyheads.stats import MemoryUse

CONTEXT_BYTES = 2**29
"""What CUDA takes for itself in a process: context, kernels' code, libraries. It is there before it can be measured."""


@dataclass(frozen=True)
class Limit:
    """What the engine may take."""

    total: int
    """Bytes."""
    base: int
    """Of them, bytes that no setting changes: the process with its libraries, or CUDA's context."""
    name: str
    """Where the limit comes from."""


def limit(config: EngineConfig, device: torch.device) -> Limit | None:
    """What there is to have before anything is loaded; None on a CPU where nothing was asked."""
    base = base_bytes(device)
    if device.type == "cpu":
        if config.memory_bytes is None:
            return None
        there, where = base + available_bytes(), "the machine's free memory"
    else:
        free, whole = torch.cuda.mem_get_info(device)
        there, where = base + free, f"the free memory of {device}"
        if config.memory_bytes is None:
            share = config.gpu_memory_utilization
            total = there - int((1 - share) * whole)
            size = f"{format_size(free)} of {format_size(whole)} free"
            return Limit(total, base, f"{device} at gpu_memory_utilization={share:g} ({size})")
    if config.memory_bytes <= there:
        return Limit(config.memory_bytes, base, f"a memory of {format_size(config.memory_bytes)}")
    size = f"{format_size(there)}, where {format_size(config.memory_bytes)} may be taken"
    return Limit(there, base, f"{where} ({size})")


def enforce(limit: Limit, device: torch.device) -> None:
    """Let torch refuse to allocate more than the limit on a GPU; a CPU's system offers nothing that would not break
    other things."""
    if device.type == "cuda":
        share = (limit.total - limit.base) / torch.cuda.mem_get_info(device)[1]
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), index)


def base_bytes(device: torch.device) -> int:
    """Bytes that this process takes without a model."""
    return CONTEXT_BYTES if device.type == "cuda" else taken_bytes(device)


def taken_bytes(device: torch.device) -> int:
    """Bytes in use: of a GPU, by whatever process; on a CPU, resident, by this one."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def available_bytes() -> int:
    """Bytes of the host's memory that the operating system counts as available."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * 2**30


class Meter:
    """Where an engine's memory goes. Made before anything is loaded.

    On a GPU, what other processes take or give back from then on is counted as `rest`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = taken_bytes(device) - base_bytes(device)
        self.weights = self.heads = 0
        self.rest = 0
        """Bytes beside weights and heads before there was a K/V cache."""

    def loaded(self, weights: int, heads: int) -> None:
        """Weights and heads of so many bytes are there, the K/V cache is not yet."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what joining the weights' parts took
        self.weights, self.heads = weights, heads
        self.rest = max(0, taken_bytes(self._device) - self._start - weights - heads)

    def look(self, kv_cache: int, kv_cache_tokens: int, graphs: int) -> MemoryUse:
        """Where memory goes now, the K/V cache and the graphs taking so many bytes."""
        rest = taken_bytes(self._device) - self._start - self.weights - self.heads - kv_cache - graphs
        return MemoryUse(
            weights=self.weights,
            heads=self.heads,
            kv_cache=kv_cache,
            graphs=graphs,
            rest=max(0, rest),
            kv_cache_tokens=kv_cache_tokens,
        )
