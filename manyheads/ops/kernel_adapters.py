"""`ops.adapters.Adapters` by the kernels of `kernels/adapters.py`: nothing waits for the device."""

from __future__ import annotations

from torch import Tensor

from manyheads.kernels import adapters
from manyheads.ops.adapters import LowRank


class KernelAdapters:
    """What adapters add, many in one batch."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._which: Tensor | None = None
        self._blocks: adapters.Blocks | None = None

    def plan(self, which: Tensor) -> None:
        self._which, self._blocks = which, adapters.group(which, self.count)

    def keep(self, rows: Tensor) -> None:
        assert self._which is not None, "no tokens were planned"
        self.plan(self._which[rows])

    def add(self, y: Tensor, x: Tensor, weights: LowRank) -> None:
        assert self._blocks is not None, "no tokens were planned"
        adapters.add(y, x, weights.a, weights.b, weights.sizes, self._blocks)
