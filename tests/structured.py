"""A tiny model with random weights over a byte-level vocabulary, for texts that follow grammars."""

from __future__ import annotations

import json
from pathlib import Path

from tests.server.tiny_tokenizer import make_hf
from tests.tiny import HIDDEN, make_model, save_heads

EOS = 4
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["cat", "dog", "mat"]}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
)


def save_structured(folder: Path, eos: int | None = EOS) -> Path:
    """Base, heads and tokenizer.

    Args:
        eos: the model's end-of-text token; None for a model without one.
    """
    hf = make_hf()
    hf.save_pretrained(str(folder))
    # a vocabulary of the model that is larger than the tokenizer's, as padded ones are
    size = len(hf) + 9
    make_model(vocab_size=size, eos_token_id=eos, max_position_embeddings=512).save_pretrained(folder)
    save_heads(folder, HIDDEN)
    return folder
