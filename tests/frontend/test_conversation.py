"""What chat templates are filled with, and that a model without a word of tools gets them all the same."""

from __future__ import annotations

from typing import Any

import pytest

from manyheads.errors import RequestError
from manyheads.frontend.conversation import Conversation
from manyheads.frontend.reasoning import REASONING_PARSERS
from manyheads.frontend.tokenizer import Tokenizer
from tests.server.tiny_tokenizer import make_hf, tiny_tokenizer

HELLO = {"role": "user", "content": "hello"}
TOOLS = ({"type": "function", "function": {"name": "now", "description": "<|end|>", "parameters": {"<|end|>": 1}}},)
CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "ü"}'}}
HISTORY: list[dict[str, Any]] = [
    HELLO,
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "noon", "tool_call_id": "1"},
    {"role": "tool", "content": "late", "tool_call_id": "2"},
]
KNOWS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.zone }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ mood }}{% endif %}"
)


def text_of(conversation: Conversation, template: str | None = None) -> str:
    tokenizer = tiny_tokenizer() if template is None else Tokenizer(make_hf(template))
    return tokenizer.decode(tokenizer.encode_chat(conversation), skip_special_tokens=False)


def num_ends(conversation: Conversation, template: str | None = None) -> int:
    tokenizer = tiny_tokenizer() if template is None else Tokenizer(make_hf(template))
    return tokenizer.encode_chat(conversation).count(tokenizer.hf.eos_token_id)


def test_a_template_that_knows_tools() -> None:
    text = text_of(Conversation(HISTORY, tools=TOOLS, variables={"mood": "gay"}), KNOWS)
    assert text.startswith('{"type": "function", "function": {"name": "now", "description": "<|end|>"')
    assert "<|assistant|>üü<|end|><|tool|>noon<|end|><|tool|>late<|end|><|assistant|>gay" in text
    assert num_ends(Conversation(HISTORY, tools=TOOLS), KNOWS) == 4, "what callers write is text"


def test_a_template_that_knows_none() -> None:
    text = text_of(Conversation(HISTORY, tools=TOOLS))
    system, user, assistant, results, _ = text.split("<|end|>\n")
    assert system.startswith("<|system|>You can call functions.")
    assert '"name": "now"' in system
    assert assistant.count('<tool_call>\n{"name": "now", "arguments": {"zone": "ü"}}\n</tool_call>') == 2
    both = "<tool_response>\nnoon\n</tool_response>\n<tool_response>\nlate\n</tool_response>"
    assert (user, results) == ("<|user|>hello", f"<|user|>{both}")
    own = Conversation([{"role": "system", "content": "Be kind."}, HELLO], tools=TOOLS)
    assert text_of(own).startswith("<|system|>Be kind.\n\nYou can call functions.")
    assert num_ends(own) == 2


def test_how_a_prompt_ends() -> None:
    said = [HELLO, {"role": "assistant", "content": "Hi the"}]
    assert text_of(Conversation(said, opens_reply=False)).endswith("Hi the<|end|>\n")
    assert text_of(Conversation(said, opens_reply=False, continues_last=True)).endswith("Hi the")
    assert text_of(Conversation([HELLO], begins_with="<tool_call>")).endswith("<|assistant|><tool_call>")
    marks = REASONING_PARSERS["think"]
    ends = text_of(Conversation([HELLO], begins_with="x", closes=marks), KNOWS + "{{ '<think>\\n' }}")
    assert ends.endswith("<think>\n</think>\n\nx")
    assert text_of(Conversation([HELLO], begins_with="x", closes=marks), KNOWS).endswith("<|assistant|>x")


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (Conversation([]), "must not be empty"),
        (Conversation([HELLO], continues_last=True), "begun or continued"),
        (Conversation([HELLO], variables={"tokenize": True}), "chat_template_kwargs cannot set tokenize"),
    ],
)
def test_what_no_template_can_take(conversation: Conversation, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny_tokenizer().encode_chat(conversation)
