"""Which chains share a rectangle on a CPU."""

from __future__ import annotations

import pytest

from manyheads.attention.torch import _chains


@pytest.mark.parametrize(
    ("lengths", "counts", "expected"),
    [
        ([40], [7], [(0, 1)]),
        ([40, 50, 60], [3, 5, 16], [(0, 3)]),  # short ones together
        ([40, 50, 60], [3, 200, 5], [(0, 1), (1, 2), (2, 3)]),  # a prompt by itself
        ([40, 900, 1000], [3, 3, 3], [(0, 1), (1, 3)]),  # others are much longer
        ([40, 50, 60, 0], [3, 0, 4, 0], [(0, 1), (2, 3)]),  # rows that pad a step bring nothing
    ],
)
def test_chains(lengths: list[int], counts: list[int], expected: list[tuple[int, int]]) -> None:
    assert _chains(lengths, counts) == expected
