"""For which sizes steps are recorded: what a step brings is rounded up to the next of them."""

from __future__ import annotations

from collections.abc import Mapping

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Rows that steps of roots alone are recorded for; beyond, steps of 64 rows."""
TREE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256)
"""The same for trees: the nodes of a step go to the rows that are surest, and to dummy rows only their roots."""
CHUNKS = ((0, 0), (32, 8), (64, 16), (128, 32), (192, 48), (256, 64), (384, 64), (512, 64), (768, 64), (1024, 64))
"""Tokens of chunks that passes are recorded for, and the most chunks that may bring them: what grammars leave no choice
about comes in chunks of a few tokens, of many rows at once. Beyond, the GPU is busy for longer than the host needs for
the launches."""
TREES = (
    (0, 0),
    (16, 16),
    (32, 32),
    (64, 64),
    (96, 96),
    (128, 128),
    (160, 128),
    (192, 160),
    (224, 192),
    (256, 256),
    (288, 256),
    (320, 256),
    (352, 256),
    (384, 256),
    (448, 256),
    (512, 256),
    (576, 256),
    (640, 256),
    (704, 256),
    (768, 256),
    (896, 256),
    (1024, 256),
)
"""Tokens of trees beside them, and the most rows: from 96 on about what TREE_ROWS bring with 1.25 to 4 nodes each; each
of so many tokens costs arithmetic."""

PassKey = tuple[tuple[int, int], tuple[int, int]]
"""A recorded forward pass: one of `CHUNKS`, and one of `TREES`."""


def pass_keys(num_rows: int, max_tokens: int, max_inflight: int) -> list[PassKey]:
    """The passes that so many rows may need.

    Args:
        max_tokens: of prompts that a step computes.
        max_inflight: of trees that its rows bring together.
    """
    chunks, trees = _up_to(CHUNKS, max_tokens, 0), _up_to(TREES, max_inflight, num_rows)
    return [(size, other) for size in chunks for other in trees][1:]


def _up_to(sizes: tuple[tuple[int, int], ...], tokens: int, rows: int) -> tuple[tuple[int, int], ...]:
    """The sizes up to the one that holds so many tokens of so many rows; all of them where none does."""
    largest = fitting(sizes, tokens, rows)
    return sizes if largest is None else sizes[: sizes.index(largest) + 1]


def fitting(sizes: tuple[tuple[int, int], ...], tokens: int, rows: int) -> tuple[int, int] | None:
    """The first size that holds so many tokens of so many rows."""
    return next((size for size in sizes if size[0] >= tokens and size[1] >= rows), None)


def fitting_pass(num_prompts: int, num_chunks: int, num_trees: int, num_rows: int) -> PassKey | None:
    """The smallest pass for so many tokens of so many chunks, and of so many rows' trees; None where none is large
    enough."""
    chunks, trees = fitting(CHUNKS, num_prompts, num_chunks), fitting(TREES, num_trees, num_rows)
    return None if chunks is None or trees is None else (chunks, trees)


def computed(key: PassKey, instead: Mapping[int, int]) -> tuple[int, int]:
    """Tokens of chunks and of trees that a pass computes.

    Args:
        instead: numbers of tokens, both together, that others are computed for.
    """
    (chunks, _), (trees, _) = key
    added = instead.get(chunks + trees, chunks + trees) - chunks - trees
    return (chunks + added, trees) if chunks else (chunks, trees + added)


def all_rows(most: int, sizes: tuple[int, ...]) -> list[int]:
    """What numbers of rows up to `most` are padded to, the largest first."""
    return sorted({padded_rows(count, most, sizes) for count in range(1, most + 1)}, reverse=True)


def padded_rows(count: int, most: int, sizes: tuple[int, ...]) -> int:
    """The number of rows of the recording that serves `count` rows where at most `most` run."""
    return min(next((rows for rows in sizes if rows >= count), -(-count // 64) * 64), most)
