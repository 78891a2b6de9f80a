"""The engine: schedule, run, postprocess."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from manyheads.engine.counts import Counts
from manyheads.engine.ending import gain
from manyheads.engine.grammars import Grammars
from manyheads.engine.scheduler import Scheduler, StepsUnread
from manyheads.engine.step import PendingStep, Request, RowResult, StepPlan, StepResult, StepRunner
from manyheads.errors import RequestError, require
from manyheads.request import EngineReady, EngineRequest, FinishReason, RequestDelta, SamplingParams, StepTrace
from manyheads.stats import EngineStats, MemoryUse


@dataclass(frozen=True)
class _Launched:
    plan: StepPlan
    step: PendingStep
    at: float
    foreseen: dict[Request, list[int]] = field(default_factory=dict)
    """What requests have been given of it already."""


class Engine:
    """Continues many requests at once, one step at a time.

    Every request that `add_request` takes ends in exactly one delta with a finish_reason.

    Args:
        runner: runs the planned steps.
        scheduler: plans them; it has the same pages and the same rows as the runner.
        ready: what is served.
        seed: for requests that bring none; None takes one from the operating system.
        memory: says where memory goes.
        grammars: holds texts to grammars; None refuses requests that have one.
    """

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        ready: EngineReady,
        seed: int | None = None,
        memory: Callable[[], MemoryUse] = MemoryUse,
        grammars: Grammars | None = None,
    ) -> None:
        fits = scheduler.pages.longest_text
        if ready.max_model_len > fits:
            raise ValueError(f"max_model_len={ready.max_model_len}, but the pages hold {fits} tokens")
        self.runner = runner
        self.scheduler = scheduler
        self.planner = scheduler.planner
        self.ready = ready
        self._requests: dict[str, Request] = {}
        self._pending: list[RequestDelta] = []
        self._unread: _Launched | None = None
        self._read_at = 0.0
        self._drawing: frozenset[Request] = frozenset()
        """Rows that draw from trees in the step that is being launched."""
        self._said: list[RequestDelta] = []
        """What came to light meanwhile,"""
        self._ended: list[Request] = []
        """and who ended by that: they keep their rows until the step is launched."""
        self._random = random.Random(seed)
        self._memory = memory
        self._grammars = grammars
        self._counts = Counts(ready)
        self._announce: Callable[[list[str]], None] = lambda admitted: None
        runner.watch(self._counts.compiled)

    def listen(self, admitted: Callable[[list[str]], None], beat: Callable[[], None]) -> None:
        """Call `admitted` with the ids of requests before their first step, and `beat` now and then in a long step."""
        self._announce = admitted
        self.runner.listen(beat)

    def add_request(self, message: EngineRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never be served; nothing was queued. (What a grammar lacks, a step's delta says.)
            QueueFull: it would not start in time, or too many wait; nothing was queued.
        """
        params, known = message.params, message.prompt_token_ids + message.output_token_ids
        if message.request_id in self._requests:
            raise RequestError(f"request id {message.request_id!r} is in use")
        if params.n != 1:
            raise RequestError("the engine takes one sequence a request; n is the front end's to fan out")
        self.ready.check(params, [message.prompt_token_ids], message.lora)
        max_len = self.ready.max_model_len
        if params.max_tokens is not None:
            max_len = len(message.prompt_token_ids) + params.max_tokens
        if message.output_token_ids:
            self.ready.check(SamplingParams(), [known])
            require(
                len(known) < max_len, f"{len(message.output_token_ids)} tokens of output are all that was asked for"
            )
        require(message.timeout is None or message.timeout > 0, f"timeout must be above 0, not {message.timeout}")
        require(params.grammar is None or self._grammars is not None, "this engine holds no text to a grammar")
        adapter = self.ready.loras.index(message.lora) + 1 if message.lora else 0
        eos, seed = tuple(self.ready.eos_token_ids), self._random.getrandbits(62)
        request = Request.from_message(message, max_len, eos, seed, adapter)
        self.scheduler.add(request)
        self._requests[request.request_id] = request
        if params.grammar is not None and self._grammars is not None:
            self._grammars.hold(request)

    def abort(self, request_id: str) -> None:
        """End a request; its last delta comes with the next step. Unknown (already finished) ids are fine."""
        request = self._requests.get(request_id)
        if request is not None:
            self._pending.append(self._finish(request, [], "abort"))

    def has_work(self) -> bool:
        """Whether a step has anything to run or to say."""
        return bool(self._requests or self._pending or self._unread)

    def step(self) -> list[RequestDelta]:
        """Run the model once over everyone who can run; [] when nobody is there.

        On a device that works beside the host, a step is launched before the one before is read: while the host looks
        at what came out and plans, the device computes. What the scheduler does not know yet, it takes for the worst
        case (`Request.unread`); what a finished request gains from a step that was launched too early is dropped.
        """
        deltas, self._pending = self._pending + self._refuse(), []
        try:
            plan = self.scheduler.schedule()
        except StepsUnread:
            deltas += self._read_unread()
            plan = self.scheduler.schedule()
        launched = self._launch(plan) if plan is not None else None
        if plan is None and self._grammars is not None:
            self._grammars.nap()
        deltas += self._said
        self._said = []
        deltas += self._read_unread()
        self._unread = launched
        return deltas if self.runner.overlaps else deltas + self._read_unread()

    def _refuse(self) -> list[RequestDelta]:
        """End those who can no longer start in time, and those whose grammars turned out to be none."""
        found = self._grammars.settle() if self._grammars is not None else []
        refused = [
            (request, RequestDelta.failure(request.request_id, *why))
            for request, why in found
            if self._requests.get(request.request_id) is request
        ]
        for request in self.scheduler.expired():
            if all(request is not other for other, _ in refused):
                why = self.scheduler.refusal(request)
                refused.append((request, RequestDelta.refusal(request.request_id, why)))
        for request, _ in refused:
            self.scheduler.remove(request)
            del self._requests[request.request_id]
        return [delta for _, delta in refused]

    def _launch(self, plan: StepPlan) -> _Launched:
        if plan.admitted:
            self._announce([request.request_id for request in plan.admitted])
        began = time.perf_counter()  # a CPU computes the step as it is launched
        self._drawing = frozenset(plan.decoding)
        launched = _Launched(plan, self.runner.launch(plan, self._follow), began)
        self._drawing = frozenset()
        for request in self._ended:
            self.scheduler.remove(request)
        self._ended.clear()
        for chunk in plan.chunks:
            chunk.request.cached_len += chunk.num_inflight
            chunk.request.unread_known += chunk.num_inflight
            chunk.request.is_extended = False
        for request in (chunk.request for chunk in plan.chunks if chunk.is_last):
            request.unread += 1
            request.has_candidates = plan.draft.propose
        for request in plan.decoding:
            request.unread += plan.draft.most_gained
            request.has_candidates = plan.draft.propose
        for row in launched.step.foreseen:
            if self._requests.get(row.request.request_id) is row.request:
                launched.foreseen[row.request] = row.tokens
                self._said.append(self._advance(row, plan, False, is_read=False))
        return launched

    def _follow(self) -> None:
        """Read the step before the one that is being launched, so that its rows' grammars know their texts."""
        self._said += self._read_unread()

    def _read_unread(self) -> list[RequestDelta]:
        """Read the step that is unread, if any."""
        launched, self._unread = self._unread, None
        if launched is None:
            return []
        result = launched.step.read()
        now = time.perf_counter()
        seconds, self._read_at = now - max(launched.at, self._read_at), now
        return self._postprocess(launched, result, seconds)

    def stats(self) -> EngineStats:
        """A snapshot; counters count from the start of the engine."""
        return self._counts.stats(self.scheduler, self._memory())

    def check_integrity(self) -> None:
        """Every page, row and request is accounted for. Raises RuntimeError."""
        self.scheduler.check_integrity()
        held = {r.request_id for r in (*self.scheduler.running, *self.scheduler.waiting)}
        if held != self._requests.keys():
            raise RuntimeError(f"requests without a place: {held ^ self._requests.keys()}")

    def _postprocess(self, launched: _Launched, result: StepResult, seconds: float) -> list[RequestDelta]:
        plan = launched.plan
        self._counts.steps += 1
        computing = {chunk.request.request_id for chunk in plan.chunks}
        self.planner.observe(result.hits, result.trials)
        if result.gains:
            rows = [row for row in result.rows if row.request.request_id not in computing]
            gained = [max(len(row.tokens) - 1, 0) for row in rows]
            self.planner.observe_gains(plan.draft, result.gains, gained, [row.request.adapter for row in rows])
        elif plan.decoding and not plan.draft.propose:
            self.planner.observe_plain()
        if result.is_typical:
            prompt_tokens = sum(chunk.num_inflight for chunk in plan.chunks)
            self.planner.observe_cost(len(plan.decoding), plan.draft, seconds, prompt_tokens)
        deltas: list[RequestDelta] = []
        for chunk in plan.chunks:
            request = chunk.request
            request.unread_known -= chunk.num_inflight
            if self._requests.get(request.request_id) is not request:
                continue
            if request in result.broken:
                deltas.append(self._fail(request, []))
            else:
                self._register(request)
        for request, tokens in launched.foreseen.items():
            request.unread_known -= len(tokens)
        for row in result.rows:
            if self._requests.get(row.request.request_id) is not row.request:
                continue
            if row.request not in launched.foreseen:
                deltas.append(self._advance(row, plan, row.request.request_id in computing))
            elif not row.is_finite:
                deltas.append(self._fail(row.request, [], row))
            elif row.tokens != launched.foreseen[row.request]:
                delta = self._fail(row.request, [], row)
                why = f"tokens {row.tokens} were drawn where the grammar allows {launched.foreseen[row.request]} alone"
                deltas.append(msgspec.structs.replace(delta, error=why))
            else:
                self._register(row.request)
        return deltas

    def _advance(self, row: RowResult, plan: StepPlan, first: bool, is_read: bool = True) -> RequestDelta:
        """Give a request the tokens that its row gained; the text ends at the first stop.

        Args:
            first: the row has computed the last of its known tokens.
            is_read: the step is; else nobody knows yet whether its numbers are finite, and nothing of it is shared.
        """
        request, tokens = row.request, row.tokens
        request.unread -= 1 if first else plan.draft.most_gained
        if first:
            self._counts.prompt_tokens += request.prompt_len if request.num_output == 0 else 0
        else:
            request.cached_len += len(tokens)
        request.num_steps += 1
        gained = gain(request, tokens, is_drawing=request.unread > 0 or request in self._drawing)
        tokens, reason = gained.tokens, gained.reason
        self._counts.add_row(row, len(tokens))
        request.tokens.extend(tokens)
        request.is_extended = len(tokens) > len(row.tokens)
        self.scheduler.charge(request, len(tokens))
        if reason is not None:
            return self._finish(request, tokens, reason, row, gained.stop_token, is_read)
        if request.matcher is not None and request.matcher.error is not None:
            delta = self._finish(request, tokens, "error", row)
            why = f"the grammar cannot be followed after {request.num_output} tokens: {request.matcher.error}"
            return msgspec.structs.replace(delta, error=why, error_kind="invalid")
        if not row.is_finite:
            return self._fail(request, tokens, row)
        if is_read:
            self._register(request)
        else:
            request.unread_known += len(row.tokens)
        return self._delta(request, tokens, row)

    def _fail(self, request: Request, tokens: list[int], row: RowResult | None = None) -> RequestDelta:
        """End a request whose numbers are not finite. What it computed is shared with nobody."""
        self.scheduler.pages.forget(request.table)
        self._remove(request)
        where = f"after {request.num_output} tokens" if request.num_output else "for the prompt"
        why = f"the model's logits are not finite {where}; its numbers overflow in {self.ready.dtype}"
        delta = self._delta(request, tokens, row, "error")
        return msgspec.structs.replace(delta, error=why, error_kind="model")

    def _register(self, request: Request) -> None:
        num_read = request.cached_len - request.unread_known
        self.scheduler.pages.register(request.table, request.tokens, min(num_read, len(request.tokens)))

    def _finish(
        self,
        request: Request,
        tokens: list[int],
        reason: FinishReason,
        row: RowResult | None = None,
        stop_token: int | None = None,
        is_read: bool = True,
    ) -> RequestDelta:
        if request.held_row is not None and is_read:
            self._register(request)
        self._remove(request)
        return self._delta(request, tokens, row, reason, stop_token)

    def _remove(self, request: Request) -> None:
        del self._requests[request.request_id]
        if self._drawing:
            self._ended.append(request)  # the step that is being launched may still write to its row
        else:
            self.scheduler.remove(request)

    @staticmethod
    def _delta(
        request: Request,
        tokens: list[int],
        row: RowResult | None,
        reason: FinishReason | None = None,
        stop_token: int | None = None,
    ) -> RequestDelta:
        return RequestDelta(
            request_id=request.request_id,
            new_token_ids=tokens,
            logprobs=row.logprobs[: len(tokens)] if row is not None and row.logprobs is not None else None,
            prompt_logprobs=request.told_prompt(len(tokens)) if row is not None else None,
            trace=StepTrace(len(tokens), row.guesses) if row is not None and request.params.return_steps else None,
            finish_reason=reason,
            stop_token_id=stop_token,
            num_cached_tokens=request.num_cached_prompt_tokens,
            num_steps=request.num_steps,
        )
