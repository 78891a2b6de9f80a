"""Medusa heads as they are trained: Medusa-1, where the base stays as it is, or Medusa-2 (Cai et al. 2024, 2.2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.config import ConfigError
from manyheads.models.config import ModelConfig
from manyheads.speculation.medusa.checkpoint import HeadWeights, locate_heads, read_heads
from manyheads.speculation.medusa.export import write_heads
from manyheads.train.base import Base, half_precision, send
from manyheads.train.dataset import Batch
from manyheads.train.drafter import Guesses, TrainedDrafter, most_used
from manyheads.train.loss import chunked, cross_entropy, divergence
from manyheads.train.prompts import Answer
from manyheads.train.settings import TrainSettings


class TrainedHeads(TrainedDrafter):
    """H heads of L residual blocks, x ← x + SiLU(W x + b), with a vocabulary projection.

    Cai et al. 2024, section 2.1.1. Blocks begin as zeros: untrained heads say what the base says next.

    Args:
        num_heads, num_blocks: H and L.
        projection: [V, hidden], to begin with; copied.
        kind: `own` (each head's projection), `shared` (one for all heads), `base` (the base model's, not trained).
        token_map: [V] int64, the token of each row of `projection`; None: all tokens in order.
    """

    part = "head"
    follows_path = False
    base_projection: Tensor | None

    def __init__(
        self, num_heads: int, num_blocks: int, projection: Tensor, kind: str = "own", token_map: Tensor | None = None
    ) -> None:
        super().__init__()
        hidden = projection.shape[1]
        self.num_heads = self.depth = num_heads
        self.num_blocks, self.kind = num_blocks, kind
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

    @classmethod
    def start(cls, settings: TrainSettings, base: Base, config: ModelConfig, answers: list[Answer]) -> TrainedHeads:
        projection = base.projection.detach().float().cpu()
        token_map = None
        if settings.tokens is not None and settings.tokens < config.vocab_size:
            token_map = most_used(answers, settings.tokens, config.vocab_size)
        if settings.init is None:
            kept = projection if token_map is None else projection[token_map]
            return cls(settings.heads, settings.blocks, kept, settings.projection, token_map)
        heads = cls.of(read_heads(locate_heads(settings.init)[0], config), projection)
        for name, found, wanted in (
            ("heads", heads.num_heads, settings.heads),
            ("blocks", heads.num_blocks, settings.blocks),
            ("projection", heads.kind, settings.projection),
        ):
            if found != wanted:
                raise ConfigError(f"the heads to start from have {name} {found!r}; give --{name} {found}, not {wanted}")
        if token_map is not None:
            heads.cut(token_map)
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

    def guesses(self, base: Base, batch: Batch, places: Tensor) -> Guesses:
        hidden = base.hidden(batch)[send(places, base.device)]
        return lambda h, part: self.logits(h, hidden[part])

    def write(self, out: Path, name: str, config: ModelConfig) -> None:
        write_heads(self.weights(config.dtype), out, base=name, vocab_size=config.vocab_size)

    def backward(
        self,
        settings: TrainSettings,
        base: Base,
        teacher: Base | None,
        batch: Batch,
        targets: Tensor,
        counts: Tensor,
    ) -> Tensor:
        device = base.device
        indices = [send((column >= 0).nonzero()[:, 0], device) for column in targets.T]
        targets = send(targets, device)
        with torch.set_grad_enabled(teacher is not None):
            states = base.hidden(batch)
        hidden = states.detach()
        grad, scale = None, 1.0
        sums = [torch.zeros((), device=device)]
        if teacher is not None:
            grad, scale = torch.zeros_like(hidden, dtype=torch.float32), settings.heads_weight
            loss = _base_loss(base, teacher, batch)
            sums[0] = chunked(loss, hidden, indices[0], 1 / int(counts[0]), settings.chunk, grad)
        for h in range(self.num_heads):

            def loss(states: Tensor, index: Tensor, h: int = h) -> Tensor:
                with half_precision(device):
                    logits = self.logits(h, states)
                return cross_entropy(logits, targets[index, h + 1])

            weight = scale * settings.discount**h / int(counts[h + 1])
            sums.append(chunked(loss, hidden, indices[h + 1], weight, settings.chunk, grad))
        if grad is not None:
            states.backward(grad.to(states.dtype))  # type: ignore[no-untyped-call]
        return torch.stack(sums)


def _base_loss(base: Base, teacher: Base, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
    """How far the base has gone from what it was: where it is to say what it said."""
    with torch.no_grad():
        was = teacher.hidden(batch)

    def loss(states: Tensor, index: Tensor) -> Tensor:
        with half_precision(base.device):
            with torch.no_grad():
                wanted = teacher.logits(was[index])
            return divergence(wanted, base.logits(states))

    return loss
