"""Text becomes tokens and tokens text: prompts, chat templates, and text that grows with the tokens."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manyheads.config import ConfigError
from manyheads.errors import RequestError, require
from manyheads.frontend.conversation import Conversation

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 64
"""So many tokens may wait for the rest of a character; more than that is not UTF-8 and is shown as it is."""
LONGEST_CHARACTER = 4
"""A character of UTF-8 has at most so many bytes, and so many tokens."""
CONTEXT_TOKENS = 6
_BREAK = "\ufdd0"  # a Unicode noncharacter: never part of a text
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
_BYTE_OF_CHAR = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
"""GPT-2's printable characters stand for these bytes (byte-level BPE)."""

VICUNA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = 'A chat between a curious user and an artificial "
    "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' %}"
    "{% set turns = messages %}{% endif %}{{ system }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('a system message must come first') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
CHAT_TEMPLATES = {"vicuna": VICUNA_TEMPLATE}


class Tokenizer:
    """This is a transformers tokenizer that is safe to use from several threads.

    Args:
        hf: the transformers tokenizer.
        chat_template: a Jinja template that replaces the tokenizer's own.
        folder: that it was loaded from, if there is one.
    """

    def __init__(self, hf: Any, chat_template: str | None = None, folder: Path | None = None) -> None:
        self.hf, self.folder = hf, folder
        if chat_template is not None:
            hf.chat_template = chat_template
        # NOTE: the wrapper's own calls change truncation in the backend, which fails while another thread encodes;
        # so everything here goes straight to the backend, with truncation and padding off.
        self._backend: Any = getattr(hf, "backend_tokenizer", None)
        self._lock = threading.Lock()
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        added: Mapping[int, Any] = hf.added_tokens_decoder
        self.special_ids = frozenset(i for i, token in added.items() if token.special) | frozenset(hf.all_special_ids)
        specials = sorted({str(t) for t in hf.all_special_tokens} | {t.content for t in added.values() if t.special})
        specials = [s for s in specials if len(s) > 1]
        self._special = re.compile("(?=" + "|".join(map(re.escape, specials)) + ")(.)", re.S) if specials else None
        self._byte_level = self._backend is not None and "ByteLevel" in repr(self._backend.decoder)
        self.longest_token = max(map(len, hf.get_vocab()), default=1)
        """The longest token has so many characters: n times as many, and one more, make more than n tokens."""

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None) -> Tokenizer:
        """Load a tokenizer from a local folder.

        Args:
            chat_template: a file with a Jinja template, or the name of one in CHAT_TEMPLATES.

        Raises:
            ConfigError: there is no tokenizer, or no such template.
        """
        template = None if chat_template is None else _read_template(chat_template)
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"no tokenizer could be loaded from {folder}: {reason}; the folder needs tokenizer.json "
                "(or the files that the model's tokenizer class asks for) and tokenizer_config.json"
            ) from error
        return cls(hf, template, Path(folder))

    @property
    def has_chat_template(self) -> bool:
        """Tell whether conversations can be encoded."""
        return bool(self.hf.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, with the special tokens (bos) that the model's tokenizer adds."""
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        with self._lock:
            return list(self.hf.encode(text, add_special_tokens=add_special_tokens))

    def chat_template(self, *, with_tools: bool = False) -> str:
        """Return the text of the chat template; a model may have another one where there are tools."""
        return str(self.hf.get_chat_template(tools=[{}] if with_tools else None)) if self.has_chat_template else ""

    def encode_chat(self, conversation: Conversation) -> list[int]:
        """Encode a conversation by the chat template.

        Special tokens in the caller's own texts stay text. RequestError says that no template takes this conversation.
        """
        require(
            self.has_chat_template,
            "this model's tokenizer has no chat template: use /v1/completions (or LLM.generate) with a complete "
            "prompt, or start with --chat-template FILE, or --chat-template vicuna for Vicuna checkpoints",
        )
        conversation.check()
        knows_tools = "tools" in self.chat_template(with_tools=bool(conversation.tools))
        guarded = conversation.guarded(self._break_specials)
        guarded = guarded.as_known() if knows_tools else guarded.as_text()
        try:
            text: str = self.hf.apply_chat_template(
                guarded.messages,
                tools=list(guarded.tools) or None,
                tokenize=False,
                add_generation_prompt=guarded.opens_reply,
                continue_final_message=guarded.continues_last,
                **guarded.variables,
            )
        except Exception as error:  # templates raise whatever they like
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        parts = filter(None, (text + conversation.ending(text)).split(_BREAK))
        return [token for part in parts for token in self.encode(part, add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        ids = [t for t in token_ids if t not in self.special_ids] if skip_special_tokens else list(token_ids)
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        with self._lock:
            return str(self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token stands for, which need not be whole characters."""
        piece = self.hf.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        piece = str(piece)
        if token_id not in self.special_ids:
            if match := _BYTE_PIECE.fullmatch(piece):
                return bytes([int(match[1], 16)])
            if self._byte_level and all(c in _BYTE_OF_CHAR for c in piece):
                return bytes(_BYTE_OF_CHAR[c] for c in piece)
            if "\u2581" in piece:
                return piece.replace("\u2581", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    def _break_specials(self, text: str) -> str:
        """Mark a cut inside every special token that a message spells out, so that it is encoded as text."""
        text = text.replace(_BREAK, "")
        return self._special.sub(rf"\1{_BREAK}", text) if self._special is not None else text


class Detokenizer:
    """A detokenizer gives the text of one sequence as its tokens arrive, and looks at a bounded window of them a step.

    It never gives half a character.

    The texts that `push` and `flush` give, joined, are `tokenizer.decode` of all tokens. (Where byte tokens of a
    SentencePiece vocabulary are no UTF-8, `decode` spoils valid characters beside them and this class does not.)

    Args:
        shows: special tokens that are not skipped.
        context: tokens before the first, so that a continuation keeps its leading space where the tokenizer
            drops a text's first one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shows: frozenset[int] = frozenset(),
        context: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids - shows if skip_special_tokens else frozenset()
        self._ids = [t for t in context[-CONTEXT_TOKENS:] if t not in tokenizer.special_ids]
        self._read = len(self._ids)
        """The text of so many tokens of the window has been given out; they only set the scene for the others."""
        self._prefix = self._decode(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; give the text that is certain now."""
        new = token_ids if self._skip.isdisjoint(token_ids) else [t for t in token_ids if t not in self._skip]
        self._ids += new
        # of tokens that come together only the last may be the beginning of a character, and have to wait
        for end in range(len(self._ids), len(self._ids) - min(len(new), LONGEST_CHARACTER), -1):
            if text := self._advance(end, final=False):
                return text
        if text := self._broken():
            return text
        return self.flush() if len(self._ids) - self._read > MAX_HELD_TOKENS else ""

    def _broken(self) -> str:
        """Give the text of bytes that are no UTF-8 and have waited long enough: behind them stands as much as the
        longest character could still need, and it has not made one of them."""
        end = len(self._ids) - LONGEST_CHARACTER + 1
        if end <= self._read or not self._decode(self._ids).startswith(self._decode(self._ids[:end])):
            return ""
        return self._advance(end, final=True)

    def flush(self) -> str:
        """Give the text of what is still held, as it is: there will be no more tokens."""
        return self._advance(len(self._ids), final=True)

    def _advance(self, end: int, final: bool) -> str:
        """Give the text of the window's tokens up to this one; nothing if it may not be whole, unless it is final."""
        if end == self._read:
            return ""
        window = self._decode(self._ids[:end])
        if window.endswith(REPLACEMENT) and not final:
            return ""
        new = self._decode(self._ids[self._read : end])
        # where it does not start so, bytes that are no UTF-8 took the text before them along
        text = window[len(self._prefix) :] if window.startswith(self._prefix) else new
        if not text and not final:
            return ""
        self._ids, self._read = self._ids[self._read :], end - self._read
        self._prefix = new
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""


def _read_template(name: str) -> str:
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if not Path(name).is_file():
        raise ConfigError(f"chat template {name!r} is neither a file nor one of: {', '.join(CHAT_TEMPLATES)}")
    return Path(name).read_text(encoding="utf-8")
