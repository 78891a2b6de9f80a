"""What stands between a drafter's passes by kernels against torch, which tests/ops holds against plain Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.batch import Guesses, OpenNodes, RowState
from manyheads.ops.torch import TorchOps
from tests.guesses import Passes
from tests.kernels import DEVICE

pytest.importorskip("triton")

from manyheads.kernels import guesses as kernels

OPS = TorchOps()
CPU = torch.device("cpu")
FIELDS = ("row_start", "slots", "tokens", "source", "position", "bits", "new_row", "new_which", "new_at")


def there(state: RowState) -> RowState:
    """The rows on the device."""
    copy = RowState(state.num_rows, state.max_len, state.page_size, state.candidates.shape[1], 1000, DEVICE)
    for name in ("cached_len", "page_table", "speculative"):
        getattr(copy, name).copy_(getattr(state, name))
    return copy


def check(found: Guesses, wanted: Guesses) -> None:
    """All but the columns of what pads families, and places without a node."""
    assert torch.equal(found.cached_len.cpu(), wanted.cached_len)
    for name in ("tokens", "chances", "worth", "above", "feature"):
        old, new = getattr(wanted, name), getattr(found, name)
        assert new.dtype == old.dtype
        assert torch.equal(new[:, :-1].cpu(), old[:, :-1]), name
    assert found.num_opened == wanted.num_opened
    assert torch.equal(found.row_start.cpu(), wanted.row_start)


def check_nodes(found: OpenNodes, wanted: OpenNodes) -> None:
    for name in FIELDS:
        old, new = getattr(wanted, name), getattr(found, name)
        assert new.dtype == old.dtype, name
        assert torch.equal(new.cpu(), old), name


def compare(passes: Passes) -> None:
    """All passes of a step."""
    state, template = there(passes.state), passes.template
    most = template.num_inner
    wanted = OPS.begin_guesses(passes.state, passes.index, template.num_candidates, most)
    found = kernels.begin_guesses(state, passes.index.to(DEVICE), template.num_candidates, most)
    check(found, wanted)
    assert torch.equal(found.opened[0].cpu(), wanted.opened[0])
    token_map = None if passes.token_map is None else passes.token_map.to(DEVICE)
    here, levels = passes.levels(CPU), passes.levels(DEVICE)
    old: OpenNodes | None = None
    new: OpenNodes | None = None
    count = len(passes.index)
    for depth, after in enumerate([*passes.counts, 0]):
        tokens, chances = passes.children(here[depth], count)
        OPS.offer_children(wanted, here[depth], old, tokens, chances, passes.token_map)
        kernels.offer_children(found, levels[depth], new, tokens.to(DEVICE), chances.to(DEVICE), token_map)
        check(found, wanted)
        if after:
            count = after
            old = OPS.open_nodes(wanted, here[depth + 1], count)
            new = kernels.open_nodes(found, levels[depth + 1], count)
            check_nodes(new, old)
            check(found, wanted)


@pytest.mark.parametrize("seed", range(16))
def test_passes(seed: int) -> None:
    """Chances of which many are equal or 0, rows that decline trees, and dummy rows."""
    compare(Passes(num_rows=1 + seed, padding=seed % 4, seed=100 + seed, levels=(0, 2, 3, 5)[seed % 4]))


def test_rows_that_all_decline() -> None:
    passes = Passes(num_rows=5, padding=2, seed=3)
    passes.state.speculative.fill_(0.0)
    compare(passes)


def test_64_candidates_of_one_row() -> None:
    compare(Passes(num_rows=1, padding=0, seed=11, ranks=2))


@pytest.mark.parametrize("block", [16, 64])
def test_more_values_than_a_program_holds(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCKS", {block: 1})
    for seed in range(2):
        compare(Passes(num_rows=9, padding=1, seed=200 + seed, levels=(0, 3)[seed % 2], ranks=5))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
class TestOnGpu:
    @pytest.mark.parametrize("num_rows", [1, 2, 7, 48, 255, 700])
    def test_many_cases(self, num_rows: int) -> None:
        for seed in range(40):
            compare(
                Passes(num_rows, padding=seed % 5, seed=1000 + seed, levels=(0, 2, 3, 9)[seed % 4], ranks=3 + seed % 4)
            )

    @pytest.mark.parametrize("num_rows", [1, 64, 256])
    def test_in_a_graph(self, num_rows: int) -> None:
        """Recorded, and replayed for other rows."""
        passes = Passes(num_rows, padding=3, seed=5, levels=4)
        state, template, levels = there(passes.state), passes.template, passes.levels(DEVICE)
        counts = [len(passes.index), *passes.counts]
        index = torch.full_like(passes.index, passes.state.num_rows, device=DEVICE)
        given = [
            [x.to(DEVICE) for x in passes.children(level, count)] for level, count in zip(levels, counts, strict=True)
        ]

        def step() -> tuple[Guesses, list[OpenNodes]]:
            found = kernels.begin_guesses(state, index, template.num_candidates, template.num_inner)
            nodes: list[OpenNodes] = []
            for level, count, children in zip(levels, [0, *passes.counts], given, strict=True):
                if count:
                    nodes.append(kernels.open_nodes(found, level, count))
                kernels.offer_children(found, level, nodes[-1] if nodes else None, *children, None)
            return found, nodes

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found, nodes = step()
        for _ in range(3):
            order = torch.randperm(len(passes.index), generator=passes.random)
            index.copy_(passes.index[order])
            here: list[list[Tensor]] = []
            for level, count, children in zip(levels, counts, given, strict=True):
                here.append(list(passes.children(level, count)))
                for there_now, value in zip(children, here[-1], strict=True):
                    there_now.copy_(value)
            graph.replay()
            wanted = OPS.begin_guesses(passes.state, passes.index[order], template.num_candidates, template.num_inner)
            old: OpenNodes | None = None
            for depth, level in enumerate(passes.levels(CPU)):
                if depth:
                    old = OPS.open_nodes(wanted, level, passes.counts[depth - 1])
                    check_nodes(nodes[depth - 1], old)
                OPS.offer_children(wanted, level, old, here[depth][0], here[depth][1], None)
            check(found, wanted)
