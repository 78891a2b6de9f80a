"""The heads as they are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.config import ConfigError
from manyheads.speculation.medusa.checkpoint import HeadWeights


class TrainedHeads(nn.Module):
    """H heads of L residual blocks, x ← x + SiLU(W x + b), with a vocabulary projection.

    Cai et al. 2024, section 2.1.1. Blocks begin as zeros: untrained heads say what the base says next.

    Args:
        num_heads, num_blocks: H and L.
        projection: [V, hidden], to begin with; copied.
        kind: `own` (each head's projection), `shared` (one for all heads), `base` (the base model's, not trained).
        token_map: [V] int64, the token of each row of `projection`; None: all tokens in order.
    """

    token_map: Tensor | None
    base_projection: Tensor | None

    def __init__(
        self, num_heads: int, num_blocks: int, projection: Tensor, kind: str = "own", token_map: Tensor | None = None
    ) -> None:
        super().__init__()
        hidden = projection.shape[1]
        self.num_heads, self.num_blocks, self.kind = num_heads, num_blocks, kind
        count = num_heads * num_blocks  # head by head
        self.weight = nn.ParameterList(torch.zeros(hidden, hidden) for _ in range(count))
        self.bias = nn.ParameterList(torch.zeros(hidden) for _ in range(count))
        owned = {"own": num_heads, "shared": 1, "base": 0}[kind]
        self.projection = nn.ParameterList(projection.detach().float().clone() for _ in range(owned))
        self.register_buffer("base_projection", projection.detach() if kind == "base" else None, persistent=False)
        self.register_buffer("token_map", token_map, persistent=False)

    @classmethod
    def of(cls, weights: HeadWeights, base_projection: Tensor) -> TrainedHeads:
        """Heads as read from a checkpoint; those without a projection take `base_projection` [V, hidden]."""
        own = weights.projections
        kind = "base" if own is None else "shared" if weights.shares_one_projection else "own"
        start = base_projection if own is None else own[0]
        heads = cls(len(weights.blocks), len(weights.blocks[0]), start, kind, weights.token_map)
        pairs = [pair for head in weights.blocks for pair in head]
        values = [*(w for w, _ in pairs), *(b for _, b in pairs), *(own or [])]
        with torch.no_grad():
            # of one projection for all heads the copies are left over
            for parameter, value in zip((*heads.weight, *heads.bias, *heads.projection), values, strict=False):
                parameter.copy_(value)
        return heads

    def cut(self, token_map: Tensor) -> None:
        """Keep the rows of these tokens only. Raises ConfigError where a token has no row."""
        if self.kind == "base":
            raise ConfigError("heads that use the base's projection cannot be cut to a token_map")
        rows = token_map
        if self.token_map is not None:
            rows = self.place(token_map, int(torch.cat([token_map, self.token_map]).max()) + 1)
            if missing := int((rows < 0).sum()):
                raise ConfigError(f"the heads to start from have no row for {missing} of the wanted tokens")
        self.projection = nn.ParameterList(p.detach()[rows].clone() for p in self.projection)
        self.token_map = token_map

    @property
    def vocab_size(self) -> int:
        """Tokens that a head can say."""
        return len(self.projection[0] if self.base_projection is None else self.base_projection)

    def logits(self, h: int, hidden: Tensor) -> Tensor:
        """[N, hidden] → [N, V] of head h, in the order of `token_map`."""
        x = hidden
        for i in range(h * self.num_blocks, (h + 1) * self.num_blocks):
            x = x + F.silu(F.linear(x, self.weight[i], self.bias[i]))
        if self.base_projection is not None:
            return F.linear(x, self.base_projection.to(x.dtype))
        return F.linear(x, self.projection[h if self.kind == "own" else 0])

    def place(self, tokens: Tensor, vocab_size: int) -> Tensor:
        """Tokens as rows of the projections: -1 stays, and a token without a row is -2."""
        if self.token_map is None:
            return tokens
        place = torch.full((vocab_size + 1,), -2, device=tokens.device)
        place[self.token_map.to(tokens.device)] = torch.arange(len(self.token_map), device=tokens.device)
        place[-1] = -1
        return place[tokens]

    def weights(self, dtype: torch.dtype) -> HeadWeights:
        """As `write_heads` takes them; projections that are one stay one."""

        def plain(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", dtype).contiguous()

        pairs = [(plain(w), plain(b)) for w, b in zip(self.weight, self.bias, strict=True)]
        blocks = [pairs[i : i + self.num_blocks] for i in range(0, len(pairs), self.num_blocks)]
        projections = [plain(p) for p in self.projection]
        if self.kind == "shared":
            projections *= self.num_heads
        tokens = None if self.token_map is None else self.token_map.cpu()
        return HeadWeights(blocks, projections or None, tokens, "trained", None)
