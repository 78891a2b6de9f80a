"""gpt-oss's experts in 4 bits: what transformers makes of them, widened as they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from manyheads.config import CheckpointError
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.quantization import mxfp4
from tests.forward import logits
from tests.models.families import reference
from tests.models.test_families import edit

CPU, TOKENS = torch.device("cpu"), torch.arange(20)


def blocks_of(count: int, out: int, into: int) -> tuple[Tensor, Tensor]:
    """Every code, and scales around a quarter."""
    random = torch.Generator().manual_seed(count + out + into)
    blocks = torch.randint(0, 256, (count, out, into // 32, 16), generator=random).to(torch.uint8)
    return blocks, torch.randint(121, 126, (count, out, into // 32), generator=random).to(torch.uint8)


def test_codes_and_scales_are_those_of_transformers() -> None:
    blocks, scales = blocks_of(3, 48, 128)
    scales[0, 0] = torch.tensor([0, 1, 127, 250])
    for dtype in (torch.float32, torch.bfloat16):
        wanted = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # [experts, in, out]
        found = torch.stack([mxfp4.widen(*each, dtype) for each in zip(blocks, scales, strict=True)])
        assert torch.equal(found[:, 1:], wanted.transpose(1, 2)[:, 1:])
        torch.testing.assert_close(found[0, 0], wanted[0, :, 0], rtol=1e-6, atol=1e-37)  # transformers has no 2 ** -128


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    """One whose experts are in 4 bits on disk, with the same ones widened."""
    made = reference("gpt-oss", hidden_size=64, intermediate_size=96)
    made.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if name.endswith("_proj") and ".experts." in name]:
        count, into, out = state.pop(name).shape
        blocks, scales = blocks_of(count, out, into)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        made.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(state, tmp_path / "model.safetensors")
    edit(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return made


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_checkpoint_is_widened_as_it_is_loaded(
    tmp_path: Path, model: PreTrainedModel, quantization: str | None
) -> None:
    loaded = load_model(tmp_path, read_config(tmp_path), torch.float32, CPU, quantization=quantization)
    with torch.inference_mode():
        wanted = model(TOKENS[None]).logits[0]
    found = logits(loaded, TOKENS)
    if quantization is None:
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    else:
        assert not torch.equal(found, wanted)
        assert float(torch.cosine_similarity(found, wanted).mean()) > 0.98


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, tensor: (name, tensor[:, 1:]), "down_proj_blocks has shape"),
        (lambda name, tensor: (name, tensor.float()), "down_proj_blocks is torch.float32, and MXFP4 comes in bytes"),
        (lambda name, tensor: ("model.other", tensor), "key model.other belongs to no parameter"),
        (lambda name, tensor: (name.replace("blocks", "more"), tensor), "down_proj_more belongs to no parameter"),
        (lambda name, tensor: None, "parameter layers.1.mlp.experts.down_proj is missing"),
    ],
)
@pytest.mark.usefixtures("model")
def test_what_does_not_fit_is_named(tmp_path: Path, change: object, message: str) -> None:
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    tensor = state.pop(name)
    changed = change(name, tensor)  # type: ignore[operator]
    if changed is not None:
        state[changed[0]] = changed[1].contiguous()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, read_config(tmp_path), torch.float32, CPU)


@pytest.mark.usefixtures("model")
def test_scales_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.mlp.experts.gate_up_proj_scales"][2, 1] = 255
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.gate_up_proj.* not finite"):
        load_model(tmp_path, read_config(tmp_path), torch.float32, CPU)
