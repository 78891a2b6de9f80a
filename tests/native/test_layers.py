"""What stands between the products of a layer in C, against torch in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from manyheads import ops
from manyheads.attention.base import Group, Heads
from manyheads.attention.native import NativeAttention, serves
from manyheads.attention.torch import TorchAttention
from manyheads.kv_cache import KVCache
from manyheads.native import layers
from manyheads.native.memory import LargePages
from manyheads.ops.native import NativeOps
from manyheads.ops.torch import TorchOps

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(layers.library() is None, reason="there is no C compiler")
SHAPES = [(1, 1), (1, 576), (3, 70), (700, 400)]


@pytest.fixture
def native() -> NativeOps:
    found = layers.library()
    assert found is not None
    return NativeOps(found)


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for anew, and after the test again."""
    layers.library.cache_clear()
    yield
    layers.library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(native: NativeOps, shape: tuple[int, int]) -> None:
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    wanted = F.rms_norm(x.double(), shape[1:], weight.double(), 1e-5)
    torch.testing.assert_close(native.rms_norm(x, weight, 1e-5).double(), wanted, rtol=1e-5, atol=1e-6)
    total = residual + 0.5 * x
    wanted = F.rms_norm(total.double(), shape[1:], weight.double(), 1e-5)
    found = native.add_rms_norm(x, residual, weight, 1e-5, multiplier=0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(residual, total)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_activation(native: NativeOps, shape: tuple[int, int]) -> None:
    gate, up = torch.randn(shape) * 40, torch.randn(shape)
    found = native.silu_mul(torch.cat((gate, up), dim=1))
    torch.testing.assert_close(found.double(), F.silu(gate.double()) * up, rtol=1e-6, atol=1e-30)


@needs_compiler
def test_what_is_not_finite_stays_so(native: NativeOps) -> None:
    x = torch.ones(2, 64)
    x[1, 3] = float("nan")
    assert native.rms_norm(x, torch.ones(64), 1e-5).isnan().any(dim=1).tolist() == [False, True]
    assert native.silu_mul(x).isnan().any(dim=1).tolist() == [False, True]


@needs_compiler
def test_other_types_and_strides_are_left_to_torch(native: NativeOps) -> None:
    x, weight = torch.randn(4, 128), torch.randn(64)
    strided, half = x[:, ::2], x[:, :64].bfloat16()
    assert torch.equal(native.rms_norm(strided, weight, 1e-5), TorchOps().rms_norm(strided, weight, 1e-5))
    assert torch.equal(native.rms_norm(half, weight, 1e-5), TorchOps().rms_norm(half, weight, 1e-5))
    assert torch.equal(native.silu_mul(half), TorchOps().silu_mul(half))
    total = native.add_rms_norm(half, half.clone(), weight, 1e-5)
    assert torch.equal(total, TorchOps().add_rms_norm(half, half.clone(), weight, 1e-5))
    rope = torch.ones(8, 1, 32), torch.zeros(8, 1, 32)
    heads, cache = Heads(num_heads=2, eps=1e-5, ropes={0: rope}), KVCache(torch.zeros(1, 2, 2, 4, 1, 32))
    assert serves(cache, heads)
    assert isinstance(native.attention(cache, heads), NativeAttention)
    for other, told in (
        (KVCache(cache.data.bfloat16()), heads),
        (KVCache(cache.data[..., :24]), heads),
        (cache, replace(heads, softcap=2.0)),
        (cache, replace(heads, sinks={0: torch.zeros(2)})),
    ):
        assert not isinstance(native.attention(other, told), NativeAttention)


@needs_compiler
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_long_texts_and_tokens_beside_others(native: NativeOps, dim: int) -> None:
    """More keys than are looked at at a time, with scores so large that the first ones come to nothing."""
    cached, page_size, most = [150, 0, 70], 16, 12
    data = torch.randn(1, 2, 40, page_size, 2, dim)
    data[:, 0] *= torch.linspace(0.1, 4, 40).view(-1, 1, 1, 1)
    heads = Heads(num_heads=6, eps=1e-5, ropes={0: (torch.ones(200, 1, dim), torch.zeros(200, 1, dim))})
    table = torch.randperm(39)[: 3 * most].view(3, most) + 1
    bits = [1, 3, 5, 1, 1, 3, 7, 11]
    starts, row = [0, 3, 4, 8], torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    position = torch.tensor(cached)[row] + torch.tensor([0, 1, 1, 0, 0, 1, 2, 2])
    slot = torch.tensor(cached)[row] + torch.tensor([0, 1, 2, 0, 0, 1, 2, 3])
    slots = table[row, slot // page_size] * page_size + slot % page_size
    qkv = torch.randn(8, 10 * dim)

    def attended(backend: type[TorchAttention], rows: slice) -> torch.Tensor:
        cache = KVCache(data.clone())
        some = slice(starts[rows.start], starts[rows.stop])
        attention = native.attention(cache, heads) if backend is NativeAttention else backend(cache, heads)
        assert type(attention) is backend
        group = Group(
            start=0,
            stop=some.stop - some.start,
            row_start=torch.tensor(starts[rows.start : rows.stop + 1], dtype=torch.int32) - starts[rows.start],
            bits=torch.tensor(bits[some]),
            cached_len=torch.tensor(cached[rows]),
            page_table=table[rows],
            max_tokens=4,
            max_cached_len=150,
        )
        attention.plan([group], position[some], slots[some])
        return attention(0, qkv[some].clone(), None, None)

    found = attended(NativeAttention, slice(0, 3))
    torch.testing.assert_close(found, attended(TorchAttention, slice(0, 3)), rtol=1e-4, atol=1e-5)
    for r in range(3):
        assert torch.equal(attended(NativeAttention, slice(r, r + 1)), found[starts[r] : starts[r + 1]])


def test_without_a_compiler_torch_does_it(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert layers.library() is None
    assert type(ops.ops_for.__wrapped__(CPU)) is TorchOps


@needs_compiler
def test_what_computes_something_else_is_not_taken(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(ops.ops_for.__wrapped__(CPU), NativeOps)
    layers.library.cache_clear()

    def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(ctypes, "CDLL", lambda _: type("Library", (), dict.fromkeys(layers.FUNCTIONS, nothing)))
    assert layers.library() is None


def test_memory_in_large_pages() -> None:
    memory = LargePages()
    tensors = [torch.randn(size) for size in (3, 1000, 2**21, 2**23, 5)]
    placed = [memory.placed(tensor) for tensor in tensors]
    memory.placed(torch.zeros(100))
    for tensor, copy in zip(tensors, placed, strict=True):
        assert copy.data_ptr() % 64 == 0
        assert torch.equal(copy, tensor)
    assert placed[1].data_ptr() - placed[0].data_ptr() == 64
