"""The base model as training runs it: transformers' own, over packed rows."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.train.dataset import Batch


def find_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def half_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 arithmetic on a GPU; float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


class Base:
    """A causal language model of transformers.

    Args:
        folder: with config.json and weights; an architecture that `ModelConfig` knows.
        trained: the weights are to change (float32 then); else bfloat16 on a GPU and float32 on a CPU, and fixed.
    """

    def __init__(self, folder: Path, device: torch.device, trained: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
        dtype = torch.bfloat16 if device.type == "cuda" and not trained else torch.float32
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(trained)
        self.device = device

    @property
    def projection(self) -> Tensor:
        """[V, hidden]"""
        weight: Tensor = self.model.lm_head.weight
        return weight

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, [R · L, hidden]."""
        with half_precision(self.device):
            output = self.model.model(
                input_ids=batch.tokens,
                attention_mask=batch.visible,
                position_ids=batch.positions,
                use_cache=False,
            )
        states: Tensor = output.last_hidden_state
        return states.flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] → [N, V]"""
        output: Tensor = self.model.lm_head(hidden)
        return output
