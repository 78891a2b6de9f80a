"""Acceptance by a table: what the engine counts is what the table says, by depth, of every kind of drafter."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyheads.batch import RowState, TreeTensors
from manyheads.checkpoint import BUILTIN_FOLDER
from manyheads.engine import ranks, recorded, runner
from manyheads.engine.engine import Engine
from manyheads.engine.nodes import Nodes
from manyheads.engine.runner import Runner
from manyheads.frontend.tokenizer import Detokenizer, Tokenizer
from manyheads.request import EngineRequest, SamplingParams
from manyheads.speculation.drafter import DrafterShape
from manyheads.speculation.eagle3.drafter import Eagle3Drafter
from manyheads.speculation.medusa.drafter import MedusaDrafter
from tests.eagle3 import drafter_of
from tests.engine.test_exactness import engine
from tests.engine.test_graphs import record
from tests.engine.test_ranks import engine as ranked_engine
from tests.tiny import save_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import by_chance
from changes import Changes

VOCAB = 512
"""So many tokens that one that is no candidate is hardly ever taken for one."""
TABLE = [[0.6, 0.2, 0.1], [0.5, 0.3], [0.6, 0.2]]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `install` replaces is put back."""
    for owner, name in (
        (MedusaDrafter, "propose"),
        (MedusaDrafter, "attach"),
        (Eagle3Drafter, "guess"),
        (Eagle3Drafter, "attach"),
        (by_chance.medusa, "read_heads"),
        (by_chance.eagle3, "read_drafter"),
        (recorded, "draw"),
        (runner, "draw"),
        (ranks, "COMMAND"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("kind", by_chance.KINDS)
@pytest.mark.usefixtures("restored")
def test_candidates_are_right_as_often_as_the_table_says(tmp_path: Path, kind: str, is_recorded: bool) -> None:
    save_model(tmp_path / "model", vocab_size=VOCAB)
    heads = drafter_of(tmp_path / "model", kind)
    by_chance.ByChance(TABLE).install()
    served = engine(tmp_path / "model", 10, heads=str(heads), num_blocks=300, max_num_batched_tokens=64)
    assert served.ready.drafter == kind
    if is_recorded:
        record(served)
    for i in range(24):
        params = SamplingParams(temperature=1.0, seed=i, max_tokens=80)
        served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=[i, 3, 5], params=params))
    while served.has_work():
        served.step()
    planner = served.planner
    learnt = planner.acceptance.table()
    assert isinstance(served.runner, Runner)
    for depth, rates in enumerate(TABLE):
        assert learnt[depth][: len(rates)] == pytest.approx(rates, abs=0.12), depth
    stats = served.stats()
    assert stats.accepted_by_depth[0] / stats.drafted_by_depth[0] > 0.8  # all three ranks together hold for 0.9


def sampled(served: Engine) -> list[list[int]]:
    """Everyone's tokens, of more requests than run at once."""
    for i in range(8):
        params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
        served.add_request(
            EngineRequest(request_id=str(i), prompt_token_ids=[i + 1, 3, 5] * (1 + i % 4), params=params)
        )
    replies: dict[str, list[int]] = {str(i): [] for i in range(8)}
    while served.has_work():
        for delta in served.step():
            replies[delta.request_id] += delta.new_token_ids
    assert [len(reply) for reply in replies.values()] == [30] * 8
    return list(replies.values())


@pytest.mark.parametrize("kind", by_chance.KINDS)
@pytest.mark.usefixtures("restored")
def test_two_ranks_draw_the_same(tmp_path: Path, kind: str) -> None:
    """The other one is a process; what it adds to a layer is wrong as soon as its rows are others. A rerun gives the
    same tokens."""
    save_model(tmp_path / "model", vocab_size=VOCAB)
    heads = drafter_of(tmp_path / "model", kind)
    Changes(by_chance=True, acceptance=TABLE).install()
    settings = {"heads": str(heads), "num_blocks": 200}
    shared = ranked_engine(tmp_path / "model", 2, **settings)
    found = sampled(shared)
    stats = shared.stats()
    assert stats.generation_tokens / stats.row_steps > 2.2
    assert sampled(ranked_engine(tmp_path / "model", 2, **settings)) == found
    assert sampled(ranked_engine(tmp_path / "model", 1, **settings)) == found


class Chain:
    """Draws of rows with the best of a Medusa drafter's candidates as their trees: a root and a node of each depth."""

    def __init__(self, seeds: Tensor, others: tuple[int, ...] = ()) -> None:
        self.count, self.depth, width = len(seeds), len(TABLE), 4
        self.state = RowState(self.count, 64, 16, self.depth * width, VOCAB, seeds.device)
        self.state.seed[: self.count] = seeds
        self.state.drafts.copy_(torch.arange(1 + self.depth * width))
        self.chance = by_chance.ByChance(TABLE, others)
        self.chance._take(self, seeds.device)

    name = "medusa"

    @property
    def shape(self) -> DrafterShape:
        return DrafterShape(
            max_depth=self.depth, num_candidates=self.depth * 4, layer_weights=0, vocabulary_weights=0, row_logits=0
        )

    def ranks(self, rows: Tensor, first: int) -> Tensor:
        """[R, D + 1], the rank of each node's child; 4 is none of them."""
        candidate = self.tokens(rows, first) - 1 - 4 * torch.arange(1 + self.depth)
        return torch.where((candidate < 0) | (candidate > 3), 4, candidate)

    def tokens(self, rows: Tensor, first: int) -> Tensor:
        """[R, D + 1], what each node draws."""
        count, nodes = len(rows), 1 + self.depth
        order = torch.arange(nodes)
        tree = TreeTensors.blank(nodes, self.depth, rows.device)
        tree.column[1:] = 1 + 4 * order[:-1]
        found, _ = self.chance._draw(
            torch.empty(count * nodes, VOCAB),
            Nodes(
                requests=[],
                rows=rows,
                row=torch.arange(count).repeat_interleave(nodes),
                node=order.repeat(count),
                depth=order.repeat(count),
                max_depth=self.depth,
                first=torch.full_like(rows, first),
                node_tokens=self.state.drafts[rows][:, tree.column],
                place=torch.arange(count * nodes).view(count, nodes),
                tree=tree,
            ),
            self.state,
            None,  # type: ignore[arg-type]
        )
        return found.view(count, nodes)


@pytest.mark.parametrize("are_drawn", [True, False], ids=["drawn seeds", "seeds in a row"])
def test_draws_follow_the_table_and_not_each_other(are_drawn: bool) -> None:
    """Everything within four deviations: rates of each depth and rank, and how often best candidates are right at two
    places of a row, or of two rows."""
    seeds = torch.arange(400)
    if are_drawn:
        seeds = torch.randint(2**62, (400,), generator=torch.Generator().manual_seed(0))
    chain, rows = Chain(seeds), torch.arange(400)
    drawn = torch.stack([chain.ranks(rows, first) for first in range(0, 800, 4)])  # [200, 400, 4]
    count = 200 * 400
    for depth, rates in enumerate(TABLE):
        for rank, rate in enumerate([*rates, *[0.0] * (4 - len(rates)), 1 - sum(rates)]):
            # one that is no candidate may be taken for one
            slack = 4 * (count * rate * (1 - rate)) ** 0.5 + count * 4 / VOCAB
            assert abs(int((drawn[:, :, depth] == rank).sum()) - count * rate) < slack, (depth, rank)
    is_right = (drawn[:, :, :3] == 0).float()
    is_right -= is_right.mean((0, 1))
    is_right /= is_right.std((0, 1))
    text = is_right.permute(1, 0, 2).flatten(1)  # by position
    for name, product in {
        "next position": text[:, 1:] * text[:, :-1],
        "next step": is_right[1:] * is_right[:-1],
        "next row": text[1:] * text[:-1],
        "other half": text[:200] * text[200:],
    }.items():
        assert abs(float(product.mean())) < 4 / product.numel() ** 0.5, name
    others = by_chance.hashed(seeds[:, None], torch.arange(200)) >> by_chance.BITS
    seen = (others % 16).flatten().bincount(minlength=16)
    assert float(((seen - 5000) ** 2 / 5000).sum()) < 15 + 4 * 30**0.5


def test_what_is_no_candidate_is_text_by_itself() -> None:
    whole = by_chance.whole_tokens(BUILTIN_FOLDER)
    tokenizer = Tokenizer.load(BUILTIN_FOLDER)
    assert 3000 < len(whole) < len(tokenizer.hf.get_vocab())
    rng = random.Random(0)
    detokenizer = Detokenizer(tokenizer)
    assert all(detokenizer.push([rng.choice(whole)]) for _ in range(300)), "nothing is held back"
    chain = Chain(torch.arange(50), others=(77, 91))
    tokens = chain.tokens(torch.arange(50), 30)
    candidates = chain.ranks(torch.arange(50), 30) < 4
    assert {77, 91} == set(tokens[~candidates].tolist())
    assert not {77, 91} & set(tokens[candidates].tolist())


def test_draws_do_not_depend_on_what_runs_beside() -> None:
    chain = Chain(torch.arange(50) * 7)
    every = chain.ranks(torch.arange(50), 30)
    assert torch.equal(chain.ranks(torch.tensor([41, 3]), 30), every[[41, 3]])
    assert torch.equal(chain.ranks(torch.arange(50), 30), every)
    assert not torch.equal(chain.ranks(torch.arange(50), 31), every)


def test_tables(tmp_path: Path) -> None:
    eagle3 = by_chance.table_of("eagle3")
    assert by_chance.chain_rates(eagle3, 5) == pytest.approx(by_chance.CHAIN)
    assert len(eagle3) == 6
    for rates, measured in zip(eagle3, [*by_chance.MEASURED, by_chance.MEASURED[-1]], strict=True):
        assert len(rates) == 10
        assert rates[1:3] == measured[1:3]
        found, wanted = (sum(table[3:]) / (1 - sum(table[:3])) for table in (rates, measured))
        assert found == pytest.approx(wanted)
        assert sum(rates) < 1
    assert by_chance.chain_rates(by_chance.table_of("medusa"), 3) == pytest.approx([0.56, 0.30, 0.16], abs=0.01)
    file = tmp_path / "table.json"
    file.write_text(json.dumps(TABLE))
    assert by_chance.table_of("eagle3", file) == TABLE
    assert by_chance.chain_rates(TABLE, 5) == pytest.approx([0.6, 0.3, 0.18, 0.108, 0.0648])
    file.write_text("[[0.7, 0.4]]")
    with pytest.raises(ValueError, match="each of which adds up to 1 at most"):
        by_chance.table_of("eagle3", file)
