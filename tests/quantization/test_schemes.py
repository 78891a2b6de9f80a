from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyheads.config import QUANTIZATIONS, ConfigError
from manyheads.quantization import base as module
from manyheads.quantization.base import CodedScheme, CodedWeight
from manyheads.quantization.fp8 import FP8, Fp8Weight
from manyheads.quantization.int4 import INT4, Int4Weight, pack, unpack
from manyheads.quantization.int8 import INT8, Int8Weight
from manyheads.quantization.schemes import SCHEMES, find, for_vocabulary, join, reorder

CODED = [scheme for scheme in SCHEMES.values() if isinstance(scheme, CodedScheme)]


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


@pytest.mark.parametrize("scheme", CODED, ids=str)
def test_what_rounding_costs(scheme: CodedScheme) -> None:
    """No value is further from its code than half a step, of its row or of its group."""
    weight = random(24, 256) * torch.logspace(-3, 2, 24)[:, None]
    weight[:, 7] *= 20
    rounded = scheme.quantize(weight)
    error = (rounded.dequantize(torch.float32) - weight).abs()
    if scheme is INT8:
        assert (error <= 0.501 * weight.abs().amax(1, keepdim=True) / 127).all()
    elif scheme is FP8:  # three bits after the first; the smallest numbers are a 448 / 2 ** -9 part of the largest
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
    assert rounded.nbytes < {INT8: 1.1, FP8: 1.1, INT4: 0.6}[scheme] * weight.numel()


@pytest.mark.parametrize(("scheme", "share"), [(INT8, 0.009), (FP8, 0.03), (INT4, 0.1)], ids=str)
def test_what_rounding_costs_on_average(scheme: CodedScheme, share: float) -> None:
    weight = random(64, 512)
    assert (scheme.quantize(weight).dequantize(torch.float32) - weight).std() < share


@pytest.mark.parametrize("scheme", CODED, ids=str)
def test_what_is_rounded_already_stays(scheme: CodedScheme) -> None:
    once = scheme.quantize(random(8, 64)).dequantize(torch.float32)
    again = scheme.quantize(once).dequantize(torch.float32)
    torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", CODED, ids=str)
def test_zeros_and_single_values(scheme: CodedScheme) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 0.37
    weight[2, 5] = -4.0
    found = scheme.quantize(weight).dequantize(torch.float32)
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scheme", CODED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_weights_in_pieces(scheme: CodedScheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(23, 64).to(dtype)
    whole = scheme.quantize(weight)
    monkeypatch.setattr(module, "_CHUNK", 5 * 64)
    pieces = scheme.quantize(weight)
    assert torch.equal(pieces.dequantize(dtype), whole.dequantize(dtype))
    assert pieces.dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("scheme", CODED, ids=str)
def test_weights_below_each_other(scheme: CodedScheme) -> None:
    parts = [scheme.quantize(random(rows, 64, seed=rows)) for rows in (8, 3, 5)]
    whole = CodedWeight.cat(parts)
    assert torch.equal(whole.dequantize(torch.float32), torch.cat([p.dequantize(torch.float32) for p in parts]))
    assert whole.nbytes == sum(p.nbytes for p in parts)
    assert whole.shape == (16, 64)


@pytest.mark.parametrize("scheme", CODED, ids=str)
def test_rows_in_another_order(scheme: CodedScheme) -> None:
    plain = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    weight = scheme.quantize(plain)
    found = reorder(weight, order)
    assert isinstance(found, CodedWeight)
    assert torch.equal(found.dequantize(torch.float32), weight.dequantize(torch.float32)[order])
    assert torch.equal(reorder(plain, order), plain[order])


def test_symmetric_beside_asymmetric() -> None:
    part = INT4.quantize(random(4, 64))
    symmetric = Int4Weight(part.values, part.scale)
    whole = CodedWeight.cat([part, symmetric])
    found = torch.cat([part.dequantize(torch.float32), symmetric.dequantize(torch.float32)])
    assert torch.equal(whole.dequantize(torch.float32), found)
    codes = unpack(part.values).float()
    assert torch.equal(symmetric.dequantize(torch.float32), (codes - 8) * part.scale)


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (192, 64), (96, 32)])
def test_groups(columns: int, size: int) -> None:
    assert INT4.quantize(random(4, columns)).group_size == size


def test_columns_that_come_in_no_groups() -> None:
    with pytest.raises(ConfigError, match="one has 48 columns"):
        INT4.quantize(random(4, 48))


def test_parts_that_do_not_fit() -> None:
    int8, int4 = INT8.quantize(random(4, 64)), INT4.quantize(random(4, 64))
    with pytest.raises(ValueError, match="quantized differently"):
        CodedWeight.cat([int8, int4])
    with pytest.raises(ValueError, match="quantized differently"):
        CodedWeight.cat([int4, INT4.quantize(random(4, 128))])
    for kind, *bad in (
        (Fp8Weight, int8.values, int8.scale, None),
        (Int8Weight, int8.values, int8.scale[:3], None),
        (Int8Weight, int8.values, int8.scale.half(), None),
        (Int8Weight, int8.values, int8.scale.expand(4, 2), None),
        (Int8Weight, int8.values, int8.scale, int4.zero),
        (Int4Weight, int4.values, int4.scale, int4.scale),
        (Int4Weight, int4.values, int4.scale.expand(4, 3), None),
    ):
        with pytest.raises(ValueError, match=kind.__name__.removesuffix("Weight").lower()):
            kind(*bad)


def test_joined_weights() -> None:
    plain = [random(4, 64), random(2, 64)]
    whole = join(plain)
    assert isinstance(whole, Tensor)
    assert torch.equal(whole, torch.cat(plain))
    assert join(plain[:1]) is plain[0]
    with pytest.raises(ValueError, match="some are quantized and some are not"):
        join([plain[0], INT8.quantize(plain[1])])


def test_names() -> None:
    """What users may give is what there is; a vocabulary has a scheme that it can bear."""
    assert tuple(SCHEMES) == QUANTIZATIONS
    assert find(None) is find("none") is None
    assert {name: str(for_vocabulary(find(name))) for name in SCHEMES} == {
        "int8": "int8",
        "fp8": "fp8",
        "int4": "int8",
        "bitsandbytes-8bit": "None",
        "bitsandbytes-4bit": "None",
    }
