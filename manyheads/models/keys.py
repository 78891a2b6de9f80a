"""The keys of a config.json, read strictly: what is not understood is an error, not a guess.

What a key means where it is missing is up to transformers' class of a family: each family declares the keys of that
class with their defaults. Whatever of them is not read has to have its default, or the text would be another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from manyheads.config import ConfigError

IRRELEVANT = frozenset(
    {
        "attention_dropout", "bos_token_id", "embd_pdrop", "embedding_dropout", "eos_token_id", "initializer_range",
        "output_router_logits", "pad_token_id", "pretraining_tp", "resid_pdrop", "residual_dropout",
        "router_aux_loss_coef", "router_jitter_noise", "use_cache",
    }
)  # fmt: skip
"""Keys that say nothing of what a model computes for a text: of training, of special tokens, of speed."""
UNDECLARED: dict[str, Any] = {
    "attention_chunk_size": None,
    "head_dim": None,
    "is_causal": True,
    "kv_sharing_modes": None,
    "layer_types": None,
    "original_max_position_embeddings": None,
    "partial_rotary_factor": None,
    "per_layer_config": None,
    "rope_scaling": None,
    "rope_theta": None,
    "sliding_window": None,
}
"""Keys that transformers looks at in any model, whether its class declares them or not."""

T = TypeVar("T")


class Keys:
    """What a config.json says, and a note of what was asked.

    Args:
        raw: what the file holds.
        path: of the file.
        declared: the keys of transformers' class that are not `IRRELEVANT`, with their defaults.
    """

    def __init__(self, raw: Mapping[str, Any], path: Path, declared: Mapping[str, Any]) -> None:
        self.raw, self.path = raw, path
        self._defaults = UNDECLARED | dict(declared)
        self._values = self._defaults | dict(raw)
        self._read: set[str] = set()

    def wrong(self, key: str, wanted: str) -> ConfigError:
        """What to raise: a key's value is not what it has to be."""
        return ConfigError(f"{self.path}: {key} must be {wanted}, not {self._values.get(key)!r}")

    def value(self, key: str) -> Any:
        """Whatever stands there."""
        self._read.add(key)
        return self._values[key]

    def integer(self, key: str) -> int:
        """A positive integer."""
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a positive integer")
        return value

    def integer_or(self, key: str, default: T) -> int | T:
        """A positive integer, or what null stands for."""
        return default if self.value(key) is None else self.integer(key)

    def number(self, key: str, may_be_zero: bool = False) -> float:
        """A positive number, or zero if that is one as well."""
        value = self.value(key)
        if not is_number(value) or value < 0 or (value == 0 and not may_be_zero):
            raise self.wrong(key, "a positive number or zero" if may_be_zero else "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, T]) -> T:
        """One of some names, and what it stands for."""
        value = self.value(key)
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(f"{self.path}: {key} {value!r} is not supported, only {' and '.join(choices)}")
        return choices[value]

    def check_all_read(self) -> None:
        """See that what was not asked for is what it is taken for. Raises ConfigError naming the key."""
        for key, default in self._defaults.items():
            value = self._values[key]
            if key not in self._read and value != default:
                raise ConfigError(f"{self.path}: {key} {value!r} is not supported, only {default!r}")


def is_number(value: object) -> bool:
    """Whether this is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
