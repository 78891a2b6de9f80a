"""The base model as training runs it: transformers' own, over packed rows."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.checkpoint import is_gguf, read_tensors, tensor_files
from manyheads.models.registry import read_config
from manyheads.train.attention import register
from manyheads.train.dataset import Batch


def find_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def half_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 arithmetic on a GPU; float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what a GPU is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Base:
    """A causal language model of transformers, its weights on the device.

    Args:
        model: made with the attention of attention.py.
        trained: the weights are to change.
    """

    def __init__(self, model: Any, device: torch.device, trained: bool = False) -> None:
        self.model = model.eval().requires_grad_(trained)
        self.device, self.trained = device, trained

    @classmethod
    def load(cls, folder: Path, device: torch.device, trained: bool = False) -> Base:
        """Read a checkpoint with config.json and weights, of an architecture that `ModelConfig` knows.

        Args:
            trained: the weights are to change (float32 then); else they are as they are served: on a GPU the
                checkpoint's own, bfloat16 for float32, and on a CPU float32.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        dtype = torch.float32
        if device.type == "cuda" and not trained:
            own = read_config(folder).dtype
            dtype = torch.bfloat16 if own == torch.float32 else own
        name, shown = register(), logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # --quiet would not reach it
        try:
            if is_gguf(folder):
                model: Any = _of_gguf(folder, name)
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    folder, attn_implementation=name, local_files_only=True, trust_remote_code=False
                )
        finally:
            if shown:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        return cls(model.to(device=device, dtype=dtype), device, trained)

    @property
    def projection(self) -> Tensor:
        """The vocabulary projection's weight, [V, hidden]."""
        weight: Tensor = self.model.lm_head.weight
        return weight

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, [R · L, hidden], of a batch on the CPU."""
        bounds = batch.bounds
        on_device, longest = send(bounds, self.device), int(bounds.diff().max())
        with half_precision(self.device) if self.trained else contextlib.nullcontext():
            output = self.model.model(
                input_ids=send(batch.tokens, self.device),
                position_ids=send(batch.positions, self.device),
                use_cache=False,
                cu_seq_lens_q=on_device,
                cu_seq_lens_k=on_device,
                max_length_q=longest,
                max_length_k=longest,
            )
        states: Tensor = output.last_hidden_state
        return states.flatten(0, 1)

    def hidden_and_inputs(self, batch: Batch, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What `hidden` gives, and what enters these layers, side by side: [R · L, layers · hidden].

        Layer n, of n, is the final norm.
        """
        inputs: dict[int, Tensor] = {}

        def keep(i: int, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs[i] = (args[0] if args else named["hidden_states"]).flatten(0, 1)

        stages = [*self.model.model.layers, self.model.model.norm]
        hooks = [
            stages[i].register_forward_pre_hook(lambda _, args, named, i=i: keep(i, args, named), with_kwargs=True)
            for i in set(layers)
        ]
        try:
            hidden = self.hidden(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return hidden, torch.cat([inputs[i] for i in layers], dim=-1)

    def embed(self, tokens: Tensor) -> Tensor:
        """[N] int64 → [N, hidden]."""
        output: Tensor = self.model.model.embed_tokens(tokens)
        return output

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary embedding at positions [N] int64, [N, 1, head_dim] float32."""
        like = torch.empty(0, device=positions.device)
        cos, sin = self.model.model.rotary_emb(like, positions[None])
        return cos[0, :, None], sin[0, :, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """What the vocabulary projection makes of hidden states: [N, hidden] → [N, V]."""
        output: Tensor = self.model.lm_head(hidden)
        return output


def _of_gguf(folder: Path, attention: str) -> Any:
    """Transformers' model of a GGUF file's numbers, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    vars(config).pop("quantization_config", None)  # all of it is widened
    config.dtype = torch.float32
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)  # type: ignore[no-untyped-call]
    state = {key: tensor for path in tensor_files(folder) for key, tensor in read_tensors(path, widen=True)}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model
