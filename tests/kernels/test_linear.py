"""The product of few rows against a float64 product."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from manyheads.kernels import fused, linear
from tests.kernels import DEVICE, INTERPRETED, relative_error


def random(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("rows", [1, 5, 16, 33])
@pytest.mark.parametrize(("num_out", "width", "splits"), [(64, 128, 1), (192, 384, 1), (128, 640, 2), (64, 256, 3)])
def test_product(rows: int, num_out: int, width: int, splits: int) -> None:
    """Also shares of unequal length, and one that is empty."""
    x, weight = random(rows, width), random(num_out, width) / width**0.5
    got = linear.few_rows(x, weight, splits)
    assert got.shape == ((rows, num_out) if splits == 1 else (splits, rows, num_out))
    whole = got if splits == 1 else got.sum(0)
    assert relative_error(whole, x.double() @ weight.double().T) < 2e-3


def test_parts_are_added_up_where_they_are_read() -> None:
    x, weight, residual, norm = random(7, 256), random(128, 256) / 16, random(7, 128), random(128)
    parts = linear.few_rows(x, weight, 2)
    total = (residual.double() + x.double() @ weight.double().T).half()
    got = fused.add_rms_norm(parts, residual, norm, 1e-5)
    assert relative_error(residual, total.double()) < 2e-3
    wanted = total.double() * (total.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.double()
    assert relative_error(got, wanted) < 4e-3


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_out", "width"), [(4096, 4096), (4096, 11008), (12288, 4096)])
def test_large(rows: int, dtype: torch.dtype, num_out: int, width: int) -> None:
    x, weight = random(rows, width, dtype=dtype), random(num_out, width, dtype=dtype) / width**0.5
    assert linear.serves(x, weight) == (torch.cuda.get_device_capability() >= (9, 0))
    for splits in (1, 2):
        got = linear.few_rows(x, weight, splits)
        whole = got if splits == 1 else got.sum(0)
        assert relative_error(whole, x.double() @ weight.double().T) < (2e-3 if dtype == torch.float16 else 8e-3)
