"""Settings of a training run: one frozen dataclass; the command line takes its defaults from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from manyheads.config import ConfigError

PROJECTIONS = ("own", "shared", "base")
OWN = {
    "medusa": ("heads", "blocks", "projection", "tokens", "init", "joint", "joint_start", "base_rate", "heads_weight"),
    "eagle3": ("passes", "draft_vocab"),
}
"""Kinds of drafters, and the settings that are theirs alone."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a run does; the same settings, data and base give the same drafter."""

    kind: str = "medusa"
    """Of the drafter: `medusa` (heads that read one hidden state) or `eagle3` (a layer that goes on from its own)."""

    heads: int = 4
    """Head h (from 0) predicts the token h + 2 places after the one whose hidden state it reads."""
    blocks: int = 1
    """Residual blocks of each head."""
    projection: str = "own"
    """Vocabulary projection: `own` (each head's), `shared` (one for all heads), `base` (the base model's, "V2")."""
    tokens: int | None = None
    """The heads' own projections span this many of the tokens that the base uses most; None: all."""
    init: str | None = None
    """Heads to start from; None: blocks that do nothing, and the base's projection."""

    passes: int = 5
    """EAGLE-3: how many follow one another in training, each with the features of the one before."""
    draft_vocab: int | None = None
    """EAGLE-3: it can say this many of the tokens that the base uses most; None: 32,000, or all of fewer."""

    questions: int = 0
    """Prompts that the base comes up with itself, beside those of the data."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out."""
    max_new_tokens: int = 256
    sampled: float = 0.25
    """Share of the prompts that are answered at `temperature`; the others greedily."""
    temperature: float = 0.7
    held_out: float = 0.05
    """Share of the answers that are for measuring, at least one."""

    length: int = 1024
    """Tokens of a packed row."""
    rows: int = 8
    """Packed rows that go through the base at once."""
    accumulate: int = 1
    """Such groups of rows in an optimizer step."""
    epochs: int = 2
    max_steps: int | None = None
    rate: float = 1e-3
    """Highest learning rate of the drafter."""
    warmup: float = 0.05
    """Share of the steps over which the rate grows; a cosine takes it to zero afterwards."""
    discount: float = 0.8
    """The loss of each head or pass counts so much of the one before (Cai et al. 2024, 2.2.1; Li et al. 2025)."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the gradient."""
    chunk: int = 1024
    """Tokens whose logits, of one head, exist at once; of EAGLE-3 tokens times passes."""
    checkpoint_every: int = 200
    """Steps."""
    seed: int = 0
    device: str = "auto"

    joint: bool = False
    """Medusa-2: the base learns too (Cai et al. 2024, section 2.2.2)."""
    joint_start: float = 0.2
    """Share of the steps in which the heads learn alone, before the base joins."""
    base_rate: float | None = None
    """Highest learning rate of the base; None: a quarter of the heads' (section 2.2.2)."""
    heads_weight: float = 0.2
    """Of the heads' loss beside the base's (λ0 of section 2.2.2)."""

    @property
    def depth(self) -> int:
        """Tokens that are guessed after the base's own."""
        return self.heads if self.kind == "medusa" else self.passes

    def __post_init__(self) -> None:
        if self.kind not in OWN:
            raise ConfigError(f"kind must be one of {', '.join(OWN)}, not {self.kind!r}")
        for kind, names in OWN.items():
            for field in fields(self):
                if kind != self.kind and field.name in names and getattr(self, field.name) != field.default:
                    raise ConfigError(f"{field.name} is for kind {kind}; this is {self.kind}")
        whole = ("heads", "blocks", "passes", "max_prompt_tokens", "max_new_tokens", "rows", "accumulate", "epochs")
        for name in (*whole, "chunk", "checkpoint_every", "tokens", "draft_vocab", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.questions < 0:
            raise ConfigError(f"questions must be at least 0, not {self.questions}")
        for name in ("sampled", "held_out", "warmup", "joint_start"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("rate", "discount", "clip", "temperature", "heads_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.length < self.depth + 2:
            what = "heads" if self.kind == "medusa" else "passes"
            raise ConfigError(f"length must be at least {self.depth + 2} for {self.depth} {what}, not {self.length}")
        if self.projection not in PROJECTIONS:
            raise ConfigError(f"projection must be one of {', '.join(PROJECTIONS)}, not {self.projection!r}")
        if self.projection == "base" and self.joint:
            raise ConfigError("joint training moves the base's projection; its heads need one of their own")
        if self.projection == "base" and self.tokens is not None:
            raise ConfigError("tokens cuts the heads' own projections; with projection base there are none")

    def differs_from(self, other: TrainSettings) -> str | None:
        """The first setting that is not the same, for a run that is to go on."""
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            if here != there and field.name not in ("checkpoint_every", "device"):
                return f"{field.name} is {here!r} and was {there!r}"
        return None
