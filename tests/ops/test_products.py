"""Products in every form against float64 products with what the weight stands for."""

from __future__ import annotations

import pytest
import torch

from manyheads.models.linear import Linear, Split
from manyheads.ops import integer
from manyheads.ops.integer import IntegerProduct
from manyheads.ops.products import (
    CodesProduct,
    HalfProduct,
    OneDnnProduct,
    PlainProduct,
    has_half_products,
    number_bytes,
)
from manyheads.ops.torch import TorchOps
from manyheads.quantization.base import CodedScheme
from manyheads.quantization.fp8 import FP8
from manyheads.quantization.int4 import INT4
from manyheads.quantization.int8 import INT8
from tests.kernels import DEVICE, relative_error

CODED = (INT8, FP8, INT4)
CPU = torch.device("cpu")
needs_integers = pytest.mark.skipif(not integer.is_exact(), reason="this processor has no exact products of bytes")
needs_half_products = pytest.mark.skipif(not has_half_products(), reason="this build of torch has no FBGEMM")


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("form", ["integer", *CODED], ids=str)
def test_products(form: CodedScheme | str, has_bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "integer":
        if not integer.is_exact():
            pytest.skip("this processor has no exact products of bytes")
        monkeypatch.setattr(integer, "LEAST_SIZE", 0)
    torch.manual_seed(rows)
    weight = (INT8 if isinstance(form, str) else form).quantize(torch.randn(96, 160))
    bias = torch.randn(96) if has_bias else None
    product = TorchOps().product(weight, bias, torch.float32)
    assert isinstance(product, IntegerProduct) == (form == "integer")
    assert (product.out_features, product.in_features) == (96, 160)
    x = torch.randn(rows, 160)
    wanted = x.double() @ weight.dequantize(torch.float64).T + (0 if bias is None else bias.double())
    error = 2**-16 * x.abs().amax(1, keepdim=True) * weight.dequantize(torch.float32).abs().sum(1) + 1e-4
    assert ((product(x).double() - wanted).abs() <= (error if form == "integer" else 1e-4)).all()
    assert torch.equal(product.parts(x), product(x))


@needs_half_products
@pytest.mark.parametrize("has_bias", [False, True])
def test_forms_on_a_cpu(has_bias: bool) -> None:
    """A weight in float32 is kept in half precision where that loses nothing, and what was asked is what it takes."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 96), torch.randn(40, 96), torch.randn(40) if has_bias else None
    extra = 40 * 4 if has_bias else 0
    for values, dtype, form, size in (
        (weight.half().float(), torch.float32, HalfProduct, 2),
        (weight, torch.float32, OneDnnProduct, 4),
        (weight.bfloat16(), torch.bfloat16, PlainProduct, 2),
    ):
        product = TorchOps().product(values, None if bias is None else bias.to(dtype), dtype)
        assert type(product) is form
        assert product.nbytes == size * weight.numel() + extra * dtype.itemsize // 4
        assert product.plain is (values if form is PlainProduct else None)
        assert product.can_be_captured
        assert product.takes(x) is None
        wanted = x.to(dtype).double() @ values.double().T + (0 if bias is None else bias.double())
        assert relative_error(product(x.to(dtype)), wanted) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert number_bytes(torch.float32, CPU, torch.float32) == number_bytes(torch.float32, CPU, torch.float16) == 2
    assert number_bytes(torch.float32, CPU, torch.bfloat16) == 4
    assert number_bytes(torch.bfloat16, CPU, torch.float32) == 2
    assert number_bytes(torch.float32, torch.device("cuda"), torch.float16) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", CODED, ids=str)
def test_half_precision_on_a_cpu(scheme: CodedScheme, dtype: torch.dtype) -> None:
    weight = scheme.quantize(torch.randn(32, 64))
    product = TorchOps().product(weight, None, dtype)
    assert type(product) is PlainProduct
    x = torch.randn(3, 64, dtype=dtype)
    assert product(x).dtype == dtype
    assert torch.equal(product(x), x @ weight.dequantize(dtype).T)


@needs_integers
def test_integer_products_do_not_depend_on_other_rows() -> None:
    torch.manual_seed(0)
    product = IntegerProduct(INT8.quantize(torch.randn(320, 512)), None)
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
    product = IntegerProduct(INT8.quantize(weight), None)
    found = product(torch.tensor([[3.0], [-3.0], [1.0]]) * torch.ones(3, 4096))
    torch.testing.assert_close(found[:, 0], 4096 * torch.tensor([3.0, -3.0, 1.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:, 1], -4096 * torch.tensor([3.0, -3.0, 1.0]), rtol=1e-6, atol=0)


def test_what_the_forms_take() -> None:
    weight = torch.randn(64, 128)
    for scheme in (INT8, FP8):
        product = TorchOps().product(scheme.quantize(weight), None, torch.float32)
        assert product.nbytes <= 2 * weight.numel() + 4 * 64
        assert isinstance(product, CodesProduct) or not has_half_products()


def test_what_is_split_by_inputs_may_come_in_parts() -> None:
    """That by outputs is whole, whoever reads it."""
    torch.manual_seed(0)
    weight, x = torch.randn(6, 8), torch.randn(3, 8)

    class InParts(TorchOps):
        def product(self, weight: torch.Tensor, *_: object) -> PlainProduct:  # type: ignore[override]
            product = PlainProduct(weight, None)
            product.parts = lambda x: torch.stack((product(x), product(x)))  # type: ignore[method-assign]
            return product

    for split, shape in ((Split.OUTPUTS, (3, 6)), (Split.INPUTS, (2, 3, 6))):
        assert Linear(weight, None, torch.float32, InParts(), split)(x).shape == shape


# by kernels


@pytest.mark.parametrize("scheme", CODED, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_quantized_products_by_kernels(scheme: CodedScheme, has_bias: bool) -> None:
    pytest.importorskip("triton")
    from manyheads.kernels import quantized
    from manyheads.ops.kernel_products import QuantizedProduct
    from manyheads.ops.triton import TritonOps

    torch.manual_seed(0)
    weight = scheme.quantize(torch.randn(64, 256, device=DEVICE) / 16)
    bias = torch.randn(64, device=DEVICE).half() if has_bias else None
    product = TritonOps().product(weight, bias, torch.float16)
    assert type(product) is QuantizedProduct
    assert (product.out_features, product.in_features) == (64, 256)
    assert product.takes(torch.empty(0, 256, dtype=torch.float16, device=DEVICE)) is scheme
    assert product.takes(torch.empty(0, 256, device=DEVICE)) is None
    x = torch.randn(3, 256, device=DEVICE).half()
    whole, parts = product(x), product.parts(x)
    kept = quantized.arrange(weight)
    assert product.nbytes == kept.nbytes + (0 if bias is None else bias.nbytes)
    assert torch.equal(whole, quantized.product(x, kept) + (0 if bias is None else bias))
    assert parts.ndim == (2 if has_bias else 3)
    assert relative_error(parts if has_bias else parts.sum(0), whole) < 1e-3


@pytest.mark.parametrize("is_hopper", [False, True])
def test_few_rows_by_a_kernel(is_hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that it does not serve, older GPUs, and weights with a bias, are torch's."""
    pytest.importorskip("triton")
    from manyheads.kernels import linear
    from manyheads.ops.kernel_products import FewRowsProduct
    from manyheads.ops.triton import TritonOps

    monkeypatch.setattr(linear, "_is_hopper", lambda _: is_hopper)
    torch.manual_seed(0)
    x, bias = torch.randn(3, 256, device=DEVICE).half(), torch.randn(128, device=DEVICE).half()
    for out in (128, 100):
        weight = (torch.randn(out, 256, device=DEVICE) / 16).half()
        product = TritonOps().product(weight, None, torch.float16)
        assert type(product) is FewRowsProduct
        assert product.plain is weight
        wanted = x.double() @ weight.double().T
        assert relative_error(product(x), wanted) < 1e-2
        parts = product.parts(x)
        is_ours = is_hopper and out == 128
        assert parts.ndim == (3 if is_ours else 2)
        assert relative_error(parts.sum(0) if is_ours else parts, wanted) < 1e-2
    assert type(TritonOps().product(torch.randn(128, 256).half(), bias, torch.float16)) is PlainProduct


def test_fp8_before_ada_is_widened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton does not even convert it there. The GPU is made up."""
    pytest.importorskip("triton")
    from manyheads.kernels import quantized
    from manyheads.ops.kernel_products import FewRowsProduct, QuantizedProduct
    from manyheads.ops.triton import TritonOps

    for known in (True, False):
        monkeypatch.setattr(quantized, "multiplies", lambda scheme, _, known=known: known)
        forms = {
            scheme: type(TritonOps().product(scheme.quantize(torch.randn(8, 32)), None, torch.float16))
            for scheme in CODED
        }
        fp8 = QuantizedProduct if known else FewRowsProduct
        assert forms == {INT8: QuantizedProduct, INT4: QuantizedProduct, FP8: fp8}
