"""Command R7B (Cohere 2): attention and the feed-forward part read the same norm side by side; one layer in four knows
no positions, and the others look back over a window."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from manyheads.models import llama
from manyheads.models.config import FULL, SLIDING, ModelConfig, head_dim_of, rope_keys, windows_of
from manyheads.models.families.llama import COMMON
from manyheads.models.family import Family
from manyheads.models.keys import Keys
from manyheads.models.llama import AttentionLayer, LayerParts, Llama, whole
from manyheads.models.parallel import summed
from manyheads.models.parameters import Parameters
from manyheads.models.rope import NO_ROPE
from manyheads.quantization.base import CodedScheme

if TYPE_CHECKING:
    from manyheads.ops.base import Rows


class Cohere2(Llama):
    """The forward pass of a Cohere 2."""

    def takes(self, layer: AttentionLayer, residual: Tensor) -> CodedScheme | None:
        """Both parts have to take the same."""
        scheme = layer.qkv.takes(residual)
        return scheme if scheme is layer.takes(residual) else None

    def block(self, layer: AttentionLayer, x: Rows, y: Tensor, residual: Tensor) -> Tensor:
        """Both parts read x."""
        return layer.o(y).add_(summed(self.feed_forward(layer, x, residual)))


def read_cohere2(keys: Keys, folder: Path) -> ModelConfig:
    """Read the configuration of a Cohere 2; raises what `ModelConfig.read` does."""
    num_layers, bias = keys.integer("num_hidden_layers"), keys.flag("attention_bias")
    pattern = keys.integer("sliding_window_pattern")
    windows = windows_of(keys, [SLIDING if (i + 1) % pattern else FULL for i in range(num_layers)])
    rope = rope_keys(keys, head_dim_of(keys)).read()
    return ModelConfig.read(
        keys,
        folder,
        qkv_bias=bias,
        o_bias=bias,
        norm="layer",
        rms_norm_eps=keys.number("layer_norm_eps"),
        ropes=tuple(NO_ROPE if window is None else rope for window in windows),
        interleaved=True,
        windows=windows,
        logits_multiplier=keys.number("logit_scale"),
    )


def parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint holds."""
    return llama.parameters(config, _layer)


def _layer(config: ModelConfig, at: str) -> LayerParts:
    parts = llama.layer_parameters(config, at)
    del parts["post_norm"]
    return parts | {"o": whole(parts["o"]), "down": whole(parts["down"])}


_KEYS = COMMON | {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "logit_scale": 0.0625,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "layer_types": None,
}
del _KEYS["rms_norm_eps"]

COHERE2 = Family(
    architecture="Cohere2ForCausalLM",
    model_type="cohere2",
    keys=_KEYS,
    read=read_cohere2,
    parameters=parameters,
    model=Cohere2,
)
