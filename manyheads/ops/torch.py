"""Every operation in torch: what runs on a CPU, the fallback elsewhere, and what the kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.attention.base import Heads
from manyheads.attention.torch import TorchAttention, rms_norm
from manyheads.batch import Gained, InFlight, Outcome, RowState, Trees, TreeTensors
from manyheads.kv_cache import KVCache
from manyheads.ops import blocks, experts, guesses, integer, products
from manyheads.ops.adapters import Adapters, TorchAdapters
from manyheads.ops.base import GroupedProduct, Product
from manyheads.ops.experts import LoopedProduct
from manyheads.ops.noise import LEAST, MOST, gumbel, gumbel_of, streams
from manyheads.quantization.base import CodedScheme, CodedWeight, Weight
from manyheads.quantization.bitsandbytes import BitsandbytesWeight
from manyheads.quantization.blocks import BlockWeight
from manyheads.quantization.int4 import Int4Weight
from manyheads.quantization.int8 import Int8Weight

FEW_BEST = 64
"""Logits of a row that are sorted at first to find what top-k and top-p leave."""


class TorchOps:
    """`ops.base.Ops`, some fifty operations of torch where kernels need a few launches."""

    records = False
    noise_bytes = 36  # hashes in int64, at most four at once, and what becomes of them
    cutoff_bytes = 28  # where all of a row have to be sorted
    library_bytes = 0
    widened_rows = 0
    gathers_pages = True

    def watch(self, tell: Callable[[str], None]) -> None:
        """Nothing is compiled."""

    def attention(self, cache: KVCache, heads: Heads) -> TorchAttention:
        return TorchAttention(cache, heads)

    def product(self, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Product:
        if isinstance(weight, BitsandbytesWeight):
            return products.LibraryProduct(weight, bias)
        if isinstance(weight, CodedWeight):
            # codes of 8 bits are float16 numbers, and a row of them has one scale
            if products.is_packed(dtype, weight.device) and weight.scheme.bits == 8:
                is_large = weight.values.numel() >= integer.LEAST_SIZE
                if isinstance(weight, Int8Weight) and is_large and integer.is_exact():
                    return integer.IntegerProduct(weight, bias)
                if products.has_half_products():
                    return products.CodesProduct(weight, bias)
            in_blocks = BlockWeight.of_int4(weight) if isinstance(weight, Int4Weight) else None
            weight = in_blocks or weight.dequantize(dtype)  # once, into one of the forms below
        if isinstance(weight, BlockWeight):
            if blocks.serves(dtype, weight.device):
                return blocks.BlockProduct(weight, bias)
            weight = weight.dequantize(dtype)
        assert isinstance(weight, Tensor)
        if products.is_packed(weight.dtype, weight.device):
            if torch.equal(weight.half().float(), weight) and products.has_half_products():
                return products.HalfProduct(weight, bias)
            if torch._C._has_mkldnn:
                return products.OneDnnProduct(weight, bias)
        return products.PlainProduct(weight, bias)

    def grouped(self, weights: Sequence[Weight], bias: Tensor | None, dtype: torch.dtype) -> GroupedProduct:
        biases = [None] * len(weights) if bias is None else list(bias.chunk(len(weights)))
        return LoopedProduct([self.product(*each, dtype) for each in zip(weights, biases, strict=True)])

    route = staticmethod(experts.route)

    def adapters(self, count: int) -> Adapters:
        return TorchAdapters(count)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def norm_pairs(
        self,
        first: Tensor,
        first_at: Tensor | None,
        first_weight: Tensor,
        second: Tensor,
        second_at: Tensor | None,
        second_weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        first = first if first_at is None else F.embedding(first_at, first)
        second = second if second_at is None else F.embedding(second_at, second)
        normed = self.rms_norm(first, first_weight, eps), self.rms_norm(second, second_weight, eps)
        return torch.cat(normed, dim=-1), second

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        scheme: CodedScheme | None = None,
        multiplier: float = 1.0,
    ) -> Tensor:
        return rms_norm(residual.add_(x, alpha=multiplier), weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def add_layer_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        scheme: CodedScheme | None = None,
        multiplier: float = 1.0,
    ) -> Tensor:
        return F.layer_norm(residual.add_(x, alpha=multiplier), weight.shape, weight, bias, eps)

    def silu_mul(self, gate_up: Tensor, scheme: CodedScheme | None = None) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def gelu_mul(self, gate_up: Tensor, scheme: CodedScheme | None = None) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def clamped_swiglu(
        self, gate_up: Tensor, scheme: CodedScheme | None = None, *, alpha: float, limit: float
    ) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=limit)
        return torch.sigmoid(alpha * gate).mul_(gate).mul_(up.clamp(-limit, limit).add_(1))

    def gelu(self, x: Tensor, scheme: CodedScheme | None = None) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def head_input(self, hidden: Tensor, block_out: Tensor) -> Tensor:
        return hidden[:, None] + F.silu(block_out)

    def argmax(self, logits: Tensor) -> Tensor:
        most, tokens = logits.max(dim=-1)
        return tokens.masked_fill_(~most.isfinite(), -1)

    def cutoff(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        width, most = logits.shape[-1], logits.amax(dim=-1)
        mass = 1 / logits.softmax(dim=-1).amax(dim=-1)  # of exp(x - most)
        has_k, has_p = top_k < width, top_p < 1
        size = FEW_BEST
        while True:  # the answer is among the best few, most of the time, and to sort all takes long
            size = min(size, width)
            best = logits.topk(size, dim=-1).values
            cut = best.gather(1, top_k.clamp(max=size)[:, None] - 1)[:, 0].masked_fill_(~has_k, -torch.inf)
            is_known = ~has_k | (best[:, -1] < cut)
            weights = torch.where(best >= cut[:, None], (best - most[:, None]).exp_(), 0.0)
            share = top_p * torch.where(has_k, weights.sum(dim=-1), mass)
            is_left = (weights.cumsum(dim=-1) - weights < share[:, None]) & (weights > 0)
            is_known &= ~has_p | has_k | ~is_left[:, -1]
            if size == width or bool((is_known | ~most.isfinite()).all()):
                break
            size *= 8
        last = best.gather(1, is_left.sum(dim=-1, keepdim=True).clamp_(min=1) - 1)[:, 0]
        cut = torch.where(has_p, torch.maximum(cut, last), cut)
        cut = torch.where(min_p > 0, torch.maximum(cut, most + min_p.log()), cut)
        return torch.minimum(cut, most)

    def draw(
        self,
        logits: Tensor,
        temperature: Tensor,
        seed: Tensor,
        first: Tensor,
        row: Tensor,
        depth: Tensor,
        max_depth: int,
    ) -> Tensor:
        greedy, temperature = self.argmax(logits), temperature[row]
        draws = (temperature > 0) & (greedy >= 0)
        scaled = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
        # noise can lift a token by so much over the most probable one; mostly few can be drawn, after top-p very few
        least = (scaled.amax(dim=-1) - (MOST - LEAST)).masked_fill_(~draws, torch.inf)
        node, token = (scaled >= least[:, None]).nonzero().unbind(1)
        if 2 * len(node) > len(first) * (max_depth + 1) * logits.shape[-1]:
            noise = gumbel(seed, first[:, None] + torch.arange(max_depth + 1, device=first.device), logits.shape[-1])
            drawn = (scaled + noise[row, depth]).argmax(dim=-1)
            return torch.where(draws, drawn, greedy)
        worth = scaled[node, token] + gumbel_of(streams(seed[row], first[row] + depth)[node], token)
        most = worth.new_full((len(logits),), -torch.inf).scatter_reduce_(0, node, worth, "amax")
        best = torch.where(worth == most[node], token, logits.shape[-1])  # of equals the first
        drawn = token.new_full((len(logits),), logits.shape[-1]).scatter_reduce_(0, node, best, "amin")
        return torch.where(draws, drawn, greedy)

    def best(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        values, tokens = logits.topk(count, dim=-1)
        return tokens, (values.float() - logits.float().logsumexp(dim=-1, keepdim=True)).exp_().nan_to_num_(0.0)

    def expand(
        self, state: RowState, index: Tensor, tree: TreeTensors, num_tokens: int, sizes: Tensor | None = None
    ) -> Trees:
        node_tokens = state.drafts[index[:, None], tree.column]
        row_slots = state.slots(index[:, None], state.cached_len[index][:, None] + tree.order)
        if tree.num_nodes == 1:
            return _roots(state, index, tree, node_tokens, row_slots)
        num_rows, num_nodes = node_tokens.shape
        value = _values(state.chances[index[:, None], tree.column], tree)
        # stable: of equals the earlier, so that no node comes before its parent
        ordered, order = value.flatten().sort(descending=True, stable=True)
        ordered[:num_rows] = 0.0  # the roots
        gains = None if sizes is None else ordered.cumsum(0)[sizes - 1]
        ids = order[:num_tokens].sort().values
        chosen = torch.zeros(num_rows * num_nodes, dtype=torch.bool, device=index.device).index_fill_(0, ids, True)
        chosen = chosen.view(num_rows, num_nodes)
        upto = chosen.cumsum(1)  # [R, n]
        offset = upto - 1
        row, node = ids // num_nodes, ids % num_nodes
        row_start = torch.zeros(num_rows + 1, dtype=torch.int32, device=index.device)
        row_start[1:] = upto[:, -1].cumsum(0)
        depth = tree.depth[node]
        above = offset[row[:, None], tree.path[node]]  # [T, D + 1], of the tokens on the path, padded with the last
        on_path = torch.arange(above.shape[1], device=index.device) <= depth[:, None]
        inflight = InFlight(
            index=index,
            row_start=row_start,
            tokens=node_tokens[row, node],
            position=state.cached_len[index][row] + depth,
            slots=row_slots[row, offset[row, node]],
            bits=(on_path.to(torch.int64) << above).sum(1),
        )
        # a node without a chance only fills the step up
        return Trees(inflight, tree, node_tokens, chosen & (value > 0), offset, row, node, row_slots, gains)

    def settle(
        self, state: RowState, cache: KVCache, trees: Trees, target: Tensor, accepted: Tensor | None = None
    ) -> Outcome:
        index, tree = trees.inflight.index, trees.tree
        every = target[trees.place]  # [R, n]; what stands at nodes that were not taken is never looked at
        if accepted is None:
            # a node is accepted if it holds  what the target drew at its parent
            holds = trees.node_tokens == every[:, tree.parent]
            last, path, emitted = longest_path(trees.node_tokens, every, holds & trees.taken, tree)
        else:
            last, path, emitted = longest_path(trees.node_tokens, every, accepted & trees.taken, tree, lossy=True)
        gained = tree.depth[last] + 1
        if tree.num_nodes > 1:
            self.compact(cache, trees, path, gained)
            brought, deepest = trees.taken.sum(1), torch.where(trees.taken, tree.depth, 0).amax(1)
        else:
            brought, deepest = gained, last
        values = torch.cat(
            (torch.stack((gained, brought, deepest), dim=1), emitted, path, state.candidates[index]), dim=1
        )
        state.cached_len.index_add_(0, index, gained)
        state.cached_len[state.num_rows] = 0
        state.drafts[index, 0] = emitted.gather(1, gained[:, None] - 1)[:, 0].clamp_(min=0)
        return Outcome(values, trees.place.gather(1, last[:, None])[:, 0])

    def compact(self, cache: KVCache, trees: Trees, path: Tensor, gained: Tensor) -> None:
        """Move the K/V of an accepted path's nodes [R, D + 1] to the first slots of the row's in-flight tokens."""
        places = trees.offset.gather(1, path)  # never smaller than depths
        depth = torch.arange(path.shape[1], device=cache.device)
        moved = (places != depth) & (depth < gained[:, None])
        if bool(moved.any()):
            row, to = moved.nonzero(as_tuple=True)  # paths may have room for more depths than there are nodes
            cache.move(trees.row_slots[row, places[row, to]], trees.row_slots[row, to])

    def pack(self, state: RowState, trees: Trees, outcome: Outcome, size: int) -> Gained:
        index, width = trees.inflight.index, trees.tree.max_depth + 1
        rows = index.shape[0]
        gained, path = outcome.values[:, 0], outcome.values[:, 3 + width : 3 + 2 * width]
        ends = gained.cumsum(0)
        at = torch.arange(size, device=index.device)
        row = torch.searchsorted(ends, at, right=True)
        is_real, row = row < rows, row.clamp(max=rows - 1)
        depth = (at - ends[row] + gained[row]).clamp(max=width - 1)
        first = (state.cached_len[index] - gained).clamp(min=0)  # the dummy row gains tokens and stays where it is
        position = first[row] + depth
        following = outcome.values[row, 3 + depth].clamp(min=0)
        place = trees.place[row, torch.where(is_real, path[row, depth], 0)]
        numbers = torch.stack((following, position, state.slots(index[row], position), place))
        following, position, slots, place = torch.where(is_real, numbers, 0).unbind()
        inflight = InFlight(
            index=F.pad(index, (0, 1), value=state.num_rows),
            row_start=torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), size))).to(torch.int32),
            tokens=following,
            position=position,
            slots=slots,
            bits=torch.where(is_real, (2 << depth) - 1, 1),
        )
        return Gained(inflight, F.pad(first, (0, 1)), place, ends - 1)

    begin_guesses = staticmethod(guesses.begin_guesses)
    open_nodes = staticmethod(guesses.open_nodes)
    offer_children = staticmethod(guesses.offer_children)

    def propose(self, state: RowState, index: Tensor, candidates: Tensor, chances: Tensor) -> None:
        state.drafts[index, 1:] = candidates
        state.chances[index, 1:] = chances * state.speculative[index, None]


def _roots(state: RowState, index: Tensor, tree: TreeTensors, node_tokens: Tensor, row_slots: Tensor) -> Trees:
    """`TorchOps.expand` for rows that bring their last token alone."""
    rows = torch.arange(index.shape[0], device=index.device)
    nothing = torch.zeros_like(rows)
    starts = torch.arange(index.shape[0] + 1, device=index.device, dtype=torch.int32)
    position = state.cached_len[index]
    inflight = InFlight(index, starts, node_tokens[:, 0], position, row_slots[:, 0], nothing + 1)
    taken = torch.ones_like(node_tokens, dtype=torch.bool)
    return Trees(inflight, tree, node_tokens, taken, nothing[:, None], rows, nothing, row_slots, None)


def _values(chance: Tensor, tree: TreeTensors) -> Tensor:
    """How probable each node is [R, n], from its chance once its parent holds; 2 for roots, which come first."""
    value = chance
    for _ in range(tree.max_depth - 1):
        value = chance * value[:, tree.parent]  # each turn takes in an ancestor more; the root's chance is 1
    value[:, 0] = 2.0
    return value


def longest_path(
    tokens: Tensor, target: Tensor, accepted: Tensor, tree: TreeTensors, *, lossy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The longest path from the root whose every node is accepted; of equals, the earlier (more probable) node's.

    Args:
        tokens: [R, n] int64.
        target: [R, n] int64; the one at the end of the path is the row's next root.
        accepted: [R, n] bool, each node on its own; the root counts as accepted whatever it says.
        lossy: whether a node may be accepted though the target drew something else at its parent.

    Returns:
        [R] int64, the deepest accepted node; [R, D + 1] int64, the nodes of the path by depth, padded with the last
        one; and [R, D + 1] int64, the tokens that the row gains, of which one more holds than the path is deep.
    """
    if tree.max_depth == 0:  # a root alone: all of the below would say so, at the price of a dozen operations
        nothing = torch.zeros_like(target[:, 0])
        return nothing, nothing[:, None], target
    # a node is reached if all of its ancestors (itself included) were accepted
    held = (accepted.to(torch.int64) << tree.order).sum(dim=1) | 1  # [R], a bit for each node; the root's is set
    reached = (tree.bits & ~held[:, None]) == 0  # [R, n]
    last = torch.where(reached, tree.depth, -1).argmax(dim=1)  # argmax takes the first of equals
    path = tree.path[last]  # [R, D + 1]
    emitted = target.gather(1, path)
    if lossy:
        below = tokens.gather(1, torch.cat((path[:, 1:], path[:, -1:]), dim=1))  # token at depth d + 1 of the path
        above_end = torch.arange(path.shape[1], device=tokens.device) < tree.depth[last, None]
        emitted = torch.where(above_end, below, emitted)
    return last, path, emitted
