"""Products with weights in blocks, widened in registers by `blocks.c`: torch has none in float32 that is quick.

Rows of activations stay in float32, so what comes out is what the widened weight gives, read as a fifth of its
bytes. The file is compiled once for a machine, by its C compiler, as Triton has one compile what launches its kernels.
Without a compiler weights are widened when they are loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from manyheads.cache import cache_folder
from manyheads.ops.base import Product
from manyheads.quantization.blocks import BLOCK, BlockWeight

SOURCE = Path(__file__).with_name("blocks.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class BlockProduct(Product):
    """A weight in blocks with float32 activations."""

    def __init__(self, weight: BlockWeight, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias, weight.nbytes)
        self._library = library()
        parts = (weight.codes, weight.scale, weight.minimum)
        self._kept = [None if part is None else part.contiguous() for part in parts]
        self._pointers = [0 if part is None else part.data_ptr() for part in self._kept]

    def __call__(self, x: Tensor) -> Tensor:
        x, y = x.contiguous(), x.new_empty(len(x), self.out_features)
        assert self._library is not None
        sizes = (len(x), self.out_features, self.in_features)
        self._library(x.data_ptr(), *self._pointers, y.data_ptr(), *sizes)
        return self._biased(y)


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights in blocks are multiplied as they are."""
    return dtype == torch.float32 and device.type == "cpu" and library() is not None


@functools.cache
def library() -> ctypes._NamedFuncPointer | None:
    """The function of `blocks.c`, compiled where that has not been done yet; None where it cannot be.

    It is tried before it is used: what a compiler made that does not compute what torch does is not taken.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.byteorder != "little":
        return None
    file = cache_folder("compiled") / f"{_digest(compiler)}.so"
    try:
        if not file.is_file():
            _compile(compiler, file)
        function = ctypes.CDLL(str(file)).manyheads_blocks
    except (OSError, subprocess.SubprocessError):  # no such compiler, none that knows this, or nowhere to put it
        return None
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3
    function.restype = None
    return function if _is_right(function) else None


def _digest(compiler: str) -> str:
    """A name for what this compiler makes of the file for this processor."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.is_file() else []
    known = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))][:2]
    parts = (SOURCE.read_bytes(), compiler.encode(), *map(str.encode, FLAGS), *map(str.encode, known))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=120)
        made.replace(file)


def _is_right(function: ctypes._NamedFuncPointer) -> bool:
    """Compare a product of each kind with torch's."""
    x = torch.arange(9 * 2 * BLOCK, dtype=torch.float32).sin_().view(9, -1)
    scale = torch.arange(1.0, 7.0).view(3, 2)
    codes = torch.arange(3 * 2 * BLOCK, dtype=torch.int8).view(3, -1)
    for weight in (
        BlockWeight(codes, scale, None),
        BlockWeight(codes[:, :BLOCK].view(torch.uint8).contiguous() * 7, scale, scale - 5),
    ):
        y = torch.empty(9, 3)
        minimum = 0 if weight.minimum is None else weight.minimum.data_ptr()
        function(x.data_ptr(), weight.codes.data_ptr(), weight.scale.data_ptr(), minimum, y.data_ptr(), 9, 3, 2 * BLOCK)
        wanted = x @ weight.dequantize(torch.float32).T
        if not torch.allclose(y, wanted, rtol=1e-4, atol=float(wanted.abs().max()) * 1e-5):
            return False
    return True
