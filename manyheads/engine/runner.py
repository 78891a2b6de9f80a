"""Owns device memory and runs a step: expand, forward, draw, verify, keep, propose.

A step is a function of the plan and of the row state on the device; what the host learns from it (`StepResult`) is not
needed to launch the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from manyheads.attention.base import AttentionBackend, Group
from manyheads.attention.torch import TorchAttention
from manyheads.engine.decode import InFlight, Trees, advance, chain, expand, gain_sizes, last_token, settle, verify
from manyheads.engine.graphs import Recorder, StepGraphs
from manyheads.engine.prompt_graphs import PromptGraphs
from manyheads.engine.sampler import NodeBlock, draw, node_block
from manyheads.engine.state import RowState, has_penalties
from manyheads.engine.step import Chunk, Request, RowResult, StepPlan, StepResult
from manyheads.kv_cache import KVCache
from manyheads.models.llama import Llama
from manyheads.models.ops import has_kernels
from manyheads.request import TokenLogprobs
from manyheads.speculation.medusa.heads import MedusaHeads
from manyheads.speculation.tree import ROOT, tree_tensors
from manyheads.speculation.verify import Verdict, agrees, typical

NUM_RANKS = 10
"""Candidates kept of each head."""


@dataclass(eq=False)
class Report:
    """What a step says of R rows that drew tokens, on its way to the host."""

    requests: list[Request]
    values: Tensor  # [R, …] int64, as `advance` returns it
    width: int  # of emitted tokens and of paths
    known: set[int]  # the rows whose candidates were proposed for this step
    gains: Tensor | None = None  # [sizes] float32, `Trees.gains` at the sizes that the planner considers
    logits: dict[int, Tensor] = field(default_factory=dict)
    """By row, for requests that want log-probabilities: [n, V] float32, raw."""


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
                gained, brought, depth = values[i][:3]
                tokens = values[i][3 : 3 + gained]
                logprobs = None
                if i in report.logits:
                    path = torch.tensor(values[i][3 + width : 3 + width + gained], device=report.logits[i].device)
                    logprobs = _token_logprobs(report.logits[i][path], tokens, request.params.logprobs or 0)
                result.rows.append(RowResult(request, tokens, logprobs, depth, brought - 1))
                if i in report.known:
                    _count_hits(result, tokens, values[i][3 + 2 * width :], self._num_ranks)
            if report.gains is not None:
                result.gains[:] = [gain / len(report.requests) for gain in report.gains.tolist()]
        return result


class Runner:
    """One model on one device.

    Args:
        model: the base model.
        heads: its Medusa heads, or None.
        num_rows: most requests at once.
        max_len: longest sequence, in tokens.
        num_blocks, block_size: shape of the K/V cache; page 0 is the dummy page.
        kv_dtype: of the K/V cache, one of `kv_cache.CODES` or the model's; None is the model's.
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
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.heads = model, heads
        self.device, self.block_size = model.device, block_size
        config = model.config
        self.num_ranks = min(NUM_RANKS, heads.num_tokens if heads else config.vocab_size)
        self.max_len = max_len
        self.cache = KVCache.zeros(config.kv_shape, num_blocks, block_size, kv_dtype or model.dtype, self.device)
        self.attention = _attention(self.cache, model)
        num_heads = heads.num_heads if heads else 0
        self.state = RowState(num_rows, max_len, block_size, num_heads, self.num_ranks, config.vocab_size, self.device)
        self.recorder: Recorder | None = None
        self.graphs: StepGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None
        if has_kernels(self.device) and model.can_be_captured:
            self.recorder = Recorder()
            self.graphs, self.prompt_graphs = StepGraphs(self, self.recorder), PromptGraphs(self, self.recorder)

    @property
    def overlaps(self) -> bool:
        return self.device.type != "cpu"

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Run one step, after those launched before."""
        state = self.state
        state.admit(plan.admitted)
        state.sync_blocks([*(chunk.request for chunk in plan.chunks), *plan.decoding])
        reports: list[Report] = []
        decoding = plan.decoding
        if self.graphs is not None:
            served = [request for request in decoding if self.graphs.serves(request)]
            decoding = [request for request in decoding if not self.graphs.serves(request)]
            if served:
                trees, values = self.graphs.launch(served, plan.draft)
                reports.append(self._report(plan, served, trees, values))
        chunks = plan.chunks
        if chunks and self.prompt_graphs is not None and self.prompt_graphs.serves(chunks):
            reports += self._finish_chunks(plan, self.prompt_graphs.launch(chunks))
            chunks = []
        if chunks or decoding:
            reports += self._eager(plan, chunks, decoding)
        return self._pending(reports)

    def _eager(self, plan: StepPlan, prompts: list[Chunk], decoding: list[Request]) -> list[Report]:
        """Chunks of prompts, and rows that no graph serves."""
        state, start = self.state, 0
        chunks: list[InFlight] = []
        groups: list[Group] = []
        for chunk in prompts:
            request = chunk.request
            known = request.tokens[request.cached_len : request.cached_len + chunk.num_inflight]
            inflight = chain(state, state.tensor([request.row or 0]), state.tensor(known))
            chunks.append(inflight)
            groups.append(self.group(inflight, start, len(known), request.cached_len, is_chain=True))
            start = groups[-1].stop
        trees: Trees | None = None
        if decoding:
            # of about equal length side by side: attention may pad them to rectangles
            decoding = sorted(decoding, key=lambda request: request.max_cached_len)
            index = state.tensor([request.row or 0 for request in decoding])
            tree = tree_tensors(plan.draft.tree, self.num_ranks, self.device)
            sizes = gain_sizes(len(decoding), tree.num_nodes, self.device)
            trees = expand(state, index, tree, plan.draft.num_tokens(len(decoding)), sizes)
            groups.append(self.group(trees.inflight, start, tree.num_nodes, decoding[-1].max_cached_len))
        every = chunks + ([trees.inflight] if trees else [])
        position, slots, tokens = (
            torch.cat(parts) for parts in zip(*((x.position, x.slots, x.tokens) for x in every), strict=True)
        )
        self.attention.plan(groups, position, slots)
        hidden = self.model.forward(tokens, self.attention)

        reports = self._finish_chunks(plan, hidden) if prompts else []
        if trees is not None:
            logits = self.model.logits(hidden[start:])
            raw = {
                i: logits[trees.place[i]] for i, request in enumerate(decoding) if request.params.logprobs is not None
            }
            target, distributions = draw(logits, node_block(decoding, trees, state), state)
            if distributions:
                verdict = self._verify(trees, target, distributions)
                values, last = advance(state, self.cache, trees, verdict), last_token(trees, verdict)
            else:
                values, last = settle(state, self.cache, trees, target)
            self.propose(trees.inflight.index, hidden[start:][last], plan.draft.propose)
            reports.append(self._report(plan, decoding, trees, values, raw))
        return reports

    def _finish_chunks(self, plan: StepPlan, hidden: Tensor) -> list[Report]:
        """All tokens of chunks [T, hidden] are kept; prompts that are computed draw their first token."""
        state, chunks = self.state, plan.chunks
        moved = state.tensor([[chunk.request.row or 0, chunk.num_inflight] for chunk in chunks])
        state.cached_len.index_add_(0, moved[:, 0], moved[:, 1])
        ends = accumulate(chunk.num_inflight for chunk in chunks)
        finished = [(chunk.request, end - 1) for chunk, end in zip(chunks, ends, strict=True) if chunk.is_last]
        if not finished:
            return []
        requests = [request for request, _ in finished]
        last = hidden[state.tensor([at for _, at in finished])]
        index = state.tensor([request.row or 0 for request in requests])
        root = tree_tensors(ROOT, 1, self.device)
        order = torch.arange(len(requests), device=self.device)
        logits = self.model.logits(last)
        raw = {i: logits[i : i + 1].clone() for i, r in enumerate(requests) if r.params.logprobs is not None}
        block = NodeBlock(
            requests=requests,
            rows=index,
            row=order,
            depth=torch.zeros_like(order),
            max_depth=0,
            first=state.cached_len[index],
            node_tokens=state.drafts[index, :1],
            place=order[:, None],
            tree=root,
        )
        target, _ = draw(logits, block, state)
        state.drafts[index, 0] = target
        self.propose(index, last, plan.draft.propose)
        one, none = torch.ones_like(target), torch.zeros_like(target)
        values = torch.stack((one, one, none, target, none), dim=1)
        self._count_output(requests, index, values[:, 3:4], values[:, :1])
        return [Report(requests, self._sent(values), width=1, known=set(), logits=raw)]

    def group(
        self, inflight: InFlight, start: int, max_tokens: int, max_cached_len: int, is_chain: bool = False
    ) -> Group:
        """What attention needs to know of rows whose tokens begin at `start` of the step's."""
        index = inflight.index
        return Group(
            start=start,
            stop=start + inflight.tokens.shape[0],
            row_start=inflight.row_start,
            bits=inflight.bits,
            cached_len=self.state.cached_len[index],
            block_table=self.state.block_table[index],
            max_tokens=max_tokens,
            max_cached_len=max_cached_len,
            is_chain=is_chain,
        )

    def propose(self, index: Tensor, hidden: Tensor, wanted: bool) -> None:
        """The heads' candidates for rows' next trees, from the hidden states [R, hidden] of their last tokens."""
        if wanted and self.heads is not None:
            self.state.propose(index, *self.heads.candidates(hidden, self.num_ranks))
        elif self.heads is not None:
            self.state.forget_proposals(index)

    def _verify(self, trees: Trees, target: Tensor, distributions: dict[int, Tensor]) -> Verdict:
        """The verdict where some rows, those with `distributions`, have a lossy rule."""
        accepted = agrees(trees.node_tokens, target[trees.place], trees.tree)
        for i, distribution in distributions.items():
            row = slice(i, i + 1)
            index = trees.inflight.index[row]
            accepted[row] = typical(
                trees.node_tokens[row],
                distribution[None],
                trees.tree,
                self.state.epsilon[index],
                self.state.alpha[index],
            )
        return verify(trees, target, accepted)

    def _report(
        self,
        plan: StepPlan,
        requests: list[Request],
        trees: Trees,
        values: Tensor,
        logits: dict[int, Tensor] | None = None,
    ) -> Report:
        width = trees.tree.max_depth + 1
        self._count_output(requests, trees.inflight.index, values[:, 3 : 3 + width], values[:, :1])
        known: set[int] = set()
        if plan.draft.propose and self.heads is not None:
            known = {i for i, request in enumerate(requests) if request.has_candidates}
        # rows for which the heads have not spoken yet expect nothing, which says nothing
        said = trees.gains if len(known) == len(requests) else None
        gains = self._sent(said) if said is not None else None
        return Report(requests, self._sent(values[: len(requests)]), width, known, gains, logits or {})

    def _sent(self, tensor: Tensor) -> Tensor:
        """On its way to the host, at once: what a graph returns lies in memory that the next graph may compute in."""
        if self.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _pending(self, reports: list[Report]) -> PendingStep:
        if self.device.type == "cpu":
            return PendingStep(reports, self.num_ranks)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return PendingStep(reports, self.num_ranks, copied)

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


def _attention(cache: KVCache, model: Llama) -> AttentionBackend:
    if has_kernels(cache.device):
        from manyheads.attention.triton import TritonAttention

        return TritonAttention(cache, model.config.num_heads, model.config.rms_norm_eps, model.rope)
    return TorchAttention(cache, model.config.num_heads, model.config.rms_norm_eps, model.rope)


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
