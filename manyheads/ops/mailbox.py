"""Opens the memory by which the GPUs of one machine send each other rows (`kernels/exchange.py`)."""

from __future__ import annotations

import pickle
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from torch import cuda

from manyheads.ops import ops_for

if TYPE_CHECKING:
    from manyheads.kernels.exchange import Mailbox


def open_mailbox(store: Any, rank: int, size: int, device: torch.device, row_bytes: int) -> Mailbox | None:
    """This rank's, once all ranks are here; None where GPUs do not reach each other's memory. Empty when it is ready.

    Args:
        store: torch's, in which the ranks find each other. It is private to them, so that what is in it is trusted.
        device: GPU number `rank` of this machine.
        row_bytes: of the widest rows.
    """
    pairs = permutations(range(size), 2)  # of all, so that all ranks decide alike
    if not ops_for(device).records or not all(cuda.can_device_access_peer(one, other) for one, other in pairs):
        return None
    from manyheads.kernels.exchange import Mailbox, box_bytes

    memory = torch.zeros(box_bytes(size, row_bytes), dtype=torch.uint8, device=device)
    cuda.synchronize(device)  # before anybody writes to it
    # torch shares memory between processes in this way (torch.multiprocessing); but here it is opened from another GPU,
    # and nothing is on its way that an event would have to tell of
    storage: Any = memory.untyped_storage()
    *handle, _event, _waits = storage._share_cuda_()[1:]
    store.set(f"mailbox {rank}", pickle.dumps(handle))
    boxes = [storage] * size
    for other in range(size):
        if other != rank:
            theirs = pickle.loads(store.get(f"mailbox {other}"))
            boxes[other] = storage._new_shared_cuda(device.index, *theirs, b"", False)
    addresses = torch.tensor([box.data_ptr() for box in boxes], device=device)
    return Mailbox(rank, addresses, row_bytes, boxes)
