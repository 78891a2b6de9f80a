"""What the endpoints answer, for the description of the interface alone: answers are written without these models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from manyheads.request import FinishReason

ChatFinishReason = FinishReason | Literal["tool_calls"]


class Error(BaseModel):
    """It says what went wrong."""

    message: str = Field(description="for a person: what is wrong and what to do")
    type: str
    param: str | None = Field(description="the field at fault, if one is")
    code: str | None = Field(description="for a program: what is wrong")


class ErrorAnswer(BaseModel):
    """Every answer other than 200 is one of these; in a stream that fails later, the last event but [DONE] is one."""

    error: Error


class PromptTokensDetails(BaseModel):
    """It says what of a prompt did not have to be computed."""

    cached_tokens: int = Field(ge=0)


class Usage(BaseModel):
    """It counts what an answer took."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)
    prompt_tokens_details: PromptTokensDetails
    decoding_steps: int = Field(ge=0)


class CompletionLogprobs(BaseModel):
    """Each list has an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for a prompt's first token, which nothing foretells")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """It is a token that stands, or could have stood, in a prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By token id, for each token of a prompt; null for the first."""


class StepGuess(BaseModel):
    """It is a token that was guessed for a step."""

    token: str
    parent: int = Field(ge=-1, description="which of the step's guesses it follows; -1: the text before the step")
    accepted: bool = Field(description="whether the model agreed")


class Step(BaseModel):
    """It is what a step of the model gave: the guesses that it accepted, and what it drew after them."""

    num_tokens: int = Field(ge=0)
    guesses: list[StepGuess]


class CompletionChoice(BaseModel):
    """It is one continuation, or in a stream what came of it."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = Field(description="the stop string or token that ended it, if one did")
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    steps: list[Step] | None = Field(default=None, description="in a stream, that of the event")


class CompletionChunk(BaseModel):
    """It is an event of a stream of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Completion(CompletionChunk):
    """It is an answer of /v1/completions."""

    usage: Usage


class TopLogprob(BaseModel):
    """It is a token that could have stood here."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """It is a token of an answer, with those that were likely beside it."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """It has an entry for each token."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """A function is called with these arguments."""

    name: str
    arguments: str = Field(description="JSON")


class ToolCall(BaseModel):
    """The assistant calls a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """It is what the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = Field(default=None, description="what it thought before")
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """It is one answer."""

    index: int = Field(ge=0)
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    steps: list[Step] | None = Field(default=None, description="in a stream, that of the event")


class ChatCompletion(BaseModel):
    """It is an answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class FunctionDelta(BaseModel):
    """It is the name that begins a call, or a piece of its arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """It is what an event adds to a call; the first one of a call has id and name."""

    index: int = Field(ge=0)
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(BaseModel):
    """It is what an event adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """It is what came of one answer."""

    index: int = Field(ge=0)
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    steps: list[Step] | None = Field(default=None, description="in a stream, that of the event")


class ChatCompletionChunk(BaseModel):
    """It is an event of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class Model(BaseModel):
    """It is a name by which the model is served, or an adapter on top of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    """Of an adapter, the base."""
    max_model_len: int
    drafter: str | None
    num_medusa_heads: int


class Models(BaseModel):
    """It is what is served."""

    object: Literal["list"]
    data: list[Model]


class GenerateDetails(BaseModel):
    """It counts what an answer took."""

    finish_reason: FinishReason
    stop_reason: int | str | None
    prompt_tokens: int
    generated_tokens: int
    steps: int
    tokens_per_step: float
    seconds: float


class GenerateAnswer(BaseModel):
    """It is an answer of /generate, and the last event of /generate_stream."""

    response: str
    details: GenerateDetails


class GenerateText(BaseModel):
    """It is an event of /generate_stream but the last."""

    text: str


class Tokens(BaseModel):
    """It is an answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    """It is an answer of /detokenize."""

    prompt: str


class Version(BaseModel):
    """It is an answer of /version."""

    version: str
