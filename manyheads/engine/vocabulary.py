"""What the tokens of a model's vocabulary stand for, as the library that follows grammars wants it."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLTokenizer

END = "<|the grammar's text is whole|>"
"""A token behind the vocabulary that ends texts for the library, so that it knows nothing of the model's own."""
MOST_THREADS = 4
"""That make masks. All of a machine's (the library would take 25 of 32 cores) take longer to wake up than they save."""


class Vocabulary:
    """The tokens of a tokenizer as bytes. It is read when the first grammar needs it.

    Byte-level vocabularies and those of SentencePiece, with bytes to fall back on, are both told by tokenizer.json.

    Args:
        folder: with the tokenizer.
        size: of the model's vocabulary, which may be larger than the tokenizer's.
        eos_token_ids: the model's; they are nobody's text.
    """

    def __init__(self, folder: Path, size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._folder, self._size = folder, size
        self.eos_token_ids = frozenset(eos_token_ids)

    @cached_property
    def tokens(self) -> LLTokenizer:
        """The library's own form, which takes it a moment to make. Raises OSError or ValueError: it cannot be read."""
        from llguidance import LLTokenizer

        backend = self._backend()
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([END])
        size = max(self._size, backend.get_vocab_size(with_added_tokens=True))
        return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=[backend.token_to_id(END)])

    @cached_property
    def executor(self) -> LLExecutor | None:
        """The library's threads, which make masks of several texts at once; None where there are few cores."""
        from llguidance import LLExecutor

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = min(MOST_THREADS, cores // 4)
        return LLExecutor(threads) if threads > 1 else None

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text for the library."""
        return tuple(self.tokens.eos_tokens)

    @cached_property
    def num_words(self) -> int:
        """Words of 32 bits that a mask of the library has, at least as many as the model's logits need."""
        return -(-self.tokens.vocab_size // 32)

    @cached_property
    def writable(self) -> NDArray[np.int32]:
        """[W], a mask of the tokens that a text may have where its grammar says so. It lacks what the model does not
        know, what ends a text for the library, and of the model's own ends those that the library takes for text; the
        others it allows only where a grammar names them."""
        bits = np.zeros(32 * self.num_words, dtype=bool)
        bits[: self._size] = True
        textual = [token for token in self.eos_token_ids if not self.tokens.is_special_token(token)]
        bits[[*self.ends, *textual]] = False
        return np.packbits(bits, bitorder="little").view(np.int32)

    def is_writable(self, token: int) -> bool:
        """Whether a text may have it."""
        return holds(self.writable, token)

    def is_special(self, token: int) -> bool:
        """Whether a token is no text: it controls something."""
        return token in self.eos_token_ids or self.tokens.is_special_token(token)

    def _backend(self) -> Any:
        """The tokenizer of the library `tokenizers`."""
        file = self._folder / "tokenizer.json"
        if file.is_file():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(file))
        # a vocabulary of SentencePiece alone is brought into that form
        from transformers import AutoTokenizer

        hf = AutoTokenizer.from_pretrained(str(self._folder), local_files_only=True, trust_remote_code=False)
        return hf.backend_tokenizer


def holds(words: NDArray[np.int32], token: int) -> bool:
    """Whether a mask, [W] words, has a token: bit t % 32 of word t // 32 is token t's."""
    return bool(int(words[token >> 5]) >> (token & 31) & 1)
