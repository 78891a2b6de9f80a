"""The families of models that are served."""

from __future__ import annotations

from pathlib import Path

from manyheads.checkpoint import read_json
from manyheads.config import ConfigError
from manyheads.models.config import ModelConfig
from manyheads.models.families.cohere import COHERE2
from manyheads.models.families.gemma import GEMMA2, GEMMA3
from manyheads.models.families.glm import GLM4
from manyheads.models.families.gpt_oss import GPT_OSS
from manyheads.models.families.granite import GRANITE
from manyheads.models.families.llama import LLAMA, MISTRAL
from manyheads.models.families.moe import MIXTRAL, QWEN3_MOE
from manyheads.models.families.olmo import OLMO2
from manyheads.models.families.phi import PHI3
from manyheads.models.families.qwen import QWEN2, QWEN3
from manyheads.models.families.seed import SEED_OSS
from manyheads.models.families.smollm import SMOLLM3
from manyheads.models.families.starcoder import STARCODER2
from manyheads.models.keys import Keys
from manyheads.models.parameters import Parameters

_RECORDS = (
    LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3, GRANITE, OLMO2, SMOLLM3, GLM4, COHERE2, STARCODER2,
    MIXTRAL, QWEN3_MOE, GPT_OSS, SEED_OSS,
)  # fmt: skip
FAMILIES = {family.architecture: family for family in _RECORDS}


def read_config(folder: Path) -> ModelConfig:
    """Read a checkpoint's config.json and generation_config.json.

    Raises:
        ConfigError: naming the file and the key that is missing or not supported.
    """
    path = folder / "config.json"
    raw = read_json(path)
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture not in FAMILIES:
        raise ConfigError(f"{path}: architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[architecture]
    if (model_type := raw.get("model_type", family.model_type)) != family.model_type:
        raise ConfigError(f"{path}: model_type {model_type!r} is not that of a {architecture}, {family.model_type!r}")
    keys = Keys(raw, path, family.keys)
    config = family.read(keys, folder)
    keys.check_all_read()
    return config


def parameters(config: ModelConfig) -> Parameters:
    """What a checkpoint of a model holds."""
    return FAMILIES[config.architecture].parameters(config)


def shared(config: ModelConfig, num_ranks: int) -> ModelConfig:
    """The configuration of one of so many ranks. Raises ConfigError: the model cannot be shared so."""
    if num_ranks > 1 and not FAMILIES[config.architecture].can_be_shared:
        raise ConfigError(f"tensor_parallel_size={num_ranks}: a {config.architecture} cannot be shared among ranks")
    return config.shared(num_ranks)
