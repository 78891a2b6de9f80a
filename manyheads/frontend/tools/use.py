"""What a request says about functions: which there are, and whether they may or must be called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyheads.frontend.tools.forced import MAX_CALLS, ForcedParser, call_grammar
from manyheads.frontend.tools.parser import ToolParser
from manyheads.grammar import Grammar


@dataclass(frozen=True)
class ToolUse:
    """A request has functions, and the reply may call them."""

    tools: tuple[Mapping[str, Any], ...] = ()
    """In OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}."""
    must_call: tuple[str, ...] = ()
    """One of these must be called; if there is none, it is the model's choice."""
    parallel: bool = True
    """A reply may hold several calls."""

    def parser(self, kind: type[ToolParser] | None, *, streams: bool) -> ToolParser | None:
        """Make what reads a reply of a model whose form is read by `kind`; None if there are no calls to read."""
        if not self.tools or (kind is None and not self.must_call):
            return None
        names = frozenset(str(tool["function"]["name"]) for tool in self.tools)
        reader = ForcedParser if self.must_call or kind is None else kind
        return reader(names, streams=streams, most=None if self.parallel else 1)

    def grammar(self, form: type[ToolParser], *, several: bool) -> Grammar | None:
        """Make the grammar of calls that must be made; None if none must be.

        Args:
            form: what the model's calls are written in.
            several: the model can be left to say how many there are.
        """
        functions = [tool["function"] for tool in self.tools if tool["function"]["name"] in self.must_call]
        return call_grammar(functions, form, MAX_CALLS if several and self.parallel else 1) if functions else None
