"""Which parser reads a model's calls."""

from __future__ import annotations

from manyheads.frontend.tools.deepseek import BEGIN as DEEPSEEK
from manyheads.frontend.tools.deepseek import DeepSeekParser
from manyheads.frontend.tools.hermes import HermesParser
from manyheads.frontend.tools.llama import LlamaJsonParser, PythonicParser
from manyheads.frontend.tools.mistral import BEGIN as MISTRAL
from manyheads.frontend.tools.mistral import MistralParser
from manyheads.frontend.tools.parser import ToolParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaJsonParser,
    "pythonic": PythonicParser,
    "mistral": MistralParser,
    "deepseek_v3": DeepSeekParser,
}
"""The names are vLLM's."""
_SIGNS = {
    DEEPSEEK: "deepseek_v3",
    MISTRAL: "mistral",
    "<tool_call>": "hermes",
    "[func_name1(": "pythonic",
    "<|python_start|>": "pythonic",
    "<|python_tag|>": "llama3_json",
    '"parameters": dictionary of argument name': "llama3_json",
}
"""A chat template that holds the text on the left asks for calls in the form on the right."""


def find_parser(template: str) -> type[ToolParser]:
    """Find what reads the calls of a model with such a chat template; Hermes' form is what we ask the others for."""
    name = next((name for sign, name in _SIGNS.items() if sign in template), "hermes")
    return TOOL_PARSERS[name]
