"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel

from tests.models.families import reference
from tests.server.tiny_tokenizer import SPECIALS, TEMPLATE, make_backend

MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA = MODULES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
VOCAB = 400


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """A random model whose columns come in blocks of 32, and in one of 256 for the type that needs it."""
    return reference(name, vocab_size=VOCAB, intermediate_size=256, eos_token_id=4, bos_token_id=0, **changes)


def write(
    path: Path,
    model: PreTrainedModel,
    kinds: dict[str, Kind] | None = None,
    more: dict[str, Any] | None = None,
    extra: dict[str, Tensor] | None = None,
) -> Path:
    """Write a model with the tests' tokenizer.

    Args:
        kinds: types of matrices by their names in the file, without the layer; all others are float32.
        more: keys of the architecture's own beside those that every file has, or instead of them; None leaves one out.
        extra: tensors beside the model's.
    """
    arch = model.config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, arch)
    _write_keys(writer, arch, model, more or {})
    _write_tokenizer(writer)
    for key, tensor in model.state_dict().items():
        at, _, leaf = key.rpartition(".")
        if at == "lm_head" and model.config.tie_word_embeddings:
            continue
        _write_tensor(writer, _name(at, arch), leaf, _arranged(tensor, at, model, arch), kinds or {})
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_keys(writer: gguf.GGUFWriter, arch: str, model: PreTrainedModel, more: dict[str, Any]) -> None:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    epsilon = "layer_norm" if arch == "starcoder2" else "layer_norm_rms"
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        f"attention.{epsilon}_epsilon": float(getattr(config, "rms_norm_eps", 1e-5)),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": VOCAB,
    }
    for key, value in (keys | more).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}.get(type(value))
        if add is not None:
            add(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_array(f"{arch}.{key}", value)


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    backend = make_backend()
    state = json.loads(backend.to_str())
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(4)
    writer.add_chat_template(TEMPLATE)


def _name(at: str, arch: str) -> str:
    if at in TOP:
        return TOP[at]
    _, _, number, module = at.split(".", 3)
    modules = GEMMA if arch.startswith("gemma") else MODULES
    return f"blk.{number}.{modules[module]}"


def _arranged(tensor: Tensor, at: str, model: PreTrainedModel, arch: str) -> Tensor:
    """As the converter has it: Llama's heads with neighbours to turn, and Gemma's norms with their 1."""
    if arch.startswith("gemma") and "norm" in at:
        return tensor + 1
    if arch == "llama" and at.endswith(("q_proj", "k_proj")):
        heads = model.config.num_attention_heads if at.endswith("q_proj") else model.config.num_key_value_heads
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _write_tensor(writer: gguf.GGUFWriter, name: str, leaf: str, tensor: Tensor, kinds: dict[str, Kind]) -> None:
    kind = kinds.get(name.rpartition(".")[2], Kind.F32) if leaf == "weight" else Kind.F32
    values = tensor.detach().float().contiguous().numpy()
    if kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):  # the package only reads them: blocks of anything will do
        data = _random_blocks(values.shape, kind)
    else:
        data = gguf.quants.quantize(values, kind)
    writer.add_tensor(f"{name}.{leaf}", data, raw_dtype=kind)


def _random_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray[Any, Any]:
    """Blocks of 256 numbers with codes as they come, and small scales, which are float16 and at one end of a block."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // size, num_bytes), dtype=np.uint8)
    scale = torch.tensor([0.001], dtype=torch.float16).numpy().view(np.uint8)
    if kind == Kind.Q6_K:
        blocks[..., -2:] = scale
    else:
        blocks[..., :2] = blocks[..., 2:4] = scale
    return blocks.reshape(shape[0], -1)
