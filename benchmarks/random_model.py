"""Models of random weights that no file holds: what their steps cost follows from their shape alone.

    python benchmarks/gpu.py FOLDER OUT.json --random qwen3-30b-a3b --acceptance

The folder gets config.json and the built-in model's tokenizer, for prompts. Weights are made on the device as the
loader asks for them, a layer at a time: 60 GB take seconds, and no disk. Medusa heads are random as well, so that
candidates have to be accepted by chance (by_chance.py). Text is noise, of which each token has experts of its own.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.checkpoint import BUILTIN_FOLDER
from manyheads.models import loader
from manyheads.models.config import ModelConfig
from manyheads.models.registry import parameters, read_config
from manyheads.speculation.medusa import drafter
from manyheads.speculation.medusa.checkpoint import HeadWeights

DEVIATION = 0.02
"""Of the weights, as of initial ones."""
HEADS = 3
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {  # its experts widened, as they are where its own checkpoint is loaded
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "tie_word_embeddings": False,
    },
}
"""What config.json says, as of the published models."""


def write(folder: Path, shape: str) -> None:
    """Write what a folder of such a model holds beside its weights."""
    (folder / "heads").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))
    shutil.copy(BUILTIN_FOLDER / "tokenizer.json", folder)
    (folder / "heads" / "config.json").write_text(json.dumps({"model_type": "medusa"}))


def install(folder: Path, device: torch.device) -> None:
    """Let what this process loads from the folder be random; of other folders, nothing can be loaded any more."""
    config = read_config(folder)
    vars(loader)["tensor_files"] = lambda folder: [folder]
    vars(loader)["read_tensors"] = lambda path, widen: tensors(config, device)
    vars(drafter)["read_heads"] = lambda folder, model: heads(config, device)


def tensors(config: ModelConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor) of a model; those of a layer are made at once."""
    declared = parameters(config)
    by_layer: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in declared.shapes.items():
        part = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
        by_layer.setdefault(part, {})[name] = shape
    for shapes in by_layer.values():
        made = _random(sum(map(math.prod, shapes.values())), config.dtype, device)
        pieces = torch.split(made, [math.prod(shape) for shape in shapes.values()])
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
            yield name, piece.fill_(1.0) if "norm" in name else piece.view(shape)


def heads(config: ModelConfig, device: torch.device) -> HeadWeights:
    """Medusa heads, each with a projection of its own."""
    size, vocabulary = config.hidden_size, config.vocab_size
    blocks = [
        [(_random(size * size, config.dtype, device).view(size, size), _random(size, config.dtype, device))]
        for _ in range(HEADS)
    ]
    projections = [_random(vocabulary * size, config.dtype, device).view(vocabulary, size) for _ in range(HEADS)]
    return HeadWeights(blocks, projections, None, "random", None)


def _random(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=dtype, device=device).normal_(0, DEVIATION)
