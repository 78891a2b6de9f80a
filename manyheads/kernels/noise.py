"""Standard Gumbel noise from a counter, in registers: what `ops.noise.gumbel` computes in torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(seed, position, token):
    """The noise of a row's seed (int64) and a position for tokens [N] int32: [N] float32."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    at = position.to(tl.uint32)
    stream = _mixed(_mixed(low) ^ _mixed(high + _number(0x9E3779B9)) ^ _mixed(at * _number(0x85EBCA6B)))
    counter = token.to(tl.uint32) * _number(0x9E3779B9) + _number(0x7F4A7C15)
    bits = _mixed(stream ^ _mixed(counter))
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def _mixed(x):
    """MurmurHash3's finalizer, `fmix32`, of uint32."""
    x = (x ^ (x >> 16)) * _number(0x85EBCA6B)
    x = (x ^ (x >> 13)) * _number(0xC2B2AE35)
    return x ^ (x >> 16)


@triton.jit
def _number(value: tl.constexpr):
    return tl.full((), value, tl.uint32)
