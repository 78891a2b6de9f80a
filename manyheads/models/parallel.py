"""Ranks: processes that hold a model together, each a share of every layer (tensor parallelism).

Shoeybi et al. 2019, "Megatron-LM", section 3: attention's heads and the feed-forward part's inner size are shared out,
so each rank computes a share of what a layer adds to the residual, and the shares are added up, twice a layer. The
vocabulary is shared out as well. What comes out of a sum or a gathering is the same on every rank, bit for bit; so all
of them draw the same tokens, and none has to tell the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from manyheads.config import ConfigError
from manyheads.ops.mailbox import open_mailbox
from manyheads.quantization.base import QuantizedWeight, Weight
from manyheads.quantization.schemes import join

if TYPE_CHECKING:
    from manyheads.kernels.exchange import Mailbox

PATIENCE = timedelta(days=1)
"""How long a rank waits for the others. A rank that has died ends them, and one that hangs is the supervisor's to
find; meanwhile they may be idle for any time."""
ARRIVAL = timedelta(minutes=2)
"""How long ranks that have come wait until they have found each other: one may die just then."""


def here(folder: Path, rank: int) -> Path:
    """The file that says that a rank has come to join. Who waits in a group for one that never comes waits for good."""
    return folder / f"rank-{rank}"


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that share a model, as one of them sees them; one alone shares with nobody."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """torch's process group, which carries tensors between them; None for one alone."""
    mailbox: Mailbox | None = None
    """By which a few rows are summed in less time, where GPUs reach each other's memory."""

    @classmethod
    def join(cls, rank: int, size: int, folder: Path, device: torch.device, row_bytes: int = 0) -> Ranks:
        """Meet the others, who join as well; it waits until all are there.

        Args:
            folder: a private one, in which they find each other.
            device: of this rank.
            row_bytes: of the widest rows that are to be summed fast.
        """
        here(folder, rank).touch()
        # NOTE: groups of our own, since torch's default group is one for a whole process
        torch_groups: Any = distributed
        store = torch_groups.FileStore(str(folder / "ranks"), size)
        if device.type == "cuda":
            group = torch_groups.ProcessGroupNCCL(store, rank, size, PATIENCE)
            joined = cls(rank, size, group, open_mailbox(store, rank, size, device, row_bytes))
        else:
            gloo = torch_groups.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = ARRIVAL
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            group = gloo(store, rank, size, options)
            group._set_default_timeout(PATIENCE)
            joined = cls(rank, size, group)
        joined.least(0)  # all are there, and have found each other
        return joined

    def abort(self) -> None:
        """Let go whoever waits for another rank, with a RuntimeError."""
        if self.mailbox is not None:
            self.mailbox.release()  # first: what aborts the group may wait for the device
        if self.group is not None:
            self.group.abort()

    def sum(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of all ranks' x; x itself may be overwritten.

        Args:
            x: [T, D], or parts of it that are added up first, [splits, T, D] float32.

        Returns:
            [T, D] of this dtype.
        """
        if self.mailbox is not None and self.mailbox.serves(x, dtype):
            return self.mailbox.sum(x, dtype)
        if x.ndim == 3:
            x = x.sum(0).to(dtype)
        if self.group is not None:
            self.group.allreduce([x]).wait()
        return x

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        if self.group is None:
            return number
        device = "cuda" if self.group.name() == "nccl" else "cpu"
        least = torch.tensor([number], device=device)
        options: Any = distributed.AllreduceOptions()
        options.reduceOp = distributed.ReduceOp.MIN
        self.group.allreduce([least], options).wait()
        return int(least)

    def gather(self, x: Tensor, size: int) -> Tensor:
        """All ranks' x [T, n] side by side, the first rank's first, and of those `size` columns: [T, size]."""
        if self.group is None:
            return x
        if self.mailbox is not None and self.mailbox.holds(x):
            return self.mailbox.gather(x, size)
        every = x.new_empty(self.size * x.shape[0], x.shape[1])
        self.group._allgather_base(every, x.contiguous()).wait()
        return every.view(self.size, *x.shape).transpose(0, 1).reshape(x.shape[0], -1)[:, :size]

    def embed(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Embeddings of tokens [T] int64, [T, hidden].

        Args:
            rows: this rank's share of the embedding.
        """
        if self.group is None:
            return F.embedding(tokens, rows)
        place = tokens - self.rank * len(rows)
        elsewhere = (place < 0) | (place >= len(rows))
        found = F.embedding(place.masked_fill(elsewhere, 0), rows).masked_fill_(elsewhere[:, None], 0.0)
        return self.sum(found, rows.dtype)

    def part(self, weight: Weight, dim: int, size: int) -> Weight:
        """This rank's `size` rows (dim 0) or columns (dim 1) of a weight, or numbers of a bias.

        Where ranks times size are more than there are, neighbours hold the same part, if the weight has fewer parts
        than there are ranks (K/V heads); else the last part is padded with zeros, unless it is in few bits.
        """
        there = weight.shape[dim]
        if size == there:
            return weight
        start = self.rank * -(-there // size) // self.size * size
        if isinstance(weight, QuantizedWeight):
            return weight.part(dim, start, start + size)
        return padded(weight.narrow(dim, start, min(size, there - start)), dim, size).contiguous()

    def sections(self, weight: Weight, sizes: Sequence[int], parts: Sequence[int]) -> Weight:
        """This rank's parts of projections that stand in a weight or a bias one below the other.

        Args:
            sizes: rows of each.
            parts: this rank's rows of each.
        """
        starts = [0, *accumulate(sizes)]
        found: list[Weight] = []
        for start, stop, size in zip(starts, starts[1:], parts, strict=False):
            if isinstance(weight, QuantizedWeight):
                found.append(self.part(weight.part(0, start, stop), 0, size))
            else:
                found.append(self.part(weight.narrow(0, start, stop - start), 0, size))
        return join(found)

    def rounded_part(self, weight: Tensor, shape: tuple[int, ...], rounded: Callable[[Tensor], Weight]) -> Weight:
        """This rank's part, of this shape, of a weight that is rounded by whole rows, as without other ranks."""
        rows = self.tensor_part(weight, shape[:1])
        if shape[1] < rows.shape[1]:
            rows = padded(rows, 1, shape[1] * self.size)
        return self.part(rounded(rows), 1, shape[1])

    def tensor_part(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """This rank's part of a tensor, of this shape."""
        for dim, size in enumerate(shape):
            part = self.part(tensor, dim, size)
            assert isinstance(part, Tensor)
            tensor = part
        return tensor


@dataclass(frozen=True, eq=False)
class Unsummed:
    """A rank's share of a result, for whoever adds it to something: sum and norm may be one kernel."""

    ranks: Ranks
    x: Tensor
    """As `Ranks.sum` takes it."""
    dtype: torch.dtype

    def sum(self) -> Tensor:
        """The result, [T, D]."""
        return self.ranks.sum(self.x, self.dtype)

    def add_rms_norm(self, residual: Tensor, weight: Tensor, eps: float, multiplier: float) -> Tensor | None:
        """As `Ops.add_rms_norm`; None where there is no such kernel."""
        mailbox = self.ranks.mailbox
        if mailbox is None or not mailbox.serves(self.x, self.dtype):
            return None
        return mailbox.add_rms_norm(self.x, residual, weight, eps, multiplier)


def summed(y: Tensor | Unsummed) -> Tensor:
    """A result, if it is not one yet."""
    return y.sum() if isinstance(y, Unsummed) else y


def padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """So many rows or columns of a tensor that has at most as many, the last ones zeros."""
    if tensor.shape[dim] == size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)


ALONE = Ranks()
"""A model that one process holds."""


@dataclass(frozen=True)
class Share:
    """A rank's share of a layer."""

    num_heads: int
    num_kv_heads: int
    """Where there are more ranks than K/V heads, neighbours hold the same one."""
    intermediate_size: int
    """Of the last rank, some may be padding."""

    @classmethod
    def of(cls, num_ranks: int, num_heads: int, num_kv_heads: int, intermediate_size: int, whose: str) -> Share:
        """One of `num_ranks` shares. Raises ConfigError: they cannot be equal.

        Args:
            whose: named in the message.
        """

        def refuse(number: int, what: str) -> ConfigError:
            return ConfigError(f"tensor_parallel_size={num_ranks} does not divide {whose}'s {what} of {number}")

        if num_heads % num_ranks:
            raise refuse(num_heads, "number of heads")
        if num_kv_heads % num_ranks and num_ranks % num_kv_heads:
            raise refuse(num_kv_heads, "number of K/V heads")
        kv_heads = max(1, num_kv_heads // num_ranks)
        return cls(num_heads // num_ranks, kv_heads, shared_rows(intermediate_size, num_ranks))


def shared_rows(size: int, num_ranks: int) -> int:
    """A rank's share of so many rows; the last rank's may be fewer, and are padded."""
    return -(-size // num_ranks)
