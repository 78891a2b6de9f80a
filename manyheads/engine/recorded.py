"""Steps that are recorded once for each shape and replayed (CUDA graphs), each on tensors that stay where they are.

A decoding step is for a number of rows and of nodes; the next larger number of rows is taken, and the rest are dummy
rows, which write to the dummy page. Which rows, which tree and their lengths are data. It is two recordings, so that
the sampler can stand between them.

Of a step that draws in one pass (with chunks, grammars or log-probabilities), the forward pass is recorded, over so
many tokens of chunks and so many of trees, likewise padded; which row brings how many of them is data. Its trees end as
a decoding step does, by that one's second recording, unless a row has typical acceptance. What comes before and between
is a few launches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from manyheads.batch import MAX_NODES, InFlight, Trees, TreeTensors
from manyheads.engine.graphs import Recorded, Recorder
from manyheads.engine.record_sizes import (
    ROWS,
    TREE_ROWS,
    PassKey,
    all_rows,
    computed,
    fitting_pass,
    padded_rows,
    pass_keys,
)
from manyheads.engine.sampler import draw, edits_logits, nodes_of
from manyheads.engine.step import Chunk, Request
from manyheads.engine.step_run import (
    ChunkHidden,
    ChunkRows,
    DecodingRows,
    Hidden,
    StepRun,
    TreeRows,
    chunk_numbers,
    gain_sizes,
)
from manyheads.speculation.draft import NO_DRAFT, Draft
from manyheads.speculation.planner import Planner
from manyheads.speculation.tree import Tree

_Key = tuple[int, int, int, int]
"""Rows, nodes that a row may bring, in-flight tokens, and passes of the drafter."""
_HalfKey = tuple[int, int, int]
"""The same without passes, which come in a step's second half."""


@dataclass(frozen=True, eq=False)
class _Half:
    """The first half of a decoding step, and the tensors that it reads and writes."""

    rows: DecodingRows
    trees: Trees
    hidden: Hidden
    logits: Tensor  # [T, V]
    target: Tensor  # [T] int64
    recorded: Recorded[tuple[Trees, Hidden, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class _Step:
    """A decoding step."""

    rows: DecodingRows
    """Those of its first half, and how deep it proposes."""
    half: _Half
    finish: Recorded[Tensor]


_TOKEN_FIELDS = ("tokens", "position", "slots", "bits")
"""What `InFlight` says of each token."""


@dataclass(frozen=True, eq=False)
class _Pass:
    """A forward pass, and the tensors that it reads and writes."""

    numbers: Tensor | None  # [3, T] int64: tokens, rows and places of chunks
    chunks: ChunkRows | None
    trees: TreeRows | None
    recorded: Recorded[tuple[ChunkHidden | None, Hidden]]

    @property
    def num_tokens(self) -> int:
        """That it computes."""
        chunks = 0 if self.chunks is None else len(self.chunks.tokens)
        return chunks + (0 if self.trees is None else len(self.trees.inflight.tokens))


class _Room:
    """Where all recordings of a kind leave what they made of tokens: it is used before the next of them is replayed.
    Had each a place of its own, logits alone would take gigabytes.

    Args:
        most: tokens that there is room for at once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._places: dict[str, Tensor] = {}

    def put(self, name: str, made: Tensor) -> Tensor:
        """Something that was made of each of so many tokens, put in its place."""
        if name not in self._places:
            self._places[name] = made.new_empty(self.most, *made.shape[1:])
        return self._places[name][: len(made)].copy_(made)

    def put_hidden(self, made: Hidden) -> Hidden:
        """The same of the tokens of trees."""
        return Hidden(self.put("last", made.last), None if made.states is None else self.put("states", made.states))

    def put_chunks(self, made: ChunkHidden) -> ChunkHidden:
        """The same of the tokens of chunks."""
        states = None if made.states is None else self.put("chunks' states", made.states)
        return ChunkHidden(self.put("ends", made.ends), self.put("is finite", made.is_finite), states, None)


class RecordedSteps:
    """Records steps at start-up or as they are first needed, and replays them.

    Args:
        run: the step.
        recorder: of its graphs.
    """

    def __init__(self, run: StepRun, recorder: Recorder) -> None:
        self.run, self.recorder = run, recorder
        self._steps: dict[_Key, _Step] = {}
        self._halves: dict[_HalfKey, _Half] = {}
        self._passes: dict[PassKey, _Pass] = {}
        self._step_room, self._pass_room = _Room(0), _Room(0)
        self.prompt_sizes: tuple[int, ...] = ()
        """Tokens of chunks that passes were recorded for."""
        self._trees: dict[_HalfKey, Tree] = {}  # what stands in the steps' tree tensors now

    def record_steps(self, wanted: list[tuple[int, Draft]]) -> None:
        """Record steps of so many rows with these drafts."""
        self._make_steps([(self._key(num_rows, draft), draft) for num_rows, draft in wanted])

    def record_passes(self, max_tokens: int, max_inflight: int, instead: Mapping[int, int]) -> None:
        """Record forward passes over all numbers of tokens of chunks, up to `max_tokens`, and of trees.

        Args:
            instead: numbers of tokens, both together, that others are computed for (`quickest`).
        """
        self._make_passes(pass_keys(self.run.state.num_rows, max_tokens, max_inflight), instead)
        self.prompt_sizes = tuple(sorted({chunks[0] for chunks, _ in self._passes} - {0}))

    def forget(self) -> None:
        """Let go of all recordings; nothing can be run any more."""
        self._steps.clear()
        self._halves.clear()
        self._passes.clear()
        self._step_room, self._pass_room = _Room(0), _Room(0)

    def padded_pass(self, num_prompts: int, num_trees: int, num_rows: int) -> int:
        """Tokens of the pass over so many of chunks, and so many of so many rows' trees."""
        key = fitting_pass(num_prompts, 1, num_trees, num_rows)
        found = None if key is None else self._passes.get(key)
        return num_prompts + num_trees if found is None else found.num_tokens

    @staticmethod
    def serves(requests: list[Request]) -> bool:
        """Whether decoding rows want nothing that only the sampler in one pass does."""
        return RecordedSteps.ends(requests) and all(r.params.logprobs is None and r.matcher is None for r in requests)

    @staticmethod
    def ends(requests: list[Request]) -> bool:
        """Whether decoding rows accept what the target draws and nothing else, as the end of a recorded step does."""
        return all(request.params.greedy or request.params.acceptance == "exact" for request in requests)

    def decode(self, requests: list[Request], draft: Draft, tree: TreeTensors) -> tuple[Trees, Tensor]:
        """Run a step of decoding rows; its trees, and `Outcome.values`, with rows for the padding.

        Args:
            tree: of the draft.
        """
        rows = self.decoding_rows(requests, draft, tree)
        step, state = self._with_rows(rows, draft), self.run.state
        half = step.half
        half.recorded.replay()
        if any(not request.params.greedy or edits_logits(request) for request in requests):
            nodes = nodes_of(requests, half.trees, state, draft.tree.max_depth)
            target, _ = draw(half.logits.float(), nodes, state, self.run.ops)
            half.target.copy_(target)
        return half.trees, step.finish.replay()

    def decoding_rows(self, requests: list[Request], draft: Draft, tree: TreeTensors) -> DecodingRows:
        """Rows as the step that is recorded for as many has them, with dummy rows behind them.

        Args:
            tree: of the draft.
        """
        state = self.run.state
        key = self._key(padded_rows(len(requests), state.num_rows, TREE_ROWS if draft.propose else ROWS), draft)
        if key not in self._steps:
            self._make_steps([(key, draft)])
        padding = [state.num_rows] * (key[0] - len(requests))
        index = state.tensor([*(request.row for request in requests), *padding])
        return replace(self._steps[key].rows, index=index, tree=tree)

    def finish(
        self, rows: DecodingRows, draft: Draft, trees: Trees, hidden: Hidden, target: Tensor
    ) -> tuple[Trees, Tensor]:
        """The end of a step that drew in one pass; what it says of these rows is as `decode`'s.

        Args:
            rows: as `decoding_rows` made them.
            trees, hidden, target: of these rows. NOTE: not what a recorded step returned, which is written to here.
        """
        step = self._with_rows(rows, draft)
        half = step.half
        there, given = ([*_tensors(x), *_tensors(x.inflight)] for x in (half.trees, trees))
        there += [*_tensors(half.hidden), half.target]
        given += [*_tensors(hidden), target]
        torch._foreach_copy_(there, given)
        return half.trees, step.finish.replay()

    def _with_rows(self, rows: DecodingRows, draft: Draft) -> _Step:
        """The step that is recorded for so many rows, made ready for these."""
        key = self._key(len(rows.index), draft)
        step = self._steps[key]
        step.rows.index.copy_(rows.index, non_blocking=True)
        if self._trees.get(key[:3]) != draft.tree:
            self._trees[key[:3]] = draft.tree
            step.rows.tree.take(rows.tree)
        return step

    def forward(self, chunks: list[Chunk], trees: TreeRows | None) -> tuple[ChunkHidden | None, Hidden] | None:
        """What `StepRun.forward` makes of chunks (and of what pads them) and of trees; None where no pass was recorded
        for so many."""
        num_tokens, num_trees = sum(chunk.num_inflight for chunk in chunks), 0
        num_rows = 0
        if trees is not None:
            num_trees, num_rows = trees.inflight.tokens.shape[0], trees.inflight.index.shape[0]
        key = fitting_pass(num_tokens, len(chunks), num_trees, num_rows)
        if key is None or (found := self._passes.get(key)) is None:
            return None
        if found.chunks is not None and found.numbers is not None:
            self._put_chunks(found.numbers, found.chunks, chunks)
        if found.trees is not None and trees is not None:
            self._put_trees(found.trees.inflight, trees.inflight)
        known, hidden = found.recorded.replay()
        return known, hidden.first(num_trees)

    def _put_chunks(self, numbers: Tensor, rows: ChunkRows, chunks: list[Chunk]) -> None:
        state = self.run.state
        num_tokens, last = numbers.shape[1], rows.index.shape[0] - 1
        values, starts = chunk_numbers(chunks, num_tokens, last)
        padding = last + 1 - len(chunks)
        index = [*(chunk.request.row for chunk in chunks), *[state.num_rows] * padding]
        starts += [*[starts[-1]] * (padding - 1), num_tokens]
        numbers.copy_(state.tensor(values), non_blocking=True)
        rows.index.copy_(state.tensor(index), non_blocking=True)
        rows.row_start.copy_(state.tensor(starts, torch.int32), non_blocking=True)

    def _put_trees(self, there: InFlight, given: InFlight) -> None:
        """Put trees where a pass reads them; what pads them is the dummy row's, and goes to the dummy page."""
        num_tokens, num_rows = given.tokens.shape[0], given.index.shape[0]
        for name in _TOKEN_FIELDS:
            getattr(there, name)[:num_tokens].copy_(getattr(given, name))
        there.index[:num_rows].copy_(given.index)
        there.row_start[: num_rows + 1].copy_(given.row_start)
        there.slots[num_tokens:].zero_()
        there.index[num_rows:].fill_(self.run.state.num_rows)
        there.row_start[num_rows + 1 : -1].fill_(num_tokens)

    def _key(self, num_rows: int, draft: Draft) -> _Key:
        return num_rows, draft.tree.num_nodes, draft.num_tokens(num_rows), draft.passes

    def _make_steps(self, wanted: list[tuple[_Key, Draft]]) -> None:
        """Record what is not there yet."""
        with self.recorder.session():
            if (most := max(tokens for (_, _, tokens, _), _ in wanted)) > self._step_room.most:
                self._step_room = _Room(most)  # what was recorded before keeps its own
            for key, draft in wanted:
                if key not in self._steps:
                    self._steps[key] = self._record_step(key, draft)

    def _make_passes(self, keys: Collection[PassKey], instead: Mapping[int, int]) -> None:
        """Record what is not there yet, the largest first: the others compute in its memory."""
        with self.recorder.session():
            sizes = {key: computed(key, instead) for key in sorted(keys, reverse=True)}
            if (most := max(map(max, sizes.values()), default=0)) > self._pass_room.most:
                self._pass_room = _Room(most)
            for key, (num_tokens, num_trees) in sizes.items():
                if key not in self._passes:
                    self._passes[key] = self._record_pass((num_tokens, key[0][1]), (num_trees, key[1][1]))

    def _record_step(self, key: _Key, draft: Draft) -> _Step:
        if key[:3] not in self._halves:
            self._halves[key[:3]] = self._record_half(key[0], draft)
        run, half = self.run, self._halves[key[:3]]
        rows = replace(half.rows, depth=draft.tree.max_depth, nodes=draft.nodes)

        def finish() -> Tensor:
            return run.finish(rows, half.trees, half.hidden, half.target)

        with self.recorder.aside():
            half.rows.index.fill_(run.state.num_rows)  # not the rows of a step that had the same first half
            half.recorded.replay()  # whose results it reads
            finish()
            return _Step(rows, half, self.recorder.record(finish))

    def _record_half(self, num_rows: int, draft: Draft) -> _Half:
        run, room, num_nodes = self.run, self._step_room, draft.tree.num_nodes
        device, drafter = run.state.device, run.drafter
        # as deep as the drafter reaches: paths of trees that are not are padded
        reach = drafter.shape.max_depth if drafter is not None and num_nodes > 1 else 0
        rows = DecodingRows(
            index=torch.full((num_rows,), run.state.num_rows, device=device),
            tree=TreeTensors.blank(num_nodes, reach, device),
            num_tokens=draft.num_tokens(num_rows),
            nodes=draft.nodes,
            depth=draft.tree.max_depth,
            max_cached_len=run.state.max_len,
            sizes=gain_sizes(num_rows, draft, device),
        )

        def forward() -> tuple[Trees, Hidden, Tensor, Tensor]:
            trees, brought = run.expand(rows)
            _, hidden = run.forward(None, brought)
            logits = run.model.project(hidden.last)
            return trees, room.put_hidden(hidden), room.put("logits", logits), run.ops.argmax(logits)

        with self.recorder.aside():
            forward()
            first = self.recorder.record(forward)
        return _Half(rows, *first.result, first)

    def _record_pass(self, of_chunks: tuple[int, int], of_trees: tuple[int, int]) -> _Pass:
        """Of so many tokens, and rows, of each."""
        state, room = self.run.state, self._pass_room
        device, dummy = state.device, state.num_rows
        (num_tokens, num_chunks), (num_trees, num_rows) = of_chunks, of_trees
        numbers: Tensor | None = None
        chunks: ChunkRows | None = None
        trees: TreeRows | None = None
        if num_tokens:
            numbers = torch.zeros(3, num_tokens, dtype=torch.int64, device=device)
            numbers[1] = num_chunks
            tokens, row, place = numbers.unbind()
            chunks = ChunkRows(
                tokens=tokens,
                row=row,
                place=place,
                index=torch.full((num_chunks + 1,), dummy, device=device),
                row_start=_starts(num_chunks + 1, num_tokens, device),
                max_tokens=num_tokens,
                max_cached_len=state.max_len,
            )
        if num_trees:
            inflight = InFlight(
                index=torch.full((num_rows + 1,), dummy, device=device),
                row_start=_starts(num_rows + 1, num_trees, device),
                **{name: torch.zeros(num_trees, dtype=torch.int64, device=device) for name in _TOKEN_FIELDS},
            )
            trees = TreeRows(inflight, MAX_NODES, state.max_len)

        def forward() -> tuple[ChunkHidden | None, Hidden]:
            known, hidden = self.run.forward(chunks, trees)
            return None if known is None else room.put_chunks(known), room.put_hidden(hidden)

        with self.recorder.aside():
            forward()
            return _Pass(numbers, chunks, trees, self.recorder.record(forward))


def all_steps(planner: Planner, most: int) -> list[tuple[int, Draft]]:
    """All numbers of rows, up to `most`, and all drafts that the planner may choose for them; the largest first."""
    wanted = [(rows, NO_DRAFT) for rows in all_rows(most, ROWS)]
    for rows in all_rows(most, TREE_ROWS):
        wanted += [(rows, draft) for draft in planner.drafts(rows)]
    return wanted


def _tensors(record: Any) -> list[Tensor]:
    """A record's own tensors."""
    held = (getattr(record, field.name) for field in fields(record))
    return [value for value in held if isinstance(value, Tensor)]


def _starts(num_rows: int, num_tokens: int, device: torch.device) -> Tensor:
    """[R + 1] int32, where rows begin of which the last one holds all tokens."""
    return torch.tensor([0] * num_rows + [num_tokens], dtype=torch.int32).to(device)
