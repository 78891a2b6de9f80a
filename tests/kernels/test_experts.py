"""Products with the weights of experts, by kernels, against the same pair by pair in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from manyheads.kernels import routing
from manyheads.kernels.rows import GROUP, quantize_rows
from manyheads.kernels.widen import Arranged
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.ops import kernel_experts
from manyheads.ops.triton import TritonOps
from manyheads.quantization.base import CodedScheme, Weight
from manyheads.quantization.fp8 import FP8
from manyheads.quantization.int4 import INT4, Int4Weight
from manyheads.quantization.int8 import INT8
from tests.forward import logits
from tests.kernels import DEVICE, INTERPRETED, TOLERANCE, relative_error
from tests.models.families import reference

TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # whose tl.dot multiplies bfloat16's bits


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "count", "top", "adds_up"), [(1, 8, 2, True), (33, 6, 3, False), (17, 128, 8, True), (5, 3, 3, False)]
)
def test_the_most_probable_experts_are_chosen(
    tokens: int, count: int, top: int, adds_up: bool, dtype: torch.dtype
) -> None:
    x, router, bias = random(tokens, 72, dtype=dtype), random(count, 72, dtype=dtype), random(count, dtype=dtype)
    for added in (None, bias):
        chances, chosen = routing.route(x, router, added, top, adds_up)
        logits = x.double() @ router.double().T + (0 if added is None else added.double())
        wanted, best = logits.softmax(-1).topk(top)
        if adds_up:
            wanted /= wanted.sum(-1, keepdim=True)
        assert chances.dtype == torch.float32
        assert torch.equal(chosen.long(), best)
        assert relative_error(chances, wanted) < 1e-4


def test_a_token_that_is_not_a_number_has_experts_that_exist() -> None:
    x = torch.full((3, 32), torch.nan, device=DEVICE)
    x[1] = 0.0
    chances, chosen = routing.route(x, random(5, 32), None, 2, True)
    assert chances.isnan().any(1).tolist() == [True, False, True]
    assert bool(((chosen >= 0) & (chosen < 5)).all())
    assert len(set(chosen[1].tolist())) == 2  # of equals, two


def drawn(tokens: int, count: int, top: int, uneven: bool = False) -> torch.Tensor:
    """Experts of tokens, [T, K] int32; uneven: the first ones are everybody's."""
    values = torch.rand(tokens, count, generator=torch.Generator().manual_seed(tokens))
    if uneven:
        values[:, :top] += 1
    return values.argsort(-1)[:, -top:].int().contiguous().to(DEVICE)


CASES = {
    "one token": (drawn(1, 8, 2), 8),
    "few": (drawn(4, 6, 3), 6),
    "each its own": (torch.arange(12, dtype=torch.int32, device=DEVICE).view(6, 2), 12),
    "the same for all": (drawn(20, 8, 2, uneven=True), 8),
    "more than are looked at at once": (drawn(2100, 3, 2), 3),
    "many": (drawn(70, 1, 1), 1),
}
"""Experts of tokens, and how many there are."""


@pytest.mark.parametrize("name", CASES)
def test_pairs_stand_in_blocks_of_one_expert(name: str) -> None:
    """Each in one block, in its order; the blocks that are left over are none."""
    chosen, count = CASES[name]
    groups = routing.group(chosen, count)
    order, which = groups.order.tolist(), chosen.flatten().tolist()
    assert order == sorted(range(len(which)), key=lambda pair: which[pair])
    expert, first, last = groups.table.tolist()
    real = [block for block in range(len(expert)) if expert[block] >= 0]
    assert real == list(range(len(real)))
    found = []
    for block in real:
        pairs = order[first[block] : min(first[block] + groups.size, last[block])]
        assert {which[pair] for pair in pairs} == {expert[block]}
        found += pairs
    assert found == order


def test_blocks_are_larger_where_experts_have_more() -> None:
    """And no larger beyond the passes that are recorded, so that nothing is compiled later."""
    assert [routing.block_size(tokens, 2, 8) for tokens in (1, 32, 64, 128, 256)] == [16, 16, 32, 64, 128]
    assert [routing.block_size(tokens, 1, 64) for tokens in (1024, 1500, 3000)] == [32, 32, 32]


def by_pair(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, which: torch.Tensor) -> torch.Tensor:
    """[N, in], a row's own expert's [out, in], in float64."""
    found = torch.einsum("ni,noi->no", x.double().cpu(), weight.double().cpu()[which.cpu()])
    return found if bias is None else found + bias.double().cpu()[which.cpu()]


def weights_of(scheme: CodedScheme | None, count: int, out: int, width: int, dtype: torch.dtype) -> list[Weight]:
    full = [random(out + i, width, dtype=dtype)[i:] / width**0.5 for i in range(count)]
    if scheme is None:
        return [weight.contiguous() for weight in full]
    coded = [scheme.quantize(weight) for weight in full]
    if scheme is INT4:
        # one of them with zero points, as checkpoints may have
        first = coded[0]
        zero = torch.randint(0, 16, first.scale.shape, device=DEVICE).to(torch.uint8)
        coded[0] = Int4Weight(first.values, first.scale, zero)
    return coded


def widened(weights: list[Weight]) -> torch.Tensor:
    return torch.stack([w if isinstance(w, torch.Tensor) else w.dequantize(torch.float32) for w in weights])


SHAPES = [
    ("few", 3, 40, 96, torch.float32),
    ("one token", 2, 64, 128, torch.float16),
    ("the same for all", 2, 130, 200, torch.float16),
    ("many", 1, 24, 64, torch.float16),
    ("each its own", 2, 72, 192, torch.float16),
]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("name", "top", "out", "width", "dtype"), SHAPES, ids=[shape[0] for shape in SHAPES])
def test_each_pair_is_multiplied_with_its_expert(
    name: str, top: int, out: int, width: int, dtype: torch.dtype, has_bias: bool
) -> None:
    chosen, count = CASES[name]
    assert chosen.shape[1] == top
    weights = weights_of(None, count, out, width, dtype)
    bias = random(count * out, dtype=dtype) if has_bias else None
    product = TritonOps().grouped(weights, bias, dtype)
    check(product, chosen, widened(weights), bias, random(len(chosen), width, dtype=dtype), 2 * TOLERANCE[dtype])


def check(
    product: kernel_experts.KernelGroupedProduct,
    chosen: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    tolerance: float,
) -> None:
    """Hold both kinds of results against float64's."""
    count, top = len(weight), chosen.shape[1]
    shaped = None if bias is None else bias.view(count, -1)
    groups = routing.group(chosen, count)
    order, which = groups.order.long(), chosen.flatten().long()
    chances = random(*chosen.shape).abs()
    routed = kernel_experts.KernelRouted(chances, chosen, groups)
    found = product(x, routed)
    assert found.dtype == x.dtype
    assert relative_error(found, by_pair(x[order // top], weight, shaped, which[order])) < tolerance
    inner = x.repeat_interleave(top, 0) * random(len(which), 1).sign().to(x.dtype)  # another row for each pair
    parts = product.added(inner[order], routed)
    wanted = by_pair(inner, weight, shaped, which) * chances.double().cpu().flatten()[:, None]
    assert parts.dtype == torch.float32
    assert relative_error(parts.transpose(0, 1).flatten(0, 1), wanted) < tolerance


@pytest.mark.parametrize("scheme", [INT8, FP8, INT4], ids=str)
@pytest.mark.parametrize(("name", "out", "width"), [("one token", 64, 256), ("few", 72, 384), ("many", 8, 128)])
def test_codes_are_multiplied_as_they_are(scheme: CodedScheme, name: str, out: int, width: int) -> None:
    chosen, count = CASES[name]
    weights = weights_of(scheme, count, out, width, torch.float16)
    product = TritonOps().grouped(weights, None, torch.float16)
    assert isinstance(product, kernel_experts.KernelGroupedProduct)
    assert product.takes(random(1, width, dtype=torch.float16)) is scheme
    assert product.nbytes < 0.75 * 2 * count * (out * width + 128 * width / count)  # with what fills it up
    x = random(len(chosen), width, dtype=torch.float16)
    check(product, chosen, widened(weights), None, x, 5e-2 if scheme is FP8 else 3e-3)


@pytest.mark.parametrize("scheme", [INT8, FP8, INT4], ids=str)
def test_rows_may_come_in_codes(scheme: CodedScheme) -> None:
    """As whatever computes them may leave them."""
    chosen, count = CASES["one token"]
    product = TritonOps().grouped(weights_of(scheme, count, 24, 384, torch.float16), None, torch.float16)
    routed = kernel_experts.KernelRouted(random(*chosen.shape).abs(), chosen, routing.group(chosen, count))
    rows = random(chosen.numel(), 384, dtype=torch.float16)
    assert torch.equal(product.added(quantize_rows(rows, scheme), routed), product.added(rows, routed))


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=str)
@pytest.mark.parametrize("width", [48, 192])
def test_bytes_of_any_width_are_multiplied(scheme: CodedScheme, width: int) -> None:
    weights = weights_of(scheme, 8, 40, width, torch.float16)
    product = TritonOps().grouped(weights, None, torch.float16)
    assert product.takes(random(1, width)) is scheme
    x = random(1, width, dtype=torch.float16)
    check(product, CASES["one token"][0], widened(weights), None, x, 5e-2 if scheme is FP8 else 3e-3)


@pytest.mark.parametrize(
    ("scheme", "width", "dtype"),
    [(INT8, 40, torch.float16), (INT4, 64, torch.float16), (INT8, GROUP, torch.float32), (INT4, GROUP, torch.float32)],
)
def test_codes_that_no_kernel_multiplies_are_widened(scheme: CodedScheme, width: int, dtype: torch.dtype) -> None:
    """Rows that no whole copies make up, columns that come in no groups of 128, activations in float32."""
    weights = weights_of(scheme, 8, 16, width, dtype)
    product = TritonOps().grouped(weights, None, dtype)
    assert product.takes(random(1, width, dtype=dtype)) is None
    assert not isinstance(product._weight, Arranged)
    x = random(1, width, dtype=dtype)
    check(product, CASES["one token"][0], widened(weights), None, x, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("scheme", [None, INT8, INT4], ids=str)
def test_a_row_does_not_depend_on_those_beside_it(scheme: CodedScheme | None) -> None:
    """Bit for bit, whatever experts the others have, and wherever a row stands."""
    count, top, width = 8, 2, 128
    weights = weights_of(scheme, count, 32, width, torch.float16)
    product = TritonOps().grouped(weights, None, torch.float16)
    router, x = random(count, width, dtype=torch.float16), random(14, width, dtype=torch.float16)

    def results(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routed = kernel_experts.route(rows, router, None, top, True)
        pairs = product(rows, routed)
        place = torch.empty_like(routed.groups.order)
        place[routed.groups.order.long()] = torch.arange(len(place), dtype=torch.int32, device=DEVICE)
        inner = rows.repeat_interleave(top, 0)[routed.groups.order.long()]
        return pairs[place.long()].view(len(rows), -1), product.added(inner, routed).transpose(0, 1)

    together = results(x)
    for rows in (x[:1], x[7:8], x[3:12].flip(0)):
        index = [int(torch.where((x == row).all(1))[0]) for row in rows]
        for alone, whole in zip(results(rows), together, strict=True):
            assert torch.equal(alone, whole[index])


def test_a_layer_of_experts_is_that_of_torch() -> None:
    """The whole of it, with the parts that a norm adds up."""
    ops, count, top, hidden, inner = TritonOps(), 6, 3, 48, 40
    up, down = (random(count, *shape) / 7 for shape in ((2 * inner, hidden), (hidden, inner)))
    x, router, residual = random(9, hidden), random(count, hidden), random(9, hidden)
    routed = ops.route(x, router, None, top, True)
    y = ops.silu_mul(ops.grouped(list(up), None, torch.float32)(x, routed))
    parts = ops.grouped(list(down), None, torch.float32).added(y, routed)
    wanted = residual.double()
    chances, chosen = (x @ router.T).softmax(-1).topk(top)
    chances /= chances.sum(-1, keepdim=True)
    for k in range(top):
        gate, middle = torch.einsum("ti,toi->to", x, up[chosen[:, k]]).chunk(2, -1)
        said = torch.einsum("ti,toi->to", F.silu(gate) * middle, down[chosen[:, k]])
        wanted += (said * chances[:, k, None]).double()
    ops.add_rms_norm(parts, residual, torch.ones(hidden, device=DEVICE), 1e-6)
    assert relative_error(residual, wanted) < 1e-5


@pytest.mark.parametrize("name", ["qwen3 with experts", "gpt-oss"])
def test_a_model_of_experts_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    """All of it but attention by kernels, with nothing that a recording could not hold."""
    model = reference(name)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, read_config(tmp_path), torch.float32, DEVICE, ops=TritonOps())
    assert loaded.can_be_captured
    tokens = torch.randint(0, 61, (12,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        wanted = model(tokens[None]).logits[0]
    torch.testing.assert_close(logits(loaded, tokens.to(DEVICE)).cpu(), wanted, atol=1e-4, rtol=1e-4)
