"""Experts one after the other, in torch, against the same pair by pair in float64."""

from __future__ import annotations

import pytest
import torch

from manyheads.ops.experts import LoopedProduct
from manyheads.ops.torch import TorchOps
from manyheads.quantization.base import CodedScheme
from manyheads.quantization.int8 import INT8
from tests.kernels import relative_error

COUNT, TOP, HIDDEN, INNER = 6, 3, 48, 40


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("adds_up", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_tokens_go_to_the_most_probable_experts(has_bias: bool, adds_up: bool) -> None:
    x, router, bias = random(9, HIDDEN), random(COUNT, HIDDEN), random(COUNT)
    routed = TorchOps().route(x, router, bias if has_bias else None, TOP, adds_up)
    probabilities = (x @ router.T + (bias if has_bias else 0)).softmax(-1)
    wanted, chosen = probabilities.topk(TOP)
    assert torch.equal(routed.chosen, chosen)
    torch.testing.assert_close(routed.chances, wanted / wanted.sum(-1, keepdim=True) if adds_up else wanted)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scheme", [None, INT8], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_each_pair_is_multiplied_with_its_expert(tokens: int, scheme: CodedScheme | None, has_bias: bool) -> None:
    ops, x, router = TorchOps(), random(tokens, HIDDEN), random(COUNT, HIDDEN)
    weights = [random(INNER + i, HIDDEN)[i:] for i in range(COUNT)]
    coded = [weight if scheme is None else scheme.quantize(weight) for weight in weights]
    bias = random(COUNT * INNER) if has_bias else None
    product = ops.grouped(coded, bias, torch.float32)
    assert isinstance(product, LoopedProduct)
    assert product.nbytes >= sum(weight.nbytes for weight in coded) // (1 if scheme else 2)
    weight = torch.stack([w if isinstance(w, torch.Tensor) else w.dequantize(torch.float32) for w in coded]).double()
    biases = torch.zeros(COUNT, INNER) if bias is None else bias.view(COUNT, INNER)
    routed = ops.route(x, router, None, TOP, True)
    which, token = routed.chosen.flatten()[routed.order], routed.order // TOP
    assert which.tolist() == sorted(which.tolist())
    wanted = torch.einsum("ni,noi->no", x[token].double(), weight[which]) + biases[which]
    assert relative_error(product(x, routed), wanted) < 1e-4
    chances = routed.chances.flatten()[routed.order, None].double()
    added = torch.zeros(tokens, INNER, dtype=torch.float64).index_add_(0, token, wanted * chances)
    assert relative_error(product.added(x[token], routed), added) < 1e-4


def test_a_token_does_not_depend_on_those_beside_it() -> None:
    """As far as products of several rows are those of one, which depends on the processor; of so many, bit for bit."""
    ops, x, router = TorchOps(), random(20, HIDDEN), random(COUNT, HIDDEN)
    up, down = (list(random(COUNT, *shape)) for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER)))
    grouped, added = (ops.grouped(weights, None, torch.float32) for weights in (up, down))

    def layer(rows: torch.Tensor) -> torch.Tensor:
        routed = ops.route(rows, router, None, TOP, True)
        return added.added(ops.silu_mul(grouped(rows, routed)), routed)

    whole = layer(x)
    for rows in ([4], [17, 3, 9]):
        assert relative_error(layer(x[rows]), whole[rows]) < 1e-5
    assert torch.equal(layer(x[:5].flip(0)).flip(0), layer(x[:5]))
