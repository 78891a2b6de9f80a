"""Owns device memory and runs a step: expand, forward, draw, verify, keep, propose.

A step is a function of the plan and of the row state on the device; what the host learns from it (`StepResult`) is not
needed to launch the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manyheads.attention.base import AttentionBackend, Group
from manyheads.attention.torch import TorchAttention
from manyheads.engine.decode import InFlight, advance, expand, place
from manyheads.engine.graphs import StepGraphs
from manyheads.engine.sampler import NodeBlock, draw
from manyheads.engine.state import RowState, has_penalties
from manyheads.engine.step import Chunk, Request, RowResult, StepPlan, StepResult
from manyheads.medusa.heads import MedusaHeads
from manyheads.medusa.tree import ROOT, chain_tensors, tree_tensors
from manyheads.medusa.verify import Verdict, agrees, longest_path, typical
from manyheads.models.llama import Llama
from manyheads.models.ops import has_kernels
from manyheads.request import TokenLogprobs

NUM_RANKS = 10
"""Candidates kept of each head."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """Requests that bring the same tree, and their tokens from `start` on in the flat batch."""

    requests: list[Request]
    inflight: InFlight
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.inflight.tokens.numel()


@dataclass(eq=False)
class Report:
    """What a step says of R rows that drew tokens, on its way to the host."""

    requests: list[Request]
    values: Tensor  # as `advance` returns it
    width: int  # of emitted tokens and of paths
    depth: int  # of the tree
    known: set[int]  # the rows whose candidates were proposed for this step
    logits: dict[int, Tensor]  # by row, for requests that want log-probabilities: [n, V] float32, raw


class PendingStep:
    """A launched step.

    Args:
        copied: when the reports have reached the host; None if they were never anywhere else.
    """

    def __init__(self, reports: list[Report], num_ranks: int, copied: torch.cuda.Event | None = None) -> None:
        self._reports, self._num_ranks, self._copied = reports, num_ranks, copied

    def read(self) -> StepResult:
        if self._copied is not None:
            self._copied.synchronize()
        result = StepResult(rows=[], hits=[], trials=[])
        for report in self._reports:
            width = report.width
            values = report.values.tolist()
            for i, request in enumerate(report.requests):
                gained, emitted, path = values[i][0], values[i][1 : 1 + width], values[i][1 + width : 1 + 2 * width]
                tokens = emitted[:gained]
                logprobs = None
                if i in report.logits:
                    logits = report.logits[i][torch.tensor(path[:gained], device=report.logits[i].device)]
                    logprobs = _token_logprobs(logits, tokens, request.params.logprobs or 0)
                result.rows.append(RowResult(request, tokens, logprobs, report.depth))
                if i in report.known:
                    _count_hits(result, tokens, values[i][1 + 2 * width :], self._num_ranks)
        return result


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
        config = model.config
        self.num_ranks = min(NUM_RANKS, heads.num_tokens if heads else config.vocab_size)
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.max_len = max_len
        self.cache = torch.zeros(shape, dtype=model.dtype, device=self.device)
        self.attention = _attention(self.cache, model)
        num_heads = heads.num_heads if heads else 0
        self.state = RowState(num_rows, max_len, block_size, num_heads, self.num_ranks, config.vocab_size, self.device)
        self.graphs = StepGraphs(self) if has_kernels(self.device) else None

    @property
    def overlaps(self) -> bool:
        return self.device.type != "cpu"

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Run one step, after those launched before."""
        state = self.state
        state.admit(plan.admitted)
        state.sync_blocks([*(chunk.request for chunk in plan.chunks), *plan.speculating, *plan.single])
        reports: list[Report] = []
        if self.graphs is not None:
            plan, reports = self._replay(plan, self.graphs)
        if plan.num_inflight:
            reports += self._eager(plan)
        return self._pending(reports)

    def _replay(self, plan: StepPlan, graphs: StepGraphs) -> tuple[StepPlan, list[Report]]:
        """Launch graphs for the decoding rows that they serve; the rest of the plan."""
        reports: list[Report] = []
        left: list[list[Request]] = []
        for requests, tree in ((plan.speculating, plan.tree), (plan.single, ROOT)):
            served = [request for request in requests if graphs.serves(request)]
            left.append(requests if not served else [r for r in requests if not graphs.serves(r)])
            if served:
                index, values = graphs.launch(served, tree, plan.propose)
                width = self.state.num_heads + 1 if tree.max_depth else 1
                self._count_output(served, index, values[:, 1 : 1 + width], values[:, :1])
                reports.append(self._report(plan, served, values, width, tree.max_depth, {}))
        return replace(plan, speculating=left[0], single=left[1]), reports

    def _eager(self, plan: StepPlan) -> list[Report]:
        """A step of any rows."""
        state = self.state
        start = 0
        chunks: list[_Rows] = []
        decoding: list[_Rows] = []
        for chunk in plan.chunks:
            chunks.append(self._chunk(chunk, start))
            start = chunks[-1].stop
        for requests, tree in ((plan.speculating, plan.tree), (plan.single, ROOT)):
            if requests:
                # of about equal length side by side: attention may pad them to rectangles
                requests = sorted(requests, key=lambda request: request.max_cached_len)
                index = state.tensor([request.row or 0 for request in requests])
                inflight = expand(state, index, tree_tensors(tree, self.num_ranks, self.device))
                decoding.append(_Rows(requests, inflight, start))
                start = decoding[-1].stop

        hidden = self._forward([*chunks, *decoding])

        for rows in chunks:
            state.cached_len[rows.inflight.index] += rows.inflight.num_nodes
        finished = [rows for chunk, rows in zip(plan.chunks, chunks, strict=True) if chunk.is_last]
        if not finished and not decoding:
            return []
        # the nodes that draw a token: the last one of a finished prompt, all nodes of decoding rows
        drawing = hidden[decoding[0].start :] if decoding else hidden[:0]
        if finished:
            drawing = torch.cat((hidden[state.tensor([rows.stop - 1 for rows in finished])], drawing))
        logits = self.model.logits(drawing)
        blocks = _node_blocks(finished, decoding)
        raw = [
            {
                i: logits[block.start + i * block.num_nodes :][: block.num_nodes].clone()
                for i, request in enumerate(block.requests)
                if request.params.logprobs is not None
            }
            for block in blocks
        ]
        target, distributions = draw(logits, blocks, state)

        reports: list[Report] = []
        last_hidden: list[Tensor] = []
        for block, logits_of in zip(blocks, raw, strict=True):
            trees = next((r for r in decoding if r.requests is block.requests), None)
            drawn = target[block.start : block.stop].view(len(block.requests), -1)
            depth = 0
            if trees is None:  # finished prompts: every token is kept, one is gained
                state.drafts[block.rows, 0] = drawn[:, 0]
                last_hidden.append(drawing[block.start : block.stop])
                emitted = drawn
                gained = torch.ones_like(drawn)
                values = torch.cat((gained, drawn, torch.zeros_like(drawn)), dim=1)
            else:
                verdict = self._verify(trees, drawn, distributions)
                values = advance(state, self.cache, trees.inflight, verdict)
                first = torch.arange(0, drawn.numel(), block.num_nodes, device=self.device)
                last_hidden.append(drawing[block.start + first + verdict.last])
                emitted, gained = verdict.emitted, verdict.num_accepted[:, None]
                depth = trees.inflight.tree.max_depth
            self._count_output(block.requests, block.rows, emitted, gained)
            reports.append(self._report(plan, block.requests, values, depth + 1, depth, logits_of))
        if plan.propose and self.heads is not None:
            proposals = self.heads.candidates(torch.cat(last_hidden), self.num_ranks)
            state.candidates[torch.cat([block.rows for block in blocks])] = proposals.flatten(1)
        return reports

    def _report(
        self,
        plan: StepPlan,
        requests: list[Request],
        values: Tensor,
        width: int,
        depth: int,
        logits: dict[int, Tensor],
    ) -> Report:
        known: set[int] = set()
        if (plan.propose or depth) and values.shape[1] > 1 + 2 * width:
            known = {i for i, request in enumerate(requests) if request.has_candidates}
        return Report(requests, values, width, depth, known, logits)

    def _pending(self, reports: list[Report]) -> PendingStep:
        """Send the reports on their way to the host."""
        if self.device.type == "cpu":
            return PendingStep(reports, self.num_ranks)
        for report in reports:
            host = torch.empty(report.values.shape, dtype=report.values.dtype, pin_memory=True)
            report.values = host.copy_(report.values, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return PendingStep(reports, self.num_ranks, copied)

    def _chunk(self, chunk: Chunk, start: int) -> _Rows:
        """A row that computes known tokens: a chain."""
        request = chunk.request
        tokens = self.state.tensor([request.tokens[request.cached_len : request.cached_len + chunk.num_inflight]])
        index = self.state.tensor([request.row or 0])
        rows = place(self.state, index, chain_tensors(chunk.num_inflight, self.device), tokens)
        return _Rows([request], rows, start)

    def _forward(self, every: list[_Rows]) -> Tensor:
        """The hidden state of every in-flight token, [T, hidden]."""
        groups = [
            Group(
                start=rows.start + low * rows.inflight.num_nodes,
                num_rows=high - low,
                tree=rows.inflight.tree,
                cached_len=self.state.cached_len[rows.inflight.index[low:high]],
                block_table=self.state.block_table[rows.inflight.index[low:high]],
                max_cached_len=rows.requests[high - 1].max_cached_len,
            )
            for rows in every
            for low, high in _length_classes([request.max_cached_len for request in rows.requests])
        ]
        tokens, position, slots = (
            torch.cat([x.flatten() for x in parts])
            for parts in zip(*((r.inflight.tokens, r.inflight.position, r.inflight.slots) for r in every), strict=True)
        )
        self.attention.plan(groups, position, slots)
        return self.model.forward(tokens, self.attention)

    def _verify(self, rows: _Rows, target: Tensor, distributions: dict[int, Tensor]) -> Verdict:
        inflight = rows.inflight
        accepted = agrees(inflight.tokens, target, inflight.tree)
        for i, request in enumerate(rows.requests):
            if request.row in distributions:
                one = slice(i, i + 1)
                index = inflight.index[one]
                accepted[one] = typical(
                    inflight.tokens[one],
                    distributions[request.row][None],
                    inflight.tree,
                    self.state.epsilon[index],
                    self.state.alpha[index],
                )
        return longest_path(inflight.tokens, target, accepted, inflight.tree, lossy=bool(distributions))

    def _count_output(self, requests: list[Request], rows: Tensor, emitted: Tensor, gained: Tensor) -> None:
        """Add what rows with penalties gained to their counts."""
        with_penalties = [i for i, request in enumerate(requests) if has_penalties(request)]
        if not with_penalties:
            return
        assert self.state.output_count is not None
        which = self.state.tensor(with_penalties)
        emitted, gained = emitted[which], gained[which]
        counted = torch.arange(emitted.shape[1], device=self.device) < gained
        at = (rows[which, None].expand_as(emitted), emitted)
        self.state.output_count.index_put_(at, counted.to(torch.int32), accumulate=True)


def _attention(cache: Tensor, model: Llama) -> AttentionBackend:
    if has_kernels(cache.device):
        from manyheads.attention.triton import TritonAttention

        return TritonAttention(cache, model.config, model.rope)
    return TorchAttention(cache, model.config, model.rope)


def _node_blocks(finished: list[_Rows], decoding: list[_Rows]) -> list[NodeBlock]:
    blocks: list[NodeBlock] = []
    start = 0
    if finished:
        rows = [r.inflight for r in finished]
        root = tree_tensors(ROOT, 1, rows[0].index.device)
        blocks.append(
            NodeBlock(
                requests=[r.requests[0] for r in finished],
                start=0,
                rows=torch.cat([r.index for r in rows]),
                position=torch.cat([r.position[:, -1:] for r in rows]) + 1,
                tokens=torch.cat([r.tokens[:, -1:] for r in rows]),
                tree=root,
            )
        )
        start = len(finished)
    for r in decoding:
        inflight = r.inflight
        blocks.append(
            NodeBlock(r.requests, start, inflight.index, inflight.position + 1, inflight.tokens, inflight.tree)
        )
        start += inflight.tokens.numel()
    return blocks


def _count_hits(result: StepResult, tokens: list[int], candidates: list[int], num_ranks: int) -> None:
    """How good a row's proposals turned out, for the planner: each head's candidates against what came out."""
    for depth, token in enumerate(tokens):
        ranks = candidates[depth * num_ranks : (depth + 1) * num_ranks]
        if not ranks:
            return  # more tokens than heads
        if depth == len(result.trials):
            result.hits.append([0] * num_ranks)
            result.trials.append(0)
        result.trials[depth] += 1
        if token in ranks:
            result.hits[depth][ranks.index(token)] += 1


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
