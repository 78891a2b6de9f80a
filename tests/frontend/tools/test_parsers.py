"""Calls are read the same however the text is cut, and what is no call stays content."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.frontend.tools.kinds import TOOL_PARSERS, find_parser
from manyheads.frontend.tools.parser import Parsed

NAMES = frozenset({"weather", "now"})
WEATHER = ("weather", {"city": 'Köln "}{\\', "days": [1, {"a": None}]})
NOW = ("now", {})
J = json.dumps(WEATHER[1], ensure_ascii=False)
CALL = f'{{"name": "weather", "arguments": {J}}}'
SEP, CALL_BEGIN, CALL_END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
V3_CALL = f"{CALL_BEGIN}function{SEP}weather\n```json\n{J}\n```{CALL_END}"
REPLIES = [
    ("hermes", f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see.", [WEATHER]),
    (
        "hermes",
        f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name":"now","arguments":{{}}}}</tool_call>',
        "",
        [WEATHER, NOW],
    ),
    ("hermes", f'<tool_call>{{"arguments": {J}, "name": "weather"}}</tool_call> Done.', " Done.", [WEATHER]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}, "id": 7}', "", [NOW]),
    ("hermes", "a <tool_call> is no call", "a <tool_call> is no call", []),
    ("hermes", "<tool_call>{name: now}</tool_call>", "<tool_call>{name: now}</tool_call>", []),
    ("hermes", "<tool_call>{]}</tool_call>", "<tool_call>{]}</tool_call>", []),
    ("hermes", "1 < 2, <tool", "1 < 2, <tool", []),
    ("hermes", "", "", []),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [WEATHER, WEATHER]),
    ("mistral", f"Hm. [TOOL_CALLS]weather[ARGS]{J}[TOOL_CALLS]now{{}}", "Hm.", [WEATHER, NOW]),
    ("mistral", f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{J}", "", [WEATHER]),
    ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    (
        "llama3_json",
        f'<|python_tag|>{{"name": "weather", "parameters": {J}}}; {{"name": "now", "parameters": {{}}}}',
        "",
        [WEATHER, NOW],
    ),
    ("llama3_json", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ("llama3_json", '{"a": 1} and more', '{"a": 1} and more', []),
    ("llama3_json", "Hello {you}", "Hello {you}", []),
    (
        "pythonic",
        '[weather(city="Köln", days=[1, -2]), now()]',
        "",
        [("weather", {"city": "Köln", "days": [1, -2]}), NOW],
    ),
    ("pythonic", "<|python_start|>[now()]<|python_end|>", "", [NOW]),
    ("pythonic", "[1] says so", "[1] says so", []),
    ("pythonic", "[now(1)]", "[now(1)]", []),
    ("pythonic", "[now(x=__import__('os'))]", "[now(x=__import__('os'))]", []),
    ("pythonic", "[now(" + "[" * 90 + "]" * 90 + ")]", "[now(" + "[" * 90 + "]" * 90 + ")]", []),
    (
        "deepseek_v3",
        f"Ok{BEGIN}{V3_CALL}\n{V3_CALL.replace('weather', 'now').replace(J, '{}')}{END}",
        "Ok",
        [WEATHER, NOW],
    ),
    ("deepseek_v3", f"{BEGIN}{CALL_BEGIN}weather{SEP}{J}{CALL_END}{END}", "", [WEATHER]),
    ("deepseek_v3", f"{BEGIN} nothing", f"{BEGIN} nothing", []),
]


def read(name: str, pieces: list[str], *, streams: bool, most: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """The content, and the calls put together, as a client does."""
    parser = TOOL_PARSERS[name](NAMES, streams=streams, most=most)
    parts = [parser.push(piece) for piece in pieces] + [parser.push("", final=True)]
    return put_together(parts)


def put_together(parts: list[Parsed]) -> tuple[str, list[tuple[str, str]]]:
    calls: list[tuple[str, str]] = []
    for delta in (call for part in parts for call in part.calls):
        if delta.name is not None:
            assert delta.index == len(calls)
            calls.append((delta.name, ""))
        calls[delta.index] = (calls[delta.index][0], calls[delta.index][1] + delta.arguments)
    return "".join(part.content for part in parts), calls


@pytest.mark.parametrize(("name", "text", "content", "calls"), REPLIES)
def test_calls_and_content(name: str, text: str, content: str, calls: list[tuple[str, dict]]) -> None:
    found, raw = read(name, [text], streams=False)
    assert (found, [(n, json.loads(a)) for n, a in raw]) == (content, calls)
    dice = random.Random(text)
    cuts = [[text[i : i + 1] for i in range(len(text))]]
    for _ in range(5):
        ends = sorted(dice.sample(range(len(text) + 1), min(4, len(text))))
        cuts.append([text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)])
    for pieces in cuts:
        assert read(name, pieces, streams=True) == (found, raw)
        assert read(name, pieces, streams=False) == (found, raw)


def test_arguments_come_piece_by_piece() -> None:
    parser = TOOL_PARSERS["hermes"](NAMES, streams=True)
    assert parser.push('<tool_call>{"name": "weather", "argum').calls == []
    first, second = parser.push('ents": {"city": "K').calls
    assert (first.name, first.arguments, second.arguments) == ("weather", "", '{"city": "K')
    assert [c.arguments for c in parser.push('öln"').calls] == ['öln"']
    assert [c.arguments for c in parser.push("}}").calls] == ["}"]


def test_a_call_that_is_cut_off_or_no_json_is_content() -> None:
    for text in ('<tool_call>{"name": "now", "arguments": {"a": 1', '<tool_call>{"name": "now", "arguments": {a: 1}}'):
        assert read("hermes", [text], streams=False) == (text, [])


def test_no_more_calls_than_wanted() -> None:
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    for streams in (True, False):
        assert len(read("hermes", [text], streams=streams, most=1)[1]) == 1


PIECES = st.lists(
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            BEGIN,
            CALL_BEGIN,
            SEP,
            "<|python_tag|>",
            "now",
            "[ARGS]",
            "(",
            ")",
            '{"name": "now", "arguments": {',
            '{"name": "now", "parameters": {',
            "{",
            "}",
            "[",
            "]",
            '"',
            "\\",
            ",",
            ";",
            " ",
            "\n",
            "x",
            "a=",
            "function",
            "```json",
            "\ud7ff",
            "\0",
        ]
    ),
    max_size=14,
)


@pytest.mark.parametrize("name", TOOL_PARSERS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(pieces=PIECES)
def test_nothing_breaks_a_parser(name: str, pieces: list[str]) -> None:
    """Whatever a model writes, there is an answer; whole calls have arguments that are JSON."""
    _, calls = read(name, ["".join(pieces)], streams=False)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)
    content, calls = read(name, pieces, streams=True)
    assert read(name, list("".join(pieces)), streams=True) == (content, calls)


def test_templates_tell_the_form() -> None:
    assert find_parser("{% for m in messages %}{% endfor %}") is TOOL_PARSERS["hermes"]
    for sign, name in {"<tool_call></tool_call>": "hermes", "[TOOL_CALLS]": "mistral", BEGIN: "deepseek_v3"}.items():
        assert find_parser("{{ tools }}" + sign) is TOOL_PARSERS[name]
    assert find_parser("{{ '<|python_tag|>' }}") is TOOL_PARSERS["llama3_json"]
    assert find_parser("[func_name1(params_name1=value)]") is TOOL_PARSERS["pythonic"]
