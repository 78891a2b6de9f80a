"""A grammar says which texts an answer may be, as a request states it."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from manyheads.errors import RequestError, require

MAX_CHARACTERS = 200_000
MAX_CHOICES = 10_000
Kind = Literal["json", "regex", "choice", "grammar", "structural_tag"]


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The text of an answer has to be in this language. Whether `value` can be compiled, the engine finds out."""

    kind: Kind
    value: str
    """A JSON Schema as JSON, a regular expression, a JSON list of texts of which one is chosen, a grammar (Lark or
    GBNF), or a structural tag as JSON (vLLM's forms)."""

    def validate(self) -> None:
        """Raise RequestError if the kind is unknown, or the value cannot be one of its kind."""
        kinds = get_args(Kind)
        require(self.kind in kinds, f"grammar: kind must be one of {', '.join(kinds)}, not {self.kind!r}")
        name = f"grammar of kind {self.kind}"
        require(self.value != "", f"{name}: the value is empty")
        require(len(self.value) <= MAX_CHARACTERS, f"{name}: at most {MAX_CHARACTERS} characters")
        is_text = not any("\ud800" <= character <= "\udfff" for character in self.value)
        require(is_text, f"{name}: not valid Unicode: half a surrogate pair")
        if self.kind not in ("json", "choice", "structural_tag"):
            return
        try:
            value = msgspec.json.decode(self.value)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise RequestError(f"{name}: the value is not JSON: {error}") from None
        if self.kind == "json":
            require(isinstance(value, (dict, bool)), f"{name}: a JSON Schema is an object or a boolean")
        elif self.kind == "structural_tag":
            require(isinstance(value, dict), f"{name}: the value must be a JSON object")
        else:
            is_list = isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) and v for v in value)
            require(not isinstance(value, list) or len(value) <= MAX_CHOICES, f"{name}: at most {MAX_CHOICES} choices")
            require(is_list, f"{name}: the value must be a JSON list of texts, none of them empty")
