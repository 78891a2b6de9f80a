"""Rows that ranks send each other. Here all ranks are one process's, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import pytest
import torch
from torch import Tensor

from tests.kernels import DEVICE, INTERPRETED, TOLERANCE

pytest.importorskip("triton")

from manyheads.kernels.exchange import FEW_ROWS, PROGRAMS, Mailbox, box_bytes, most_rows
from manyheads.kernels.fused import add_rms_norm

DIM, ROW_BYTES = 96, 512
TYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


class Ranks:
    """Mailboxes of ranks, of which nobody waits: a call is made once for what it sends, and again for what came."""

    def __init__(self, size: int) -> None:
        memory = [torch.zeros(box_bytes(size, ROW_BYTES), dtype=torch.uint8, device=DEVICE) for _ in range(size)]
        addresses = torch.tensor([tensor.data_ptr() for tensor in memory], device=DEVICE)
        self.boxes = [Mailbox(rank, addresses, ROW_BYTES, memory) for rank in range(size)]

    def sum(self, every: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return self.call(lambda box, x: box.sum(x, dtype), every)

    def call(self, function: Callable[[Mailbox, Tensor], Tensor], every: list[Tensor]) -> list[Tensor]:
        """What a function gives each rank."""
        for box, x in zip(self.boxes, every, strict=True):
            calls = box._calls.clone()
            box.release()
            function(box, x)
            box._calls.copy_(calls)
            box._released.zero_()
        return [function(box, x) for box, x in zip(self.boxes, every, strict=True)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_the_sum_of_rounded_rows(size: int, dtype: torch.dtype) -> None:
    ranks = Ranks(size)
    for call, num_rows in enumerate((3, FEW_ROWS + 2, 1, FEW_ROWS + 1, 4, FEW_ROWS, FEW_ROWS + 3)):
        generator = torch.Generator().manual_seed(call)
        every = [torch.randn(num_rows, DIM, generator=generator).to(DEVICE, dtype) for _ in range(size)]
        sums = ranks.sum(every, dtype)
        wanted = reduce(torch.add, (x.float() for x in every)).to(dtype)
        for found in sums:
            assert torch.equal(found, wanted)


def test_a_program_sums_all_its_rows() -> None:
    ranks = Ranks(2)
    for size in (most_rows(2), PROGRAMS + 1, 2):
        every = [torch.arange(size, device=DEVICE)[:, None].expand(size, 4).float() + rank for rank in range(2)]
        for found in ranks.sum([x.contiguous() for x in every], torch.float32):
            assert torch.equal(found, every[0] + every[1])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("num_rows", [3, FEW_ROWS + 1])
def test_the_sum_is_added_and_normed_as_by_a_kernel_of_its_own(num_rows: int, dtype: torch.dtype) -> None:
    ranks = Ranks(2)
    generator = torch.Generator().manual_seed(1)
    every = [torch.randn(2, num_rows, DIM, generator=generator).to(DEVICE) for _ in range(2)]
    before, weight = (torch.randn(size, generator=generator).to(DEVICE, dtype) for size in ((num_rows, DIM), (DIM,)))
    wanted = before.clone()
    normed = add_rms_norm(ranks.sum(every, dtype)[0], wanted, weight, 1e-5, multiplier=0.5)
    residuals: list[Tensor] = []

    def call(box: Mailbox, x: Tensor) -> Tensor:
        residuals.append(before.clone())
        return box.add_rms_norm(x, residuals[-1], weight, 1e-5, 0.5)

    for found in ranks.call(call, every):
        torch.testing.assert_close(found, normed, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for residual in residuals[2:]:
        assert torch.equal(residual, wanted)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [2, 3])
def test_rows_of_all_ranks_stand_side_by_side(size: int, dtype: torch.dtype) -> None:
    ranks = Ranks(size)
    for num_rows, width in ((1, 300), (5, 130), (PROGRAMS // 2, 300), (2, 7)):
        generator = torch.Generator().manual_seed(num_rows)
        every = [torch.randn(num_rows, width, generator=generator).to(DEVICE, dtype) for _ in range(size)]
        assert ranks.boxes[0].holds(every[0])
        wanted = torch.cat(every, dim=1)[:, : size * width - 3]
        for found in ranks.call(lambda box, x: box.gather(x, size * x.shape[1] - 3), every):
            assert torch.equal(found, wanted)
    wide = torch.zeros(most_rows(size), ROW_BYTES, device=DEVICE, dtype=dtype)
    assert not ranks.boxes[0].holds(wide)
    assert not ranks.boxes[0].holds(wide.bool())


@pytest.mark.parametrize("num_rows", [3, FEW_ROWS + 1])
def test_parts_are_added_up_and_rounded_before_they_are_sent(num_rows: int) -> None:
    ranks = Ranks(2)
    generator = torch.Generator().manual_seed(1)
    every = [torch.randn(2, num_rows, DIM, generator=generator).to(DEVICE) for _ in range(2)]
    wanted = (every[0].sum(0).half().float() + every[1].sum(0).half().float()).half()
    for found in ranks.sum(every, torch.float16):
        assert torch.equal(found, wanted)


def test_who_is_released_waits_for_nobody() -> None:
    ranks = Ranks(3)
    ranks.boxes[0].release()
    for num_rows in (2, FEW_ROWS + 1, 2, FEW_ROWS + 1):
        ranks.boxes[0].sum(torch.ones(num_rows, DIM, device=DEVICE), torch.float32)


def test_calls_are_counted_round_and_round() -> None:
    """A word tells the call that it is of from the one two calls before, and from what nobody has written yet; so does
    a flag."""
    ranks = Ranks(2)
    for box in ranks.boxes:
        box._calls.fill_(2**31 - 3)
    for call in range(5):
        num_rows = (1, FEW_ROWS + 1)[call % 2]
        every = [torch.full((num_rows, DIM), call + 10.0 * rank, device=DEVICE) for rank in range(2)]
        for found in ranks.sum(every, torch.float32):
            assert torch.equal(found, every[0] + every[1])
    assert ranks.boxes[0]._calls[0] == 2


def test_what_does_not_fit_is_not_served() -> None:
    box = Ranks(2).boxes[0]
    x = torch.zeros(most_rows(2), ROW_BYTES // 4, device=DEVICE)
    assert box.serves(x, torch.float32)
    assert box.serves(x.expand(2, *x.shape), torch.float32)
    assert not box.serves(x.new_zeros(most_rows(2) + 1, 8), torch.float32)
    assert not box.serves(x.new_zeros(1, ROW_BYTES // 4 + 1), torch.float32)
    assert not box.serves(x.new_zeros(1, 7), torch.float16)
