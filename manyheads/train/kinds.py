"""The kinds of drafters that can be trained, and how one is read again to be measured."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from manyheads.config import ConfigError
from manyheads.models.config import ModelConfig
from manyheads.speculation.eagle3.checkpoint import Eagle3Weights, is_eagle3, read_drafter
from manyheads.speculation.medusa.checkpoint import HeadWeights, read_heads
from manyheads.train.base import Base
from manyheads.train.drafter import TrainedDrafter
from manyheads.train.eagle3 import TrainedEagle3
from manyheads.train.medusa import TrainedHeads
from manyheads.train.settings import TrainSettings

KINDS: dict[str, type[TrainedDrafter]] = {"medusa": TrainedHeads, "eagle3": TrainedEagle3}
"""By what the settings call them."""


def read_weights(folder: Path, config: ModelConfig) -> HeadWeights | Eagle3Weights:
    """Heads or an EAGLE-3 drafter from their folder, for a base of this shape.

    Raises:
        CheckpointError, ConfigError: the folder holds neither, or what is there does not fit.
    """
    return read_drafter(folder, config) if is_eagle3(folder) else read_heads(folder, config)


def trained(weights: HeadWeights | Eagle3Weights, base: Base, config: ModelConfig) -> TrainedDrafter:
    """What has been read, on the base's device, as it is when it is trained.

    Raises:
        ConfigError: an EAGLE-3 drafter computes otherwise than those that are trained here.
    """
    if isinstance(weights, Eagle3Weights):
        drafter: TrainedDrafter = _eagle3(weights, config)
    else:
        drafter = TrainedHeads.of(weights, base.projection.detach().float().cpu())
    return drafter.to(base.device)


def _eagle3(weights: Eagle3Weights, config: ModelConfig) -> TrainedEagle3:
    """A drafter for a base of this shape, with as many passes as it was measured at."""
    passes = len(weights.accuracy) if weights.accuracy else TrainSettings.passes
    layers = weights.config.feature_layers(config.num_layers)
    tensors = {key: tensor.float() for key, tensor in weights.tensors.items() if key in weights.config.shapes}
    drafter = TrainedEagle3(
        config, passes, layers, tensors["norm.weight"], tensors["lm_head.weight"], weights.token_map
    )
    own = drafter.shape(config)
    found = replace(weights.config, layer_ids=layers, max_position_embeddings=own.max_position_embeddings)
    others = [field.name for field in fields(own) if getattr(own, field.name) != getattr(found, field.name)]
    others += ["embed_tokens"] if weights.embedding is not None else []
    if others:
        names = ", ".join(others)
        raise ConfigError(f"an EAGLE-3 drafter with other {names} than manyheads train gives is served, not measured")
    drafter.load_state_dict(tensors)
    return drafter
