"""The core types say what a request asks, and what crosses the border between the front end and an engine process.

Each is a msgspec Struct, so that it travels as typed msgpack.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from manyheads.errors import QueueFull, RequestError, require
from manyheads.grammar import Grammar
from manyheads.stats import EngineStats, MemoryUse

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
MAX_STOP_TOKENS = 256
MAX_LOGPROBS = 20
MAX_N = 64
MAX_LOGIT_BIASES = 1024
MAX_ALLOWED = 4096
MAX_BAD_WORDS = 256
MAX_BAD_TOKENS = 32
"""A bad word has at most so many tokens."""
RANGES: dict[str, tuple[float, float]] = {
    "n": (1, MAX_N),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "typical_epsilon": (0, 1),
    "typical_alpha": (0, 100),
}
"""These fields of `SamplingParams` have a least and a greatest value."""

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorKind = Literal["invalid", "queue_full", "engine", "model"]
"""A delta that says `error` has a reason: the request can't be served as asked (HTTP 400), too many wait (429), the
engine has died (503), or the model gives no numbers for this text (500)."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """These parameters say how to continue a prompt, with vLLM's names and meanings; `validate` checks them."""

    n: int = 1
    max_tokens: int | None = None
    """The output has at most so many tokens; None lets it go on until the model stops or the context is full."""
    min_tokens: int = 0
    max_steps: int | None = None
    """The request gets at most so many decoding steps, each of which can give several tokens if it speculates."""
    temperature: float = 1.0
    """At 0, decoding is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """At 0 (or -1), all tokens may be drawn."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """It holds for tokens of prompt and output (Keskar et al. 2019, CTRL, section 4.1); 1 turns it off."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    """If there are any, the output has no other tokens."""
    bad_words: tuple[str, ...] = ()
    """No token is drawn that would end one of these texts; the front end adds them to `bad_token_ids`."""
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    """No token is drawn that would end one of these runs of tokens, of which the first may stand in the prompt."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Asks for the log-probabilities, from raw logits, of the chosen token and of this many most likely ones."""
    prompt_logprobs: int | None = None
    """Asks for the same of each token of the prompt but the first."""
    return_steps: bool = False
    """Asks for what was guessed in each step, and what came of it."""
    skip_special_tokens: bool = True
    speculative: bool = True
    """If False, this request is decoded one token a step."""
    acceptance: Literal["exact", "typical"] = "exact"
    """Above temperature 0, `exact` keeps the model's distribution; `typical` is Medusa's own lossy rule
    (Cai et al. 2024, section 2.3.1)."""
    typical_epsilon: float = 0.09
    typical_alpha: float = 0.3
    grammar: Grammar | None = None
    """The output is in this language; at its end only a stop token may follow."""

    def validate(self) -> SamplingParams:
        """Raise RequestError for a field whose value is out of its range, else return self so that calls chain."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None or not name.endswith("logprobs"):  # NaN is between nothing
                require(low <= value <= high, f"{name} must be between {low:g} and {high:g}, not {value}")
        require(self.top_p > 0, f"top_p must be above 0, not {self.top_p}")
        for name, limit, low in (("max_tokens", self.max_tokens, 0), ("max_steps", self.max_steps, 1)):
            require(limit is None or limit >= low, f"{name} must be at least {low}, not {limit}")
        least, most = self.min_tokens, self.max_tokens
        require(least >= 0, f"min_tokens must not be negative, not {least}")
        require(most is None or least <= most, f"min_tokens ({least}) must not exceed max_tokens ({most})")
        require(self.top_k >= -1, f"top_k must be -1 or 0 (off) or positive, not {self.top_k}")
        for name in ("max_tokens", "min_tokens", "max_steps", "top_k"):
            value = getattr(self, name)
            require((value or 0) < 2**31, f"{name} must be below 2**31, not {value}")
        is_rule = self.acceptance in ("exact", "typical")
        require(is_rule, f"acceptance must be exact or typical, not {self.acceptance!r}")
        require(self.seed is None or -(2**63) <= self.seed < 2**63, f"seed must be a 64-bit integer, not {self.seed}")
        for count, what, room in (
            (len(self.stop), "stop strings", MAX_STOP_STRINGS),
            (len(self.stop_token_ids), "stop token ids", MAX_STOP_TOKENS),
            (len(self.logit_bias), "logit_bias entries", MAX_LOGIT_BIASES),
            (len(self.allowed_token_ids), "allowed_token_ids", MAX_ALLOWED),
            (len(self.bad_words), "bad words", MAX_BAD_WORDS),
            (len(self.bad_token_ids), "bad_token_ids", 4 * MAX_BAD_WORDS),
            (max(map(len, self.bad_token_ids), default=0), "tokens in a bad word", MAX_BAD_TOKENS),
        ):
            require(count <= room, f"at most {room} {what}, not {count}")
        require(all(self.stop), "a stop string must not be empty")
        require(all((*self.bad_words, *self.bad_token_ids)), "a bad word must not be empty")
        is_short = all(len(s) <= MAX_STOP_CHARACTERS for s in self.stop)
        require(is_short, f"a stop string must have at most {MAX_STOP_CHARACTERS} characters")
        in_range = all(-100 <= bias <= 100 for bias in self.logit_bias.values())
        require(in_range, "logit_bias values must be between -100 and 100")
        if self.grammar is not None:
            self.grammar.validate()
        return self

    @property
    def greedy(self) -> bool:
        """Tell whether the most probable token is always taken."""
        return self.temperature == 0.0


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """The front end asks the engine to continue one sequence; `params.n` is 1 by then."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    output_token_ids: list[int] = []
    """These tokens of the answer are known already, from an engine that has died; the request goes on behind them."""
    num_steps: int = 0
    """They took so many decoding steps."""
    resumes: bool = False
    """If True, an engine had accepted it before it died, so that no queue is too long for it."""
    client: str = ""
    """Whose fair share it counts against."""
    priority: int = 0
    """A lower one runs earlier, as in vLLM; among equal ones, clients are served in turn."""
    cache_salt: str = ""
    """Only requests with the same one share pages of the prefix cache."""
    lora: str = ""
    """The name of the adapter that answers, on top of the base; "" is the base alone."""
    timeout: float | None = None
    """It has to start within so many seconds, or is refused; None leaves it to the engine's `max_wait`."""
    session: str = ""
    """Of several engines, requests with the same one go to the same; an engine does not read it."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The front end no longer wants this request; it gets one last delta with finish_reason `abort`."""

    request_id: str


class TokenLogprobs(msgspec.Struct, frozen=True):
    """An output token comes with its log-probability, its rank (from 1), and the most likely tokens with theirs."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Guess(msgspec.Struct, frozen=True, array_like=True):
    """A node of the tree that a row brought to a step, its root left out."""

    token_id: int
    parent: int
    """Where the guess before it stands among the step's; -1 if it follows the text itself."""
    accepted: bool


class StepTrace(msgspec.Struct, frozen=True, array_like=True):
    """A trace says what a step gave to one request: the guesses that were accepted, and what the model drew after."""

    num_tokens: int
    guesses: list[Guess]
    """They stand in the order of the tree; there are none where nothing was guessed."""


class RequestDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A delta is what one step added to one request. The last one, and only that, has a finish_reason."""

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """There is one for each new token, if the request asked for them."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """The first delta has those of the prompt's tokens but the first, if the request asked for them."""
    trace: StepTrace | None = None
    """It is there if the request asked for its steps and a step ran."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token (eos included) that ended the request; it is the last of new_token_ids."""
    num_cached_tokens: int = 0
    """Counts the prompt tokens that came from the prefix cache."""
    num_steps: int = 0
    """Counts the decoding steps so far."""
    error: str | None = None
    error_kind: ErrorKind | None = None
    retry_after: float | None = None

    @classmethod
    def failure(cls, request_id: str, message: str, kind: ErrorKind, retry_after: float | None = None) -> RequestDelta:
        """Make the last delta of a request that is refused or cannot go on."""
        delta = cls(request_id=request_id, new_token_ids=[], finish_reason="error", error=message, error_kind=kind)
        return msgspec.structs.replace(delta, retry_after=retry_after)

    @classmethod
    def refusal(cls, request_id: str, error: RequestError | QueueFull) -> RequestDelta:
        """Make the last delta of a request that the engine does not take."""
        if isinstance(error, QueueFull):
            return cls.failure(request_id, str(error), "queue_full", error.retry_after)
        return cls.failure(request_id, str(error), "invalid")


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """An engine process says first what it serves."""

    model: str
    max_model_len: int
    vocab_size: int
    drafter: str | None = None
    """What guesses tokens, one of `config.DRAFTERS`; None for a plain engine."""
    draft_depth: int = 0
    """Tokens that it guesses beyond the next one: of Medusa, its heads."""
    dtype: str
    quantization: str | None = None
    """The weights are rounded to this, if to anything."""
    weights: str | None = None
    """A line on what became of the checkpoint's weights, if that is not plain."""
    kv_cache_dtype: str = "auto"
    device: str
    num_pages: int
    page_size: int
    eos_token_ids: list[int]
    loras: list[str] = []
    """Names of the adapters that requests may ask for."""
    wanted_model_len: int = 0
    """So many tokens would max_model_len be, had the K/V cache room for them."""
    memory: MemoryUse = MemoryUse()

    def check(self, params: SamplingParams, prompts: Iterable[Sequence[int]], lora: str = "") -> None:
        """Check prompts (token ids), how they are to be continued, and by which adapter; raise RequestError if that can
        never be served.

        The front end calls it before anything runs, and the engine for whatever reaches it.
        """
        params.validate()
        there = ", ".join(map(repr, self.loras)) or "none"
        require(not lora or lora in self.loras, f"there is no adapter {lora[:200]!r}; there are: {there}")
        longest, last_id = self.max_model_len, self.vocab_size - 1
        bad = (token for word in params.bad_token_ids for token in word)
        tokens = (*params.stop_token_ids, *params.logit_bias, *params.allowed_token_ids, *bad)
        are_known = all(0 <= t <= last_id for t in tokens)
        names = "stop_token_ids, logit_bias, allowed_token_ids and bad_token_ids"
        require(are_known, f"{names}: token ids must be between 0 and {last_id}")
        for prompt in prompts:
            count = len(prompt)
            require(count > 0, "the prompt is empty")
            are_known = min(prompt) >= 0 and max(prompt) <= last_id
            require(are_known, f"prompt token ids must be between 0 and {last_id}")
            exceeds = f"exceed the context of {longest} tokens"
            require(count < longest, f"the prompt has {count} tokens; with one of output they {exceeds}")
            both = f"the prompt's {count} tokens and max_tokens={params.max_tokens} together {exceeds}"
            require(count + (params.max_tokens or 0) <= longest, f"{both}; ask for at most {longest - count}")


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start or has died; the message is for a person."""

    message: str
    refused: bool = False
    """If True, a setting or a checkpoint cannot hold, which is the caller's to mend."""


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="outputs"):
    """One step of the engine has this to say."""

    deltas: list[RequestDelta] = []
    admitted: list[str] = []
    """These requests run from this step on; it is told before the step begins, which may be the end of the engine."""
    stats: EngineStats | None = None


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """The engine is alive, and in the middle of something long."""


ToEngine = EngineRequest | Abort
FromEngine = EngineReady | EngineFailed | StepOutputs | Beat
