"""Models of random weights that no file holds: what their steps cost follows from their shape alone.

    python benchmarks/gpu.py FOLDER OUT.json --random qwen3-30b-a3b --acceptance
    python benchmarks/gpu.py FOLDER OUT.json --random llama-3.1-70b --acceptance --quantization fp8 \\
        --tensor-parallel-size 2

The folder gets config.json and the built-in model's tokenizer, for prompts. Weights are made on the device as the
loader asks for them, a tensor at a time: 60 GB take seconds, and no disk; of what the loader rounds or shares with
other ranks, no more than a tensor is there in full. Each rank makes all of them, the same ones, and keeps its part.
Medusa heads are random as well, so that candidates have to be accepted by chance (by_chance.py). Text is noise, of
which each token has experts of its own.
"""

from __future__ import annotations

import json
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
LLAMA_3_1: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA_3_1
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3.1-70b": LLAMA_3_1
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
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


def install(folder: Path) -> None:
    """Let what this process loads from the folder be random; of other folders, nothing can be loaded any more.

    It is made on the current GPU, which a rank chooses before it loads anything; or on the CPU.
    """
    config = read_config(folder)
    vars(loader)["tensor_files"] = lambda folder: [folder]
    vars(loader)["read_tensors"] = lambda path, widen: tensors(config)
    vars(drafter)["read_heads"] = lambda folder, model: heads(config)


def tensors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor) of a model, the same ones every time."""
    made = _Random(config.dtype, 0)
    for name, shape in parameters(config).shapes.items():
        # NOTE: each in memory of its own, since the loader keeps some as they are, and only parts of others
        yield name, torch.ones(shape, dtype=made.dtype, device=made.device) if "norm" in name else made(*shape)


def heads(config: ModelConfig) -> HeadWeights:
    """Medusa heads, each with a projection of its own; on the host, as those of a file."""
    made = _Random(config.dtype, 1)
    size, vocabulary = config.hidden_size, config.vocab_size
    blocks = [[(made(size, size).cpu(), made(size).cpu())] for _ in range(HEADS)]
    projections = [made(vocabulary, size).cpu() for _ in range(HEADS)]
    return HeadWeights(blocks, projections, None, "random", None)


class _Random:
    """Makes tensors."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.device = dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        return made.normal_(0, DEVIATION, generator=self._generator)
