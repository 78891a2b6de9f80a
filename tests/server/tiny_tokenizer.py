"""A byte-level BPE tokenizer with a chat template, made when a test needs it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from manyheads.frontend.tokenizer import Tokenizer

SPECIALS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["The cat sat on the mat and the dog sat on the log. It was elegant.", "hello world, hello there"] * 20


def make_backend() -> Backend:
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
    hf = PreTrainedTokenizerFast(
        tokenizer_object=make_backend(),
        eos_token="<|end|>",
        bos_token="<|endoftext|>",
        extra_special_tokens={"s": "<|system|>", "u": "<|user|>", "a": "<|assistant|>"},
    )
    hf.chat_template = template
    return hf


@lru_cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(make_hf())


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    make_hf(template).save_pretrained(str(folder))
    return folder
