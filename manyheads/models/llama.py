"""The forward pass of Llama, with what differs in families of the same shape; and what Llama's checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manyheads.attention.base import AttentionBackend, Heads
from manyheads.models.config import ModelConfig
from manyheads.models.linear import Linear, Split
from manyheads.models.norm import NoNorm, Norm
from manyheads.models.parallel import ALONE, Ranks, Unsummed
from manyheads.models.parameters import Normed, Packed, Parameters, Part, Plain
from manyheads.models.rope import row_order
from manyheads.ops.adapters import Adapters
from manyheads.ops.base import Ops, rows_at
from manyheads.quantization.base import CodedScheme

if TYPE_CHECKING:
    from manyheads.ops.base import Rows

LayerParts = dict[str, Part | tuple[Packed, ...]]
"""The parameters of a layer, by the fields of its class; several products are those of its experts."""


NO_NORM = NoNorm()


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionLayer:
    """A layer's weights without those of the feed-forward part."""

    input_norm: Norm = NO_NORM
    qkv: Linear  # hidden → (heads + 2 · kv_heads) · head_dim
    q_norm: Tensor | None = None  # [head_dim]
    k_norm: Tensor | None = None  # [head_dim]
    o: Linear  # heads · head_dim → hidden
    attention_norm: Norm = NO_NORM
    """Of what attention adds to the residual."""
    post_norm: Norm = NO_NORM
    mlp_norm: Norm = NO_NORM
    """Of what the feed-forward part adds."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its weights."""
        held = (getattr(self, field.name) for field in fields(self))
        return sum(part.nbytes for part in held if part is not None)

    def takes(self, residual: Tensor) -> CodedScheme | None:
        """The scheme that the norm before the feed-forward part may quantize rows for (`Product.takes`)."""
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer(AttentionLayer):
    """A layer's weights: of attention, then of the feed-forward part."""

    gate_up: Linear  # hidden → 2 · intermediate; without a gate, → intermediate
    down: Linear  # intermediate → hidden

    def takes(self, residual: Tensor) -> CodedScheme | None:
        """That of gate and up."""
        return self.gate_up.takes(residual)


def layer_parameters(config: ModelConfig, at: str) -> LayerParts:
    """What a checkpoint of a Llama holds of a layer; families name what they have otherwise.

    Args:
        at: what the names begin with, such as `layers.0.`.
    """
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * dim, config.num_kv_heads * dim
    attention, mlp = f"{at}self_attn.", f"{at}mlp."
    return {
        "input_norm": norm_of(config, f"{at}input_layernorm"),
        "qkv": Packed(
            attention,
            {"q_proj": q, "k_proj": kv, "v_proj": kv},
            hidden,
            config.qkv_bias,
            order=row_order(config.head_order, {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}),
        ),
        **(head_norms(config, attention) if config.qk_norm else {}),
        "o": Packed(attention, {"o_proj": hidden}, q, config.o_bias, Split.INPUTS),
        "post_norm": norm_of(config, f"{at}post_attention_layernorm"),
        "gate_up": Packed(mlp, {"gate_proj": inner, "up_proj": inner}, hidden, config.mlp_bias),
        "down": Packed(mlp, {"down_proj": hidden}, inner, config.mlp_bias, Split.INPUTS),
    }


def head_norms(config: ModelConfig, at: str) -> LayerParts:
    """The norms of queries and keys, each head by itself."""
    shape, offset = (config.head_dim,), config.norm_offset
    return {"q_norm": Plain(f"{at}q_norm", shape, offset), "k_norm": Plain(f"{at}k_norm", shape, offset)}


def norm_of(config: ModelConfig, name: str) -> Normed:
    """A norm of hidden states."""
    return Normed(name, config.hidden_size, config.norm_bias, config.norm_offset)


def whole(part: Part | tuple[Packed, ...]) -> Packed:
    """A product whose result a norm reads."""
    assert isinstance(part, Packed)
    return replace(part, whole=True)


def parameters(config: ModelConfig, layer: Callable[[ModelConfig, str], LayerParts] = layer_parameters) -> Parameters:
    """What a checkpoint holds.

    Args:
        layer: of (the configuration, what names begin with), the parameters of a layer.
    """
    return Parameters(
        embedding=Plain("embed_tokens", (config.vocab_rows, config.hidden_size)),
        layers=[layer(config, f"layers.{i}.") for i in range(config.num_layers)],
        norm=norm_of(config, "norm"),
        lm_head=Packed("", {"lm_head": config.vocab_rows}, config.hidden_size, split=Split.GATHERED),
        is_tied=config.tie_word_embeddings,
    )


def are_finite(rows: Tensor) -> Tensor:
    """[N, …] → [N] bool, whether rows have numbers alone."""
    return rows.isfinite().all(dim=1)


class Llama:
    """The forward pass over a flat ragged batch; attention and its cache are the caller's.

    Args:
        config: of this rank.
        embedding: [V, hidden], or this rank's share.
        norm: the final one.
        lm_head: hidden → V.
        ops: of the device that all of it is on.
        ranks: that share the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: Sequence[AttentionLayer],
        norm: Norm,
        lm_head: Linear,
        ops: Ops,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.ops, self.ranks = config, ops, ranks
        self.embedding, self.layers, self.norm, self.lm_head = embedding, layers, norm, lm_head
        self.device, self.dtype = embedding.device, embedding.dtype
        activations: dict[str, Callable[..., Any]] = {
            "silu": ops.silu_mul,
            "clamped silu": partial(ops.clamped_swiglu, alpha=config.swiglu_alpha, limit=config.swiglu_limit),
            "gelu": ops.gelu_mul,
            "plain gelu": ops.gelu,
        }
        self.activate = activations[config.activation]
        # as transformers rounds it, which is seen in bfloat16
        self._embedding_multiplier = embedding.new_tensor(config.embedding_multiplier).item()
        self.heads = self._heads()
        self.adapters: Adapters | None = None
        """What adapters add to products, if there are some (`models/adapters.attach`): planned before each pass."""
        self.beat: Callable[[], None] = lambda: None
        """Called at each layer: a long prompt can take a CPU minutes, and a watchdog wants to know that it goes on."""

    def forward(
        self,
        tokens: Tensor,
        attention: AttentionBackend,
        inputs: Mapping[int, Tensor] | None = None,
        read: Tensor | None = None,
        is_finite: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Most tokens of a prompt are computed for their K/V alone. So those that nobody reads go no further than the last
        layer's attention: of the rest of that layer, only what `read` names is computed.

        Args:
            tokens: [T] int64.
            attention: planned for these tokens.
            inputs: by layer, [T, hidden] that its input is written to; that of layer n, of n, is what the last one
                gives, before the final norm.
            read: [N] int64, the tokens whose hidden states are wanted; None for all.
            is_finite: [M] bool, written to: whether the last layer is given numbers for the first M tokens, and its
                attention gives some.

        Returns:
            [N, hidden]
        """
        inputs, last = inputs or {}, len(self.layers) - 1
        residual = self.embed(tokens)
        x: Rows = self.layers[0].input_norm(residual)
        for i, layer in enumerate(self.layers):
            self.beat()
            if i in inputs:
                inputs[i].copy_(residual)
            y = attention(i, self.queries(layer, x), layer.q_norm, layer.k_norm)
            if i == last and is_finite is not None:
                count = len(is_finite)  # NOTE: of few keys, torch's attention makes numbers of queries that are none
                torch.logical_and(are_finite(residual[:count]), are_finite(y[:count]), out=is_finite)
            if i == last and read is not None and i + 1 not in inputs:
                x, y, residual = rows_at(x, read), y[read], residual[read]
                if self.adapters is not None:
                    self.adapters.keep(read)
                read = None
            z = self.block(layer, x, y, residual)
            if i < last:
                following = self.layers[i + 1]
                x = following.input_norm.add(z, residual, self.takes(following, residual))
        hidden: Tensor = self.norm.add(z, residual, None)
        if len(self.layers) in inputs:
            inputs[len(self.layers)].copy_(residual)
        return hidden if read is None else hidden[read]

    def takes(self, layer: AttentionLayer, residual: Tensor) -> CodedScheme | None:
        """The scheme that the layer's first norm may quantize rows for (`Product.takes`)."""
        return layer.qkv.takes(residual)

    def embed(self, tokens: Tensor) -> Tensor:
        """[T] int64 → [T, hidden], what the first layer reads."""
        x = self.ranks.embed(tokens, self.embedding)
        return x if self._embedding_multiplier == 1.0 else x.mul_(self._embedding_multiplier)

    def block(self, layer: AttentionLayer, x: Rows, y: Tensor, residual: Tensor) -> Tensor | Unsummed:
        """What a layer does behind its attention: it adds all but the last of its results to the residual, and returns
        that.

        Args:
            x: [T, hidden], the residual after the layer's first norm.
            y: [T, heads · head_dim], what attention gives.
            residual: [T, hidden]

        Returns:
            [T, hidden], or what `Linear.to_add` gives.
        """
        x = layer.post_norm.add(layer.attention_norm(layer.o.to_add(y)), residual, layer.takes(residual))
        added: Tensor | Unsummed = layer.mlp_norm(self.feed_forward(layer, x, residual))
        return added

    def queries(self, layer: AttentionLayer, x: Rows) -> Tensor:
        """Queries, keys and values: [T, hidden] → [T, (heads + 2 · kv_heads) · head_dim]."""
        return layer.qkv(x)

    def feed_forward(self, layer: AttentionLayer, x: Rows, residual: Tensor) -> Tensor | Unsummed:
        """[T, hidden] → [T, hidden], or what `Linear.to_add` gives; the residual is there for its type."""
        assert isinstance(layer, Layer)
        return layer.down.to_add(self.activate(layer.gate_up(x), layer.down.takes(residual)))

    def project(self, hidden: Tensor) -> Tensor:
        """Logits in the model's type: [N, hidden] → [N, V]."""
        logits, cap = self.lm_head(hidden), self.config.logits_softcap
        if self.config.logits_multiplier != 1.0:
            logits = logits.mul_(self.config.logits_multiplier)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] → [N, V] float32."""
        return self.project(hidden).float()

    def _heads(self) -> Heads:
        config = self.config
        tables = {
            rope: rope.table(config.max_position_embeddings, config.head_dim, self.device, self.dtype)
            for rope in dict.fromkeys(config.ropes)
        }
        return Heads(
            num_heads=config.num_heads,
            eps=config.rms_norm_eps,
            ropes={i: tables[rope] for i, rope in enumerate(config.ropes)},
            windows={i: window for i, window in enumerate(config.windows) if window is not None},
            scale=config.attention_scale,
            softcap=config.attention_softcap,
        )

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph may hold a forward pass."""
        return all(layer.qkv.product.can_be_captured for layer in self.layers)

    def memory_bytes(self) -> int:
        """Bytes of all weights; a vocabulary projection that is the embedding itself counts once."""
        total = self.embedding.nbytes + self.norm.nbytes + sum(layer.nbytes for layer in self.layers)
        return total + (0 if self.lm_head.product.plain is self.embedding else self.lm_head.nbytes)
