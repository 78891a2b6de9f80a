"""A byte-level BPE tokenizer with a chat template, made when a test needs it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from manyheads.frontend.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"
SPECIALS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", END]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEMPLATES = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
CORPUS = ["The cat sat on the mat and the dog sat on the log. It was elegant.", "hello world, hello there"] * 20


@lru_cache
def make_backend() -> Backend:
    """All that the fake engine needs."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def make_hf(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(
        tokenizer_object=make_backend(),
        eos_token=END,
        bos_token="<|endoftext|>",
        extra_special_tokens={"s": "<|system|>", "u": "<|user|>", "a": "<|assistant|>"},
    )
    hf.chat_template = template
    return hf


@lru_cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(make_hf())


class LightTokenizer:
    """It does what `Tokenizer` asks of transformers' class; importing that takes seconds, and many servers start."""

    chat_template = TEMPLATE
    all_special_tokens = tuple(SPECIALS)
    all_special_ids = tuple(range(len(SPECIALS)))

    def __init__(self) -> None:
        self.backend_tokenizer = make_backend()
        self.added_tokens_decoder = self.backend_tokenizer.get_added_tokens_decoder()
        self.get_vocab = self.backend_tokenizer.get_vocab
        self.convert_ids_to_tokens = self.backend_tokenizer.id_to_token

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]:
        return [self.backend_tokenizer.token_to_id(token) for token in tokens]

    def get_chat_template(self, tools: object = None) -> str:
        return self.chat_template

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, continue_final_message: bool = False, **variables: Any
    ) -> str:
        """What TEMPLATE makes of a conversation."""
        text = _TEMPLATES.from_string(self.chat_template).render(messages=messages, **variables)
        if continue_final_message:
            last = messages[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    make_hf(template).save_pretrained(str(folder))
    return folder
