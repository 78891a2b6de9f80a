"""Opens the memory by which the GPUs of one machine send each other rows (`kernels/exchange.py`)."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from torch import cuda

from manyheads.ops import ops_for

if TYPE_CHECKING:
    from manyheads.kernels.exchange import Mailbox


def open_mailbox(store: Any, name: str, rank: int, size: int, device: torch.device, row_bytes: int) -> Mailbox | None:
    """This rank's, once all ranks are here; None where GPUs do not reach each other's memory. Empty when it is ready.

    Args:
        store: torch's, in which the ranks find each other.
        name: of the group, the same for all of its ranks and no other group of this process.
        device: GPU number `rank` of this machine.
        row_bytes: of the widest rows.
    """
    pairs = permutations(range(size), 2)  # of all, so that all ranks decide alike
    if not ops_for(device).records or not all(cuda.can_device_access_peer(one, other) for one, other in pairs):
        return None
    import torch._C._distributed_c10d as c10d

    from manyheads.kernels.exchange import ROWS, Mailbox

    # torch finds the ranks by the name of a group; it needs no more of it than its store
    groups: Any = c10d
    group = groups.ProcessGroup(groups.PrefixStore("mailbox", store), rank, size)
    groups._register_process_group(name, group)
    symmetric = groups._SymmetricMemory
    memory = symmetric.empty_strided_p2p((2 * size * ROWS * row_bytes // 4,), (1,), torch.int64, device, name)
    memory.zero_()
    cuda.synchronize(device)  # before anybody writes to it
    handle = symmetric.rendezvous(memory, name)
    return Mailbox(rank, torch.tensor(list(handle.buffer_ptrs), device=device), row_bytes, (memory, handle, group))
