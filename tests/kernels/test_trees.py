"""Trees by kernels against trees by torch, which tests/ops holds against plain Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from manyheads.batch import Gained, Outcome, RowState, Trees, TreeTensors
from manyheads.kv_cache import KVCache
from manyheads.ops.torch import TorchOps
from manyheads.speculation.tree import ROOT, Choice, Tree
from tests.kernels import DEVICE
from tests.trees import medusa_tensors

pytest.importorskip("triton")

from manyheads.kernels.settle import pack, propose, settle
from manyheads.kernels.trees import expand

CPU = torch.device("cpu")
OPS = TorchOps()
HEADS, RANKS, VOCAB = 4, 5, 3
"""Few tokens, so that paths are accepted."""


class Rows:
    """The same rows on the CPU, for torch, and on the device, for the kernels."""

    def __init__(self, num_rows: int, seed: int, levels: int = 0, page_size: int = 3, max_len: int = 40) -> None:
        """levels: so many different chances there are, 0 among them; 0 is any."""
        self.random = torch.Generator().manual_seed(seed)
        self.levels = levels
        self.reference, self.state = (
            RowState(num_rows, max_len, page_size, HEADS * RANKS, VOCAB, device) for device in (CPU, DEVICE)
        )
        state = self.reference
        state.cached_len[:-1] = self.ints(0, max_len // 2, num_rows)
        state.drafts[:] = self.ints(0, VOCAB, *state.drafts.shape)
        pages = state.page_table[:-1]
        pages[:] = 1 + torch.randperm(pages.numel(), generator=self.random).view(pages.shape)
        state.chances[:-1, 1:] = self.chances(num_rows, HEADS * RANKS)
        state.speculative[:-1] = self.ints(0, 4, num_rows).clamp(max=1).float()
        # [layers, 2, pages, page size, kv_heads, head_dim], no two entries alike
        shape = torch.Size((2, 2, pages.numel() + 1, page_size, 1, 2))
        entries = torch.arange(shape.numel(), dtype=torch.float32).view(shape)
        self.reference_cache, self.cache = KVCache(entries), KVCache(entries.clone().to(DEVICE))
        for name in ("cached_len", "drafts", "page_table", "chances", "speculative"):
            getattr(self.state, name).copy_(getattr(state, name))

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.random)

    def chances(self, *shape: int) -> Tensor:
        chances = torch.rand(shape, generator=self.random)
        if self.levels:
            chances = (chances * self.levels).floor() / max(self.levels - 1, 1)
        return chances

    def some(self, count: int, padding: int) -> Tensor:
        """Rows, and dummy rows behind them."""
        num_rows = self.reference.num_rows
        rows = torch.randperm(num_rows, generator=self.random)[:count]
        return torch.cat((rows, torch.full((padding,), num_rows)))

    def expand(self, index: Tensor, tree: TreeTensors, num_tokens: int) -> tuple[Trees, Trees]:
        sizes = torch.arange(index.numel(), index.numel() * tree.num_nodes + 1)
        sizes = sizes[:: 1 + index.numel() // 5].contiguous()
        wanted = OPS.expand(self.reference, index, tree, num_tokens, sizes)
        tensors = [getattr(tree, name).to(DEVICE) for name in ("parent", "depth", "column", "bits", "path")]
        found = expand(self.state, index.to(DEVICE), TreeTensors(*tensors), num_tokens, sizes.to(DEVICE))
        return wanted, found

    def check_state(self) -> None:
        """Alike but for what the dummy row drafts, which means nothing: it is made alike."""
        assert torch.equal(self.state.cached_len.cpu(), self.reference.cached_len)
        assert torch.equal(self.state.drafts[:-1].cpu(), self.reference.drafts[:-1])
        self.reference.drafts[-1] = self.state.drafts[-1].cpu()
        assert torch.equal(self.state.chances.cpu(), self.reference.chances)
        assert torch.equal(self.cache.data.cpu(), self.reference_cache.data)


def random_tree(random: torch.Generator, num_nodes: int, depth: int) -> Tree:
    choices: list[Choice] = [()]
    for _ in range(20 * num_nodes):
        parents = [choice for choice in choices if len(choice) < depth]
        if len(choices) == num_nodes or not parents:
            break
        parent = parents[int(torch.randint(0, len(parents), (), generator=random))]
        choice = (*parent, int(torch.randint(0, RANKS, (), generator=random)))
        if choice not in choices:
            choices.append(choice)
    return Tree(tuple(choices))


def padded(tree: TreeTensors) -> TreeTensors:
    """As in a graph: paths as long as the heads reach."""
    last = tree.path[:, -1:].expand(-1, HEADS + 1 - tree.path.shape[1])
    return replace(tree, path=torch.cat((tree.path, last), dim=1))


def check_trees(found: Trees, wanted: Trees) -> None:
    for name in ("index", "row_start", "tokens", "position", "slots", "bits"):
        old, new = getattr(wanted.inflight, name), getattr(found.inflight, name)
        assert new.dtype == old.dtype
        assert torch.equal(new.cpu(), old), name
    for name in ("node_tokens", "taken", "offset", "row", "node", "row_slots", "place"):
        old, new = getattr(wanted, name), getattr(found, name)
        assert new.dtype == old.dtype
        assert torch.equal(new.cpu(), old), name
    assert (found.gains is None) == (wanted.gains is None)
    if found.gains is not None and wanted.gains is not None:
        torch.testing.assert_close(found.gains.cpu(), wanted.gains, rtol=1e-5, atol=1e-6)


def check_outcome(found: Outcome, wanted: Outcome) -> None:
    for name in ("values", "last"):
        old, new = getattr(wanted, name), getattr(found, name)
        assert new.dtype == old.dtype
        assert torch.equal(new.cpu(), old), name


def check_gained(found: Gained, wanted: Gained) -> None:
    for name in ("index", "row_start", "tokens", "position", "slots", "bits"):
        old, new = getattr(wanted.inflight, name), getattr(found.inflight, name)
        assert new.dtype == old.dtype
        assert torch.equal(new.cpu(), old), name
    for name in ("cached_len", "place", "last"):
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name


@pytest.mark.parametrize("seed", range(15))
def test_steps(seed: int) -> None:
    """Three steps of the same rows, with other trees: what is brought, what is kept, and what is proposed next."""
    random = torch.Generator().manual_seed(1000 + seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    num_rows = draw(1, 20)
    rows = Rows(num_rows, seed, levels=(0, 1, 2, 3, 5)[seed % 5], page_size=draw(1, 5))
    for _ in range(3):
        index = rows.some(draw(1, num_rows), draw(0, 3))
        tree = medusa_tensors(random_tree(random, draw(1, 64) if seed % 3 else draw(1, 8), draw(0, HEADS)), RANKS, CPU)
        if seed % 2 and tree.num_nodes > HEADS:
            tree = padded(tree)
        most = index.numel() * tree.num_nodes
        num_tokens = (index.numel(), draw(index.numel(), most), min(2 * index.numel(), most), most)[draw(0, 3)]
        wanted, found = rows.expand(index, tree, num_tokens)
        check_trees(found, wanted)

        target = rows.ints(0, VOCAB, num_tokens)
        old = OPS.settle(rows.reference, rows.reference_cache, wanted, target)
        new = settle(rows.state, rows.cache, found, target.to(DEVICE))
        check_outcome(new, old)
        rows.check_state()

        size = int(old.values[:, 0].sum()) + draw(0, 2) * draw(0, 1500)
        check_gained(pack(rows.state, found, new, size), OPS.pack(rows.reference, wanted, old, size))

        shape = (index.numel(), HEADS * RANKS)
        candidates, chances = rows.ints(0, VOCAB, *shape), rows.chances(*shape)
        OPS.propose(rows.reference, index, candidates, chances)
        propose(rows.state, *(x.to(DEVICE) for x in (index, candidates, chances)))
        rows.check_state()


def test_long_paths_are_accepted() -> None:
    """All nodes hold: every row moves on by the depth of its deepest."""
    rows = Rows(6, seed=1)
    rows.reference.drafts.fill_(1)
    rows.state.drafts.fill_(1)
    tree = medusa_tensors(random_tree(rows.random, 40, HEADS), RANKS, CPU)
    wanted, found = rows.expand(rows.some(6, 2), tree, 100)
    target = torch.ones(100, dtype=torch.int64)
    before = rows.state.cached_len.clone()
    old = OPS.settle(rows.reference, rows.reference_cache, wanted, target)
    new = settle(rows.state, rows.cache, found, target.to(DEVICE))
    check_outcome(new, old)
    assert torch.equal(new.values[:, 0], new.values[:, 2] + 1)
    assert int(new.values[:, 0].max()) == HEADS + 1
    assert not torch.equal(rows.state.cached_len, before)
    rows.check_state()


def test_many_rows() -> None:
    """More values than a program reads at once, among the rows before one and behind the gains; many of them equal."""
    rows = Rows(90, seed=2, levels=4)
    tree = medusa_tensors(random_tree(rows.random, 64, HEADS), RANKS, CPU)
    assert tree.num_nodes == 64
    wanted, found = rows.expand(rows.some(88, 8), tree, 4800)
    check_trees(found, wanted)


def test_roots_of_many_rows() -> None:
    for count in (1, 127, 128, 129, 300):
        rows = Rows(300, seed=3)
        wanted, found = rows.expand(rows.some(count, 2), medusa_tensors(ROOT, RANKS, CPU), count + 2)
        check_trees(found, wanted)


def test_64_nodes_of_one_row() -> None:
    """The last one's bit is the sign, in the tree's masks and in the row's."""
    rows = Rows(1, seed=4)
    tree = medusa_tensors(random_tree(rows.random, 64, HEADS), RANKS, CPU)
    wanted, found = rows.expand(rows.some(1, 0), tree, 64)
    check_trees(found, wanted)
    assert bool((found.inflight.bits < 0).any())


def test_chances_that_are_no_numbers_are_none() -> None:
    """As many tokens as were asked for, and every row's root among them, whatever the heads say."""
    rows = Rows(5, seed=5)
    rows.state.chances[:-1, 1::2] = float("nan")
    rows.reference.chances[:-1, 1::2] = 0.0
    tree = medusa_tensors(random_tree(rows.random, 30, HEADS), RANKS, CPU)
    wanted, found = rows.expand(rows.some(5, 0), tree, 90)
    check_trees(found, wanted)


def test_no_sizes() -> None:
    rows = Rows(3, seed=6)
    tree = medusa_tensors(Tree(((), (0,), (1,))), RANKS, DEVICE)
    index = rows.some(3, 0).to(DEVICE)
    assert expand(rows.state, index, tree, 7).gains is None


def test_heads_that_propose_nothing() -> None:
    """A model without heads: outcomes have no candidates."""
    outcomes = []
    for device, settled in ((CPU, OPS.settle), (DEVICE, settle)):
        state = RowState(2, 20, 4, 0, VOCAB, device)
        index = torch.tensor([1, 2], device=device)
        trees = OPS.expand(state, index, medusa_tensors(ROOT, RANKS, device), 2)
        cache = KVCache(torch.zeros(1, 2, 50, 4, 1, 2, device=device))
        outcomes.append(settled(state, cache, trees, torch.tensor([1, 2], device=device)))
        assert outcomes[-1].last.tolist() == [0, 1]
        assert state.cached_len.tolist() == [0, 1, 0]
    check_outcome(outcomes[1], outcomes[0])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
class TestOnGpu:
    @pytest.mark.parametrize(("num_rows", "num_tokens"), [(1, 40), (256, 1024), (512, 9000)])
    def test_in_a_graph(self, num_rows: int, num_tokens: int) -> None:
        """Recorded, and replayed for other rows."""
        rows = Rows(num_rows, seed=7, levels=0 if num_rows > 1 else 3, max_len=200)
        tree = padded(medusa_tensors(random_tree(rows.random, 64, HEADS), RANKS, DEVICE))
        index = torch.full((num_rows,), num_rows, device=DEVICE)
        target = torch.zeros(num_tokens, dtype=torch.int64, device=DEVICE)
        candidates = torch.zeros(num_rows, HEADS * RANKS, dtype=torch.int64, device=DEVICE)
        chances = torch.zeros(num_rows, HEADS * RANKS, device=DEVICE)
        sizes = torch.tensor([num_rows, num_tokens], device=DEVICE)

        def step() -> tuple[Trees, Outcome, Gained]:
            trees = expand(rows.state, index, tree, num_tokens, sizes)
            outcome = settle(rows.state, rows.cache, trees, target)
            gained = pack(rows.state, trees, outcome, num_tokens)
            propose(rows.state, index, candidates, chances)
            return trees, outcome, gained

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            trees, outcome, gained = step()
        on_cpu = TreeTensors(*(getattr(tree, name).cpu() for name in ("parent", "depth", "column", "bits", "path")))
        for _ in range(3):
            some = rows.some(num_rows - num_rows // 4, num_rows // 4)
            index.copy_(some)
            target.copy_(rows.ints(0, VOCAB, num_tokens))
            candidates.copy_(rows.ints(0, VOCAB, *candidates.shape))
            chances.copy_(rows.chances(*chances.shape))
            graph.replay()
            wanted = OPS.expand(rows.reference, some, on_cpu, num_tokens, sizes.cpu())
            check_trees(trees, wanted)
            old = OPS.settle(rows.reference, rows.reference_cache, wanted, target.cpu())
            check_outcome(outcome, old)
            check_gained(gained, OPS.pack(rows.reference, wanted, old, num_tokens))
            OPS.propose(rows.reference, some, candidates.cpu(), chances.cpu())
            rows.check_state()
