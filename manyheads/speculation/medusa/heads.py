"""The Medusa heads: candidates for the next tokens but one, from the last accepted hidden state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.models.linear import Linear, Split
from manyheads.models.llama import Llama
from manyheads.models.parallel import shared_rows
from manyheads.quantization.schemes import compress, compress_vocabulary, find
from manyheads.speculation.medusa.checkpoint import HeadWeights


class MedusaHeads:
    """H heads of L residual blocks each: x ← x + SiLU(W x + b), then a vocabulary projection.

    The projection is each head's own (Cai et al. 2024, section 2.1.1), one for all heads, or the base model's (TGI's
    "V2").

    Args:
        weights: as read from a checkpoint.
        model: the base, for its vocabulary projection, its `ops` and its `ranks`.
        quantization: one of `config.QUANTIZATIONS` rounds the first blocks and the projections, which are nearly all of
            the heads.
    """

    def __init__(
        self,
        weights: HeadWeights,
        model: Llama,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None = None,
    ) -> None:
        self.num_heads = len(weights.blocks)
        self.num_tokens = model.config.vocab_size if weights.token_map is None else weights.token_map.numel()
        """Tokens that a head can propose."""
        self.model = model
        ops, scheme = model.ops, find(quantization)
        layers = list(zip(*weights.blocks, strict=True))  # per layer: (weight, bias) of every head
        # the first layer's blocks all read the same hidden state: one product
        weight, bias = (torch.cat([part.to(device, dtype) for part in parts]) for parts in zip(*layers[0], strict=True))
        ranks, size = model.ranks, len(weight)
        share = (shared_rows(size, ranks.size), weight.shape[1])
        weight, bias = ranks.tensor_part(weight, share), ranks.tensor_part(bias, share[:1])
        self._first = Linear(compress(weight, scheme), bias, dtype, ops, Split.GATHERED, ranks, size)
        self._later = [
            (
                torch.stack([w.to(device, dtype).T for w, _ in layer]),  # [H, hidden, hidden]
                torch.stack([b.to(device, dtype) for _, b in layer])[:, None],  # [H, 1, hidden]
            )
            for layer in layers[1:]
        ]
        self._projections: list[Linear] | None = None
        if weights.projections is not None:
            own = weights.projections[:1] if weights.shares_one_projection else weights.projections
            share = (shared_rows(self.num_tokens, ranks.size), share[1])
            parts = [compress_vocabulary(ranks.tensor_part(w, share).to(device, dtype), scheme) for w in own]
            self._projections = [
                Linear(part, None, dtype, ops, Split.GATHERED, ranks, self.num_tokens) for part in parts
            ]
        self._token_map = weights.token_map.to(device) if weights.token_map is not None else None

    def candidates(self, hidden: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
        """The most likely tokens of each head, best first, and their probabilities.

        Args:
            hidden: [R, hidden], after the base's final norm, of each row's last accepted token.

        Returns:
            [R, H, num_ranks] int64 and float32. Head h (from 0) proposes for depth h + 1 of the next tree, whose root
            is the token that the base itself draws.
        """
        num_rows, size = hidden.shape
        x = self.model.ops.head_input(
            hidden, self._first(hidden).view(num_rows, self.num_heads, size)
        )  # [R, H, hidden]
        for weight, bias in self._later:
            x = x + F.silu(torch.baddbmm(bias, x.transpose(0, 1), weight)).transpose(0, 1)
        if self._projections is None:
            logits = self.model.project(x.reshape(-1, size))
        elif len(self._projections) == 1:
            logits = self._projections[0](x.reshape(-1, size))
        else:
            logits = torch.stack([p(x[:, h]) for h, p in enumerate(self._projections)], dim=1).flatten(0, 1)
        tokens, chances = self.model.ops.best(logits, num_ranks)
        shape = (num_rows, self.num_heads, num_ranks)
        if self._token_map is not None:
            tokens = self._token_map[tokens]
        return tokens.view(shape), chances.view(shape)

    def memory_bytes(self) -> int:
        """Bytes of the heads' own weights."""
        linears = [self._first, *(self._projections or [])]
        return sum(p.nbytes for p in linears) + sum(w.nbytes + b.nbytes for w, b in self._later)
