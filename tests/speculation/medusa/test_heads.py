from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.models.linear import Linear
from manyheads.models.parallel import ALONE
from manyheads.ops.torch import TorchOps
from manyheads.speculation.medusa.checkpoint import HeadWeights
from manyheads.speculation.medusa.heads import MedusaHeads

torch.set_num_threads(1)

CPU = torch.device("cpu")
HIDDEN, VOCAB, HEADS = 16, 40, 3


def weights(layers: int, rows: int | None = VOCAB, token_map: Tensor | None = None, half: bool = False) -> HeadWeights:
    torch.manual_seed(layers)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).half() if half else torch.randn(*shape)

    blocks = [[(random(HIDDEN, HIDDEN) / 4, random(HIDDEN)) for _ in range(layers)] for _ in range(HEADS)]
    projections = None if rows is None else [random(rows, HIDDEN) for _ in range(HEADS)]
    return HeadWeights(blocks, projections, token_map, "test", None)


def model() -> Any:
    """As much of a base as heads ask for."""
    torch.manual_seed(99)
    ops = TorchOps()
    lm_head = Linear(torch.randn(VOCAB, HIDDEN), None, torch.float32, ops)
    return SimpleNamespace(
        config=SimpleNamespace(vocab_size=VOCAB), lm_head=lm_head, project=lm_head, ops=ops, ranks=ALONE
    )


def naive(w: HeadWeights, hidden: Tensor, lm_head: Any, num_ranks: int) -> tuple[list, Tensor]:
    """The best tokens of each row and head, and their probabilities."""
    out, probabilities = [], []
    for x in hidden.double():
        row = []
        for h, blocks in enumerate(w.blocks):
            y = x
            for weight, bias in blocks:
                y = y + F.silu(weight.double() @ y + bias.double())
            logits = lm_head(y.float()[None])[0].double() if w.projections is None else w.projections[h].double() @ y
            best = logits.argsort(descending=True)[:num_ranks]
            probabilities.append(torch.softmax(logits, 0)[best])
            row.append(best.tolist() if w.token_map is None else [int(w.token_map[i]) for i in best])
        out.append(row)
    return out, torch.stack(probabilities).view(len(out), len(w.blocks), num_ranks)


def one_projection() -> HeadWeights:
    w = weights(1)
    assert w.projections is not None
    return HeadWeights(w.blocks, w.projections[:1] * HEADS, None, "test", None)


TOKEN_MAP = torch.tensor([7, 3, 39, 0, 12, 5])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    "w",
    [
        weights(1),
        weights(3),
        weights(1, None),
        weights(2, None),
        one_projection(),
        weights(1, 6, TOKEN_MAP),
        weights(2, half=True),
    ],
    ids=["one layer", "three layers", "the base's", "the base's, two layers", "one for all", "token map", "half"],
)
def test_candidates_are_the_heads_best_tokens_and_their_probabilities(w: HeadWeights, rows: int) -> None:
    base = model()
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
    found, chances = MedusaHeads(w, base, torch.float32, CPU).candidates(hidden, 4)
    wanted, probabilities = naive(w, hidden, base.lm_head, 4)
    assert (found.dtype, chances.dtype) == (torch.int64, torch.float32)
    assert found.tolist() == wanted
    torch.testing.assert_close(chances.double(), probabilities, atol=1e-6, rtol=1e-4)


def test_one_projection_for_all_heads_is_kept_once() -> None:
    one = MedusaHeads(one_projection(), model(), torch.float32, CPU).memory_bytes()
    assert MedusaHeads(weights(1), model(), torch.float32, CPU).memory_bytes() - one == (HEADS - 1) * VOCAB * HIDDEN * 4


def test_memory_is_counted_without_what_the_base_owns() -> None:
    blocks = HEADS * 2 * (HIDDEN * HIDDEN + HIDDEN) * 4
    assert MedusaHeads(weights(2, None), model(), torch.float32, CPU).memory_bytes() == blocks
    own = MedusaHeads(weights(2), model(), torch.float32, CPU).memory_bytes()
    assert own == blocks + HEADS * VOCAB * HIDDEN * 4


def test_heads_run_in_the_dtype_they_are_given() -> None:
    heads = MedusaHeads(weights(2), model(), torch.bfloat16, CPU)
    hidden = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    wanted, probabilities = naive(weights(2), hidden, None, 1)
    found, chances = heads.candidates(hidden.bfloat16(), 1)
    same = found == torch.tensor(wanted)
    assert float(same.float().mean()) > 0.6
    assert chances.dtype == torch.float32
    torch.testing.assert_close(chances[same].double(), probabilities[same], atol=0.1, rtol=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_probability_is_above_1(dtype: torch.dtype) -> None:
    """Or a node would be more probable than its parent."""
    w = weights(1)
    assert w.projections is not None
    sure = HeadWeights(w.blocks, [p * 20 for p in w.projections], None, "test", None)
    hidden = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, chances = MedusaHeads(sure, model(), dtype, CPU).candidates(hidden, 3)
    assert 0.99 < float(chances.max()) <= 1.0
    assert float(chances.min()) >= 0.0
