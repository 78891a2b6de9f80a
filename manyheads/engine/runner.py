"""Owns device memory and runs a step: expand, forward, target, verify, compact, propose.

A step is a function of the plan and of the row state on the device; what the host learns from it (`StepResult`) is not
needed to launch the next one's forward pass, only to plan it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.attention.cpu import CpuAttention
from manyheads.engine.sampler import NodeBlock, draw
from manyheads.engine.state import RowState, has_penalties
from manyheads.engine.step import Request, RowResult, StepPlan, StepResult
from manyheads.medusa.heads import MedusaHeads
from manyheads.medusa.tree import ROOT, TreeTensors, chain_tensors, tree_tensors
from manyheads.medusa.verify import Verdict, agrees, longest_path, typical
from manyheads.models.llama import Llama
from manyheads.request import TokenLogprobs

NUM_RANKS = 10
"""Candidates kept of each head."""


@dataclass(eq=False)
class _Rows:
    """R rows that bring the same tree of n nodes: flat tokens `start … start + R·n`."""

    requests: list[Request]
    index: Tensor  # [R] int64, slots of the row state
    tree: TreeTensors
    tokens: Tensor  # [R, n] int64
    position: Tensor  # [R, n] int64, of the tokens themselves
    slots: Tensor  # [R, n] int64, cache slots
    start: int = 0

    @property
    def num_nodes(self) -> int:
        return self.tree.num_nodes

    @property
    def num_inflight(self) -> int:
        return self.tokens.numel()


class Runner:
    """One model on one device.

    Args:
        model: the base model.
        heads: its Medusa heads, or None.
        num_rows: most requests at once.
        max_len: longest sequence, in tokens.
        num_blocks, block_size: shape of the K/V cache; page 0 is the dummy page.
    """

    def __init__(
        self,
        model: Llama,
        heads: MedusaHeads | None,
        *,
        num_rows: int,
        max_len: int,
        num_blocks: int,
        block_size: int,
    ) -> None:
        self.model, self.heads = model, heads
        self.device, self.block_size = model.device, block_size
        self.num_ranks = min(NUM_RANKS, heads.num_tokens if heads else model.config.vocab_size)
        config = model.config
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.cache = torch.zeros(shape, dtype=model.dtype, device=self.device)
        self.attention = CpuAttention(self.cache, config.num_heads)
        num_heads = heads.num_heads if heads else 0
        self.state = RowState(num_rows, max_len, block_size, num_heads, self.num_ranks, config.vocab_size, self.device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step."""
        state = self.state
        for request in plan.admitted:
            state.assign(request)
        chunks = [self._chunk_rows(chunk.request, chunk.num_inflight) for chunk in plan.chunks]
        decoding = [
            self._tree_rows(requests, tree_tensors(tree, self.num_ranks, self.device))
            for requests, tree in ((plan.speculating, plan.tree), (plan.single, ROOT))
            if requests
        ]
        every = [*chunks, *decoding]
        start = 0
        for rows in every:
            rows.start = start
            start += rows.num_inflight

        hidden = self._forward(every)

        # the nodes that draw a token: the last one of a finished prompt, all nodes of decoding rows
        finished = [rows for chunk, rows in zip(plan.chunks, chunks, strict=True) if chunk.is_last]
        for chunk, rows in zip(plan.chunks, chunks, strict=True):
            state.cached_len[rows.index] += chunk.num_inflight
        if not finished and not decoding:
            return StepResult(rows=[], hits=[], trials=[])
        last_nodes = [rows.start + rows.num_nodes - 1 for rows in finished]
        decode_start = decoding[0].start if decoding else start
        drawing = hidden[decode_start:]
        if last_nodes:
            drawing = torch.cat((hidden[torch.tensor(last_nodes, device=self.device)], drawing))
        logits = self.model.logits(drawing)

        blocks = self._node_blocks(finished, decoding)
        raw = {
            id(request): logits[block.start + i * block.num_nodes :][: block.num_nodes].clone()
            for block in blocks
            for i, request in enumerate(block.requests)
            if request.params.logprobs is not None
        }
        target, distributions = draw(logits, blocks, state)

        result = StepResult(rows=[], hits=[], trials=[])
        hidden_of_last: list[Tensor] = []
        rows_of_last: list[Tensor] = []
        for block in blocks:
            tree_rows = next((r for r in decoding if r.requests is block.requests), None)
            drawn = target[block.start : block.stop].view(len(block.requests), -1)
            if tree_rows is None:  # finished prompts: every token is kept, one is gained
                state.last_token[block.rows] = drawn[:, 0]
                hidden_of_last.append(drawing[block.start : block.stop])
                emitted = [[token] for token in drawn[:, 0].tolist()]
                paths = [[0]] * len(emitted)
                depth = 0
            else:
                verdict = self._verify(tree_rows, drawn, distributions)
                if plan.propose or tree_rows.num_nodes > 1:
                    self._count_hits(tree_rows, verdict, result)
                self._keep(tree_rows, verdict)
                last = torch.arange(len(tree_rows.requests), device=self.device) * tree_rows.num_nodes + verdict.last
                hidden_of_last.append(drawing[block.start : block.stop][last])
                lengths = verdict.num_accepted.tolist()
                emitted = [e[:n] for e, n in zip(verdict.emitted.tolist(), lengths, strict=True)]
                paths = verdict.path.tolist()
                depth = int(tree_rows.tree.path.shape[1]) - 1
            rows_of_last.append(block.rows)
            for request, tokens, path in zip(block.requests, emitted, paths, strict=True):
                row = RowResult(request, tokens, drafted_depth=depth)
                if request.params.logprobs is not None:
                    nodes = raw[id(request)][path[: len(tokens)]]
                    row.logprobs = _token_logprobs(nodes, tokens, request.params.logprobs)
                if has_penalties(request):
                    assert request.row is not None
                    state.count_output(request.row, tokens)
                result.rows.append(row)
        if plan.propose and self.heads is not None:
            proposals = self.heads.candidates(torch.cat(hidden_of_last), self.num_ranks)
            state.candidates[torch.cat(rows_of_last)] = proposals
        return result

    def _chunk_rows(self, request: Request, num_tokens: int) -> _Rows:
        """A row that computes `num_tokens` known tokens: a chain."""
        first = request.cached_len
        tokens = torch.tensor(request.tokens[first : first + num_tokens], device=self.device)
        index = torch.tensor([request.row], device=self.device)
        return self._rows([request], index, chain_tensors(num_tokens, self.device), tokens[None])

    def _tree_rows(self, requests: list[Request], tree: TreeTensors) -> _Rows:
        """Rows whose trees are their last token and their heads' candidates."""
        # of about equal length side by side: attention pads them to rectangles
        requests = sorted(requests, key=lambda request: request.cached_len)
        index = torch.tensor([request.row for request in requests], device=self.device)
        tokens = self.state.last_token[index, None]
        if tree.num_nodes > 1:
            below = self.state.candidates[index].flatten(1)[:, tree.candidate]
            tokens = torch.cat((tokens, below), dim=1)
        return self._rows(requests, index, tree, tokens)

    def _rows(self, requests: list[Request], index: Tensor, tree: TreeTensors, tokens: Tensor) -> _Rows:
        for request in requests:
            self.state.sync_blocks(request)
        cached = self.state.cached_len[index, None]  # [R, 1]
        slot = cached + torch.arange(tree.num_nodes, device=self.device)
        page = self.state.block_table[index].gather(1, slot // self.block_size)
        return _Rows(
            requests=requests,
            index=index,
            tree=tree,
            tokens=tokens,
            position=cached + tree.depth,
            slots=page * self.block_size + slot % self.block_size,
        )

    def _forward(self, every: list[_Rows]) -> Tensor:
        """The hidden state of every in-flight token, [T, hidden]."""
        groups = [
            Group(
                start=rows.start + low * rows.num_nodes,
                num_rows=high - low,
                num_nodes=rows.num_nodes,
                ancestors=rows.tree.ancestors,
                cached_len=self.state.cached_len[rows.index[low:high]],
                block_table=self.state.block_table[rows.index[low:high]],
                max_cached_len=rows.requests[high - 1].cached_len,
            )
            for rows in every
            for low, high in _length_classes([request.cached_len for request in rows.requests])
        ]
        self.attention.plan(groups, torch.cat([rows.slots.flatten() for rows in every]))
        tokens = torch.cat([rows.tokens.flatten() for rows in every])
        position = torch.cat([rows.position.flatten() for rows in every])
        return self.model.forward(tokens, position, self.attention)

    def _node_blocks(self, finished: list[_Rows], decoding: list[_Rows]) -> list[NodeBlock]:
        blocks: list[NodeBlock] = []
        start = 0
        if finished:
            blocks.append(
                NodeBlock(
                    requests=[rows.requests[0] for rows in finished],
                    start=0,
                    rows=torch.cat([rows.index for rows in finished]),
                    position=torch.cat([rows.position[:, -1:] for rows in finished]) + 1,
                    tokens=torch.cat([rows.tokens[:, -1:] for rows in finished]),
                    ancestors=torch.ones(1, 1, dtype=torch.bool, device=self.device),
                )
            )
            start = len(finished)
        for rows in decoding:
            blocks.append(
                NodeBlock(rows.requests, start, rows.index, rows.position + 1, rows.tokens, rows.tree.ancestors)
            )
            start += rows.num_inflight
        return blocks

    def _verify(self, rows: _Rows, target: Tensor, distributions: dict[int, Tensor]) -> Verdict:
        accepted = agrees(rows.tokens, target, rows.tree)
        for i, request in enumerate(rows.requests):
            if request.row in distributions:
                one = slice(i, i + 1)
                index = rows.index[one]
                accepted[one] = typical(
                    rows.tokens[one],
                    distributions[request.row][None],
                    rows.tree,
                    self.state.epsilon[index],
                    self.state.alpha[index],
                )
        return longest_path(rows.tokens, target, accepted, rows.tree)

    def _count_hits(self, rows: _Rows, verdict: Verdict, result: StepResult) -> None:
        """How good the proposals of these rows turned out, for the planner."""
        known = [i for i, request in enumerate(rows.requests) if request.has_candidates]
        if not known:
            return
        index = torch.tensor(known, device=self.device)
        candidates = self.state.candidates[rows.index[index]]  # [R, H, K]
        emitted = verdict.emitted[index][:, : candidates.shape[1]]  # [R, min(D + 1, H)]
        depths = emitted.shape[1]
        valid = torch.arange(depths, device=self.device) < verdict.num_accepted[index, None]
        hit = (candidates[:, :depths] == emitted[..., None]) & valid[..., None]
        for d, (hits, trials) in enumerate(zip(hit.sum(0).tolist(), valid.sum(0).tolist(), strict=True)):
            if d == len(result.trials):
                result.hits.append([0] * self.num_ranks)
                result.trials.append(0)
            result.hits[d] = [a + b for a, b in zip(result.hits[d], hits, strict=True)]
            result.trials[d] += trials

    def _keep(self, rows: _Rows, verdict: Verdict) -> None:
        """Move the accepted nodes' K/V to the end of the row's prefix, and advance the row."""
        depth = torch.arange(verdict.path.shape[1], device=self.device)
        moved = (verdict.path != depth) & (depth < verdict.num_accepted[:, None])
        if rows.num_nodes > 1 and bool(moved.any()):
            source = rows.slots.gather(1, verdict.path)[moved]
            destination = rows.slots[:, : depth.numel()][moved]
            flat = self.cache.flatten(2, 3)
            flat[:, :, destination] = flat[:, :, source]
        self.state.cached_len[rows.index] += verdict.num_accepted
        bonus = verdict.emitted.gather(1, verdict.num_accepted[:, None] - 1)[:, 0]
        self.state.last_token[rows.index] = bonus


def _length_classes(lengths: list[int]) -> list[tuple[int, int]]:
    """Cut rows, sorted by length, where padding to the longest would more than double a row: (first, end) pairs."""
    classes: list[tuple[int, int]] = []
    end = len(lengths)
    while end > 0:
        first = end
        while first > 0 and max(lengths[first - 1], 128) * 2 >= lengths[end - 1]:
            first -= 1
        classes.append((first, end))
        end = first
    return classes[::-1]


def _token_logprobs(logits: Tensor, tokens: list[int], num_top: int) -> list[TokenLogprobs]:
    """From raw logits [m, V], where m tokens were chosen."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = ((logprobs > chosen).sum(dim=1) + 1).tolist()
    values, ids = logprobs.topk(num_top, dim=-1)
    return [
        TokenLogprobs(token, logprob, rank, list(zip(top_ids, top_values, strict=True)))
        for token, logprob, rank, top_ids, top_values in zip(
            tokens, chosen[:, 0].tolist(), ranks, ids.tolist(), values.tolist(), strict=True
        )
    ]
