"""Compiles grammars beside the steps, and keeps those that were asked for lately."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from manyheads.engine.formats import JSON_FORM, json_form, with_real_dates
from manyheads.engine.matcher import first_line
from manyheads.engine.vocabulary import Vocabulary
from manyheads.errors import RequestError, require
from manyheads.grammar import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_GRAMMARS = 128
"""So many compiled grammars are kept."""
NUM_THREADS = 2
LIMITS = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 2_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
"""What one grammar may take: compiling some 0.1 s, a token some 10 ms in the worst case, and some 100 MB."""


class Compiler:
    """Makes matchers of grammars, in threads of its own.

    Args:
        vocabulary: of the model.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()

    def start(self, grammar: Grammar) -> Future[LLMatcher]:
        """Have a grammar compiled, unless it is: a matcher at its start, to be copied. It raises RequestError where
        that cannot be."""
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]
        future = self._compiled[grammar] = self._threads.submit(self._compile, grammar)
        if len(self._compiled) > MAX_GRAMMARS:
            self._compiled.popitem(last=False)
        return future

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        what = f"the grammar ({grammar.kind}) cannot be compiled"
        try:
            text = _TRANSLATIONS[grammar.kind](grammar.value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{what}: {first_line(str(error))}") from error
        limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]
        matcher = LLMatcher(self.vocabulary.tokens, text, log_level=0, limits=limits)
        if not matcher.is_error():
            # the first mask may take as long as all of the rest
            words = np.zeros(self.vocabulary.num_words, dtype=np.int32)
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        require(not matcher.is_error(), f"{what}: {_reason(grammar, matcher.get_error())}")
        return matcher


def _reason(grammar: Grammar, message: str) -> str:
    """What is wrong, with the keyword of a schema that the library does not name."""
    reason = first_line(message)
    if reason == "NoExtensionBias":
        leads_back = grammar.kind == "json" and '"$ref"' in grammar.value
        return "no text keeps to it" + (": a $ref leads back to itself" if leads_back else "")
    if grammar.kind == "json" and message.startswith("regex parse error"):
        keyword, pattern = next(_patterns_in(json.loads(grammar.value), message), ("pattern", ""))
        return f"{keyword} {pattern[:100]!r}: {reason}"
    return reason


def _patterns_in(schema: Any, message: str) -> Iterator[tuple[str, str]]:
    """Find the regular expressions of a schema that a message shows, with their keywords."""
    if isinstance(schema, list):
        for inner in schema:
            yield from _patterns_in(inner, message)
    elif isinstance(schema, dict):
        given = schema.get("pattern")
        of_names = schema.get("patternProperties")
        named = [("pattern", given)] + [("patternProperties", name) for name in of_names or ()]
        yield from ((keyword, p) for keyword, p in named if isinstance(p, str) and p and p in message)
        for inner in schema.values():
            yield from _patterns_in(inner, message)


def _json(value: str) -> str:
    from llguidance import LLMatcher

    schema = with_real_dates(json.loads(value))
    _check(schema is not False, "the schema false holds for nothing")
    return LLMatcher.grammar_from_json_schema({} if schema is True else schema, defaults=JSON_FORM)  # type: ignore[arg-type]


def _regex(value: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(value)


def _choice(value: str) -> str:
    # as one word of the grammar, of which there may be thousands of forms
    texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(value))
    return "start: CHOICE\nCHOICE: " + " | ".join(texts)


def _grammar(value: str) -> str:
    """Lark, or GBNF, which is brought into that form."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(value)
    except Exception as error:  # the parser raises whatever a text makes it stumble over
        raise ValueError(f"neither Lark nor GBNF: {error}") from error


def _structural_tag(value: str) -> str:
    """Text with tags in it: where a trigger was written, one of the tags that begin with it follows."""
    from llguidance import StructTag

    given = json.loads(value)
    triggers, structures = given.get("triggers"), given.get("structures")
    _check(isinstance(structures, list) and len(structures) > 0, "structures must be a list of tags")
    _check(_are_texts(triggers), "triggers must be a list of texts")
    tags: list[StructTag] = []
    for structure in structures:
        begin, end, schema = (structure.get(name) for name in ("begin", "end", "schema"))
        _check(_are_texts([begin, end]) and isinstance(schema, dict), "a tag has begin and end, texts, and a schema")
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        _check(trigger is not None, f"no trigger begins the tag {begin!r}")
        form: Any = json_form(schema)
        tags.append(StructTag(trigger=trigger or "", begin=begin, grammar=form, end=end))
    return StructTag.to_grammar(tags, assume_special=False)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values) and any(values)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


_TRANSLATIONS: dict[str, Callable[[str], str]] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}
"""Each kind of grammar in the library's own form. They raise ValueError."""
