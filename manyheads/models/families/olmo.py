"""OLMo 2: norms stand behind attention and the feed-forward part, and those of queries and keys go over all heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from manyheads.models import llama
from manyheads.models.config import ModelConfig
from manyheads.models.families.llama import COMMON
from manyheads.models.family import Family
from manyheads.models.keys import Keys
from manyheads.models.llama import AttentionLayer, Layer, LayerParts, Llama, norm_of, whole
from manyheads.models.norm import Norm
from manyheads.models.parameters import Normed, Parameters

if TYPE_CHECKING:
    from manyheads.ops.base import Rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Olmo2Layer(Layer):
    """A layer's weights."""

    queries_norm: Norm
    keys_norm: Norm


class Olmo2(Llama):
    """The forward pass of an OLMo 2."""

    def queries(self, layer: AttentionLayer, x: Rows) -> Tensor:
        """Queries and keys are normed before they are taken apart into heads."""
        assert isinstance(layer, Olmo2Layer)
        qkv, dim = layer.qkv(x), self.config.head_dim
        q, k = self.config.num_heads * dim, self.config.num_kv_heads * dim
        qkv[:, :q] = layer.queries_norm(qkv[:, :q].contiguous())
        qkv[:, q : q + k] = layer.keys_norm(qkv[:, q : q + k].contiguous())
        return qkv


def read_olmo2(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of an OLMo 2; raises what `ModelConfig.read` does."""
    bias = keys.flag("attention_bias")
    return ModelConfig.read(keys, folder, qkv_bias=bias, o_bias=bias)


def parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint holds."""
    return llama.parameters(config, _layer)


def _layer(config: ModelConfig, at: str) -> LayerParts:
    parts = llama.layer_parameters(config, at)
    del parts["input_norm"], parts["post_norm"]
    dim, attention = config.head_dim, f"{at}self_attn."
    return parts | {
        "queries_norm": Normed(f"{attention}q_norm", config.num_heads * dim),
        "keys_norm": Normed(f"{attention}k_norm", config.num_kv_heads * dim),
        "o": whole(parts["o"]),
        "attention_norm": norm_of(config, f"{at}post_attention_layernorm"),
        "down": whole(parts["down"]),
        "mlp_norm": norm_of(config, f"{at}post_feedforward_layernorm"),
    }


OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    keys=COMMON | {"vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False},
    read=read_olmo2,
    parameters=parameters,
    layer=Olmo2Layer,
    model=Olmo2,
    can_be_shared=False,  # norms go over the heads of all ranks
)
