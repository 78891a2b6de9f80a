"""Requests whose grammars are being compiled: they wait in line as any other, and cannot start before."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from manyheads.engine.compiler import Compiler
from manyheads.engine.matcher import Matcher
from manyheads.engine.step import Request
from manyheads.engine.vocabulary import Vocabulary
from manyheads.errors import RequestError, require
from manyheads.request import ErrorKind
from manyheads.say import say

if TYPE_CHECKING:
    from llguidance import LLMatcher

COMPILE_SECONDS = 10.0
"""What takes longer to compile is refused. The library's own limits end it long before, where it has a thread."""
NAP_SECONDS = 0.005
"""An engine with nothing else to do looks so often for what is compiled."""


@dataclass(eq=False)
class _Held:
    request: Request
    compiled: Future[LLMatcher]
    began: float | None = None
    """When it was first seen being compiled: others may stand before it."""


class Grammars:
    """Gives requests their matchers.

    Args:
        compiler: makes them.
        clock: in seconds.
    """

    def __init__(self, compiler: Compiler, clock: Callable[[], float] = time.monotonic) -> None:
        self._compiler = compiler
        self._clock = clock
        self._held: list[_Held] = []

    def hold(self, request: Request) -> None:
        """Keep a request from starting until its grammar is compiled."""
        assert request.params.grammar is not None
        request.is_held = True
        self._held.append(_Held(request, self._compiler.start(request.params.grammar)))

    def settle(self) -> list[tuple[Request, tuple[str, ErrorKind]]]:
        """Let those start whose grammars are compiled now.

        Returns:
            Those that never can, why, and whose fault that is.
        """
        if not self._held:
            return []
        failed: list[tuple[Request, tuple[str, ErrorKind]]] = []
        waiting: list[_Held] = []
        for held in self._held:
            if self._is_waiting(held):
                waiting.append(held)
                continue
            try:
                matcher = self._matcher(held)
                if not matcher.can_go_back():
                    held.request.params = msgspec.structs.replace(held.request.params, speculative=False)
                held.request.matcher, held.request.is_held = matcher, False
            except RequestError as error:
                failed.append((held.request, (str(error), "invalid")))
            except Exception as error:  # a defect that one request meets is the end of that request alone
                say(traceback.format_exc())
                why = f"the engine cannot compile this grammar: {type(error).__name__}: {error}"
                failed.append((held.request, (why, "engine")))
        self._held = waiting
        return failed

    def nap(self) -> None:
        """Wait a moment for what is compiled, if anything is."""
        wait([held.compiled for held in self._held], timeout=NAP_SECONDS)

    def _is_waiting(self, held: _Held) -> bool:
        if held.began is None and held.compiled.running():
            held.began = self._clock()
        is_late = held.began is not None and self._clock() - held.began >= COMPILE_SECONDS
        return not held.compiled.done() and not is_late

    def _matcher(self, held: _Held) -> Matcher:
        assert held.request.params.grammar is not None
        kind = held.request.params.grammar.kind
        require(held.compiled.done(), f"the grammar ({kind}) takes longer than {COMPILE_SECONDS:g} s to compile")
        return matcher_of(held.request, held.compiled.result(), self._compiler.vocabulary)


def matcher_of(request: Request, compiled: LLMatcher, vocabulary: Vocabulary) -> Matcher:
    """A matcher behind what a request has of its text. Raises RequestError: that does not follow its grammar."""
    ends = [token for token in request.stop_ids if vocabulary.is_special(token)]
    matcher = Matcher(compiled.deep_copy(), vocabulary, ends)
    output = request.tokens[request.prompt_len :]
    taken, _ = matcher.take(output, 0)
    require(matcher.error is None and taken == output, "the output so far does not follow the grammar")
    return matcher
