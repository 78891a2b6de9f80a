"""A drafter's passes on a GPU's timeline: how long they take, and how long nothing runs in them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu_profile import Kernel, drafting

PASS = [(0.5, 2.0, "_open_kernel"), (1.5, 5.0, "product"), (6.0, 9.0, "attention"), (9.0, 10.0, "_offer_kernel")]
"""Begin, end and name. Nothing runs from 0 to 0.5 and from 5 to 6; two kernels overlap."""


def step(at: float, stretched: float) -> list[Kernel]:
    """A forward pass of 90 us, a pass of the drafter, one that takes longer, and a copy."""
    kernels = [Kernel("forward", at, at + 90)]
    for begin, times in ((at + 90, 1.0), (at + 100, stretched)):
        kernels += [Kernel(name, begin + start * times, begin + end * times) for start, end, name in PASS]
    end = kernels[-1].end
    return [*kernels, Kernel("copy", end + 3, end + 5)]


def test_passes_and_their_gaps() -> None:
    kernels = [kernel for number in range(3) for kernel in step(number * 1000.0, 2.0 + number)]
    found = drafting(kernels, 3)
    assert found["passes"] == [
        {"kernels": 4, "us": 10.0, "gaps_us": 1.5},
        {"kernels": 4, "us": 30.0, "gaps_us": 4.5},
    ]
    assert found["us"] == 40.0
    assert found["gap_share"] == pytest.approx(6 / 40)
    assert found["first_pass"] == [
        ("_open_kernel", 0.5, 1.5, 0.5),
        ("product", 1.5, 3.5, 0.0),
        ("attention", 6.0, 3.0, 1.0),
        ("_offer_kernel", 9.0, 1.0, 0.0),
    ]


def test_a_step_without_passes() -> None:
    assert drafting([Kernel("forward", 0.0, 9.0)], 1) == {}
