"""Thoughts, content and calls are told apart, and the forms are found in chat templates."""

from __future__ import annotations

from typing import Any

import pytest

from manyheads.config import ConfigError
from manyheads.frontend.reasoning import REASONING_PARSERS, ThoughtSplitter
from manyheads.frontend.reply import ReplyForm, WholeReply, check_parsers
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.frontend.tools.hermes import HermesParser
from manyheads.frontend.tools.mistral import MistralParser
from manyheads.frontend.tools.use import ToolUse
from tests.server.tiny_tokenizer import TEMPLATE, make_hf, tiny_tokenizer

CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
USE = ToolUse(tools=({"type": "function", "function": {"name": "now"}},))


@pytest.mark.parametrize(
    ("text", "is_open", "thoughts", "answer"),
    [
        ("<think>\nHm, 1 < 2.\n</think>\n\nYes.", False, "Hm, 1 < 2.", "Yes."),
        ("\n<think>Hm.</think>Yes. </think>", False, "Hm.", "Yes. </think>"),
        ("Hm.\n</think>\n\nYes.\n", True, "Hm.", "Yes.\n"),
        ("Hm. </thin", True, "Hm. </thin", ""),
        ("Yes. <think>", False, "", "Yes. <think>"),
        ("<thing>", False, "", "<thing>"),
        ("<thi", False, "", "<thi"),
        (" Yes", False, "", " Yes"),
        ("", False, "", ""),
    ],
)
def test_thoughts(text: str, is_open: bool, thoughts: str, answer: str) -> None:
    for size in (1, 2, 3, 7, len(text) or 1):
        splitter = ThoughtSplitter(REASONING_PARSERS["think"], is_open=is_open)
        parts = [splitter.push(text[i : i + size]) for i in range(0, len(text), size)]
        parts.append(splitter.push("", final=True))
        assert tuple(map("".join, zip(*parts, strict=True))) == (thoughts, answer)


def test_calls_in_thoughts_are_none() -> None:
    form = ReplyForm(HermesParser, REASONING_PARSERS["think"])
    text = f"<think>I could {CALL}</think>Well. {CALL}"
    for streams in (True, False):
        reply, reader = WholeReply(), form.reader(tiny_tokenizer(), [5], USE, streams=streams)
        for piece in text:
            reply.add(reader.push(piece))
        reply.add(reader.push("", final=True))
        assert (reply.thoughts, reply.content) == (f"I could {CALL}", "Well.")
        assert [(c.name, c.arguments) for c in reply.calls] == [("now", "{}")]
    assert form.reader(tiny_tokenizer(), [5], ToolUse(), streams=False).read(CALL).content == CALL


def test_forms_are_found_in_templates() -> None:
    plain = ReplyForm.find(tiny_tokenizer(), None, None)
    assert (plain.tools, plain.thoughts, plain.shows) == (HermesParser, None, frozenset())
    calls = Tokenizer(make_hf(TEMPLATE + "{% if tools %}{{ tools }}{% endif %}"))
    several = [ReplyForm.find(calls, None, None), ReplyForm.find(tiny_tokenizer(), "hermes", None)]
    assert [form.calls_several for form in (plain, *several)] == [False, True, True]
    thinks = Tokenizer(make_hf(TEMPLATE + "{{ '<think></think>' }}"))
    assert ReplyForm.find(thinks, None, None).thoughts == REASONING_PARSERS["think"]
    named = ReplyForm.find(thinks, "none", "none")
    assert (named.tools, named.thoughts) == (None, None)
    assert ReplyForm.find(thinks, "mistral", "mistral").thoughts == REASONING_PARSERS["mistral"]
    for names, option in ((("x", None), "--tool-parser"), ((None, "x"), "--reasoning-parser")):
        with pytest.raises(ConfigError, match=f"{option} must be"):
            check_parsers(*names)


def test_a_prompt_can_open_thoughts() -> None:
    tokenizer, form = tiny_tokenizer(), ReplyForm(None, REASONING_PARSERS["think"])
    for prompt, thoughts in (("<|assistant|><think>\n", "Hm"), ("<think>\n</think>\n", ""), ("<think> or", "")):
        reply = form.reader(tokenizer, tokenizer.encode(prompt), ToolUse(), streams=False).read("Hm")
        assert reply.thoughts == thoughts


def test_special_tokens_of_a_form_are_shown() -> None:
    hf: Any = make_hf("{{ '[TOOL_CALLS]' }}")
    hf.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]"]})
    form = ReplyForm.find(Tokenizer(hf), None, None)
    assert form.tools is MistralParser
    assert form.shows == {hf.convert_tokens_to_ids("[TOOL_CALLS]"), hf.convert_tokens_to_ids("[ARGS]")}
