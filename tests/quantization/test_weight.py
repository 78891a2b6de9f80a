from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyheads.config import ConfigError
from manyheads.quantization import weight as module
from manyheads.quantization.weight import SCHEMES, QuantizedWeight, pack, quantize, unpack


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_packing_and_unpacking(seed: int, rows: int, pairs: int) -> None:
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes)
    assert packed.dtype == torch.uint8
    assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 1]
    assert torch.equal(unpack(packed), codes.to(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_rounding_costs(scheme: str) -> None:
    """No value is further from its code than half a step, of its row or of its group."""
    weight = random(24, 256) * torch.logspace(-3, 2, 24)[:, None]
    weight[:, 7] *= 20
    rounded = quantize(weight, scheme)
    error = (rounded.dequantize(torch.float32) - weight).abs()
    if scheme == "int8":
        assert (error <= 0.501 * weight.abs().amax(1, keepdim=True) / 127).all()
    elif scheme == "fp8":  # three bits after the first; the smallest numbers are a 448 / 2 ** -9 part of the largest
        smallest = weight.abs().amax(1, keepdim=True) * 2**-9 / 448
        assert (error <= torch.maximum(weight.abs() / 15.9, 0.501 * smallest)).all()
    else:
        groups = weight.view(24, 2, 128)
        step = (groups.amax(-1) - groups.amin(-1)) / 15
        plain = ((groups / step[..., None]).round() * step[..., None] - groups).square().sum()
        # a range may be narrowed to four fifths, which costs its ends and helps the rest
        assert (error.view(24, 2, 128) <= 0.21 * (groups.amax(-1) - groups.amin(-1))[..., None]).all()
        assert error.square().sum() <= plain
    assert rounded.shape == (24, 256)
    assert rounded.nbytes < {"int8": 1.1, "fp8": 1.1, "int4": 0.6}[scheme] * weight.numel()


@pytest.mark.parametrize(("scheme", "share"), [("int8", 0.009), ("fp8", 0.03), ("int4", 0.1)])
def test_what_rounding_costs_on_average(scheme: str, share: float) -> None:
    weight = random(64, 512)
    assert (quantize(weight, scheme).dequantize(torch.float32) - weight).std() < share


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_rounded_already_stays(scheme: str) -> None:
    once = quantize(random(8, 64), scheme).dequantize(torch.float32)
    again = quantize(once, scheme).dequantize(torch.float32)
    torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_and_single_values(scheme: str) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 0.37
    weight[2, 5] = -4.0
    found = quantize(weight, scheme).dequantize(torch.float32)
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_weights_in_pieces(scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(23, 64).to(dtype)
    whole = quantize(weight, scheme)
    monkeypatch.setattr(module, "_CHUNK", 5 * 64)
    pieces = quantize(weight, scheme)
    assert torch.equal(pieces.dequantize(dtype), whole.dequantize(dtype))
    assert pieces.dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_below_each_other(scheme: str) -> None:
    parts = [quantize(random(rows, 64, seed=rows), scheme) for rows in (8, 3, 5)]
    whole = QuantizedWeight.cat(parts)
    assert torch.equal(whole.dequantize(torch.float32), torch.cat([p.dequantize(torch.float32) for p in parts]))
    assert whole.nbytes == sum(p.nbytes for p in parts)
    assert whole.to(torch.device("cpu")).shape == (16, 64)


def test_symmetric_beside_asymmetric() -> None:
    part = quantize(random(4, 64), "int4")
    symmetric = QuantizedWeight("int4", part.values, part.scale)
    whole = QuantizedWeight.cat([part, symmetric])
    found = torch.cat([part.dequantize(torch.float32), symmetric.dequantize(torch.float32)])
    assert torch.equal(whole.dequantize(torch.float32), found)
    codes = unpack(part.values).float()
    assert torch.equal(symmetric.dequantize(torch.float32), (codes - 8) * part.scale)


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (192, 64), (96, 32)])
def test_groups(columns: int, size: int) -> None:
    assert quantize(random(4, columns), "int4").group_size == size


def test_columns_that_come_in_no_groups() -> None:
    with pytest.raises(ConfigError, match="one has 48 columns"):
        quantize(random(4, 48), "int4")


def test_parts_that_do_not_fit() -> None:
    int8, int4 = quantize(random(4, 64), "int8"), quantize(random(4, 64), "int4")
    with pytest.raises(ValueError, match="quantized differently"):
        QuantizedWeight.cat([int8, int4])
    with pytest.raises(ValueError, match="quantized differently"):
        QuantizedWeight.cat([int4, quantize(random(4, 128), "int4")])
    for bad in (
        ("fp8", int8.values, int8.scale, None),
        ("int8", int8.values, int8.scale[:3], None),
        ("int8", int8.values, int8.scale.half(), None),
        ("int8", int8.values, int8.scale.expand(4, 2), None),
        ("int8", int8.values, int8.scale, int4.zero),
        ("int4", int4.values, int4.scale, int4.scale),
        ("int4", int4.values, int4.scale.expand(4, 3), None),
    ):
        with pytest.raises(ValueError, match=bad[0]):
            QuantizedWeight(*bad)
