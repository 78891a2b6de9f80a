from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from manyheads.models import linear as module
from manyheads.models.linear import Linear
from manyheads.quantization import integer
from manyheads.quantization.weight import SCHEMES, quantize

META = torch.device("meta")
needs_integers = pytest.mark.skipif(not integer.is_exact(), reason="this processor has no exact products of bytes")


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("form", ["integer", *SCHEMES])
def test_products(form: str, has_bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "integer":
        if not integer.is_exact():
            pytest.skip("this processor has no exact products of bytes")
        monkeypatch.setattr(module, "INTEGER_SIZE", 0)
    torch.manual_seed(rows)
    weight = quantize(torch.randn(96, 160), "int8" if form == "integer" else form)
    bias = torch.randn(96) if has_bias else None
    linear = Linear(weight, bias)
    assert (linear.form == "integer") == (form == "integer")
    assert (linear.out_features, linear.in_features) == (96, 160)
    x = torch.randn(rows, 160)
    wanted = x.double() @ weight.dequantize(torch.float64).T + (0 if bias is None else bias.double())
    error = 2**-16 * x.abs().amax(1, keepdim=True) * weight.dequantize(torch.float32).abs().sum(1) + 1e-4
    assert ((linear(x).double() - wanted).abs() <= (error if form == "integer" else 1e-4)).all()
    assert torch.equal(linear.parts(x), linear(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_on_a_cpu(scheme: str, dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(32, 64), scheme)
    linear = Linear(weight, None, dtype)
    assert linear.form == "plain"
    x = torch.randn(3, 64, dtype=dtype)
    assert linear(x).dtype == dtype
    assert torch.equal(linear(x), x @ weight.dequantize(dtype).T)


@needs_integers
def test_integer_products_do_not_depend_on_other_rows() -> None:
    torch.manual_seed(0)
    product = integer.IntegerProduct(quantize(torch.randn(320, 512), "int8"))
    x = torch.randn(33, 512) * torch.logspace(-20, 8, 33)[:, None]
    x[5] = 0
    whole = product(x)
    assert not whole[5].any()
    for row in range(33):
        assert torch.equal(product(x[row : row + 1]), whole[row : row + 1])


@needs_integers
def test_integer_products_of_the_largest_numbers() -> None:
    weight = torch.ones(16, 4096)
    weight[1] *= -1
    product = integer.IntegerProduct(quantize(weight, "int8"))
    found = product(torch.tensor([[3.0], [-3.0], [1.0]]) * torch.ones(3, 4096))
    torch.testing.assert_close(found[:, 0], 4096 * torch.tensor([3.0, -3.0, 1.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:, 1], -4096 * torch.tensor([3.0, -3.0, 1.0]), rtol=1e-6, atol=0)


def test_what_the_forms_take() -> None:
    weight = torch.randn(64, 128)
    for scheme in ("int8", "fp8"):
        assert Linear(quantize(weight, scheme)).nbytes <= 2 * weight.numel() + 4 * 64


def test_fp8_before_ada_is_widened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton does not even convert it there. The GPU is made up."""
    monkeypatch.setattr(module, "has_kernels", lambda _: True)
    for known in (True, False):
        monkeypatch.setattr(module, "quantized", SimpleNamespace(multiplies=lambda scheme, _, known=known: known))
        forms = {}
        for scheme in SCHEMES:
            forms[scheme] = module._quantized_form(quantize(torch.randn(8, 32), scheme).to(META), torch.float16)
        assert forms == {"int8": "quantized", "int4": "quantized", "fp8": "quantized" if known else None}
