"""A request may say what form its answer has: by OpenAI's `response_format`, or by vLLM's names, the older ones too."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from manyheads.errors import require
from manyheads.grammar import MAX_CHARACTERS, MAX_CHOICES, Grammar
from manyheads.server.fields import Limits

ANY_OBJECT = Grammar("json", '{"type": "object"}')
"""What `json_object` asks for."""
Source = Annotated[str, Limits(minLength=1, maxLength=MAX_CHARACTERS)]
Choices = Annotated[list[Annotated[str, Limits(minLength=1)]], Limits(minItems=1, maxItems=MAX_CHOICES)]
Schema = dict[str, Any] | bool | Source


class _Form(BaseModel, extra="forbid", allow_inf_nan=False, strict=True):
    """Forms have no unknown fields and no values of another type."""


class TextFormat(_Form):
    """The answer is any text."""

    type: Literal["text"]

    def grammar(self) -> Grammar | None:
        """It needs none."""
        return None


class JsonObjectFormat(_Form):
    """The answer is some JSON object."""

    type: Literal["json_object"]

    def grammar(self) -> Grammar | None:
        """Make the grammar of such answers."""
        return ANY_OBJECT


class NamedSchema(_Form):
    """A JSON Schema comes with a name, as OpenAI has it."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]+$", max_length=64)]
    description: str | None = None
    given: dict[str, Any] | bool = Field(alias="schema", description="a JSON Schema")
    strict: bool | None = Field(default=None, description="no matter which: the answer always keeps to the schema")


class JsonSchemaFormat(_Form):
    """The answer is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def grammar(self) -> Grammar | None:
        """Make the grammar of such answers."""
        return Grammar("json", json.dumps(self.json_schema.given))


class StructuralTagFormat(_Form):
    """The answer is text in which each of these texts begins a tag, whose inside is JSON of a schema."""

    type: Literal["structural_tag"]
    structures: list[dict[str, Any]] = Field(description="tags: begin, schema, end")
    triggers: list[str]

    def grammar(self) -> Grammar | None:
        """Make the grammar of such answers."""
        return Grammar("structural_tag", self.model_dump_json(exclude={"type"}))


def _form_of(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"type={kind}" if isinstance(kind, str) else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("type=text")]
    | Annotated[JsonObjectFormat, Tag("type=json_object")]
    | Annotated[JsonSchemaFormat, Tag("type=json_schema")]
    | Annotated[StructuralTagFormat, Tag("type=structural_tag")],
    Discriminator(
        _form_of,
        custom_error_type="unknown_form",
        custom_error_message="type must be text, json_object, json_schema or structural_tag",
    ),
]
"""NOTE: what is no name, as these tags are, is left out where an error says which field it is about."""
_KINDS = ("json", "regex", "choice", "grammar", "structural_tag", "json_object")


def _only(name: str) -> dict[str, Any]:
    """Describe that one of the kinds is given, and no other."""
    null = {"type": "null"}
    given = {"not": null} if name != "json_object" else {"const": True}
    others = {other: null for other in _KINDS if other != name}
    return {"properties": {name: given, **others}, "required": [name]}


class StructuredOutputs(_Form, json_schema_extra={"oneOf": [_only(name) for name in _KINDS]}):
    """One of these says what the answer is, with vLLM's names."""

    given_json: Schema | None = Field(default=None, alias="json", description="a JSON Schema")
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = Field(default=None, description="Lark or GBNF")
    structural_tag: dict[str, Any] | Source | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = Field(default=None, description="JSON is in one line anyway")

    def asked(self) -> Grammar | None:
        """Make the grammar; raise RequestError where it is none or several."""
        found = _grammars(self.given_json, self.regex, self.choice, self.grammar, self.structural_tag)
        found += [ANY_OBJECT] if self.json_object else []
        require(len(found) == 1, f"structured_outputs must have one of {', '.join(_KINDS)}, not {len(found)} of them")
        return found[0]


class Structured(BaseModel):
    """These fields say what form the answer has, one of them at most."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(default=None, description="structured_outputs.json, by its older name")
    guided_regex: Source | None = Field(default=None, description="structured_outputs.regex, by its older name")
    guided_choice: Choices | None = Field(default=None, description="structured_outputs.choice, by its older name")
    guided_grammar: Source | None = Field(default=None, description="structured_outputs.grammar, by its older name")

    def grammar(self) -> Grammar | None:
        """Make the grammar that the answer has to follow, or raise RequestError where several are asked for."""
        found = _grammars(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        for form in (
            self.response_format.grammar() if self.response_format is not None else None,
            self.structured_outputs.asked() if self.structured_outputs is not None else None,
        ):
            found += [form] if form is not None else []
        require(len(found) <= 1, "ask for one form of answer: response_format, structured_outputs or one of guided_*")
        return found[0] if found else None


class GuidedForm(_Form):
    """The form of an answer is a kind of grammar and what it says, as TGI has it."""

    type: Literal["json", "regex"]
    value: Schema


class GuidedParameters(BaseModel):
    """Parameters may say what form the answer has, as TGI has it."""

    grammar: GuidedForm | None = None

    def asked(self) -> Grammar | None:
        """Make the grammar that the answer has to follow."""
        if self.grammar is None:
            return None
        return Grammar("regex" if self.grammar.type == "regex" else "json", _text(self.grammar.value))


def _grammars(
    schema: Any, regex: str | None, choice: list[str] | None, grammar: str | None, tag: Any = None
) -> list[Grammar]:
    """Make a grammar of each kind that is given."""
    found = [Grammar("json", _text(schema))] if schema is not None else []
    found += [Grammar("regex", regex)] if regex is not None else []
    found += [Grammar("choice", json.dumps(choice))] if choice is not None else []
    found += [Grammar("grammar", grammar)] if grammar is not None else []
    found += [Grammar("structural_tag", _text(tag))] if tag is not None else []
    return found


def _text(value: Any) -> str:
    """JSON that may come as a text of it."""
    return value if isinstance(value, str) else json.dumps(value)
