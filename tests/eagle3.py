"""Tiny random EAGLE-3 drafters on disk, and a slow, plain reference for what they compute."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from manyheads.models.config import ModelConfig
from manyheads.models.registry import read_config
from manyheads.speculation.eagle3.checkpoint import Eagle3Config, Eagle3Weights, read_drafter

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def make_drafter(
    folder: Path,
    base: ModelConfig,
    *,
    seed: int = 0,
    draft_vocab: int | None = None,
    format: str = "safeailab",
    pickled: bool = False,
    embedding: Tensor | str | None = None,
    layer_ids: Sequence[int] | None = None,
    base_name: str | None = None,
    **changes: Any,
) -> Eagle3Weights:
    """Write a drafter with random weights, the same ones every time, and read it.

    Args:
        draft_vocab: tokens that it can guess, drawn from the base's; None takes all.
        format: `safeailab`, `specforge` or `speculators`, as their own programs write them.
        pickled: `pytorch_model.bin` in place of `model.safetensors`.
        embedding: to go with the drafter; `random` makes one; None leaves it out.
        layer_ids: the base's layers whose inputs are read; None takes the defaults, or, where the base has fewer than
            seven layers and these do not exist, three others, which config.json names then.
        base_name: to be named as the base.
        changes: of other fields of `Eagle3Config`.
    """
    if layer_ids is None and base.num_layers < 7:
        layer_ids = (0, base.num_layers // 2, base.num_layers)
    config = drafter_config(base, draft_vocab=draft_vocab, layer_ids=layer_ids, **changes)
    state = random_state(config, seed)
    if isinstance(embedding, Tensor):
        state["embed_tokens.weight"] = embedding.clone()
    elif embedding is not None:
        state["embed_tokens.weight"] = torch.randn(base.vocab_size, config.hidden_size, generator=_random(seed + 1))
    write_state(folder, state, raw_config(config, format, base_name), format, pickled)
    return read_drafter(folder, base)


def drafter_of(folder: Path, kind: str) -> Path:
    """The folder of a drafter of a kind for the model that `tests.tiny.save_model` wrote to a folder."""
    if kind == "medusa":
        return folder / "heads"
    drafter = folder.parent / f"{folder.name}-drafter"
    if not drafter.exists():
        make_drafter(drafter, read_config(folder))
    return drafter


def drafter_config(
    base: ModelConfig, draft_vocab: int | None = None, layer_ids: Sequence[int] | None = None, **changes: Any
) -> Eagle3Config:
    """The shape of a drafter for a base: as wide as the base, with heads like the base's."""
    rope = base.ropes[0]
    shape: dict[str, Any] = {
        "hidden_size": base.hidden_size,
        "target_hidden_size": base.hidden_size,
        "intermediate_size": base.intermediate_size,
        "num_heads": base.num_heads,
        "num_kv_heads": base.num_kv_heads,
        "head_dim": base.head_dim,
        "vocab_size": base.vocab_size,
        "draft_vocab_size": draft_vocab or base.vocab_size,
        "rms_norm_eps": base.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "max_position_embeddings": base.max_position_embeddings,
        "layer_ids": None if layer_ids is None else tuple(layer_ids),
    }
    return Eagle3Config(**(shape | changes))


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_state(config: Eagle3Config, seed: int) -> dict[str, Tensor]:
    """All tensors of a drafter: products keep the size of what goes in, norms are near one."""
    generator, state = _random(seed), {}
    for name, shape in config.shapes.items():
        noise = torch.randn(shape, generator=generator)
        state[name] = 1 + noise / 4 if len(shape) == 1 else noise / math.sqrt(shape[1])
    if config.draft_vocab_size < config.vocab_size:
        tokens = torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
        state["d2t"] = tokens - torch.arange(len(tokens))
        state["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, tokens, True)
    return state


def raw_config(config: Eagle3Config, format: str, base_name: str | None = None) -> dict[str, Any]:
    """config.json as the format's own program writes it."""
    layer: dict[str, Any] = {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "bos_token_id": 1,
        "initializer_range": 0.02,
    }
    if scaling := config.rope_scaling:
        layer["rope_scaling"] = {key: value for key, value in vars(scaling).items() if key != "kind"}
        layer["rope_scaling"]["rope_type"] = scaling.kind
    own: dict[str, Any] = {
        "draft_vocab_size": config.draft_vocab_size,
        **{name: True for name in ("norm_before_residual", "norm_before_fc", "fc_norm") if getattr(config, name)},
        **({"norm_output": True} if config.norm_output else {}),
    }
    if config.target_hidden_size != config.hidden_size:
        own["target_hidden_size"] = config.target_hidden_size
    if format == "speculators":
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.3.0",
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
                "verifier": {"name_or_path": base_name, "architectures": ["LlamaForCausalLM"]},
            },
            "transformer_layer_config": layer,
            "norm_before_residual": False,
            "target_hidden_size": None,
            LAYER_IDS: None if config.layer_ids is None else list(config.layer_ids),
            **own,
        }
    architecture = "LlamaForCausalLMEagle3" if format == "specforge" else "LlamaForCausalLM"
    result = {"architectures": [architecture], **layer, **own, "tie_word_embeddings": False}
    if config.layer_ids is not None and format == "specforge" and config.layer_ids[0] > 0:
        result["eagle_config"] = {"use_aux_hidden_state": True, LAYER_IDS: [i - 1 for i in config.layer_ids]}
    elif config.layer_ids is not None:
        result[LAYER_IDS] = list(config.layer_ids)  # the field that vLLM reads
    if base_name is not None:
        result["base_model_name_or_path"] = base_name
    return result


def write_state(
    folder: Path, state: dict[str, Tensor], raw: dict[str, Any], format: str = "safeailab", pickled: bool = False
) -> Path:
    """Write config.json and the weights, of which speculators names some otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    if format == "speculators":
        state = {key.replace("midlayer.", "layers.0."): tensor for key, tensor in state.items()}
    (folder / "config.json").write_text(json.dumps(raw))
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return folder


class ReferenceEagle3:
    """What a drafter computes, in float32, for one sequence and without a cache (SafeAILab's cnets.py, `Model.forward`;
    the switches as in vLLM 0.26, llama_eagle3.py).

    Position t of a sequence pairs the feature of the base's position t with the embedding of token t + 1.

    Args:
        embedding: the base's, [V, hidden]; the drafter's own goes before it.
    """

    def __init__(self, weights: Eagle3Weights, embedding: Tensor) -> None:
        self.config, self.token_map = weights.config, weights.token_map
        self.weights = {name: tensor.float() for name, tensor in weights.tensors.items() if tensor.is_floating_point()}
        self.embedding = (embedding if weights.embedding is None else weights.embedding).float()

    def features(self, states: Tensor) -> Tensor:
        """[T, 3 · base's hidden], three of the base's hidden states side by side → [T, hidden]."""
        x = states.float()
        if self.config.norm_before_fc:
            x = self._norm(x, "input_norm")
        if self.config.fc_norm:
            x = torch.cat([self._norm(part, f"fc_norm.{i}") for i, part in enumerate(x.chunk(3, dim=-1))], dim=-1)
        return self._product(x, "fc")

    def outputs(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over a whole sequence, each position after all before it.

        Args:
            features: [T, hidden], of positions 0 … T − 1.
            tokens: [T], the tokens that follow them: those of positions 1 … T.

        Returns:
            [T, hidden], the features of the next pass, and [T, V], logits in the base's vocabulary of the tokens of
            positions 2 … T + 1; those that the drafter cannot guess have −∞.
        """
        hidden = self._norm(features.float(), "midlayer.hidden_norm")
        x = torch.cat([self._norm(self.embedding[tokens], "midlayer.input_layernorm"), hidden], dim=-1)
        residual = (hidden if self.config.norm_before_residual else features) + self._attention(x)
        x = self._norm(residual, "midlayer.post_attention_layernorm")
        gate, up = self._product(x, "midlayer.mlp.gate_proj"), self._product(x, "midlayer.mlp.up_proj")
        out = residual + self._product(F.silu(gate) * up, "midlayer.mlp.down_proj")
        normed = self._norm(out, "norm")
        logits = self._product(normed, "lm_head")
        if self.token_map is not None:
            whole = logits.new_full((len(logits), self.config.vocab_size), -math.inf)
            logits = whole.index_copy_(1, self.token_map, logits)
        return (normed if self.config.norm_output else out), logits

    def after(self, states: Tensor, tokens: Tensor, path: Sequence[int] = ()) -> Tensor:
        """Logits [V] of the token that follows a sequence and a path of drafted tokens.

        Args:
            states: [T, 3 · base's hidden], of positions 0 … T − 1, from the base.
            tokens: [T], of positions 1 … T; the last one is the last that is known.
            path: drafted tokens after it. They have no feature from the base: each takes the drafter's own output at
                the position before it.
        """
        features = self.features(states)
        out, logits = self.outputs(features, tokens)
        for token in path:
            features = torch.cat([features, out[-1:]])
            tokens = torch.cat([tokens, torch.tensor([token])])
            out, logits = self.outputs(features, tokens)
        return logits[-1]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def _product(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _attention(self, x: Tensor) -> Tensor:
        config, at = self.config, "midlayer.self_attn."
        q, k, v = (self._product(x, f"{at}{name}_proj").view(len(x), -1, config.head_dim) for name in "qkv")
        if config.qk_norm:
            q, k = self._norm(q, f"{at}q_norm"), self._norm(k, f"{at}k_norm")
        q, k = self._rotated(q), self._rotated(k)
        groups = config.num_heads // config.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(config.head_dim)
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        y = torch.einsum("hts,shd->thd", scores.softmax(dim=-1), v)
        return self._product(y.flatten(1), f"{at}o_proj")

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary embedding of [T, heads, head_dim], position by position."""
        angle = torch.arange(len(x)).float()[:, None, None] * self._frequencies()
        first, second = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _frequencies(self) -> Tensor:
        dim, scaling = self.config.head_dim, self.config.rope_scaling
        frequency = self.config.rope_theta ** -(torch.arange(0, dim, 2).float() / dim)
        if scaling is None:
            return frequency
        if scaling.kind == "linear":
            return frequency / scaling.factor
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)  # llama3
        kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / scaling.factor)
