"""Products with quantized weights against float64 products with what the weights stand for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from manyheads.kernels import quantized
from manyheads.quantization.weight import SCHEMES, QuantizedWeight, quantize
from tests.kernels import DEVICE, INTERPRETED, relative_error


def weight_of(scheme: str, num_out: int, width: int, *, symmetric: bool = False) -> QuantizedWeight:
    weight = quantize(torch.randn(num_out, width, device=DEVICE) / width**0.5, scheme)
    return QuantizedWeight(scheme, weight.values, weight.scale) if symmetric else weight


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize(("num_out", "width", "splits"), [(64, 128, 1), (128, 512, 1), (64, 640, 2), (64, 256, 3)])
def test_few_rows(scheme: str, rows: int, num_out: int, width: int, splits: int) -> None:
    """Also shares of unequal length, and one that is empty."""
    x, weight = torch.randn(rows, width, device=DEVICE).half(), weight_of(scheme, num_out, width)
    assert quantized.serves(x, weight)
    got = quantized.few_rows(x, quantized.arrange(weight), splits)
    assert got.shape == ((rows, num_out) if splits == 1 else (splits, rows, num_out))
    whole = got if splits == 1 else got.sum(0)
    assert relative_error(whole, x.double() @ weight.dequantize(torch.float64).T) < 1e-3


def test_int4_without_zero_points() -> None:
    x, weight = torch.randn(3, 256, device=DEVICE).half(), weight_of("int4", 64, 256, symmetric=True)
    got = quantized.few_rows(x, quantized.arrange(weight), 1)
    assert relative_error(got, x.double() @ weight.dequantize(torch.float64).T) < 1e-3
    assert torch.equal(quantized.widen(quantized.arrange(weight), torch.float32), weight.dequantize(torch.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [64, 384, 1088])
def test_widened(scheme: str, width: int) -> None:
    weight = weight_of(scheme, 5, width)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(quantized.widen(quantized.arrange(weight), dtype), weight.dequantize(dtype))


def test_rows_in_fp8() -> None:
    x = torch.randn(4, 200, device=DEVICE).half() * torch.tensor([[1e-3], [1.0], [50.0], [0.0]], device=DEVICE).half()
    codes, scale = quantized.quantize_rows(x)
    back = codes.float() * scale
    for row in range(3):
        assert relative_error(back[row], x[row]) < (0.1 if INTERPRETED else 0.04)  # the interpreter cuts off
        assert codes[row].float().abs().max() == 448
    assert torch.equal(back[3], torch.zeros_like(back[3]))


def test_what_few_rows_does_not_serve_is_widened() -> None:
    """Columns that do not come in blocks."""
    weight = weight_of("int8", 40, 72)
    x = torch.randn(3, 72, device=DEVICE).half()
    assert not quantized.serves(x, weight)
    assert (
        relative_error(quantized.product(x, quantized.arrange(weight)), x.double() @ weight.dequantize(torch.float64).T)
        < 1e-3
    )


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 129, 600])
@pytest.mark.parametrize(("num_out", "width"), [(4096, 4096), (4096, 11008)])
def test_large(scheme: str, rows: int, num_out: int, width: int) -> None:
    x, weight = torch.randn(rows, width, device=DEVICE).half(), weight_of(scheme, num_out, width)
    rounded = scheme == "fp8" and rows > quantized.MAX_ROWS  # x is rounded to fp8 as well
    wanted = x.double() @ weight.dequantize(torch.float64).T
    for splits in (1, 2):
        got = quantized.product(x, quantized.arrange(weight), splits)
        assert relative_error(got if got.ndim == 2 else got.sum(0), wanted) < (4e-2 if rounded else 2e-3)
