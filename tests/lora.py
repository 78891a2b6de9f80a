"""Random adapters in peft's format, and what they make of a model: W + scale · B A, as peft merges them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

PREFIX = "base_model.model."
M = TypeVar("M", bound=PreTrainedModel)


def save_adapter(
    folder: Path,
    model: PreTrainedModel,
    targets: tuple[str, ...] | None = None,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    ranks: dict[str, int] | None = None,
    **settings: Any,
) -> None:
    """Write an adapter that changes what a model says.

    Args:
        targets: modules of the layers; None takes all but what routes tokens to experts.
        ranks: of modules, where they are others.
        settings: keys of adapter_config.json beside those above.
    """
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        target = name.rpartition(".")[2]
        is_projection = isinstance(module, nn.Linear) and name.startswith("model.layers.") and target != "gate"
        if is_projection and (targets is None or target in targets):
            r, (outputs, inputs) = (ranks or {}).get(target, rank), module.weight.shape
            state[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, inputs, generator=random) / inputs**0.5
            state[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(outputs, r, generator=random) / 2
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets) if targets else "all-linear",
    }
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))


def change_config(folder: Path, **changes: Any) -> None:
    """Change keys of an adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def merged(model: M, folder: Path) -> M:
    """The model with an adapter in its weights, by `lora_alpha`, `alpha_pattern` and `use_rslora`."""
    model = copy.deepcopy(model)
    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    with torch.no_grad():
        for key in (key for key in state if key.endswith("lora_A.weight")):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a, b = state[key], state[key.replace("lora_A", "lora_B")]
            alpha = config.get("alpha_pattern", {}).get(name.rpartition(".")[2], config["lora_alpha"])
            scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
            modules[name].weight += scale * b @ a
    return model
