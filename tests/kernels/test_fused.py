from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import DEVICE, INTERPRETED, TOLERANCE, relative_error

pytest.importorskip("triton")

from manyheads.kernels.fused import (
    add_layer_norm,
    add_rms_norm,
    clamped_swiglu,
    gelu,
    gelu_mul,
    head_input,
    layer_norm,
    norm_pairs,
    rms_norm,
    rope_store,
    silu_mul,
)
from manyheads.kernels.rows import quantize_rows
from manyheads.kv_cache import CODES, KVCache, quantize
from manyheads.ops.torch import TorchOps
from manyheads.quantization.base import CodedScheme
from manyheads.quantization.fp8 import FP8
from manyheads.quantization.int8 import INT8

TYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDED = TYPES[:2] if INTERPRETED else TYPES  # the interpreter does not round to bfloat16 but cuts it off
EPS = 1e-5


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """In float64, not rounded."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def all_but_a_few(found: Tensor, wanted: Tensor) -> bool:
    """Equal, or one rounding apart where float32 came out on the other side."""
    return bool((found != wanted).double().mean() < 0.01) and relative_error(found, wanted) < 1e-3


@pytest.mark.parametrize("dim", [1, 64, 96, 4096, 5000, 16384])
@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm(dim: int, dtype: torch.dtype) -> None:
    x, weight = randn(3, dim, dtype=dtype) * 3, randn(dim, dtype=dtype, seed=1)
    out = torch.empty_like(x)
    assert rms_norm(x, weight, EPS, out) is out
    assert torch.equal(rms_norm(x, weight, EPS), out)
    assert relative_error(out, norm(x, weight)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dim", [1, 96, 5000])
@pytest.mark.parametrize("dtype", TYPES)
def test_norms_of_two_rows_side_by_side(dim: int, dtype: torch.dtype) -> None:
    first, second = randn(6, dim, dtype=dtype), randn(9, dim, dtype=dtype, seed=1) * 3
    weights = randn(dim, dtype=dtype, seed=2), randn(dim, dtype=dtype, seed=3)
    some, others = (torch.tensor(rows, device=DEVICE) for rows in ([5, 0, 5, 2], [1, 8, 0, 0]))
    for at, beside in ((some, others), (None, others[:1].expand(6).contiguous()), (some[[0] * 9], None)):
        x, y = (rows if which is None else rows[which] for rows, which in ((first, at), (second, beside)))
        out, taken = norm_pairs(first, at, weights[0], second, beside, weights[1], EPS)
        assert torch.equal(taken, y)
        assert relative_error(out[:, :dim], norm(x, weights[0])) < TOLERANCE[dtype]
        assert relative_error(out[:, dim:], norm(y, weights[1])) < TOLERANCE[dtype]
        wanted, rows = TorchOps().norm_pairs(first, at, weights[0], second, beside, weights[1], EPS)
        assert torch.equal(rows, y)
        assert relative_error(out, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ROUNDED[1:])
def test_rms_norm_rounds_once(dtype: torch.dtype) -> None:
    x, weight = randn(16, 768, dtype=dtype), randn(768, dtype=dtype, seed=1)
    assert all_but_a_few(rms_norm(x, weight, EPS), norm(x, weight).to(dtype))


@pytest.mark.parametrize("dim", [64, 1000])
@pytest.mark.parametrize("dtype", ROUNDED)
def test_add_rms_norm(dim: int, dtype: torch.dtype) -> None:
    x, residual, weight = (randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(5, dim), (5, dim), (dim,)]))
    total = residual + x
    kept = x.clone()
    out = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert torch.equal(x, kept)
    assert torch.equal(out, rms_norm(total, weight, EPS))


def test_a_norm_keeps_its_weight_in_float32() -> None:
    """As of families whose weights are 1 and something."""
    x, weight = randn(3, 96, dtype=torch.float16), 1 + randn(96, seed=1) / 1000
    assert relative_error(rms_norm(x, weight, EPS), norm(x, weight)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("dim", "dtype"), [(96, torch.float32), (1000, torch.float16)])
def test_layer_norm(dim: int, dtype: torch.dtype, has_bias: bool) -> None:
    x, residual, weight, bias = (
        randn(*shape, dtype=dtype, seed=i) + 1 for i, shape in enumerate([(5, dim), (5, dim), (dim,), (dim,)])
    )
    shift = bias if has_bias else None
    wanted = F.layer_norm(x.double(), (dim,), weight.double(), shift.double() if shift is not None else None, EPS)
    assert relative_error(layer_norm(x, weight, shift, EPS), wanted) < TOLERANCE[dtype]
    total = residual + x
    assert torch.equal(add_layer_norm(x, residual, weight, shift, EPS), layer_norm(total, weight, shift, EPS))
    assert torch.equal(residual, total)


@pytest.mark.parametrize("normed", [add_rms_norm, add_layer_norm])
def test_what_is_added_may_be_multiplied(normed: Callable[..., Tensor]) -> None:
    x, residual, weight = (randn(*shape, seed=i) for i, shape in enumerate([(2, 5, 96), (5, 96), (96,)]))
    wanted = residual + 0.3 * (x[0] + x[1])
    more = () if normed is add_rms_norm else (None,)
    out = normed(x, residual, weight, *more, EPS, multiplier=0.3)
    assert relative_error(residual, wanted) < 1e-6
    plain = rms_norm(wanted, weight, EPS) if normed is add_rms_norm else layer_norm(wanted, weight, None, EPS)
    assert relative_error(out, plain) < 1e-5


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size", "dtype"),
    [
        (4, 2, 64, 16, torch.float32),
        (3, 1, 128, 16, torch.float16),
        (14, 2, 64, 16, torch.bfloat16),
        (2, 2, 8, 4, torch.float32),
        (5, 5, 80, 3, torch.float32),
    ],
)
def test_rope_store(heads: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype, has_norm: bool) -> None:
    tokens, num_pages = 6, 5
    random = torch.Generator().manual_seed(0)
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angle = randn(50, dim // 2, seed=1)
    cos = torch.cat((angle.cos(), angle.cos()), -1).to(dtype)
    sin = torch.cat((-angle.sin(), angle.sin()), -1).to(dtype)
    positions = torch.randint(0, 50, (tokens,), generator=random).to(DEVICE)
    slots = torch.randperm(num_pages * page_size, generator=random)[:tokens].to(DEVICE)
    cache = randn(2, 2, num_pages, page_size, kv_heads, dim, dtype=dtype, seed=2)
    weights = (1 + randn(2, dim, dtype=dtype, seed=3)).unbind(0) if has_norm else (None, None)

    q, k, v = qkv.double().view(tokens, -1, dim).split([heads, kv_heads, kv_heads], dim=1)
    if weights[0] is not None and weights[1] is not None:
        q, k = norm(q, weights[0]), norm(k, weights[1])
    q, k = (x * cos.double()[positions, None] + x.roll(dim // 2, -1) * sin.double()[positions, None] for x in (q, k))
    wanted = cache.double()
    wanted[1].flatten(1, 2)[0, slots], wanted[1].flatten(1, 2)[1, slots] = k, v

    found = rope_store(qkv, cos[:, None], sin[:, None], positions, slots, *cache[1], heads, *weights, EPS)
    assert found.shape == (tokens, heads, dim)
    assert relative_error(found, q) < TOLERANCE[dtype]
    assert relative_error(cache, wanted) < TOLERANCE[dtype]
    # v is copied, and nothing else is touched
    assert torch.equal(cache[1, 1].double(), wanted[1, 1])
    others = [s for s in range(num_pages * page_size) if s not in slots.tolist()]
    assert torch.equal(cache.flatten(2, 3)[:, :, others].double(), wanted.flatten(2, 3)[:, :, others])
    assert torch.equal(cache[0].double(), wanted[0])


@pytest.mark.parametrize("kv_dtype", CODES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 128), (2, 2, 8), (5, 5, 80)])
def test_rope_store_in_8_bits(heads: int, kv_heads: int, dim: int, kv_dtype: str) -> None:
    """As torch rounds, but where a quotient comes out on the other side; each off by half a step at most."""
    tokens, num_pages, page_size, dtype = 6, 5, 4, CODES[kv_dtype]
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim)
    qkv.view(tokens, -1, dim)[1, heads:] = 0
    qkv.view(tokens, -1, dim)[2, heads:] *= 1e4
    angle = randn(50, dim // 2, seed=1)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    positions, slots = torch.arange(tokens, device=DEVICE) * 7, torch.tensor([19, 3, 4, 0, 8, 11], device=DEVICE)
    shape = (2, 2, num_pages, page_size, kv_heads)
    cache = KVCache(randn(*shape, dim, seed=2).to(dtype), randn(*shape, seed=3))
    assert cache.scale is not None
    before = cache.data.double(), cache.scale.clone()
    plain = randn(2, num_pages, page_size, kv_heads, dim)
    args = (qkv, cos, sin, positions, slots)
    wanted_q = rope_store(*args, *plain, heads)
    keys, values = cache.layers()[1]
    found_q = rope_store(*args, keys.data, values.data, heads, None, None, 0.0, keys.scale, values.scale)
    assert torch.equal(found_q, wanted_q)
    for plane, wide in ((keys, plain[0]), (values, plain[1])):
        assert plane.scale is not None
        wide = wide.flatten(0, 1)[slots]
        codes, scale = quantize(wide, dtype)
        torch.testing.assert_close(plane.scale.flatten(0, 1)[slots], scale)
        found = plane.span(0, num_pages * page_size, torch.float32)[slots]
        step = scale[..., None] * (1 if kv_dtype == "int8" else 2**-9) + wide.abs() * (kv_dtype == "fp8") / 8
        assert bool(((found - wide).abs() <= 0.501 * step).all())
        different = plane.data.flatten(0, 1)[slots].float() != codes.float()
        assert different.double().mean() < 0.01
    others = [s for s in range(num_pages * page_size) if s not in slots.tolist()]
    assert torch.equal(cache.data.double()[0], before[0][0])
    assert torch.equal(cache.data.double().flatten(2, 3)[:, :, others], before[0].flatten(2, 3)[:, :, others])
    assert torch.equal(cache.scale[0], before[1][0])
    assert torch.equal(cache.scale.flatten(2, 3)[:, :, others], before[1].flatten(2, 3)[:, :, others])


@pytest.mark.parametrize("dim", [1, 96, 2500])
@pytest.mark.parametrize("dtype", TYPES)
def test_gelu(dim: int, dtype: torch.dtype) -> None:
    x = randn(3, 2 * dim, dtype=dtype) * 3
    gate, up = x.double().chunk(2, dim=-1)
    assert relative_error(gelu_mul(x), F.gelu(gate, approximate="tanh") * up) < TOLERANCE[dtype]
    assert relative_error(gelu(x), F.gelu(x.double(), approximate="tanh")) < TOLERANCE[dtype]


def test_gelu_ends_in_nothing_and_in_itself() -> None:
    x = torch.tensor([[-2e4, 2e4, 0.0]], device=DEVICE)
    assert gelu(x)[0].tolist() == pytest.approx([0.0, 2e4, 0.0])


@pytest.mark.parametrize("dim", [1, 96, 2500])
@pytest.mark.parametrize("dtype", TYPES)
def test_silu_mul(dim: int, dtype: torch.dtype) -> None:
    x = randn(5, 2 * dim, dtype=dtype) * 4
    gate, up = x.double().chunk(2, dim=-1)
    assert relative_error(silu_mul(x), F.silu(gate) * up) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [1, 44, 1500])
def test_clamped_swiglu(dim: int, dtype: torch.dtype) -> None:
    """As transformers' GptOssExperts has it, by the kernel and by torch."""
    x = randn(5, 2 * dim, dtype=dtype) * 2
    gate, up = x.double().chunk(2, dim=-1)
    gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
    wanted = (up + 1) * gate * torch.sigmoid(1.7 * gate)
    for activate in (clamped_swiglu, TorchOps().clamped_swiglu):
        assert relative_error(activate(x, alpha=1.7, limit=1.5), wanted) < 2 * TOLERANCE[dtype]
    x[1, 0] = x[3, dim] = torch.nan
    assert clamped_swiglu(x, alpha=1.7, limit=1.5).isnan().any(1).tolist() == [False, True, False, True, False]


def test_silu_mul_of_extremes() -> None:
    x = torch.tensor([[-80.0, 1e4, 0.0, 2.0, 2.0, 2.0]], device=DEVICE)
    assert silu_mul(x)[0].tolist() == pytest.approx([0.0, 2e4, 0.0])


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=str)
@pytest.mark.parametrize("dtype", TYPES[1:])
def test_split_where_they_are_computed(dtype: torch.dtype, scheme: CodedScheme) -> None:
    """Bit for bit what splitting afterwards gives; a row of zeros too."""
    parts, residual, weight = randn(2, 4, 640), randn(4, 640, dtype=dtype, seed=1), randn(640, dtype=dtype, seed=2)
    gate_up = randn(4, 2 * 640, dtype=dtype, seed=3)
    parts[:, 2], residual[2], gate_up[2] = 0, 0, 0
    kept = residual.clone()
    norm_afterwards = quantize_rows(add_rms_norm(parts, kept, weight, EPS), scheme)
    for found, wanted in (
        (add_rms_norm(parts, residual, weight, EPS, scheme), norm_afterwards),
        (silu_mul(gate_up, scheme), quantize_rows(silu_mul(gate_up), scheme)),
    ):
        assert found.shape == (4, 640)
        assert found.dtype == dtype
        assert torch.equal(found.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
        assert torch.equal(found.scale, wanted.scale)
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype", TYPES)
def test_head_input(heads: int, dtype: torch.dtype) -> None:
    hidden, block_out = randn(3, 1100, dtype=dtype), randn(3, heads, 1100, dtype=dtype, seed=1)
    wanted = hidden.double()[:, None] + F.silu(block_out.double())
    assert relative_error(head_input(hidden, block_out), wanted) < TOLERANCE[dtype]


def test_no_tokens() -> None:
    assert rms_norm(randn(0, 64), randn(64), EPS).shape == (0, 64)
    assert add_rms_norm(randn(0, 64), randn(0, 64), randn(64), EPS).shape == (0, 64)
    assert silu_mul(randn(0, 64)).shape == (0, 32)
    assert head_input(randn(0, 64), randn(0, 3, 64)).shape == (0, 3, 64)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_as_torch_rounds(self, dtype: torch.dtype) -> None:
        x, weight = randn(4096, 4096, dtype=dtype), randn(4096, dtype=dtype, seed=1)
        assert all_but_a_few(rms_norm(x, weight, EPS), F.rms_norm(x, (4096,), weight, EPS))

    def test_a_long_prompt(self) -> None:
        x = randn(8192, 2 * 14336, dtype=torch.bfloat16)
        gate, up = x.float().chunk(2, dim=-1)
        assert relative_error(silu_mul(x), F.silu(gate) * up) < TOLERANCE[torch.bfloat16]

    def test_caches_beyond_32_bits(self) -> None:
        heads, dim, page_size = 8, 128, 16
        num_pages = 2**31 // (page_size * heads * dim) + 10
        k_pages, v_pages = torch.zeros(2, num_pages, page_size, heads, dim, dtype=torch.float16, device=DEVICE)
        qkv = randn(2, 3 * heads * dim, dtype=torch.float16)
        cos, sin = torch.ones(4, dim, device=DEVICE), torch.zeros(4, dim, device=DEVICE)
        slots = torch.tensor([num_pages * page_size - 1, 5], device=DEVICE)
        q = rope_store(qkv, cos, sin, torch.tensor([0, 3], device=DEVICE), slots, k_pages, v_pages, heads)
        wanted = qkv.view(2, 3, heads, dim)
        assert torch.equal(q, wanted[:, 0])
        for pages, part in ((k_pages, 1), (v_pages, 2)):
            assert torch.equal(pages.flatten(0, 1)[slots], wanted[:, part])
