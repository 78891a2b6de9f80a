"""The shape of a model, as a checkpoint's config.json says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.checkpoint import read_json
from manyheads.config import ConfigError
from manyheads.kv_cache import KVShape
from manyheads.models.keys import Keys
from manyheads.models.parallel import Share, shared_rows
from manyheads.models.rope import LongScaling, Rope, head_order
from manyheads.models.rope_keys import RopeKeys

SLIDING, FULL = "sliding_attention", "full_attention"
GATED = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
"""What the gate of a feed-forward part may be, by its name in config.json."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a model."""

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
    norm: str = "rms"
    """`rms` or `layer`, of hidden states."""
    norm_bias: bool = False
    norm_offset: float = 0.0
    """What norms' weights are kept without."""
    activation: str = "silu"
    """Of the feed-forward part: `silu`, `clamped silu` or `gelu` with a gate, or `plain gelu` without one."""
    swiglu_alpha: float = 1.0
    """Of `clamped silu` (`Ops.clamped_swiglu`),"""
    swiglu_limit: float = math.inf
    """and how large its gate and what is multiplied with it may be."""
    ropes: tuple[Rope, ...]
    """Of each layer."""
    interleaved: bool = False
    """Whether neighbours of a head are turned against each other, and not its first half against the second."""
    windows: tuple[int | None, ...]
    """How many tokens back each layer looks, itself included; None: to the beginning."""
    attention_scale: float | None = None
    """Of products of queries and keys; None is head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores s become softcap · tanh(s / softcap); None: they stay."""
    has_sinks: bool = False
    """Whether each head has a score that takes its share of the weights, and gives no value."""
    max_position_embeddings: int
    """Longest sequence."""
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embedding_multiplier: float = 1.0
    """Of what is looked up,"""
    residual_multiplier: float = 1.0
    """of what is added to the residual,"""
    logits_multiplier: float = 1.0
    """and of the logits, which a cap may follow."""
    logits_softcap: float | None = None
    num_experts: int = 0
    """Feed-forward parts of a layer, of which a router chooses; 0: there is one, and no router."""
    experts_per_token: int = 0
    experts_add_up: bool = False
    """Whether the chances of those that are chosen are made to add up to 1."""
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
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
        return KVShape(self.windows, self.num_kv_heads, self.head_dim)

    @property
    def rope(self) -> Rope:
        """That of all layers. Raises ConfigError: they differ."""
        if len(set(self.ropes)) > 1:
            raise ConfigError(f"layers of a {self.architecture} have rotary embeddings of several kinds")
        return self.ropes[0]

    @property
    def head_order(self) -> Tensor | None:
        """In which order numbers of a head are read, [head_dim] int64 (`rope.head_order`); None: as they are."""
        return head_order(max(rope.dim for rope in self.ropes), self.head_dim, self.interleaved)

    @classmethod
    def read(cls, keys: Keys, folder: Path, **own: Any) -> ModelConfig:
        """Read what config.json says that all families say alike, and generation_config.json beside it.

        Args:
            own: fields that the family reads by itself; `ropes`, `windows` and `rms_norm_eps` if it has them otherwise.

        Raises:
            ConfigError: naming the file and the key that is missing or not supported.
        """
        num_heads, hidden_size = keys.integer("num_attention_heads"), keys.integer("hidden_size")
        num_layers = keys.integer("num_hidden_layers")
        num_kv_heads = keys.integer_or("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise keys.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
        head_dim = head_dim_of(keys)
        longest = keys.integer("max_position_embeddings")
        ropes = own.pop("ropes", None) or (rope_keys(keys, head_dim).read(),) * num_layers
        windows = own.pop("windows", None) or _no_windows(keys)
        for rope in ropes:
            if isinstance(rope.scaling, LongScaling):
                longest = min(longest, rope.scaling.original_max_position_embeddings)
        return cls(
            architecture=keys.raw["architectures"][0],
            vocab_size=keys.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=own.pop("intermediate_size", None) or keys.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            activation=own.pop("activation", None) or keys.choice("hidden_act", GATED),
            rms_norm_eps=own.pop("rms_norm_eps", None) or keys.number("rms_norm_eps", may_be_zero=True),
            ropes=ropes,
            windows=tuple(None if window is None or window >= longest else window for window in windows),
            max_position_embeddings=longest,
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            eos_token_ids=_eos_token_ids(keys.raw, folder),
            dtype=_dtype(keys.raw, keys.path),
            **own,
        )


def head_dim_of(keys: Keys) -> int:
    """Numbers of a head."""
    return keys.integer_or("head_dim", keys.integer("hidden_size") // keys.integer("num_attention_heads"))


def rope_keys(keys: Keys, head_dim: int, **own: Any) -> RopeKeys:
    """The keys of rotary embedding.

    Args:
        own: what is special to a family (`RopeKeys`).
    """
    names = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor",
             "original_max_position_embeddings")  # fmt: skip
    values = {name: keys.value(name) for name in names}
    return RopeKeys(
        values=values,
        path=keys.path,
        head_dim=head_dim,
        max_position_embeddings=keys.integer("max_position_embeddings"),
        **own,
    )


def windows_of(keys: Keys, types: list[str] | None = None) -> tuple[int | None, ...]:
    """How far back each layer looks, itself included; None: to the beginning.

    Args:
        types: `sliding_attention` or `full_attention` for each layer, where config.json says nothing of them.
    """
    num_layers = keys.integer("num_hidden_layers")
    said = keys.value("layer_types")
    types = types if said is None else said
    window = keys.integer_or("sliding_window", None)
    if not isinstance(types, list) or len(types) != num_layers or not set(types) <= {SLIDING, FULL}:
        raise keys.wrong("layer_types", f"{num_layers} times {SLIDING} or {FULL}")
    if window is None and SLIDING in types:
        raise keys.wrong("sliding_window", f"a positive integer, since layers are of {SLIDING}")
    return tuple(window if kind == SLIDING else None for kind in types)


def _no_windows(keys: Keys) -> tuple[None, ...]:
    """Of a family whose layers all look to the beginning; what else is said has to mean the same."""
    longest = keys.integer("max_position_embeddings")
    if keys.integer_or("sliding_window", longest) < longest:
        raise keys.wrong("sliding_window", "null")
    if set(keys.value("layer_types") or ()) - {FULL}:
        raise keys.wrong("layer_types", f"{FULL} for each layer")
    return (None,) * keys.integer("num_hidden_layers")


def _eos_token_ids(raw: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    eos = (read_json(generation) if generation.exists() else {}).get("eos_token_id", raw.get("eos_token_id"))
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)


def _dtype(raw: Mapping[str, Any], path: Path) -> torch.dtype:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"{path}: dtype {name!r} is no floating-point type of torch")
    return dtype
