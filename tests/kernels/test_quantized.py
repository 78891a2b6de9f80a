"""Products with quantized weights against float64 products with what the weights stand for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from manyheads.kernels import quantized
from manyheads.kernels import widen as widening
from manyheads.kernels.rows import quantize_rows
from manyheads.kernels.widen import widen
from manyheads.models.linear import Linear, Split
from manyheads.models.llama import Layer, Llama
from manyheads.models.norm import RmsNorm
from manyheads.ops.kernel_products import QuantizedProduct
from manyheads.ops.triton import TritonOps
from manyheads.quantization.base import CodedScheme, CodedWeight
from manyheads.quantization.fp8 import FP8
from manyheads.quantization.int4 import INT4, Int4Weight, pack
from manyheads.quantization.int8 import INT8
from tests.kernels import DEVICE, INTERPRETED, relative_error
from tests.tiny import model_config

SCHEMES = (INT8, FP8, INT4)
ERROR = {INT8: 6e-5, INT4: 6e-5, FP8: 1e-6 if INTERPRETED else 1e-2}
"""Of what is not rounded to half precision. Tensor cores keep few bits of sums of fp8."""


def weight_of(scheme: CodedScheme, num_out: int, width: int, *, symmetric: bool = False) -> CodedWeight:
    weight = scheme.quantize(torch.randn(num_out, width, device=DEVICE) / width**0.5)
    return type(weight)(weight.values, weight.scale) if symmetric else weight


def random(rows: int, width: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(rows, width, device=DEVICE).to(dtype)


def wanted(x: torch.Tensor, weight: CodedWeight) -> torch.Tensor:
    """Of x, or with fp8 of what x is rounded to."""
    if weight.scheme is FP8:
        codes, scale, *_ = quantize_rows(x, FP8)
        x = codes.double() * scale[:, None].double()
    return x.double() @ weight.dequantize(torch.float64).T


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize(("num_out", "width", "splits"), [(64, 128, 1), (128, 512, 1), (64, 640, 2), (129, 256, 3)])
def test_product(scheme: CodedScheme, rows: int, num_out: int, width: int, splits: int) -> None:
    """Also shares of unequal length, and one that is empty; and rows that come in no blocks."""
    x, weight = random(rows, width), weight_of(scheme, num_out, width)
    arranged = quantized.arrange(weight)
    assert quantized.serves(x, arranged)
    got = quantized.multiply(x, arranged, splits)
    if splits == 1:
        assert got.shape == (rows, num_out)
        assert got.dtype == x.dtype
        assert relative_error(got, wanted(x, weight)) < max(1e-3, ERROR[scheme])
    else:
        assert got.shape == (splits, rows, num_out)
        assert relative_error(got.sum(0), wanted(x, weight)) < ERROR[scheme]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [70, 130, 400])
def test_many_rows(scheme: CodedScheme, rows: int) -> None:
    num_out = (64, 128)[(SCHEMES.index(scheme) + rows // 10) % 2]  # any two of scheme, rows and columns
    x, weight = random(rows, 256), weight_of(scheme, num_out, 256)
    got = quantized.multiply(x, quantized.arrange(weight), 2)
    assert relative_error(got.sum(0), wanted(x, weight)) < ERROR[scheme]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_of_any_size(scheme: CodedScheme) -> None:
    """Each row has a scale of its own; rows may be zero, strided and bfloat16."""
    size = torch.tensor([1.0, 0.0, 1e4, 1e-4, 1e30, 1e-24], device=DEVICE)[:, None]
    wide = (torch.randn(6, 512, device=DEVICE) * size).bfloat16()
    wide[5, 7] = 1e-22  # most of a row beside one that is far larger
    x, weight = wide[:, :256], weight_of(scheme, 64, 256)
    got = quantized.multiply(x, quantized.arrange(weight), 2).sum(0)
    for row in (0, 2, 3, 4, 5):
        assert relative_error(got[row], wanted(x, weight)[row]) < 4 * ERROR[scheme]
    assert not got[1].any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_row_does_not_depend_on_others(scheme: CodedScheme) -> None:
    """Bit for bit on what they are, and on how many; and with int8 on how the columns are shared only as far as float32
    is rounded.

    fp8's sums are rounded, and tensor cores take its codes in other ways by how many rows there are (quantized.py).
    """
    symmetric = scheme is INT4 and INTERPRETED  # zero points are multiplied as floating-point numbers
    x, weight = random(40, 512), quantized.arrange(weight_of(scheme, 64, 512, symmetric=symmetric))
    together = quantized.multiply(x, weight, 2)
    for row in (0, 17, 39):
        others = random(40, 512)
        others[row] = x[row]
        assert torch.equal(quantized.multiply(others, weight, 2)[:, row], together[:, row])
        alone = quantized.multiply(x[row : row + 1], weight, 2)[:, 0]
        if scheme is FP8:
            assert relative_error(alone.sum(0), together[:, row].sum(0)) < ERROR[FP8]
        else:
            assert torch.equal(alone, together[:, row])
    if scheme is INT8:
        assert relative_error(quantized.multiply(x, weight, 3).sum(0), together.sum(0)) < 1e-6


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_blocks_fit(scheme: CodedScheme) -> None:
    """Two programs on a processor of an H200; on an A100's and an L40S's at least one with stages to alternate."""
    counts, widths, padded = (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 600), (4096, 11008, 4224), (4096, 32000)
    for rows, width, num_out in itertools.product(counts, widths, padded):
        blocks = quantized._blocks(scheme, rows, width, num_out, 132, 224256)
        assert quantized._ALIGN_OUT % blocks.out == 0
        assert scheme is INT4 or width % blocks.columns == 0
        assert quantized._SHARE % blocks.columns == 0
        for memory, least in ((224256, blocks.stages), (158720, 3), (93184, 2)):
            there = quantized._blocks(scheme, rows, width, num_out, 132, memory)
            assert min(least, there.stages) <= quantized._stages(scheme, there, memory) <= there.stages


def test_parts() -> None:
    """As many as give every processor something to do, of the 132 there are."""
    counts = [quantized._splits(programs, 4, 132) for programs in (4, 32, 33, 64, 66, 128, 132, 500)]
    assert counts == [4, 4, 4, 4, 2, 2, 1, 1]
    assert quantized._splits(4, 1, 132) == 1
    x, weight = random(3, 256), weight_of(INT8, 64, 256)
    assert quantized.product(x, quantized.arrange(weight)).shape == (3, 64)
    assert quantized.product(x, quantized.arrange(weight), added=True).shape == (2, 3, 64)


def test_shares_do_not_depend_on_the_number_of_rows() -> None:
    """Of int8, and so neither does the result, which is exact within a share."""
    x, weight = random(70, 1280), quantized.arrange(weight_of(INT8, 64, 1280))
    together = quantized.multiply(x, weight, 2)
    for count in (1, 9, 20):
        assert torch.equal(quantized.multiply(x[:count], weight, 2), together[:, :count])


def test_int4_without_zero_points() -> None:
    x, weight = random(3, 256), weight_of(INT4, 64, 256, symmetric=True)
    got = quantized.multiply(x, quantized.arrange(weight), 2)
    assert relative_error(got.sum(0), wanted(x, weight)) < ERROR[INT4]
    assert torch.equal(widen(quantized.arrange(weight), torch.float32), weight.dequantize(torch.float32))


@pytest.mark.parametrize("group_size", [256, 512, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_in_other_groups(group_size: int, symmetric: bool) -> None:
    """Large ones, or one for a whole row, become several that are alike."""
    codes = torch.randint(0, 16, (70, 512), device=DEVICE)
    scale = torch.rand(70, 512 // group_size, device=DEVICE) + 0.5
    zero = None if symmetric else torch.randint(0, 16, scale.shape, device=DEVICE).byte()
    weight = Int4Weight(pack(codes), scale, zero)
    x, arranged = random(3, 512), quantized.arrange(weight)
    assert quantized.serves(x, arranged) == (group_size >= 128)
    assert relative_error(quantized.product(x, arranged), wanted(x, weight)) < 1e-3
    assert torch.equal(widen(arranged, torch.float32), weight.dequantize(torch.float32))


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=str)
def test_greatest_sums(scheme: CodedScheme) -> None:
    """Where 256 times a sum is beyond 32 bits, and a group's at its greatest."""
    width = 11008
    weight = scheme.quantize(torch.ones(64, width, device=DEVICE))
    if scheme is INT4:
        weight.values.zero_()
        weight = Int4Weight(weight.values, weight.scale, torch.full_like(weight.scale, 15).byte())
    x = torch.ones(2, width, device=DEVICE).half()
    x[1] = -1
    got = quantized.multiply(x, quantized.arrange(weight), 1)
    assert relative_error(got, wanted(x, weight)) < 1e-3


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("width", [64, 384, 1088])
def test_widened(scheme: CodedScheme, width: int) -> None:
    weight = weight_of(scheme, 5, width)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(widen(quantized.arrange(weight), dtype), weight.dequantize(dtype))


@pytest.mark.parametrize("dim", [128, 640])
def test_integers(dim: int) -> None:
    """Two bytes hold what a row's scale says, to half a unit."""
    x = random(4, dim)
    x[2] = 0
    codes, scale, *_ = quantize_rows(x, INT8)
    whole = 256 * codes[0::2].double() + codes[1::2].double()
    assert ((whole * scale[:, None].double() - x.double()).abs() <= 0.501 * scale[:, None]).all()
    assert whole.abs().amax(1).tolist() == [127 * 257, 127 * 257, 0, 127 * 257]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_some_of_the_rows(scheme: CodedScheme) -> None:
    x, some = torch.randn(9, 256, device=DEVICE, dtype=torch.float16), torch.tensor([7, 0, 3], device=DEVICE)
    for found, wanted in zip(quantize_rows(x, scheme).at(some), quantize_rows(x[some], scheme), strict=True):
        assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted


def test_rows_in_fp8() -> None:
    x = torch.randn(4, 200, device=DEVICE).half() * torch.tensor([[1e-3], [1.0], [50.0], [0.0]], device=DEVICE).half()
    codes, scale, *_ = quantize_rows(x, FP8)
    back = codes.float() * scale[:, None]
    for row in range(3):
        assert relative_error(back[row], x[row]) < (0.1 if INTERPRETED else 0.04)  # the interpreter cuts off
        assert codes[row].float().abs().max() == 448
    assert torch.equal(back[3], torch.zeros_like(back[3]))


def test_what_does_not_come_in_blocks_is_widened() -> None:
    weight = weight_of(INT8, 40, 72)
    x = random(3, 72)
    assert not quantized.serves(x, quantized.arrange(weight))
    assert relative_error(quantized.product(x, quantized.arrange(weight)), wanted(x, weight)) < 1e-3


@pytest.mark.parametrize(("capability", "schemes"), [((7, 5), ""), ((8, 0), "int8 int4"), ((8, 9), "int8 fp8 int4")])
def test_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], schemes: str) -> None:
    """What each can compile."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    multiplies = quantized.multiplies.__wrapped__  # past the cache
    assert [scheme.name for scheme in SCHEMES if multiplies(scheme, torch.device("cuda"))] == schemes.split()
    assert multiplies(FP8, torch.device("cpu"))


def test_what_cublas_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 instead of bfloat16, where it knows scales of rows."""
    for capability, version, known in (
        ((9, 0), "13.0", True),
        ((9, 0), "12.9", True),
        ((9, 0), "12.8", False),
        ((9, 0), None, False),
        ((10, 0), "13.0", False),
        ((8, 9), "12.9", False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        monkeypatch.setattr(torch.version, "cuda", version)
        assert quantized._scales_rows.__wrapped__(torch.device("cuda")) == known


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_model_quantizes_rows_where_they_are_computed(scheme: CodedScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first norm's and what attention returns; and computes the same."""
    hidden, intermediate, rows = 128, 256, 5
    config = model_config(
        vocab_size=40, hidden_size=hidden, intermediate_size=intermediate, head_dim=64, dtype=torch.float16
    )
    ops = TritonOps()

    def project(num_out: int, width: int, split: Split = Split.OUTPUTS) -> Linear:
        return Linear(weight_of(scheme, num_out, width), None, torch.float16, ops, split)

    norm = RmsNorm(torch.ones(hidden, device=DEVICE).half(), config.rms_norm_eps, ops)
    layers = [
        Layer(
            input_norm=norm,
            qkv=project(3 * hidden, hidden),
            q_norm=None,
            k_norm=None,
            o=project(hidden, hidden, Split.INPUTS),
            post_norm=norm,
            gate_up=project(2 * intermediate, hidden),
            down=project(hidden, intermediate, Split.INPUTS),
        )
        for _ in range(2)
    ]
    model = Llama(config, random(40, hidden), layers, norm, project(40, hidden), ops)

    def attention(layer: int, qkv: torch.Tensor, *norms: None) -> torch.Tensor:
        return qkv[:, :hidden]

    def forward() -> torch.Tensor:
        return model.forward(torch.arange(rows, device=DEVICE), attention)

    afterwards = []
    original = quantized.quantize_rows
    monkeypatch.setattr(quantized, "quantize_rows", lambda x, s: (afterwards.append(x), original(x, s))[1])
    hidden_states = forward()
    assert hidden_states.dtype == torch.float16
    assert len(afterwards) == 3
    monkeypatch.setattr(Linear, "takes", lambda self, x: None)
    assert torch.equal(forward(), hidden_states)
    assert len(afterwards) == 3 + 8


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_ways_by_rows(scheme: CodedScheme, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows become bytes, or the weight is widened; what comes of it is the same."""
    weight = weight_of(scheme, 200, 256)
    bias = random(1, 200)[0] if has_bias else None
    product = QuantizedProduct(weight, bias)
    fewer = replace(scheme, widened_from=4)
    product._weight = replace(product._weight, scheme=fewer)
    ways: list[str] = []
    for module, name in ((quantized, "quantize_rows"), (widening, "multiply")):
        original, way = getattr(module, name), f"{module.__name__.rpartition('.')[2]}.{name}"
        monkeypatch.setattr(module, name, lambda *a, f=original, way=way: (ways.append(way), f(*a))[1])
    for rows, way in ((3, "quantized.quantize_rows"), (4, "widen.multiply")):
        x = random(rows, 256)
        assert product.takes(x) is (fewer if rows < 4 else None)
        expected = wanted(x, weight) + (0 if bias is None else bias.double())
        for multiply in (product, product.parts):
            ways.clear()
            y = multiply(x)
            assert ways == [way]
            assert relative_error(y.sum(0) if y.ndim == 3 else y, expected) < 2e-3


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_widened_in_pieces(scheme: CodedScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are as large as each other, but for the last."""
    monkeypatch.setattr(widening, "PIECE", 256)
    x, weight = random(5, 512), weight_of(scheme, 600, 512)
    sizes: list[int] = []
    original = widening.widen

    def watched(weight: widening.Arranged, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        sizes.append(stop - start)
        return original(weight, dtype, start, stop)

    monkeypatch.setattr(widening, "widen", watched)
    got = widening.multiply(x, quantized.arrange(weight))
    assert sizes == [256, 256, 88]
    expected = x.double() @ weight.dequantize(torch.float64).T  # of x as it is, with fp8 too
    assert relative_error(got, expected) < 2e-3


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 129, 600, 2100])
@pytest.mark.parametrize(("num_out", "width"), [(4096, 4096), (4096, 11008), (4160, 4096)])
def test_large(scheme: CodedScheme, rows: int, num_out: int, width: int) -> None:
    x, weight = random(rows, width), weight_of(scheme, num_out, width)
    for added in (False, True):
        got = quantized.product(x, quantized.arrange(weight), added=added)
        least = 0 if got.ndim == 3 else 1e-3  # what is rounded to half precision
        assert relative_error(got if got.ndim == 2 else got.sum(0), wanted(x, weight)) < max(least, ERROR[scheme])
