"""What an EAGLE-3 drafter computes: one decoder layer between features and a draft vocabulary.

Li et al. 2025, "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test"; the layer
is that of SafeAILab's cnets.py, its variants those of speculators and vLLM (`checkpoint.Eagle3Config`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from manyheads.attention.base import AttentionBackend
from manyheads.models.linear import Linear, Split
from manyheads.models.llama import Llama
from manyheads.models.norm import RmsNorm
from manyheads.models.parallel import shared_rows
from manyheads.quantization.base import Weight
from manyheads.quantization.schemes import compress, compress_vocabulary, find
from manyheads.speculation.eagle3.checkpoint import LAYER, Eagle3Config, Eagle3Weights


class Eagle3Layer:
    """The drafter's weights on a device.

    Args:
        weights: as read from a checkpoint, whole.
        config: of this rank.
        model: the base, for its embedding, its `ops` and its `ranks`.
        quantization: one of `config.QUANTIZATIONS` rounds the projections, which are nearly all of the drafter.
    """

    def __init__(
        self,
        weights: Eagle3Weights,
        config: Eagle3Config,
        model: Llama,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None,
    ) -> None:
        self.config, self.ops, self.ranks, scheme = config, model.ops, model.ranks, find(quantization)
        ranks, shapes, whole = model.ranks, config.shapes, weights.config
        # what is split by its columns is rounded by whole rows, so that it is rounded as without other ranks
        tensors = {
            name: ranks.tensor_part(tensor, shapes[name][:1]).to(device, dtype)
            for name, tensor in weights.tensors.items()
            if name not in ("d2t", "embed_tokens.weight")
        }

        def linear(weight: Weight, split: Split = Split.OUTPUTS, size: int | None = None) -> Linear:
            return Linear(weight, None, dtype, self.ops, split, ranks, size)

        def joined(names: str, at: str) -> Weight:
            return compress(torch.cat([tensors[f"{LAYER}{at}{name}_proj.weight"] for name in names.split()]), scheme)

        def narrow(name: str) -> Weight:
            return ranks.rounded_part(tensors[name], shapes[name], partial(compress, scheme=scheme))

        def norm(name: str) -> Tensor | None:
            return tensors.get(f"{name}.weight")

        self.fc = linear(compress(tensors["fc.weight"], scheme), Split.GATHERED, whole.hidden_size)
        self.qkv = linear(joined("q k v", "self_attn."))
        self.o = linear(narrow(f"{LAYER}self_attn.o_proj.weight"), Split.INPUTS)
        self.gate_up = linear(joined("gate up", "mlp."))
        self.down = linear(narrow(f"{LAYER}mlp.down_proj.weight"), Split.INPUTS)
        projection = compress_vocabulary(tensors["lm_head.weight"], scheme)
        self.lm_head = linear(projection, Split.GATHERED, whole.draft_vocab_size)
        self.embedding, self._own = model.embedding, list[Tensor]()
        if weights.embedding is not None:
            share = (shared_rows(whole.vocab_size, ranks.size), whole.hidden_size)
            self.embedding = ranks.tensor_part(weights.embedding, share).to(device, dtype)
            self._own = [self.embedding]
        self.token_map = None if weights.token_map is None else weights.token_map.to(device)
        self._token_norm = tensors[f"{LAYER}input_layernorm.weight"]
        self._feature_norm = tensors[f"{LAYER}hidden_norm.weight"]
        eps = self.config.rms_norm_eps
        self._post_norm = RmsNorm(tensors[f"{LAYER}post_attention_layernorm.weight"], eps, self.ops)
        self._norm = RmsNorm(tensors["norm.weight"], eps, self.ops)
        self._states_norm = norm("input_norm")
        self._state_norms = [tensors[f"fc_norm.{i}.weight"] for i in range(3)] if self.config.fc_norm else None
        self._q_norm, self._k_norm = norm(f"{LAYER}self_attn.q_norm"), norm(f"{LAYER}self_attn.k_norm")

    def features(self, states: Tensor) -> Tensor:
        """What three of the base's layers read becomes one feature: [T, 3, base's hidden] → [T, hidden]."""
        eps = self.config.rms_norm_eps
        if self._state_norms is not None:
            states = torch.stack(
                [
                    self.ops.rms_norm(s.contiguous(), w, eps)
                    for s, w in zip(states.unbind(1), self._state_norms, strict=True)
                ],
                dim=1,
            )
        x = states.flatten(1)
        if self._states_norm is not None:
            x = self.ops.rms_norm(x, self._states_norm, eps)
        return self.fc(x)

    def __call__(
        self,
        features: Tensor,
        source: Tensor | None,
        tokens: Tensor,
        layer: int,
        attention: AttentionBackend,
        wanted: Tensor,
        room: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass over T places of texts: the K/V of all, and what comes of n of them.

        Args:
            features: [F, hidden].
            source: [T] int64, where the places' features stand; None: they are these, in order.
            tokens: [T] int64, those that follow them.
            layer: of the cache.
            attention: planned for these tokens.
            wanted: [n] int64, the places that are read on; behind attention, the others are left out.
            room: [n, hidden], where to put what is returned first.

        Returns:
            [n, hidden], the features of the next pass, and [n, hidden], what `best` reads.
        """
        ops, eps = self.ops, self.config.rms_norm_eps
        at: Tensor | None = tokens
        embedded = self.embedding
        if self.ranks.size > 1:
            embedded, at = self.ranks.embed(tokens, self.embedding), None
        x, residual = ops.norm_pairs(embedded, at, self._token_norm, features, source, self._feature_norm, eps)
        if self.config.norm_before_residual:
            residual = x[:, residual.shape[1] :]
        attended = attention(layer, self.qkv(x), self._q_norm, self._k_norm)
        if room is None:
            room = residual.new_empty(len(wanted), residual.shape[1])
        residual = torch.index_select(residual, 0, wanted, out=room)
        if len(wanted) == 0:
            return residual, residual
        y = self.o.to_add(attended.index_select(0, wanted))
        rows = self._post_norm.add(y, residual, self.gate_up.takes(residual))
        y = self.down.to_add(ops.silu_mul(self.gate_up(rows), self.down.takes(residual)))
        out: Tensor = self._norm.add(y, residual, None)
        return (residual.copy_(out) if self.config.norm_output else residual), out

    def best(self, normed: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens that come next, best first, and their chances: [N, count] int64 (of the draft
        vocabulary, which `token_map` takes to the base's) and float32."""
        return self.ops.best(self.lm_head(normed), count)

    def memory_bytes(self) -> int:
        """Bytes of the drafter's own weights."""
        linears = (self.fc, self.qkv, self.o, self.gate_up, self.down, self.lm_head)
        return sum(linear.nbytes for linear in linears) + sum(tensor.nbytes for tensor in self._own)
