"""Compiles kernels for Hopper and Ampere, without a GPU: `python tests/kernels/compiled.py`.

Triton's interpreter takes what its compiler refuses, as branches that are never taken. It is chosen when kernels are
imported, so this is a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from manyheads.kernels import adapters, cutoff, experts, fused, guesses, quantized, routing, settle, widen
from manyheads.kernels.attention import _attend_kernel
from manyheads.kernels.exchange import FEW_ROWS, PROGRAMS, _gather_kernel, _rows_kernel, _words_kernel, most_rows
from manyheads.quantization.int8 import INT8

HOPPER, AMPERE = 90, 80


def compiled(
    kernel: Any, kinds: Mapping[str, str], constants: Mapping[str, Any], capability: int, **options: int
) -> int:
    """Bytes of a kernel.

    Args:
        kinds: types of its arguments that are no constants.
        options: of the launch.
    """
    names, known = kernel.arg_names, {**constants, "DEPENDENT": capability >= HOPPER}
    signature = {name: kinds.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in known.items()})
    launch = {"num_warps": 4, "launch_pdl": capability >= HOPPER, **options}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    return len(made.asm["cubin"])


def compile_sum(dtype: str, parts: int, capability: int) -> int:
    """The sum over ranks, of rows of a dtype that come whole or in parts."""
    integers = ["dim", "words", "stride_part", "row_words", "num_rows", "row_size"]
    integers += ["num_blocks", "blocks", "width", "size", "stride_x"]
    numbers = dict.fromkeys(integers, "i32") | dict.fromkeys(("eps", "multiplier"), "fp32")
    boxes = {"boxes_ptr": "*i64", "calls_ptr": "*i64", "released_ptr": "*i32"}
    rows = {"x_ptr": f"*{dtype if parts == 1 else 'fp32'}", "out_ptr": f"*{dtype}"}
    kinds = {**rows, "residual_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", **boxes, **numbers}
    constants = {"RANK": 1, "RANKS": 2, "BLOCK": 1024}
    sums = {**constants, "PARTS": parts, "NORMED": parts > 1}
    words = {**sums, "ROWS": FEW_ROWS, "HALVES": dtype != "fp32"}
    flags = {"ROWS": most_rows(2), "PROGRAMS": PROGRAMS}
    kernels = {_words_kernel: words, _rows_kernel: sums | flags, _gather_kernel: constants | flags}
    return sum(
        compiled(kernel, {name: kinds[name] for name in kernel.arg_names if name in kinds}, known, capability)
        for kernel, known in kernels.items()
        if kernel is not _gather_kernel or parts == 1  # its rows are never in parts
    )


def compile_routing(count: int, top: int) -> int:
    """The router, and what puts tokens together by so many experts."""
    rows = {"x_ptr": "*bf16", "router_ptr": "*bf16", "bias_ptr": "*bf16", "num_tokens": "i32", "width": "i32"}
    made = {"chances_ptr": "*fp32", "chosen_ptr": "*i32"}
    constants = {"COUNT": count, "TOP": top, "ADDS_UP": True, "HAS_BIAS": True, "EXPERTS": max(16, count), "RANKS": top,
                 "TOKENS": 16, "COLUMNS": 128}  # fmt: skip
    size = compiled(routing._route_kernel, {**rows, **made}, constants, HOPPER, num_stages=3)
    tables = {"chosen_ptr": "*i32", "order_ptr": "*i32", "table_ptr": "*i32", "num_pairs": "i32", "num_blocks": "i32"}
    constants = {"COUNT": count, "BINS": 2 * count, "SIZE": 16, "AT_ONCE": 1024}
    return size + compiled(routing._group_kernel, tables, constants, HOPPER)


def compile_adapters(kind: str, parts: bool, tokens: int, capability: int) -> int:
    """What adapters of two projections add, to a product or to parts of one, for blocks of so many tokens; and what
    puts tokens together."""
    pointers = {"x": kind, "a": kind, "b": kind, "y": "fp32" if parts else kind, "inner": "fp32", "adapter": "i32",
                "token": "i32", "which": "i64"}  # fmt: skip
    kinds = {f"{name}_ptr": f"*{held}" for name, held in pointers.items()}
    rows = max(16, tokens)
    kernels = {
        adapters._group_kernel: {"COUNT": 64, "AT_ONCE": 64},
        adapters._down_kernel: {"NUMBERS": 48, "SHARE": 512, "COLUMNS": 64, "RANKS": 64, "ROWS": rows},
        adapters._up_kernel: {"COUNT": 2, "RANK": 24, "SPLITS": 3, "OUTPUTS": 512, "RANKS": 16, "SUMS": 4},
    }
    size = 0
    for kernel, constants in kernels.items():
        names: list[str] = kernel.arg_names
        known = {name: kinds.get(name, "i32") for name in names if not name.isupper()}
        size += compiled(kernel, known, {"SIZE": tokens, **constants}, capability, num_stages=3)
    return size


def compile_experts(form: str, rows: int, added: bool, capability: int) -> int:
    """The product with experts' weights: of a type, for blocks of so many rows, with parts of results or without."""
    codes = {"bf16": "bf16", "int8": "i8", "fp8": "fp8e4nv", "int4": "i8"}[form]
    pointers = {"x": codes, "weight": "u8" if form == "int4" else codes, "out": "fp32" if added else "bf16",
                "x_scale": "fp32", "scale": "fp32", "sums": "fp32", "zero": "i8", "order": "i32", "table": "i32",
                "bias": "bf16", "chances": "fp32"}  # fmt: skip
    kinds = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
    kinds |= dict.fromkeys(("num_blocks", "num_pairs", "num_out", "width", "rows", "padded"), "i32")
    kernel = experts._int4_kernel if form == "int4" else experts._kernel
    constants: dict[str, Any] = {"TOP": 8, "ADDED": added, "HAS_BIAS": True, "ROWS": rows, "OUT": 64, "EVEN_OUT": True}
    if form == "int4":
        constants |= {"HAS_ZERO": True, "IN_REGISTERS": True, "GROUP": 128, "PAIRS": 8, "GROUPS": 16, "STAGES": 2}
    else:
        constants |= {"SCALED": form != "bf16", "PARTS": 2 if form == "int8" else 1, "COLUMNS": 128, "EVEN_IN": True}
    kinds = {name: kind for name, kind in kinds.items() if name in kernel.arg_names}
    return compiled(kernel, kinds, constants, capability, num_stages=3)


def compile_bytes(rows: int, capability: int) -> int:
    """The product of so many rows of bytes with a weight in int8."""
    blocks = quantized._blocks(INT8, rows, 4096, 4096, 132, 224256)
    kinds = {"x_ptr": "*i8", "weight_ptr": "*i8", "x_scale_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": "*fp16"}
    kinds |= dict.fromkeys(("rows", "num_out", "num_blocks", "share"), "i32")
    constants = {"PARTS": 2, "BLOCK_ROWS": blocks.rows, "BLOCK_OUT": blocks.out, "BLOCK_IN": blocks.columns}
    launch = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return compiled(quantized._bytes_kernel, kinds, constants, capability, **launch)


def compile_widen(bits: int) -> int:
    """What widens a weight."""
    kinds = {name: "i32" for name in widen._widen_kernel.arg_names if not name.isupper()}
    kinds |= {"values_ptr": "*u8" if bits == 4 else "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i8", "out_ptr": "*bf16"}
    constants = {"INT4": bits == 4, "GROUP": 128 if bits == 4 else 0, "HAS_ZERO": bits == 4, "MIDDLE": 8, "BLOCK": 2048}
    return compiled(widen._widen_kernel, kinds, constants, HOPPER)


def compile_attention(capability: int) -> int:
    """Attention through a window, with sinks, of which a split begins with a weight."""
    pointers = {**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_scale_ptr", "v_scale_ptr"), "bf16"),
                **dict.fromkeys(("cached_len", "page_table", "token_mask", "position_ptr"), "i64"),
                "row_start": "i32", "tiles": "i32", "partial_ptr": "fp32", "sink_ptr": "fp32"}  # fmt: skip
    kinds = {name: f"*{kind}" for name, kind in pointers.items()} | {"scale": "fp32", "cap": "fp32"}
    strides = [name for name in _attend_kernel.arg_names if name.startswith("stride_")]
    kinds |= dict.fromkeys(("num_tokens", "num_splits", "window", *strides), "i32")
    constants = {"NUM_HEADS": 64, "QUERIES_PER_KV": 8, "HEAD_DIM": 64, "PAGE_SIZE": 16, "BLOCK_M": 64, "BLOCK_N": 64,
                 "SPLIT": True, "QUANTIZED": False, "CAPPED": False, "HAS_SINKS": True, "WINDOWED": True,
                 "IN_REGISTERS": True}  # fmt: skip
    return compiled(_attend_kernel, kinds, constants, capability, num_stages=3)


def compile_guesses(block: int, warps: int, capability: int) -> int:
    """What stands between the passes of a drafter, of so many values that a program holds."""
    kinds = dict.fromkeys(("tokens", "above", "feature", "opened", "cached_len", "columns", "parents"), "*i64")
    kinds |= dict.fromkeys(("new_row", "new_which", "new_at", "families", "given_tokens", "token_map"), "*i64")
    kinds |= dict.fromkeys(("index", "page_table", "row_cached"), "*i64")
    kinds |= dict.fromkeys(("chances", "worth", "given_chances", "speculative"), "*fp32")
    kinds |= dict.fromkeys(("row_start", "start_before"), "*i32")
    kernels = {
        guesses._begin_kernel: {"PAGE_SIZE": 16, "COLUMNS": 128},
        guesses._open_kernel: {"BLOCK": block},
        guesses._offer_kernel: {"ROOTS": False, "MAPPED": True},
    }
    size = 0
    for kernel, constants in kernels.items():
        names: list[str] = kernel.arg_names
        known = {name: "*i64" if name.startswith("out_") else "i32" for name in names if not name.isupper()} | kinds
        known = {name: kind for name, kind in known.items() if name in names}
        launch = {"num_warps": warps if kernel is guesses._open_kernel else 1}
        size += compiled(kernel, known, {"NODES": 64, **constants}, capability, **launch)
    return size


def compile_norm_pairs(capability: int) -> int:
    """Norms of rows of two tensors."""
    names: list[str] = fused._norm_pairs_kernel.arg_names
    kinds = {name: "*i64" if "_at_" in name else "*bf16" for name in names if name.endswith("_ptr")}
    constants = {"BLOCK": 4096, "FIRST_AT": True, "SECOND_AT": True}
    return compiled(fused._norm_pairs_kernel, kinds | {"eps": "fp32", "dim": "i32"}, constants, capability)


def compile_pack(capability: int) -> int:
    """What a step kept, one behind the other."""
    kinds = {name: "*i64" for name in settle._pack_kernel.arg_names if not name.isupper()}
    kinds |= dict.fromkeys(("tree_start", "row_start"), "*i32")
    numbers = ("num_rows", "width", "size", "dummy", "stride_report", "stride_offsets", "stride_table")
    constants = {"PAGE_SIZE": 16, "BLOCK_WIDTH": 8, "CHUNK": 1024}
    return compiled(settle._pack_kernel, kinds | dict.fromkeys(numbers, "i32"), constants, capability)


def compile_cutoff(capability: int, narrows: bool) -> int:
    """What top-k, top-p and min-p leave of short or long rows."""
    kinds = dict.fromkeys(("logits", "top_p", "min_p", "room", "found"), "*fp32") | {"top_k": "*i64"}
    numbers = {"width": "i32", "stride_logits": "i32"}
    constants = {"BLOCK": 4096, "SMALL": 1024, "WAYS": 8, "PASSES": 11, "NARROWS": narrows}
    return compiled(cutoff._cutoff_kernel, kinds | numbers, constants, capability, num_warps=16)


if __name__ == "__main__":
    for capability in (HOPPER, AMPERE):
        for narrows in (False, True):
            print("cutoff", capability, narrows, compile_cutoff(capability, narrows))
    for sums in (("fp16", 1, HOPPER), ("bf16", 4, HOPPER), ("fp32", 1, AMPERE)):
        print(*sums, compile_sum(*sums))
    print("sinks", compile_attention(HOPPER))
    print("pack", compile_pack(HOPPER))
    print("norm pairs", compile_norm_pairs(HOPPER))
    print("routing", compile_routing(128, 8))
    for blocks in ((128, 1, HOPPER), (8192, 16, HOPPER), (1024, 4, AMPERE)):
        print("guesses", *blocks, compile_guesses(*blocks))
    for adapted in (("fp16", True, 8, HOPPER), ("bf16", False, 64, AMPERE)):
        print("adapters", *adapted, compile_adapters(*adapted))
    for form in (("bf16", 16, False, HOPPER), ("bf16", 128, True, AMPERE), ("int8", 16, True, HOPPER),
                 ("fp8", 64, False, HOPPER), ("int4", 16, False, HOPPER)):  # fmt: skip
        print(*form, compile_experts(*form))
    for rows in (256, 512):
        print("bytes", rows, compile_bytes(rows, HOPPER))
    for bits in (8, 4):
        print("widen", bits, compile_widen(bits))
