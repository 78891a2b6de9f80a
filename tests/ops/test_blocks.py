"""Products with weights in blocks, against the same weights widened."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyheads.config import ConfigError
from manyheads.ops import blocks
from manyheads.ops.blocks import BlockProduct
from manyheads.ops.torch import TorchOps
from manyheads.quantization.blocks import BLOCK, BlockWeight
from manyheads.quantization.int4 import Int4Weight

CPU = torch.device("cpu")
SHAPES = [(1, 32), (3, 96), (64, 32), (200, 160)]


def weight(out: int, into: int, bits: int) -> BlockWeight:
    scale = torch.rand(out, into // BLOCK) + 0.1
    if bits == 8:
        return BlockWeight(torch.randint(-128, 128, (out, into), dtype=torch.int8), scale, None)
    codes = torch.randint(0, 256, (out, into // 2), dtype=torch.uint8)
    return BlockWeight(codes, scale, -torch.rand(out, into // BLOCK) * 10)


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for anew, and after the test again."""
    blocks.library.cache_clear()
    yield
    blocks.library.cache_clear()


@pytest.mark.skipif(blocks.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_widened_weight(shape: tuple[int, int], bits: int) -> None:
    some, bias = weight(*shape, bits), torch.randn(shape[0])
    product = TorchOps().product(some, bias, torch.float32)
    assert isinstance(product, BlockProduct)
    assert product.nbytes == some.nbytes * -(-shape[0] // 16) * 16 // shape[0] + bias.nbytes
    wide = some.dequantize(torch.float32)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 23):
        x = torch.randn(rows, shape[1])
        torch.testing.assert_close(product(x), x @ wide.T + bias, atol=1e-3, rtol=1e-5)


@pytest.mark.skipif(blocks.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_kept_in_half_precision_where_they_are_such_numbers(bits: int) -> None:
    some = weight(48, 96, bits)
    smallest = torch.tensor([2.0**-24, 2.0**-14, 65504.0])  # a subnormal number, and the ends of the others
    half = BlockWeight(some.codes, smallest.expand(48, 3), None if bits == 8 else -smallest.expand(48, 3))
    short, long = BlockProduct(half, None), BlockProduct(some, None)
    assert long.nbytes - short.nbytes == 48 * 3 * 2 * (2 if bits == 4 else 1)
    for x in torch.eye(96).split(32):
        wanted = x @ half.dequantize(torch.float32).T
        torch.testing.assert_close(short(x), wanted, atol=0, rtol=2e-6)


@pytest.mark.skipif(blocks.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_is_the_same_whatever_rows_are_there(bits: int) -> None:
    product = BlockProduct(weight(70, 96, bits), None)
    x = torch.randn(21, 96)
    together = product(x)
    for count in range(1, 9):
        assert torch.equal(product(x[3 : 3 + count]), together[3 : 3 + count])
    strided = torch.randn(21, 192)[:, ::2]
    assert torch.equal(product(strided), product(strided.contiguous()))


def test_parts_of_a_weight() -> None:
    for bits in (4, 8):
        some = weight(6, 96, bits)
        wide = some.dequantize(torch.float32)
        assert some.shape == (6, 96)
        assert torch.equal(some.part(0, 2, 5).dequantize(torch.float32), wide[2:5])
        assert torch.equal(some.part(1, 32, 96).dequantize(torch.float32), wide[:, 32:96])
        order = torch.tensor([5, 0, 1, 2, 4, 3])
        assert torch.equal(some.rows(order).dequantize(torch.float32), wide[order])
        assert torch.equal(BlockWeight.cat([some, some]).dequantize(torch.float32), torch.cat((wide, wide)))
        for dim, start, stop in ((1, 16, 48), (0, 0, 7), (1, 64, 128)):
            with pytest.raises(ConfigError, match="blocks of 32 columns"):
                some.part(dim, start, stop)
    with pytest.raises(ValueError, match="codes of 4 bits beside codes of 8"):
        BlockWeight.cat([weight(2, 32, 4), weight(2, 32, 8)])
    with pytest.raises(ValueError, match=r"codes torch\.int8 \(2, 32\), scale \(2, 2\)"):
        BlockWeight(torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 2), None)


def test_int4_without_zero_points_comes_in_blocks() -> None:
    values = torch.randint(0, 256, (5, 64), dtype=torch.uint8)
    some = Int4Weight(values, torch.rand(5, 2).half().float())  # as checkpoints have them
    in_blocks = BlockWeight.of_int4(some)
    assert in_blocks is not None
    assert torch.equal(in_blocks.dequantize(torch.float32), some.dequantize(torch.float32))
    assert BlockWeight.of_int4(Int4Weight(values, torch.rand(5, 2), torch.ones(5, 2, dtype=torch.uint8))) is None
    assert BlockWeight.of_int4(Int4Weight(values, torch.rand(5, 8))) is None  # groups of 8


def widened(product: object, some: BlockWeight, x: Tensor) -> bool:
    assert callable(product)
    return not isinstance(product, BlockProduct) and torch.allclose(product(x), x @ some.dequantize(torch.float32).T)


def test_without_a_compiler_weights_are_widened(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    some, x = weight(4, 32, 4), torch.ones(2, 32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    for compiler in ("/no/such/compiler", str(broken)):
        monkeypatch.setenv("CC", compiler)
        blocks.library.cache_clear()
        assert not blocks.serves(torch.float32, CPU)
        assert widened(TorchOps().product(some, None, torch.float32), some, x)
    assert list((tmp_path / "manyheads" / "compiled").iterdir()) == []


def test_what_computes_something_else_is_not_taken(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(ctypes, "CDLL", lambda _: type("Library", (), {"manyheads_blocks": nothing}))
    assert blocks.library() is None


def test_other_types_are_widened() -> None:
    some = weight(4, 32, 8)
    product = TorchOps().product(some, None, torch.bfloat16)
    assert not isinstance(product, BlockProduct)
    assert product(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
