"""What stands between the products of a layer, by the functions of `layers.c`: float32 on a CPU."""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_float, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.native.library import load

LANES = 16
"""Attention takes heads of so many numbers, or of multiples."""


class Shape(ctypes.Structure):
    """What attention has to know of a model and its cache."""

    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("page_size", c_int64),
        ("eps", c_float),
        ("scale", c_float),
    )


class Trees(ctypes.Structure):
    """Rows of a step, each a tree behind what it has cached; `layers.c` says what is at the addresses."""

    _fields_ = (
        ("row_start", c_void_p),
        ("bits", c_void_p),
        ("position", c_void_p),
        ("cached_len", c_void_p),
        ("page_table", c_void_p),
        ("rows", c_int64),
        ("pages", c_int64),
        ("max_cached_len", c_int64),
    )


FUNCTIONS: dict[str, list[Any]] = {
    "manyheads_rms_norm": [*[c_void_p] * 3, c_float, c_int64, c_int64],
    "manyheads_add_rms_norm": [*[c_void_p] * 4, c_float, c_float, c_int64, c_int64],
    "manyheads_silu_mul": [c_void_p, c_void_p, c_int64, c_int64],
    "manyheads_turn": [*[c_void_p] * 9, c_int64],
    "manyheads_attend": [*[c_void_p] * 6, c_int64],
}
"""What they are given, by name."""


class Layers:
    """The functions, as methods.

    NOTE: they are given addresses and check nothing. Tensors are contiguous, in float32 where nothing else is said.

    Args:
        compiled: `layers.c`.
    """

    def __init__(self, compiled: ctypes.CDLL) -> None:
        for name, arguments in FUNCTIONS.items():
            function = getattr(compiled, name)
            function.argtypes, function.restype = arguments, None
        self._c = compiled

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `Ops.rms_norm`."""
        y, size = torch.empty_like(x), len(weight)
        self._c.manyheads_rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), eps, x.numel() // size, size)
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float) -> Tensor:
        """As `Ops.add_rms_norm`."""
        y, size = torch.empty_like(x), len(weight)
        pointers = x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr()
        self._c.manyheads_add_rms_norm(*pointers, eps, multiplier, x.numel() // size, size)
        return y

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """As `Ops.silu_mul`."""
        rows, size = len(gate_up), gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, size)
        self._c.manyheads_silu_mul(gate_up.data_ptr(), y.data_ptr(), rows, size)
        return y

    def turn(
        self,
        shape: Shape,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],
        norms: tuple[Tensor | None, Tensor | None],
        cache: tuple[Tensor, Tensor],
        slots: Tensor,
    ) -> None:
        """Norm and turn queries and keys in place, and put keys and values into a cache.

        Args:
            qkv: [T, (heads + 2 · kv_heads) · head_dim].
            rope: cos and signed sin of each token, [T, 1, head_dim].
            norms: of queries and of keys, [head_dim] or none.
            cache: a layer's keys and values, [pages, page size, kv_heads, head_dim].
            slots: [T] int64.
        """
        given = (qkv, *rope, *norms, *cache, slots)
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in given]
        self._c.manyheads_turn(byref(shape), *pointers, len(qkv))

    def attend(
        self, shape: Shape, trees: Trees, qkv: Tensor, cache: tuple[Tensor, Tensor], out: Tensor, window: int
    ) -> None:
        """Attention of trees.

        Args:
            qkv: of their tokens, turned.
            cache: as `turn`'s.
            out: [T, heads · head_dim], which is written.
            window: how far back a token sees, itself included; 0: to the beginning.
        """
        pointers = qkv.data_ptr(), cache[0].data_ptr(), cache[1].data_ptr(), out.data_ptr()
        self._c.manyheads_attend(byref(shape), byref(trees), *pointers, window)


@functools.cache
def library() -> Layers | None:
    """What the machine's compiler makes of `layers.c`; None where it cannot, or makes what torch does not compute."""
    compiled = load("layers.c")
    if compiled is None:
        return None
    layers = Layers(compiled)
    return layers if _is_right(layers) else None


def _is_right(layers: Layers) -> bool:
    """Compare with torch: norms, the activation, and attention of a token to itself and two cached ones."""
    x = torch.arange(-70.0, 70.0).view(2, 70)
    found, wanted = [layers.rms_norm(x, x[1], 1e-5)], [F.rms_norm(x, (70,), x[1], 1e-5)]
    residual = x.clone()
    found += [layers.add_rms_norm(x, residual, x[1], 1e-5, 0.5), residual, layers.silu_mul(x)]
    wanted += [F.rms_norm(x * 1.5, (70,), x[1], 1e-5), x * 1.5, F.silu(x[:, :35]) * x[:, 35:]]
    keys, values = torch.linspace(-1, 1, 2 * 3 * LANES).sin_().view(2, 1, 3, 1, LANES)
    qkv = torch.cat((keys[0, 0], keys[0, 2], values[0, 2]), dim=1).cos_()
    shape, still = Shape(1, 1, LANES, 3, 1e-5, 0.25), (torch.ones(1, 1, LANES), torch.zeros(1, 1, LANES))
    row_start = torch.tensor([0, 1], dtype=torch.int32)
    one, two, zero = (torch.tensor([number]) for number in (1, 2, 0))
    trees = Trees(*(part.data_ptr() for part in (row_start, one, two, two, zero)), 1, 1, 2)
    layers.turn(shape, qkv, still, (None, None), (keys, values), two)
    found.append(qkv.new_empty(1, LANES))
    layers.attend(shape, trees, qkv, (keys, values), found[-1], 0)
    query, key, value = qkv.view(3, 1, LANES)
    keys, values = torch.cat((keys[0, :2, 0], key)), torch.cat((values[0, :2, 0], value))
    wanted.append(F.scaled_dot_product_attention(query, keys, values, scale=0.25))
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, wanted, strict=True))
