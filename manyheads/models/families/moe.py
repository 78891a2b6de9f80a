"""Mixtral and Qwen3-MoE: of a layer's many feed-forward parts, its experts, a router chooses a few for each token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from manyheads.models import llama
from manyheads.models.config import ModelConfig
from manyheads.models.families.llama import COMMON, windows_everywhere
from manyheads.models.family import Family
from manyheads.models.keys import Keys
from manyheads.models.linear import Split
from manyheads.models.llama import AttentionLayer, LayerParts, Llama
from manyheads.models.parameters import Packed, Parameters, Plain
from manyheads.ops.base import GroupedProduct

if TYPE_CHECKING:
    from manyheads.ops.base import Rows


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertLayer(AttentionLayer):
    """A layer's weights: of attention, then of the router and the experts."""

    router: Tensor  # [experts, hidden]
    router_bias: Tensor | None = None  # [experts]
    gate_up: GroupedProduct  # of each expert: hidden → 2 · intermediate
    down: GroupedProduct  # intermediate → hidden


class MixtureOfExperts(Llama):
    """The forward pass of models with experts."""

    def feed_forward(self, layer: AttentionLayer, x: Rows, residual: Tensor) -> Tensor:
        """What the chosen experts say of each token, by the chances that the router gives them."""
        assert isinstance(layer, ExpertLayer)
        assert isinstance(x, Tensor)
        top, adds_up = self.config.experts_per_token, self.config.experts_add_up
        routed = self.ops.route(x, layer.router, layer.router_bias, top, adds_up)
        y = self.activate(layer.gate_up(x, routed), layer.down.takes(residual))
        y = layer.down.added(y, routed)
        return y if self.ranks.size == 1 else self.ranks.sum(y, self.dtype)


def read_mixtral(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Mixtral; raises what `ModelConfig.read` does."""
    return ModelConfig.read(
        keys,
        folder,
        windows=windows_everywhere(keys),
        num_experts=num_experts_of(keys),
        experts_per_token=experts_per_token_of(keys),
        experts_add_up=True,
    )


def read_qwen3_moe(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Qwen3-MoE; raises what `ModelConfig.read` does."""
    bias = keys.flag("attention_bias")
    if keys.value("mlp_only_layers") not in (None, []):
        raise keys.wrong("mlp_only_layers", "empty, since every layer has to have experts")
    keys.integer("intermediate_size")  # of layers without experts, of which there are none
    windows = windows_everywhere(keys) if keys.flag("use_sliding_window") else None
    if windows is None:
        keys.value("sliding_window")  # it means nothing then
        windows = (None,) * keys.integer("num_hidden_layers")
    return ModelConfig.read(
        keys,
        folder,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        windows=windows,
        intermediate_size=keys.integer("moe_intermediate_size"),
        num_experts=num_experts_of(keys),
        experts_per_token=experts_per_token_of(keys),
        experts_add_up=keys.flag("norm_topk_prob"),
    )


def num_experts_of(keys: Keys) -> int:
    """How many there are, by one of two names, of which a later version of transformers writes the other."""
    ours, other = ("num_local_experts", "num_experts")
    if other in keys.raw and ours in keys.raw and keys.raw[other] != keys.raw[ours]:
        raise keys.wrong(other, f"as {ours} ({keys.raw[ours]!r})")
    named = next((name for name in (ours, other) if name in keys.raw), None)
    for name in (ours, other):
        keys.value(name)
    return keys.integer(named or (ours if keys.value(other) is None else other))


def experts_per_token_of(keys: Keys) -> int:
    """How many a token goes to."""
    count = keys.integer("num_experts_per_tok")
    if count > num_experts_of(keys):
        raise keys.wrong("num_experts_per_tok", f"at most the number of experts ({num_experts_of(keys)})")
    return count


def mixtral_parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint of a Mixtral holds."""
    return llama.parameters(config, lambda config, at: _layer(config, at, "block_sparse_moe.", ("w1", "w3"), "w2"))


def qwen3_moe_parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint of a Qwen3-MoE holds."""
    return llama.parameters(
        config, lambda config, at: _layer(config, at, "mlp.", ("gate_proj", "up_proj"), "down_proj")
    )


def _layer(config: ModelConfig, at: str, part: str, gate_up: tuple[str, str], down: str) -> LayerParts:
    hidden, inner, experts = config.hidden_size, config.intermediate_size, range(config.num_experts)
    names = [f"{at}{part}experts.{expert}." for expert in experts]
    ups = tuple(Packed(name, dict.fromkeys(gate_up, inner), hidden) for name in names)
    downs = tuple(Packed(name, {down: hidden}, inner, split=Split.INPUTS) for name in names)
    router = Plain(f"{at}{part}gate", (config.num_experts, hidden))
    return llama.layer_parameters(config, at) | {"router": router, "gate_up": ups, "down": downs}


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    keys=COMMON
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts": None,
        "num_experts_per_tok": 2,
    },
    read=read_mixtral,
    parameters=mixtral_parameters,
    layer=ExpertLayer,
    model=MixtureOfExperts,
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    keys=COMMON
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "num_local_experts": None,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
    },
    read=read_qwen3_moe,
    parameters=qwen3_moe_parameters,
    layer=ExpertLayer,
    model=MixtureOfExperts,
)
