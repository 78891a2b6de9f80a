"""The forward pass: that of Llama, and the parameters that its checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from manyheads.attention.base import AttentionBackend
from manyheads.models.config import ModelConfig
from manyheads.models.linear import Linear, Split
from manyheads.models.parallel import ALONE, Ranks
from manyheads.models.parameters import Packed, Parameters, Plain
from manyheads.ops.base import Ops

if TYPE_CHECKING:
    from manyheads.kernels.rows import QuantizedRows


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's weights: of attention, then of the gated feed-forward part."""

    input_norm: Tensor  # [hidden]
    qkv: Linear  # hidden → (heads + 2 · kv_heads) · head_dim
    o: Linear  # heads · head_dim → hidden
    post_norm: Tensor  # [hidden]
    gate_up: Linear  # hidden → 2 · intermediate
    down: Linear  # intermediate → hidden
    q_norm: Tensor | None = None  # [head_dim]
    k_norm: Tensor | None = None  # [head_dim]


def parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint of such a model holds, by the fields of `Layer`."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * dim, config.num_kv_heads * dim

    def layer(at: str) -> dict[str, Plain | Packed]:
        attention, mlp = f"{at}self_attn.", f"{at}mlp."
        norms = {"q_norm": Plain(f"{attention}q_norm", (dim,)), "k_norm": Plain(f"{attention}k_norm", (dim,))}
        return {
            "input_norm": Plain(f"{at}input_layernorm", (hidden,)),
            "qkv": Packed(attention, {"q_proj": q, "k_proj": kv, "v_proj": kv}, hidden, config.qkv_bias),
            **(norms if config.qk_norm else {}),
            "o": Packed(attention, {"o_proj": hidden}, q, config.o_bias, Split.INPUTS),
            "post_norm": Plain(f"{at}post_attention_layernorm", (hidden,)),
            "gate_up": Packed(mlp, {"gate_proj": inner, "up_proj": inner}, hidden, config.mlp_bias),
            "down": Packed(mlp, {"down_proj": hidden}, inner, config.mlp_bias, Split.INPUTS),
        }

    return Parameters(
        embedding=Plain("embed_tokens", (config.vocab_rows, hidden)),
        layers=[layer(f"layers.{i}.") for i in range(config.num_layers)],
        norm=Plain("norm", (hidden,)),
        lm_head=Packed("", {"lm_head": config.vocab_rows}, hidden, split=Split.GATHERED),
        is_tied=config.tie_word_embeddings,
    )


class Llama:
    """The forward pass over a flat ragged batch; attention and its cache are the caller's.

    Args:
        config: of this rank.
        embedding: [V, hidden], or this rank's share.
        norm: [hidden], the final one's weight.
        lm_head: hidden → V.
        ops: of the device that all of it is on.
        ranks: that share the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: list[Layer],
        norm: Tensor,
        lm_head: Linear,
        ops: Ops,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.ops, self.ranks = config, ops, ranks
        self.embedding, self.layers, self.norm, self.lm_head = embedding, layers, norm, lm_head
        self.device, self.dtype = embedding.device, embedding.dtype
        self.rope = config.rope.table(config.max_position_embeddings, config.head_dim, self.device, self.dtype)
        self.beat: Callable[[], None] = lambda: None
        """Called at each layer: a long prompt can take a CPU minutes, and a watchdog wants to know that it goes on."""

    def forward(
        self, tokens: Tensor, attention: AttentionBackend, inputs: Mapping[int, Tensor] | None = None
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: [T] int64.
            attention: planned for these tokens.
            inputs: by layer, [T, hidden] that its input is written to; that of layer n, of n, is what the last one
                gives, before the final norm.

        Returns:
            [T, hidden]
        """
        inputs = inputs or {}
        ops, eps = self.ops, self.config.rms_norm_eps
        residual = self.ranks.embed(tokens, self.embedding)
        x: Tensor | QuantizedRows = ops.rms_norm(residual, self.layers[0].input_norm, eps)
        for i, layer in enumerate(self.layers):
            self.beat()
            if i in inputs:
                inputs[i].copy_(residual)
            y = layer.o(attention(i, layer.qkv(x), layer.q_norm, layer.k_norm))
            x = ops.add_rms_norm(y, residual, layer.post_norm, eps, layer.gate_up.takes(residual))
            y = layer.down(ops.silu_mul(layer.gate_up(x), layer.down.takes(residual)))
            if i + 1 < len(self.layers):
                following = self.layers[i + 1]
                x = ops.add_rms_norm(y, residual, following.input_norm, eps, following.qkv.takes(residual))
        hidden: Tensor = ops.add_rms_norm(y, residual, self.norm, eps)
        if len(self.layers) in inputs:
            inputs[len(self.layers)].copy_(residual)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] → [N, V] float32."""
        return self.lm_head(hidden).float()

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph may hold a forward pass."""
        return all(layer.qkv.product.can_be_captured for layer in self.layers)

    def memory_bytes(self) -> int:
        """Bytes of all weights; a vocabulary projection that is the embedding itself counts once."""
        total = self.embedding.nbytes + self.norm.nbytes
        total += 0 if self.lm_head.product.plain is self.embedding else self.lm_head.nbytes
        for layer in self.layers:
            linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
            norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
            total += sum(linear.nbytes for linear in linears) + sum(n.nbytes for n in norms if n is not None)
        return total
