"""What moves between scheduler, runner and engine: requests in flight, the plan of a step, its result. No tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from manyheads.engine.matcher import Matcher
from manyheads.engine.page_manager import PageTable, salted
from manyheads.request import EngineRequest, Guess, SamplingParams, TokenLogprobs
from manyheads.speculation.draft import NO_DRAFT, Draft


def nothing() -> None:
    """What is done where nothing is to be done."""


@dataclass(eq=False)
class Request:
    """A request inside the engine.

    `tokens` is prompt and output together. The first `cached_len` of them have their K/V in the cache. While decoding,
    `cached_len == len(tokens) - 1`: the last token is the root of the next tree.
    """

    request_id: str
    params: SamplingParams
    tokens: list[int]
    prompt_len: int
    max_len: int
    """Longest it may get, prompt included, in tokens."""
    stop_ids: frozenset[int]
    """Tokens that end it: stop_token_ids, and eos unless ignored."""
    seed: int
    client: str = ""
    """Whose fair share it counts against."""
    priority: int = 0
    """A lower one starts first and gives way last."""
    adapter: int = 0
    """The number of its adapter, from 1; 0 is the base alone."""
    timeout: float | None = None
    """Within how many seconds it has to start."""
    start_by: float = math.inf
    """When it is refused if it has not started, by the scheduler's clock."""
    arrival: int = 0
    """Its number among those that the queue was given."""
    admission: int = 0
    """Its number among those that were given a row, counted anew each time."""
    table: PageTable = field(default_factory=PageTable)
    held_row: int | None = None
    """Its slot of the row state (`batch.RowState`) while it runs; None while it waits."""
    cached_len: int = 0
    unread: int = 0
    """Most tokens that it may still gain from steps that were launched and not read yet."""
    unread_known: int = 0
    """Of `cached_len`, tokens of steps that were launched and not read yet: nobody knows whether their numbers are
    finite, so the prefix cache does not know their pages, which keep what could be given back."""
    has_candidates: bool = False
    """Whether the drafter has proposed for its next tree."""
    resumes: bool = False
    """Whether an engine had accepted it that has died."""
    num_cached_prompt_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Those of the prompt's tokens from the second on that are known so far, if they are asked for."""
    num_scored: int = 0
    """How many of those are known, on their way, or told by an engine that died. By this, all ranks decide alike."""
    matcher: Matcher | None = None
    """Where its text stands in its grammar, if it has one; behind `tokens`."""
    is_held: bool = False
    """Whether it cannot start yet, since its grammar is being compiled."""
    is_extended: bool = False
    """Whether it runs and has known tokens that no step drew: those that its grammar leaves no choice about."""

    @classmethod
    def from_message(
        cls,
        message: EngineRequest,
        max_len: int,
        eos_token_ids: tuple[int, ...],
        default_seed: int,
        adapter: int = 0,
    ) -> Request:
        """A request as it begins, with no row yet.

        Args:
            max_len: longest it may get, prompt included, in tokens.
            default_seed: where the parameters bring none.
            adapter: the number of the one that the message names.
        """
        params = message.params
        eos = () if params.ignore_eos else eos_token_ids
        return cls(
            request_id=message.request_id,
            params=params,
            tokens=message.prompt_token_ids + message.output_token_ids,
            prompt_len=len(message.prompt_token_ids),
            max_len=max_len,
            stop_ids=frozenset(params.stop_token_ids) | frozenset(eos),
            seed=params.seed if params.seed is not None else default_seed,
            num_steps=message.num_steps,
            client=message.client,
            priority=message.priority,
            adapter=adapter,
            timeout=message.timeout,
            resumes=message.resumes,
            num_scored=len(message.prompt_token_ids) if message.output_token_ids else 0,
            # what is shared is not computed, and so says nothing of its tokens
            table=PageTable(root=salted(message.cache_salt, message.lora), may_share=params.prompt_logprobs is None),
        )

    @property
    def row(self) -> int:
        """Its slot of the row state. Raises RuntimeError: it holds none, and nothing may be written for it."""
        if self.held_row is None:
            raise RuntimeError(f"request {self.request_id} is to run, but holds no row")
        return self.held_row

    @property
    def num_output(self) -> int:
        """Tokens that it gained."""
        return len(self.tokens) - self.prompt_len

    def told_prompt(self, num_new: int) -> list[TokenLogprobs] | None:
        """What a delta that brings so many tokens tells of the prompt's: the first one tells all, if asked for."""
        wants = self.params.prompt_logprobs is not None
        return self.prompt_logprobs if wants and self.num_output == num_new else None

    @property
    def room(self) -> int:
        """Tokens that it may still gain."""
        return self.max_len - len(self.tokens)

    @property
    def has_started(self) -> bool:
        """Whether it has ever run: somebody reads its text already."""
        return self.num_output > 0 or self.num_preemptions > 0

    @property
    def unpaid(self) -> int:
        """Tokens of the prompt that its client is yet to be charged for: all of them, until it starts."""
        return 0 if self.has_started else self.prompt_len

    @property
    def num_uncomputed(self) -> int:
        """Known tokens without K/V: 1 while decoding, more while the prompt (or what a preempted request had) is
        being computed."""
        return len(self.tokens) - self.cached_len

    def scratch(self, draft: Draft, num_tokens: int) -> int:
        """Cache slots behind its text that a drafter needs if so many known tokens are computed, and none remain."""
        return draft.scratch * (draft.propose and num_tokens == self.num_uncomputed)

    def most_slots(self, draft: Draft, most: int) -> int:
        """Cache slots behind `max_cached_len` that it may need in a step that computes at most so many known tokens."""
        if self.decoding:
            return draft.num_slots
        # of one that is to start, the prefix cache may have nearly all
        tokens = self.num_uncomputed if self.held_row is None else min(self.num_uncomputed, most)
        return tokens + draft.scratch * draft.propose

    @property
    def decoding(self) -> bool:
        """Whether its next step draws from a tree, and computes no known tokens."""
        return self.unread > 0 or (self.num_uncomputed == 1 and self.num_output > 0)

    @property
    def max_cached_len(self) -> int:
        """The most that the device may have cached when the next step begins: `cached_len`, and what is unread."""
        return len(self.tokens) - 1 + self.unread if self.decoding else self.cached_len


@dataclass(frozen=True)
class Chunk:
    """A row that computes known tokens: part of a prompt, or of a preempted request's text."""

    request: Request
    num_inflight: int
    is_last: bool
    """Whether the row draws a token in this step: no known token is left over."""


@dataclass(frozen=True)
class StepPlan:
    """Who runs in a step, and with which tree."""

    chunks: list[Chunk]
    decoding: list[Request]
    draft: Draft = NO_DRAFT
    """What the decoding rows bring."""
    admitted: list[Request] = field(default_factory=list)
    """Requests whose row is new: the runner fills in its state."""
    companions: list[tuple[int, list[int]]] = field(default_factory=list)
    """Of pages that have new ones (`kv_cache.py`)."""

    @property
    def extended(self) -> list[Request]:
        """Requests that went on without a step: the runner brings their rows' state up to date."""
        return [chunk.request for chunk in self.chunks if chunk.request.is_extended]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.num_inflight for chunk in self.chunks)

    @property
    def num_inflight(self) -> int:
        """Tokens that the forward pass is over."""
        return self.num_prompt_tokens + self.draft.num_tokens(len(self.decoding))


@dataclass(frozen=True)
class RowResult:
    """What a step did for one row that drew a token."""

    request: Request
    tokens: list[int]
    """The tokens gained: accepted nodes below the root, then the target's own token."""
    logprobs: list[TokenLogprobs] | None = None
    drafted_depth: int = 0
    """Depth of the tree the row brought; 0 for a root alone."""
    num_drafted: int = 0
    """Nodes of it, the root left out."""
    guesses: list[Guess] = field(default_factory=list)
    """Those nodes, if the request asks for its steps."""
    is_finite: bool = True
    """Whether the target could draw a token; if not, its own is missing, since its logits were NaN or infinite."""


@dataclass(frozen=True)
class StepResult:
    """What the host learns from a step."""

    rows: list[RowResult]
    """Of those that drew tokens."""
    hits: list[list[int]]
    """[depth][rank]: accepted prefixes whose next token was the candidate of this rank."""
    trials: list[int]
    """[depth]: accepted prefixes of this depth whose next token is known."""
    gains: list[float] = field(default_factory=list)
    """Tokens that the drafter expected a row to gain beside its own, had the rows brought so many nodes each on
    average: one entry for each of `speculation.planner.SIZES`. Empty where no trees were drafted."""
    broken: list[Request] = field(default_factory=list)
    """Those with known tokens in the step whose hidden states are NaN or infinite; what they drew is worth nothing."""
    is_typical: bool = True
    """Whether steps like it take as long; one that tries another number of threads says nothing of that."""


class PendingStep(Protocol):
    """A step that was launched; a device may still be at work on it."""

    @property
    def foreseen(self) -> Sequence[RowResult]:
        """What it is sure to do for some rows, since their grammars leave them no choice."""

    def read(self) -> StepResult:
        """Wait for it."""


class StepRunner(Protocol):
    """What the engine needs of a runner."""

    @property
    def overlaps(self) -> bool:
        """Whether the host has anything to gain from launching a step before it reads the one before."""

    def launch(self, plan: StepPlan, follow: Callable[[], None] = nothing) -> PendingStep:
        """Run a step, after those launched before; the row state advances without the host.

        Args:
            follow: called where rows with grammars draw from trees, when the device has the forward pass to do: reads
                the step before, so that the matchers are where their texts are.
        """

    def listen(self, beat: Callable[[], None]) -> None:
        """Call this now and then in the middle of a step that the host computes itself."""

    def watch(self, tell: Callable[[str], None]) -> None:
        """Call this for whatever is compiled or captured from now on."""
