"""Compiles the kernel of kernels/exchange.py for Hopper and Ampere, without a GPU: `python tests/kernels/compiled.py`.

Triton's interpreter takes what its compiler refuses, as branches that are never taken. It is chosen when kernels are
imported, so this is a process of its own.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from manyheads.kernels.exchange import ROWS, _sum_kernel

POINTERS = {"boxes_ptr": "*i64", "calls_ptr": "*i64", "released_ptr": "*i32"}
NUMBERS = dict.fromkeys(("dim", "words", "stride_part", "row_words"), "i32")


def compile_sum(dtype: str, parts: int, capability: int) -> int:
    """Bytes of the kernel, for rows of a dtype that come whole or in parts."""
    constants = {"RANK": 1, "RANKS": 2, "ROWS": ROWS, "PARTS": parts, "HALVES": dtype != "fp32", "BLOCK": 1024}
    constants["DEPENDENT"] = capability >= 90
    kinds = {"x_ptr": f"*{dtype if parts == 1 else 'fp32'}", "out_ptr": f"*{dtype}", **POINTERS, **NUMBERS}
    names = _sum_kernel.arg_names
    signature = {name: kinds.get(name, "constexpr") for name in names}
    source = ASTSource(_sum_kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": 4, "launch_pdl": capability >= 90}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return len(made.asm["cubin"])


if __name__ == "__main__":
    for dtype, parts, capability in (("fp16", 1, 90), ("bf16", 4, 90), ("fp32", 1, 80)):
        print(dtype, parts, capability, compile_sum(dtype, parts, capability))
