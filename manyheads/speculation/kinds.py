"""The kinds of drafters that there are, and which of them serves a model."""

from __future__ import annotations

from pathlib import Path

from manyheads.config import ConfigError, EngineConfig
from manyheads.models.config import ModelConfig
from manyheads.speculation.drafter import DrafterSource
from manyheads.speculation.eagle3.checkpoint import is_eagle3
from manyheads.speculation.eagle3.drafter import Eagle3Source
from manyheads.speculation.medusa.drafter import MedusaSource
from manyheads.speculation.ngram import NgramSource


def find_drafter(config: EngineConfig, heads: Path | None, model: ModelConfig) -> DrafterSource | None:
    """What guesses for a model; None where nothing does, or nothing is wanted.

    Args:
        heads: the folder of its heads, if it has some.

    Raises:
        ConfigError, CheckpointError: the folder holds none that fit.
    """
    if not config.speculative:
        return None
    if config.drafter == "ngram":
        return NgramSource(config.max_model_len or model.max_position_embeddings)
    if heads is not None:
        kind = "eagle3" if is_eagle3(heads) else "medusa"
        if config.drafter not in (None, kind):
            raise ConfigError(
                f"drafter={config.drafter}: {heads} holds {kind}; leave drafter out, or name another folder"
            )
        return Eagle3Source(heads, model) if kind == "eagle3" else MedusaSource(heads, model)
    if config.drafter is not None:
        raise ConfigError(f"drafter={config.drafter}: {config.model} has no heads; name some with heads, or take ngram")
    return None
