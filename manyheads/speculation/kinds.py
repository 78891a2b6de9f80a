"""The kinds of drafters that there are, and which of them serves a model."""

from __future__ import annotations

from pathlib import Path

from manyheads.config import ConfigError, EngineConfig
from manyheads.models.config import ModelConfig
from manyheads.speculation.drafter import DrafterSource
from manyheads.speculation.eagle3.checkpoint import is_eagle3
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
    if heads is not None and is_eagle3(heads):
        raise ConfigError(f"{heads} holds an EAGLE-3 drafter, which manyheads reads and converts but does not serve")
    if heads is not None:
        return MedusaSource(heads, model)
    if config.drafter is not None:
        raise ConfigError(f"drafter={config.drafter}: {config.model} has no heads; name some with heads, or take ngram")
    return None
