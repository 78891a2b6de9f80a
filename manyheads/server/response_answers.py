"""What /v1/responses answers, for the description of the interface alone."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class ResponseItem(BaseModel, extra="allow"):
    """It is what the assistant thinks, says or calls, in OpenAI's forms."""

    type: Literal["reasoning", "message", "function_call"]
    id: str
    status: Status


class CachedTokens(BaseModel):
    """It says what of the input did not have to be computed."""

    cached_tokens: int = Field(ge=0)


class ReasoningTokens(BaseModel):
    """It says how much of the output was thought."""

    reasoning_tokens: int = Field(ge=0)


class ResponseUsage(BaseModel):
    """It counts what a response took."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseAnswer(BaseModel, extra="allow"):
    """It is an answer of /v1/responses; further fields repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[ResponseItem]
    usage: ResponseUsage | None


class ResponseEvent(BaseModel, extra="allow"):
    """It is an event of a stream of /v1/responses, in OpenAI's forms by type."""

    type: str
    sequence_number: int = Field(ge=0)
