"""Deltas of tokens become text here, one `SequenceOutput` a continuation: detokenizing, stop strings, counts."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from manyheads.frontend.markers import certain
from manyheads.frontend.tokenizer import Detokenizer, Tokenizer
from manyheads.request import ErrorKind, FinishReason, RequestDelta, SamplingParams, StepTrace, TokenLogprobs


class TextDelta(msgspec.Struct, kw_only=True):
    """A text delta is what one engine delta added to one continuation, as its reader may see it."""

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """The first delta has those of the prompt's tokens but the first, if they were asked for."""
    trace: StepTrace | None = None
    """The delta is that of one step, if the steps were asked for."""
    finish_reason: FinishReason | None = None


class CompletionOutput(msgspec.Struct, kw_only=True):
    """A completion is one continuation of a prompt, in vLLM's shape."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it stands here; None is eos or length."""
    num_steps: int = 0
    steps: list[StepTrace] | None = None
    """What each step guessed and gave, if that was asked for."""
    error: str | None = None


class RequestOutput(msgspec.Struct, kw_only=True):
    """The answer to one prompt has `params.n` continuations."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Those of the prompt's tokens but the first, if they were asked for."""


class StopScanner:
    """A scanner looks for stop strings in text that arrives in pieces, and lets no part of one out.

    The stop string that is complete first wins (of two that end together, the longer), so that the result does not
    depend on how the text was cut.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.stops = stops
        self.include = include
        self.matched: str | None = None
        self._held = ""

    def feed(self, text: str) -> str:
        """Take text; give what can no longer be part of a stop string. Sets `matched` when one is complete."""
        buffer = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self.stops if (at := buffer.find(stop)) >= 0]
        if ends:
            end, at, self.matched = min(ends)
            self._held = ""
            return buffer[: end if self.include else at]
        cut = certain(buffer, self.stops)
        self._held = buffer[cut:]
        return buffer[:cut]

    def release(self) -> str:
        """Give the text still held: there will be no more."""
        text, self._held = self._held, ""
        return text


class SequenceOutput:
    """A sequence output is one continuation as it grows.

    Args:
        context: the prompt's tokens when the text continues the prompt's text (completions), empty for a reply.
        shows: special tokens that are part of the text even if others are not.
        index: among the `n` continuations of a prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        context: Sequence[int] = (),
        shows: frozenset[int] = frozenset(),
        index: int = 0,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.num_steps = 0
        self.steps: list[StepTrace] | None = [] if params.return_steps else None
        self.num_cached_tokens = 0
        self.error: str | None = None
        self.error_kind: ErrorKind | None = None
        self.retry_after: float | None = None
        self.needs_abort = False
        """A stop string ended it, and the engine does not know yet: the caller is to abort the request there."""
        self._params = params
        self._special_ids = tokenizer.special_ids
        self._text: list[str] = []
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens, shows=shows, context=context
        )
        self._scanner = StopScanner(params.stop, params.include_stop_str_in_output)

    @property
    def text(self) -> str:
        """Join the text that is certain so far."""
        return "".join(self._text)

    @property
    def finished(self) -> bool:
        """Tell whether it has ended, for whatever reason."""
        return self.finish_reason is not None

    def push(self, delta: RequestDelta) -> TextDelta:
        """Take what a step added. After the end there is nothing to add: the answer to an abort is passed over."""
        if self.finished:
            return TextDelta()
        self.num_steps = max(self.num_steps, delta.num_steps)
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        tokens = delta.new_token_ids
        text, kept = self._read(tokens, delta)
        if self._scanner.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._scanner.matched
            self.needs_abort = delta.finish_reason is None
        elif delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.error, self.error_kind, self.retry_after = delta.error, delta.error_kind, delta.retry_after
            if delta.stop_token_id in self._params.stop_token_ids:
                self.stop_reason = delta.stop_token_id
        self.token_ids += tokens[:kept]
        logprobs = None
        if self.logprobs is not None and delta.logprobs is not None:
            logprobs = delta.logprobs[:kept]
            self.logprobs += logprobs
        if text:
            self._text.append(text)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        trace = delta.trace
        if self.steps is not None and trace is not None:
            trace = StepTrace(kept, trace.guesses)
            self.steps.append(trace)
        return TextDelta(
            text=text,
            token_ids=tokens[:kept],
            logprobs=logprobs,
            prompt_logprobs=delta.prompt_logprobs,
            trace=trace,
            finish_reason=self.finish_reason,
        )

    def result(self) -> CompletionOutput:
        """Return the continuation so far."""
        return msgspec.convert(self, CompletionOutput, from_attributes=True)

    def _read(self, tokens: list[int], delta: RequestDelta) -> tuple[str, int]:
        """Return the new text, and how many of the tokens belong to it."""
        shown = tokens[:-1] if self._hides(delta.stop_token_id) else tokens
        if not self._params.stop:
            text = self._detokenizer.push(shown)
            return text if delta.finish_reason is None else text + self._detokenizer.flush(), len(tokens)
        text = ""
        for i, token in enumerate(shown):  # one by one: it matters which one completes a stop string
            text += self._scan(self._detokenizer.push([token]), len(self.token_ids) + i + 1)
            if self._scanner.matched is not None:
                return text, i + 1
        if delta.finish_reason is not None:
            text += self._scan(self._detokenizer.flush(), len(self.token_ids) + len(tokens))
            if self._scanner.matched is None:
                text += self._scanner.release()
        return text, len(tokens)

    def _scan(self, text: str, num_tokens: int) -> str:
        """A stop string counts only from the token number `min_tokens` on."""
        return text if num_tokens < self._params.min_tokens else self._scanner.feed(text)

    def _hides(self, stop_token_id: int | None) -> bool:
        """A stop token is not part of the text unless asked for; a special one (eos) shows with the special tokens."""
        if stop_token_id is None or self._params.include_stop_str_in_output:
            return False
        return not (stop_token_id in self._special_ids and not self._params.skip_special_tokens)
