"""What a grammar may be, before anything compiles it; and that it crosses the process border."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from manyheads import Grammar, RequestError, SamplingParams
from manyheads.request import EngineRequest


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json", '{"type": "object"}'),
        ("json", "true"),
        ("regex", "[a-z]+"),
        ("choice", '["yes", "no"]'),
        ("grammar", 'start: "a"'),
        ("structural_tag", "{}"),
    ],
)
def test_grammars_that_may_be_asked_for_cross_the_border(kind: Any, value: str) -> None:
    params = SamplingParams(grammar=Grammar(kind, value)).validate()
    request = EngineRequest(request_id="x", prompt_token_ids=[1], params=params)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=EngineRequest) == request


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("yaml", "{}", "kind must be one of"),
        ("regex", "", "empty"),
        ("json", " ", "not JSON"),
        ("regex", "a\ud800", "half a surrogate pair"),
        ("json", "{", "not JSON"),
        ("json", "[]", "an object or a boolean"),
        ("json", "[" * 100_000, "not JSON"),
        ("choice", '"a"', "JSON list of texts"),
        ("choice", "[]", "JSON list of texts"),
        ("choice", "[1]", "JSON list of texts"),
        ("choice", '[""]', "JSON list of texts"),
        ("structural_tag", "[]", "a JSON object"),
        ("grammar", "x" * 200_001, "at most 200000 characters"),
    ],
)
def test_what_can_be_no_grammar_is_refused_by_name(kind: Any, value: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(grammar=Grammar(kind, value)).validate()
