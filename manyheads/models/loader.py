"""Checkpoint → model: strict, tensor by tensor, straight to the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from manyheads.checkpoint import read_tensors, tensor_files
from manyheads.config import CheckpointError, ConfigError
from manyheads.models.config import ModelConfig
from manyheads.models.linear import Linear
from manyheads.models.llama import Layer, Llama
from manyheads.quantization.formats import read_format
from manyheads.quantization.scheme import Weight, compress, compress_vocabulary, join

IGNORED_ENDINGS = (".rotary_emb.inv_freq",)
"""Buffers that some exports store and nobody needs."""
IGNORED_PREFIXES = ("medusa_head.",)
"""Medusa heads in a full-model file; speculation/medusa/checkpoint.py reads them."""


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str], None] | None = None,
    quantization: str | None = None,
) -> Llama:
    """Read the base model of a checkpoint: every parameter is filled, every key is used.

    Args:
        quantization: one of `config.QUANTIZATIONS` rounds the weights of linear layers one by one as they come, so that
            they are never all in memory in full; None leaves them as they come, quantized or not.

    Raises:
        CheckpointError: naming the key that is missing, left over, of the wrong shape, or not finite.
        ConfigError: the checkpoint is quantized in a way that is not supported, or in another than `quantization`.
    """
    expected = parameter_shapes(config)
    layout = read_format(folder)
    if layout is not None and quantization not in (None, layout.scheme):
        raise ConfigError(
            f"{folder} is quantized already ({layout.name}, {layout.scheme}), and cannot be {quantization}; "
            "leave quantization out"
        )
    state: dict[str, Weight] = {}
    parts: dict[str, dict[str, Tensor]] = {}  # of weights that are quantized in the checkpoint
    files = tensor_files(folder)
    for number, path in enumerate(files, 1):
        if progress and len(files) > 1:
            progress(f"loading {folder.name}: file {number} of {len(files)}")
        for key, tensor in read_tensors(path):
            if key.endswith(IGNORED_ENDINGS) or key.startswith(IGNORED_PREFIXES):
                continue
            name = key.removeprefix("model.")
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            module, _, leaf = name.rpartition(".")
            shape = expected.get(name)
            if layout is not None and _is_linear(f"{module}.weight", expected):
                if layout.holds(leaf, tensor):
                    parts.setdefault(module, {})[leaf] = tensor.to(device)
                    continue
                if leaf == "bias" and shape is None and not tensor.any():
                    continue  # AutoGPTQ gives every module a bias
            if shape is None:
                raise CheckpointError(f"{path}: key {key} belongs to no parameter of a {config.architecture}")
            if tuple(tensor.shape) != shape:
                raise CheckpointError(f"{path}: {key} has shape {tuple(tensor.shape)}, not {shape}")
            value = tensor.to(device, dtype)
            # summed on the device, where a large checkpoint takes no time
            if not torch.isfinite(value.sum(dtype=torch.float64 if device.type == "cpu" else torch.float32)):
                raise CheckpointError(f"{path}: {key} holds values that are not finite")
            state[name] = value
            if layout is None and _is_linear(name, expected):
                state[name] = (compress_vocabulary if module == "lm_head" else compress)(value, quantization)
    for module in list(parts):
        assert layout is not None
        name = f"{module}.weight"
        if name in state:
            raise CheckpointError(f"{folder}: {module} has a weight that is quantized and one that is not")
        state[name] = layout.read(f"{folder}: {module}", parts.pop(module), expected[name])
    missing = expected.keys() - state.keys()
    if missing:
        raise CheckpointError(f"{folder}: parameter {min(missing)} is missing ({len(missing)} in all)")
    return _build(config, state, dtype, folder, None if layout else quantization)


def _is_linear(name: str, expected: dict[str, tuple[int, ...]]) -> bool:
    """Whether a parameter is the weight of a linear layer: two dimensions, and not the embedding."""
    return len(expected.get(name, ())) == 2 and name != "embed_tokens.weight"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name, without the leading `model.`, and its shape."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * dim, config.num_kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, hidden), "norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        for name, out, into, bias in (
            ("self_attn.q_proj", q, hidden, config.qkv_bias),
            ("self_attn.k_proj", kv, hidden, config.qkv_bias),
            ("self_attn.v_proj", kv, hidden, config.qkv_bias),
            ("self_attn.o_proj", hidden, q, config.o_bias),
            ("mlp.gate_proj", inner, hidden, config.mlp_bias),
            ("mlp.up_proj", inner, hidden, config.mlp_bias),
            ("mlp.down_proj", hidden, inner, config.mlp_bias),
        ):
            layer[f"{name}.weight"] = (out, into)
            if bias:
                layer[f"{name}.bias"] = (out,)
        if config.qk_norm:
            layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _build(
    config: ModelConfig, state: dict[str, Weight], dtype: torch.dtype, folder: Path, quantization: str | None
) -> Llama:
    def tensor(name: str) -> Tensor:
        value = state.pop(name)
        assert isinstance(value, Tensor)
        return value

    def linear(prefix: str, *names: str) -> Linear:
        """One product for projections that read the same input; the parts are let go as they are joined."""
        weights = [state.pop(f"{prefix}{name}.weight") for name in names]
        biases = [tensor(f"{prefix}{name}.bias") for name in names if f"{prefix}{name}.bias" in state]
        try:
            weight = join(weights)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {prefix}{', '.join(names)} do not go together: {error}") from error
        weights.clear()
        return Linear(weight, torch.cat(biases) if biases else None, dtype)

    layers = []
    for i in range(config.num_layers):
        at = f"layers.{i}."
        layers.append(
            Layer(
                input_norm=tensor(f"{at}input_layernorm.weight"),
                qkv=linear(at + "self_attn.", "q_proj", "k_proj", "v_proj"),
                q_norm=tensor(f"{at}self_attn.q_norm.weight") if config.qk_norm else None,
                k_norm=tensor(f"{at}self_attn.k_norm.weight") if config.qk_norm else None,
                o=linear(at + "self_attn.", "o_proj"),
                post_norm=tensor(f"{at}post_attention_layernorm.weight"),
                gate_up=linear(at + "mlp.", "gate_proj", "up_proj"),
                down=linear(at + "mlp.", "down_proj"),
            )
        )
    embedding = tensor("embed_tokens.weight")
    vocabulary = state.pop("lm_head.weight", None)
    if vocabulary is None:  # tied
        vocabulary = compress_vocabulary(embedding, quantization)
    return Llama(config, embedding, layers, tensor("norm.weight"), Linear(vocabulary, None, dtype))
