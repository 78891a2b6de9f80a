"""manyheads serves language models with Medusa heads to many people at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyheads.config import ConfigError, EngineConfig
    from manyheads.errors import RequestError
    from manyheads.frontend.llm import LLM
    from manyheads.frontend.output import CompletionOutput, RequestOutput
    from manyheads.grammar import Grammar
    from manyheads.request import SamplingParams

_HOMES = {
    "LLM": "frontend.llm",
    "CompletionOutput": "frontend.output",
    "ConfigError": "config",
    "EngineConfig": "config",
    "Grammar": "grammar",
    "RequestError": "request",
    "RequestOutput": "frontend.output",
    "SamplingParams": "request",
}
__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "Grammar",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `manyheads --help` does not wait for torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"manyheads.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'manyheads' has no attribute {name!r}")
