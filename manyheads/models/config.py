"""What a checkpoint's config.json says, read strictly: what is not understood is an error, not a guess."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from manyheads.checkpoint import read_json
from manyheads.config import ConfigError
from manyheads.kv_cache import KVShape
from manyheads.models.parallel import Share, shared_rows


@dataclass(frozen=True)
class RopeScaling:
    """Rotary embedding for longer contexts: `linear`, or `llama3` (Llama 3.1, section "Positional embedding")."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama-like model."""

    architecture: str
    """Which family it is of (`registry.FAMILIES`)."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    """Longest sequence; a sliding window smaller than the checkpoint's value caps it."""
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    num_ranks: int = 1
    """That share the model; heads, K/V heads and the intermediate size are then a rank's share."""

    @property
    def vocab_rows(self) -> int:
        """Rows of a rank's share of the vocabulary."""
        return shared_rows(self.vocab_size, self.num_ranks)

    def shared(self, num_ranks: int) -> ModelConfig:
        """That of one of so many ranks. Raises ConfigError: the model cannot be shared so."""
        if self.vocab_size < num_ranks**2:
            raise ConfigError(f"tensor_parallel_size={num_ranks} is too much for {self.vocab_size} tokens")
        share = Share.of(num_ranks, self.num_heads, self.num_kv_heads, self.intermediate_size, "the model")
        return replace(self, num_ranks=num_ranks, **asdict(share))

    @property
    def kv_shape(self) -> KVShape:
        """What a token keeps of K/V."""
        return KVShape(self.num_layers, self.num_kv_heads, self.head_dim)

    @classmethod
    def read(
        cls, raw: dict[str, Any], folder: Path, *, qkv_bias: bool | None = None, qk_norm: bool = False
    ) -> ModelConfig:
        """Read what config.json says, and generation_config.json beside it.

        Args:
            raw: what config.json holds.
            folder: where it is.
            qkv_bias: whether q, k and v have biases; None: config.json's `attention_bias` says so, of the projection
                of attention's output as well.
            qk_norm: whether queries and keys are normed.

        Raises:
            ConfigError: naming the file and the key that is missing or not supported.
        """
        path = folder / "config.json"
        if raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported, only silu")

        def need(key: str) -> int:
            value = raw.get(key)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{path}: {key} must be a positive integer, not {value!r}")
            return value

        theta, scaling = read_rope(raw, path)
        num_heads, hidden_size = need("num_attention_heads"), need("hidden_size")
        longest = need("max_position_embeddings")
        window = raw.get("sliding_window")
        if window is not None and raw.get("use_sliding_window", True):
            # within its window a sliding model is a plain one
            longest = min(longest, int(window))
        attention_bias = bool(raw.get("attention_bias", False))
        return cls(
            architecture=raw["architectures"][0],
            vocab_size=need("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=need("intermediate_size"),
            num_layers=need("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
            head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=longest,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if qkv_bias is None else qkv_bias,
            o_bias=attention_bias and qkv_bias is None,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=qk_norm,
            eos_token_ids=_eos_token_ids(raw, folder),
            dtype=_dtype(raw, path),
        )


def _eos_token_ids(raw: dict[str, Any], folder: Path) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    eos = (read_json(generation) if generation.exists() else {}).get("eos_token_id", raw.get("eos_token_id"))
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)


def _dtype(raw: dict[str, Any], path: Path) -> torch.dtype:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"{path}: dtype {name!r} is no floating-point type of torch")
    return dtype


def read_rope(raw: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling, spelled as transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) does."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"{path}: rope scaling {kind!r} is not supported, only default, linear and llama3")
    if not isinstance(parameters.get("factor"), (int, float)):
        raise ConfigError(f"{path}: rope scaling {kind!r} needs a factor")
    known = RopeScaling.__dataclass_fields__.keys() - {"kind"}
    return theta, RopeScaling(kind=kind, **{key: parameters[key] for key in known if key in parameters})
