"""Standard Gumbel noise from a counter, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST, MOST = -3.0, 17.0
"""Bounds of the noise: 24 bits say no more."""
_MASK32 = 0xFFFFFFFF


def gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise from a counter: argmax(logits + noise) is a draw from softmax(logits).

    The counter (seed, position, token) is hashed twice with the finalizer of MurmurHash3 (`fmix32`).

    Args:
        seed: [R] int64.
        position: [R, P] int64.

    Returns:
        [R, P, vocab_size] float32.
    """
    tokens = torch.arange(vocab_size, device=seed.device)
    return gumbel_of(streams(seed[:, None], position)[..., None], tokens)


def streams(seed: Tensor, position: Tensor) -> Tensor:
    """What the noise of all tokens at a position begins with; shapes are broadcast."""
    low, high = seed & _MASK32, (seed >> 32) & _MASK32
    return _fmix32(_fmix32(low) ^ _fmix32(high + 0x9E3779B9) ^ _fmix32(position * 0x85EBCA6B))


def gumbel_of(stream: Tensor, token: Tensor) -> Tensor:
    """The noise of tokens, float32 from LEAST to MOST; shapes are broadcast."""
    bits = _fmix32(stream ^ _fmix32(token * 0x9E3779B9 + 0x7F4A7C15))
    # strictly between 0 and 1: 23 bits and a half are a float32, of 24 bits the largest would be rounded up to 1
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _fmix32(x: Tensor) -> Tensor:
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)
