"""A generation follows one prompt with its `n` continuations, from the engine's requests to the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from manyheads.frontend.output import RequestOutput, SequenceOutput, TextDelta
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import EngineRequest, RequestDelta, SamplingParams


@dataclass(frozen=True)
class Prompt:
    """A prompt is given to the engine as tokens."""

    token_ids: list[int]
    continues: bool = False
    """If True, the answer's text goes on where the prompt's ends (completions); else it begins a turn (chat)."""
    text: str | None = None
    """This is the text that the caller gave, if it was one."""
    shows: frozenset[int] = frozenset()
    """These special tokens are part of the answer's text even if others are not."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place says how the requests of a call wait, and for what, with the meanings of `EngineRequest`."""

    client: str = ""
    session: str = ""
    priority: int = 0
    timeout: float | None = None
    cache_salt: str = ""
    lora: str = ""


class Generation:
    """A generation is one prompt and its `params.n` continuations, each a request of its own to the engine.

    Whoever drives the engine sends it `requests()` and gives its deltas to `take`.

    Args:
        request_id: the ids of the engine's requests are made from it.
        params: they have been checked (`EngineReady.check`).
        place: how its requests wait.
    """

    def __init__(
        self, request_id: str, prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer, place: Place | None = None
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.place = place or Place()
        context = prompt.token_ids if prompt.continues else ()
        self.outputs = [
            SequenceOutput(tokenizer, params, context=context, shows=prompt.shows, index=i) for i in range(params.n)
        ]

    @property
    def finished(self) -> bool:
        """Tell whether every continuation has ended."""
        return all(o.finished for o in self.outputs)

    def requests(self) -> Iterator[tuple[EngineRequest, SequenceOutput]]:
        """Make the engine's request for each continuation."""
        for output in self.outputs:
            params = child_params(self.params, output.index)
            request_id = f"{self.request_id}-{output.index}"
            request = EngineRequest(
                request_id=request_id,
                prompt_token_ids=self.prompt.token_ids,
                params=params,
                client=self.place.client,
                priority=self.place.priority,
                timeout=self.place.timeout,
                cache_salt=self.place.cache_salt,
                lora=self.place.lora,
                session=self.place.session,
            )
            yield request, output

    def result(self) -> RequestOutput:
        """Return the answer so far."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            outputs=[o.result() for o in self.outputs],
            finished=self.finished,
            num_cached_tokens=self.outputs[0].num_cached_tokens,
            prompt_logprobs=self.outputs[0].prompt_logprobs,
        )


OpenSequences = dict[str, SequenceOutput]
"""An engine is at work on these continuations; the keys are the ids of their requests."""


@dataclass(slots=True)
class Update:
    """An update is what the engine added to one continuation."""

    output: SequenceOutput
    delta: TextDelta


def take(delta: RequestDelta, sequences: OpenSequences, abort: Callable[[str], None]) -> Update | None:
    """Give a delta to its continuation, which leaves the open ones when it ends.

    Args:
        abort: ends a request in the engine; it is called for one that a stop string ended, which the engine cannot see.

    Returns:
        None if the continuation has ended before: the delta is the answer to an abort.
    """
    if delta.request_id not in sequences:
        return None
    output = sequences[delta.request_id]
    text = output.push(delta)
    if output.finished:
        del sequences[delta.request_id]
        if output.needs_abort:
            abort(delta.request_id)
    return Update(output, text)


def child_params(params: SamplingParams, index: int) -> SamplingParams:
    """Make the parameters of continuation `index` of a request for n: those of one sequence, with a seed of its own."""
    if params.n == 1:
        return params
    seed = None if params.seed is None else (params.seed + index + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(params, n=1, seed=seed)
