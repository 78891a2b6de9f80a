"""What a config.json says of rotary embedding, and what transformers makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manyheads.config import ConfigError
from manyheads.models.keys import is_number
from manyheads.models.rope import LinearScaling, Llama3Scaling, LongScaling, Rope, YarnScaling


@dataclass(frozen=True, kw_only=True)
class RopeKeys:
    """What config.json says of rotary embedding: `rope_scaling` before `rope_parameters`, as transformers has it."""

    values: Mapping[str, Any]
    """The keys at the top level."""
    path: Path
    head_dim: int
    max_position_embeddings: int
    default_theta: float = 10000.0
    in_part: bool = False
    """Whether the family may turn a part of each head; else it turns all of it, and nothing else may be said."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of kinds."""

    def read(self, parameters: Mapping[str, Any] | None = None) -> Rope:
        """Read what the top level says, or what a family says of some of its layers.

        Raises:
            ConfigError: naming the file and what is not supported.
        """
        if parameters is None:
            parameters = self.values.get("rope_scaling") or self.values.get("rope_parameters") or {}
        if not isinstance(parameters, Mapping):
            raise ConfigError(f"{self.path}: rope parameters must be an object, not {parameters!r}")
        if nested := [key for key, value in parameters.items() if isinstance(value, Mapping)]:
            raise ConfigError(f"{self.path}: rope parameters of {', '.join(nested)} are not supported here")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        kind = self.aliases.get(kind, kind) if isinstance(kind, str) else kind
        base = {"rope_theta": self._said(parameters, "rope_theta", self.default_theta)}
        theta = self._number(base, "rope_theta", "default")
        dim = self._dim(parameters)
        match kind:
            case "default":
                return Rope(theta, dim)
            case "dynamic":
                # it stretches with a text that is longer than max_position_embeddings, and no text here is
                self._number(parameters, "factor", kind)
                return Rope(theta, dim)
            case "linear":
                return Rope(theta, dim, LinearScaling(self._number(parameters, "factor", kind)))
            case "llama3":
                return Rope(theta, dim, self._llama3(parameters))
            case "yarn":
                return Rope(theta, dim, self._yarn(parameters, theta))
            case "longrope":
                return Rope(theta, dim, self._long(parameters, dim))
        raise ConfigError(
            f"{self.path}: rope scaling {kind!r} is not supported, only default, dynamic, linear, llama3, longrope "
            "and yarn"
        )

    def _said(self, parameters: Mapping[str, Any], key: str, default: Any) -> Any:
        """What stands among the parameters, else at the top level, else by default."""
        if key in parameters:
            return parameters[key]
        value = self.values.get(key)
        return default if value is None else value

    def _number(self, parameters: Mapping[str, Any], key: str, kind: str) -> float:
        value = parameters.get(key)
        if not is_number(value) or float(value) <= 0:  # type: ignore[arg-type]
            raise ConfigError(f"{self.path}: rope scaling {kind!r} needs a {key} above 0, not {value!r}")
        return float(value)  # type: ignore[arg-type]

    def _dim(self, parameters: Mapping[str, Any]) -> int:
        share = self._said(parameters, "partial_rotary_factor", 1.0)
        if not self.in_part and share not in (None, 1.0):
            raise ConfigError(f"{self.path}: partial_rotary_factor {share!r} is not supported, only 1.0")
        share = 1.0 if share is None else share
        if not is_number(share) or not 0 < share <= 1:
            raise ConfigError(f"{self.path}: partial_rotary_factor must be above 0 and at most 1, not {share!r}")
        dim = int(self.head_dim * share)
        if dim % 2 or dim == 0:
            raise ConfigError(f"{self.path}: {dim} of {self.head_dim} numbers of a head would turn, which are no pairs")
        return dim

    def _original(self, parameters: Mapping[str, Any]) -> int:
        """The length of the texts that a model first learnt from. What the top level says of it goes first."""
        key = "original_max_position_embeddings"
        value = self.values.get(key)
        value = parameters.get(key, self.max_position_embeddings) if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.path}: {key} must be a positive integer, not {value!r}")
        return value

    def _llama3(self, parameters: Mapping[str, Any]) -> Llama3Scaling:
        factor, low, high = (
            self._number(parameters, key, "llama3") for key in ("factor", "low_freq_factor", "high_freq_factor")
        )
        if low >= high:
            raise ConfigError(f"{self.path}: low_freq_factor {low} is not below high_freq_factor {high}")
        return Llama3Scaling(factor, low, high, self._original(parameters))

    def _yarn(self, parameters: Mapping[str, Any], theta: float) -> YarnScaling:
        original = self._original(parameters)
        factor = self._factor(parameters, "yarn", original)
        given = {key: parameters[key] for key in ("mscale", "mscale_all_dim") if parameters.get(key)}
        attention_factor = parameters.get("attention_factor")
        if attention_factor is not None:
            attention_factor = self._number(parameters, "attention_factor", "yarn")
        elif len(given) == 2:
            scales = {key: self._number(given, key, "yarn") for key in given}
            attention_factor = magnitude(factor, scales["mscale"]) / magnitude(factor, scales["mscale_all_dim"])
        else:
            attention_factor = magnitude(factor, 1.0)
        betas = {
            key: self._number(parameters, key, "yarn") for key in ("beta_fast", "beta_slow") if parameters.get(key)
        }
        truncate = parameters.get("truncate", True)
        if not isinstance(truncate, bool) or theta <= 1:
            raise ConfigError(f"{self.path}: rope scaling 'yarn': truncate {truncate!r} or rope_theta {theta}")
        return YarnScaling(factor, original, attention_factor, truncate=truncate, **betas)

    def _long(self, parameters: Mapping[str, Any], dim: int) -> LongScaling:
        original = self._original(parameters)
        for key in ("short_factor", "long_factor"):
            factors = parameters.get(key)
            if not isinstance(factors, list) or len(factors) != dim // 2 or not all(map(_is_positive, factors)):
                raise ConfigError(f"{self.path}: rope scaling 'longrope' needs {dim // 2} numbers above 0 in {key}")
        factor = self._factor(parameters, "longrope", original)
        if parameters.get("attention_factor") is not None:
            attention_factor = self._number(parameters, "attention_factor", "longrope")
        elif factor <= 1:
            attention_factor = 1.0
        elif original == 1:
            raise ConfigError(f"{self.path}: original_max_position_embeddings 1 leaves no attention_factor")
        else:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
        return LongScaling(tuple(map(float, parameters["short_factor"])), original, attention_factor)

    def _factor(self, parameters: Mapping[str, Any], kind: str, original: int) -> float:
        """How much longer texts may be; null is what max_position_embeddings says."""
        if parameters.get("factor") is None and (kind == "longrope" or "factor" in parameters):
            return self.max_position_embeddings / original
        return self._number(parameters, "factor", kind)


def magnitude(factor: float, scale: float) -> float:
    """By how much attention grows sharper with longer texts (YaRN, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _is_positive(value: object) -> bool:
    return is_number(value) and float(value) > 0  # type: ignore[arg-type]
