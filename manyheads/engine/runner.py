"""Owns device memory and runs a step over the rows that a plan names.

A step is a function of the plan and of the row state on the device; what the host learns from it (`StepResult`) is not
needed to launch the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from manyheads.batch import RowState, Trees, TreeTensors
from manyheads.engine.chains import chunk_chain, told_of
from manyheads.engine.graphs import Recorder
from manyheads.engine.guesses import TreeGuesses
from manyheads.engine.logprobs import Columns, of_rows
from manyheads.engine.masks import Masks, TreeWalk
from manyheads.engine.prompt_logprobs import score
from manyheads.engine.quickest import quickest
from manyheads.engine.readout import Computed, Drawn, PendingStep
from manyheads.engine.record_sizes import pass_keys
from manyheads.engine.recorded import RecordedSteps
from manyheads.engine.sampler import draw, last_nodes, nodes_of
from manyheads.engine.state import admit, clear, count_output, rewind, sync_companions, sync_pages
from manyheads.engine.step import Chunk, Request, RowResult, StepPlan, nothing
from manyheads.engine.step_run import (
    ChunkHidden,
    DecodingRows,
    Hidden,
    StepRun,
    TreeRows,
    chunk_rows,
    gain_sizes,
)
from manyheads.engine.threads import Threads
from manyheads.kv_cache import KVCache
from manyheads.models.llama import Llama
from manyheads.speculation.draft import Draft
from manyheads.speculation.drafter import Drafter, Kept
from manyheads.speculation.tree import ROOT, Tree, tree_tensors
from manyheads.speculation.verify import accepted_nodes


class Runner:
    """One model on one device.

    Args:
        model: the base model.
        drafter: what guesses for it, or None.
        num_rows: most requests at once.
        max_len: longest sequence, in tokens.
        num_pages, page_size: shape of the K/V cache; page 0 is the dummy page.
        kv_dtype: of the K/V cache, one of `kv_cache.CODES` or the model's; None is the model's.
    """

    def __init__(
        self,
        model: Llama,
        drafter: Drafter | None,
        *,
        num_rows: int,
        max_len: int,
        num_pages: int,
        page_size: int,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.drafter, self.device = model, drafter, model.device
        shape = drafter.shape if drafter is not None else None
        kept = model.config.kv_shape.with_layers(shape.kv_layers if shape else 0)
        self.cache = KVCache.zeros(kept, num_pages, page_size, kv_dtype or model.dtype, self.device)
        self.state = RowState(
            num_rows,
            max_len,
            page_size,
            shape.num_candidates if shape else 0,
            model.config.vocab_size,
            self.device,
            shape.row_state if shape else None,
        )
        self.run = StepRun(model, drafter, model.ops, self.state, self.cache)
        self.threads: Threads | None = None
        """What chooses the number of threads of a step; None leaves torch's."""
        self._tensors = lru_cache(maxsize=512)(self._new_tensors)
        self.recorded: RecordedSteps | None = None
        if model.ops.records and model.can_be_captured:
            self.recorded = RecordedSteps(self.run, Recorder(self.device))

    @property
    def overlaps(self) -> bool:
        """Whether the device works beside the host."""
        return self.device.type != "cpu"

    @property
    def graph_bytes(self) -> int:
        """What recorded steps take of the device."""
        return self.recorded.recorder.memory_bytes if self.recorded is not None else 0

    def listen(self, beat: Callable[[], None]) -> None:
        """Call this at each layer of a pass that the host launches itself."""
        self.model.beat = beat

    def watch(self, tell: Callable[[str], None]) -> None:
        """Call this for every kernel that is compiled and every graph that is captured from now on."""
        self.model.ops.watch(tell)
        if self.recorded is not None:
            self.recorded.recorder.tell = tell

    def record_passes(self, max_tokens: int, max_inflight: int, instead: Mapping[int, int]) -> None:
        """`RecordedSteps.record_passes`, where steps are recorded."""
        if self.recorded is not None:
            self.recorded.record_passes(max_tokens, max_inflight, instead)

    def quickest_sizes(self, max_tokens: int, max_inflight: int) -> dict[int, int]:
        """`quickest`, of the passes that are recorded for so many tokens."""
        if self.recorded is None:
            return {}
        keys = pass_keys(self.state.num_rows, max_tokens, max_inflight)
        return quickest(self.model, {chunks[0] + trees[0] for chunks, trees in keys})

    def record_steps(self, wanted: list[tuple[int, Draft]]) -> None:
        """`RecordedSteps.record_steps`, where steps are recorded."""
        if self.recorded is not None:
            self.recorded.record_steps(wanted)

    def put(self, requests: list[Request]) -> None:
        """Fill the rows of requests, outside of a step."""
        admit(self.state, self.drafter, requests)
        sync_pages(self.state, requests)

    def rewind(self, requests: list[Request]) -> None:
        """Let rows that have gone on stand where their requests do."""
        rewind(self.state, requests)

    def clear(self) -> None:
        """Forget all rows; there are no requests."""
        clear(self.state)

    def launch(self, plan: StepPlan, follow: Callable[[], None] = nothing) -> PendingStep:
        """Run one step, after those launched before; the argument is as `StepRunner.launch`'s."""
        if self.threads is None:
            return self._launch(plan, follow)
        with self.threads.step(plan.num_inflight):
            step = self._launch(plan, follow)
        step.is_typical = not self.threads.is_trial
        return step

    @torch.inference_mode()
    def _launch(self, plan: StepPlan, follow: Callable[[], None]) -> PendingStep:
        admit(self.state, self.drafter, [*plan.admitted, *plan.extended])
        sync_pages(self.state, [*(chunk.request for chunk in plan.chunks), *plan.decoding])
        sync_companions(self.state, self.cache, plan.companions)
        if self.recorded is not None and not plan.chunks and self.recorded.serves(plan.decoding):
            trees, values = self.recorded.decode(plan.decoding, plan.draft, self._tensors(plan.draft.tree))
            return self._pending([self._drawn(plan, plan.decoding, trees, values)])
        return self._pending(*self._one_pass(plan, follow))

    def _one_pass(self, plan: StepPlan, follow: Callable[[], None]) -> tuple[list[Drawn], Computed | None]:
        """Chunks and trees in one forward pass, and the sampler behind it."""
        state = self.state
        # of about equal length side by side: attention may pad them to rectangles
        requests = sorted(plan.decoding, key=lambda request: request.max_cached_len)
        # a recorded decoding step may end as this one does
        recorded = self.recorded if requests and self.recorded and self.recorded.ends(requests) else None
        rows: DecodingRows | None = None
        if requests:
            make = recorded.decoding_rows if recorded is not None else self._decoding_rows
            rows = make(requests, plan.draft, self._tensors(plan.draft.tree))
        walk = TreeWalk.of(requests, state)
        if walk is not None:
            walk.drop(self._tensors(plan.draft.tree))
        trees, brought = self.run.expand(rows) if rows is not None else (None, None)
        if walk is not None and trees is not None:
            walk.send(trees)
        chain = chunk_chain(self.run, plan.chunks) if plan.chunks and self.run.base_layers else None
        known, hidden = self._forward(plan.chunks, brought)
        computed = self._computed(plan.chunks, known) if known is not None else None
        ended = self._advance(plan.chunks) if plan.chunks else []
        if not ended and rows is None and chain is None:
            return [], computed
        which, ends = state.tensor([[i for i, _ in ended], [at for _, at in ended]])
        last = known.ends[which] if known is not None else hidden.last[:0]
        drawn: list[Drawn] = []
        others: Kept | None = None
        begun = [plan.chunks[i].request for i, _ in ended]
        if ended or rows is not None:
            raw = self.model.project(torch.cat((last, hidden.last)))
            logits = raw.float()  # which is drawn from, and edited
            if logits is raw and any(request.params.logprobs is not None for request in (*begun, *requests)):
                raw = raw.clone()
        if ended:
            drawn_first, others = self._begin(begun, last, logits[: len(ended)], raw)
            drawn.append(drawn_first)
        if chain is not None:
            assert known is not None
            assert known.states is not None
            others = told_of(chain, known.states, others, last, ends)
        if others is not None:
            # where depth costs passes, those who begin have to wait a step for more than one token
            self.run.propose(others, min(1, plan.draft.tree.max_depth) if ended else 0, plan.draft.nodes)
        if rows is None or trees is None:
            return drawn, computed
        logits, raw = logits[len(ended) :], raw[len(ended) :]
        masks: Masks | None = None
        if walk is not None:
            follow()
            masks = walk.masks(plan.draft.tree)
        # NOTE: not the rows' depth, which is that of the tree with which a step was recorded
        nodes = nodes_of(requests, trees, state, plan.draft.tree.max_depth, masks)
        target, distributions = draw(logits, nodes, state, self.run.ops)
        if recorded is not None:
            trees, values = recorded.finish(rows, plan.draft, trees, hidden, target)
        else:
            accepted = accepted_nodes(state, trees, target, distributions)
            values = self.run.finish(rows, trees, hidden, target, accepted)
        foreseen = walk.foreseen if walk is not None else ()
        return [*drawn, self._drawn(plan, requests, trees, values, raw, foreseen)], computed

    def _forward(self, chunks: list[Chunk], trees: TreeRows | None) -> tuple[ChunkHidden | None, Hidden]:
        """What the pass makes of chunks (and of some tokens that pad them) and of trees."""
        every = any(chunk.request.params.prompt_logprobs is not None for chunk in chunks)
        if self.recorded is not None and not every and (found := self.recorded.forward(chunks, trees)) is not None:
            return found
        return self.run.forward(chunk_rows(self.state, chunks) if chunks else None, trees, every)

    def _new_tensors(self, tree: Tree) -> TreeTensors:
        """NOTE: shared by all steps with this tree, and not to be written to."""
        columns = [0] if self.drafter is None else self.drafter.columns(tree)
        return tree_tensors(tree, columns, self.device)

    def _decoding_rows(self, requests: list[Request], draft: Draft, tree: TreeTensors) -> DecodingRows:
        return DecodingRows(
            index=self.state.tensor([request.row for request in requests]),
            tree=tree,
            num_tokens=draft.num_tokens(len(requests)),
            nodes=draft.nodes,
            depth=draft.tree.max_depth,
            max_cached_len=requests[-1].max_cached_len,
            sizes=gain_sizes(len(requests), draft, self.device),
        )

    def _computed(self, chunks: list[Chunk], known: ChunkHidden) -> Computed:
        """See what the pass made of chunks, and perhaps of more that pads them."""
        scored = [] if known.every is None else score(chunks, known.every, self.model.logits, self._sent)
        count = sum(chunk.num_inflight for chunk in chunks)
        return Computed(chunks, self._sent(known.is_finite[:count]), scored)

    def _advance(self, chunks: list[Chunk]) -> list[tuple[int, int]]:
        """All tokens of chunks are kept; which chunks' requests have their text computed now, and where their last
        tokens stand."""
        state = self.state
        moved = state.tensor([[chunk.request.row, chunk.num_inflight] for chunk in chunks])
        state.cached_len.index_add_(0, moved[:, 0], moved[:, 1])
        ends = accumulate(chunk.num_inflight for chunk in chunks)
        return [(i, end - 1) for i, (chunk, end) in enumerate(zip(chunks, ends, strict=True)) if chunk.is_last]

    def _begin(self, requests: list[Request], hidden: Tensor, logits: Tensor, raw: Tensor) -> tuple[Drawn, Kept]:
        """Rows whose text is computed draw a token each.

        Args:
            hidden: [R, hidden], of their last tokens.
            logits: [R, V] float32, overwritten.
            raw: the same, and perhaps more, as computed.
        """
        state = self.state
        index = state.tensor([request.row for request in requests])
        nodes = last_nodes(requests, index, self._tensors(ROOT), state)
        target, _ = draw(logits, nodes, state, self.run.ops)
        state.drafts[index, 0] = target.clamp(min=0)
        one, none = torch.ones_like(target), torch.zeros_like(target)
        values = torch.stack((one, one, none, target, none), dim=1)
        kept = Kept(index, hidden, values[:, 3:4], values[:, :1])
        count_output(state, requests, index, kept.tokens, kept.gained)
        logprobs = of_rows(requests, raw, values, 1, 1, nodes.place, state, self._sent, not self.overlaps)
        return Drawn(requests, self._sent(values), width=1, known=set(), logprobs=logprobs), kept

    def _drawn(
        self,
        plan: StepPlan,
        requests: list[Request],
        trees: Trees,
        values: Tensor,
        raw: Tensor | None = None,
        foreseen: Sequence[RowResult] = (),
    ) -> Drawn:
        """What a step says of decoding rows.

        Args:
            trees, values: of the rows, and perhaps more.
            raw: [T, V], logits of the trees' nodes; None where nobody wants log-probabilities.
        """
        width = trees.tree.max_depth + 1
        count_output(self.state, requests, trees.inflight.index, values[:, 3 : 3 + width], values[:, :1])
        known: set[int] = set()
        if plan.draft.propose and self.drafter is not None:
            known = {i for i, request in enumerate(requests) if request.has_candidates}
        # rows for which the drafter has not spoken yet expect nothing, which says nothing
        said = trees.gains if len(known) == len(requests) else None
        gains = self._sent(said) if said is not None else None
        guesses = None
        if plan.draft.propose and self.drafter is not None and any(r.params.return_steps for r in requests):
            tree = plan.draft.tree
            guesses = TreeGuesses(self._sent(trees.taken[: len(requests)]), tree, self.drafter.columns(tree))
        logprobs: dict[int, Columns] = {}
        if raw is not None:
            most, asks = plan.draft.most_gained, not self.overlaps
            logprobs = of_rows(requests, raw, values, width, most, trees.place, self.state, self._sent, asks)
        sent = self._sent(values[: len(requests)])
        return Drawn(requests, sent, width, known, gains, logprobs, guesses, foreseen)

    def _sent(self, tensor: Tensor) -> Tensor:
        """On its way to the host, at once: what a graph returns lies in memory that the next graph may compute in."""
        if self.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _pending(self, drawn: list[Drawn], computed: Computed | None = None) -> PendingStep:
        if self.device.type == "cpu":
            return PendingStep(drawn, self.drafter, computed)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return PendingStep(drawn, self.drafter, computed, copied)
