"""Checkpoints that are quantized already, written here bit by bit as their formats say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from manyheads.config import CheckpointError, ConfigError
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.quantization.formats import read_format
from tests.forward import logits
from tests.tiny import save_model

State = dict[str, Tensor]
TOKENS = torch.arange(12)
GROUP = 32


def codes(name: str, out: int, into: int, low: int, high: int) -> Tensor:
    return torch.randint(low, high + 1, (out, into), generator=torch.Generator().manual_seed(len(name) + out + into))


def scales(out: int, groups: int) -> Tensor:
    return (0.01 + torch.rand(out, groups, generator=torch.Generator().manual_seed(out + groups)) / 20).half()


def words(nibbles: list[list[int]], bits: int = 4) -> Tensor:
    """[n][32 / bits] numbers of so many bits, the first the lowest → [n] int32."""
    values = [sum(value << (bits * i) for i, value in enumerate(row)) for row in nibbles]
    return torch.tensor([v - 2**32 if v >= 2**31 else v for v in values], dtype=torch.int32)


def along(matrix: Tensor, order: tuple[int, ...] = tuple(range(8)), bits: int = 4) -> Tensor:
    """[n, m] numbers → [n, m · bits / 32] int32; `order` is the column of eight in each place."""
    chunks = matrix.view(-1, 32 // bits).tolist()
    return words([[chunk[i] for i in order] for chunk in chunks], bits).view(len(matrix), -1)


def widen(code: Tensor, zero: Tensor | int, scale: Tensor) -> Tensor:
    """(code − zero) · scale by groups, in float64."""
    size = code.shape[1] // scale.shape[1]
    if isinstance(zero, Tensor):
        zero = zero.double().repeat_interleave(size, 1)
    return (code.double() - zero) * scale.double().repeat_interleave(size, 1)


def weights_config(**weights: Any) -> dict[str, Any]:
    given = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None} | weights
    given |= {"dynamic": False, "actorder": None, "observer": "minmax"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": given, "input_activations": activations}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def int8(strategy: str) -> tuple[dict[str, Any], Callable[..., Any]]:
    def write(name: str, out: int, into: int) -> tuple[State, Tensor]:
        code, scale = codes(name, out, into, -127, 127), scales(out if strategy == "channel" else 1, 1) / 8
        stored = scale if strategy == "channel" else scale[0]
        return {"weight": code.to(torch.int8), "weight_scale": stored}, widen(code, 0, scale.expand(out, 1))

    return weights_config(strategy=strategy), write


def float8(config: dict[str, Any], suffix: str, per_row: bool) -> tuple[dict[str, Any], Callable[..., Any]]:
    def write(name: str, out: int, into: int) -> tuple[State, Tensor]:
        code = codes(name, out, into, -240, 240).float().to(torch.float8_e4m3fn)
        scale = scales(out if per_row else 1, 1).float() / 16
        state = {"weight": code, f"weight_{suffix}": scale if per_row else scale[0, 0], "input_scale": torch.ones(1)}
        return state, widen(code.float(), 0, scale.expand(out, 1))

    return config, write


def packed(symmetric: bool, strategy: str = "group", bits: int = 4) -> tuple[dict[str, Any], Callable[..., Any]]:
    config = weights_config(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=GROUP)
    config["format"] = "pack-quantized"
    config["config_groups"]["group_0"]["input_activations"] = None

    def write(name: str, out: int, into: int) -> tuple[State, Tensor]:
        code = codes(name, out, into, 0, 2**bits - 1)
        scale = scales(out, into // GROUP if strategy == "group" else 1) / (1 if bits == 4 else 16)
        zero: Tensor | int = 2 ** (bits - 1)
        places = tuple(range(32 // bits))
        state = {"weight_packed": along(code, places, bits), "weight_scale": scale.bfloat16()}
        state["weight_shape"] = torch.tensor([out, into])
        if not symmetric:
            zero = codes(name, out, scale.shape[1], 0, 15)
            state["weight_zero_point"] = along(zero.T.contiguous()).T.contiguous()
        return state, widen(code, zero, scale.bfloat16())

    return config, write


def awq(size: int = GROUP) -> tuple[dict[str, Any], Callable[..., Any]]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def write(name: str, out: int, into: int) -> tuple[State, Tensor]:
        groups = into // size if size > 0 else 1
        code, zero, scale = codes(name, out, into, 0, 15), codes(name, out, groups, 0, 15), scales(out, groups)
        state = {"qweight": along(code.T.contiguous(), order), "qzeros": along(zero.T.contiguous(), order)}
        return state | {"scales": scale.T.contiguous()}, widen(code, zero, scale)

    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    return config | {"modules_to_not_convert": ["lm_head"]}, write


def gptq(form: str | None) -> tuple[dict[str, Any], Callable[..., Any]]:
    def write(name: str, out: int, into: int) -> tuple[State, Tensor]:
        groups = into // GROUP
        code, zero, scale = codes(name, out, into, 0, 15), codes(name, out, groups, 1, 15), scales(out, groups)
        state = {
            "qweight": along(code).T.contiguous(),
            "qzeros": along(zero.T.contiguous() - (0 if form == "gptq_v2" else 1)),
            "scales": scale.T.contiguous(),
            "g_idx": torch.arange(into, dtype=torch.int32) // GROUP,
            "bias": torch.zeros(out, dtype=torch.float16),
        }
        return state, widen(code, zero, scale)

    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}
    return config | ({"checkpoint_format": form} if form else {}), write


FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
CT8 = weights_config(type="float", strategy="tensor") | {"format": "float-quantized"}
FORMATS = {
    "int8 by row": int8("channel"),
    "int8 by tensor": int8("tensor"),
    "fp8 by row": float8(weights_config(type="float") | {"format": "float-quantized"}, "scale", True),
    "fp8 by tensor": float8(CT8, "scale", False),
    "plain fp8": float8(FP8, "scale", False),
    "plain fp8, inv": float8(FP8, "scale_inv", False),
    "int4": packed(True),
    "int4 by row": packed(True, "channel"),
    "int4 with zero points": packed(False),
    "int8 packed": packed(True, "channel", 8),
    "awq": awq(),
    "awq by row": awq(-1),
    "gptq": gptq(None),
    "gptq v1": gptq("gptq"),
    "gptq v2": gptq("gptq_v2"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return folder, save_model(folder, hidden=64, intermediate=96)


def configure(folder: Path, config: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))


def write(target: Path, plain: tuple[Path, LlamaForCausalLM], format_: str) -> State:
    """The checkpoint in this format; the state it stands for. lm_head stays plain."""
    target.mkdir()
    (target / "config.json").write_text((plain[0] / "config.json").read_text())
    config, writer = FORMATS[format_]
    configure(target, config)
    stored, meant = {}, {}
    for key, value in load_file(plain[0] / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if not module.endswith("_proj"):
            stored[key] = meant[key] = value
            continue
        parts, meant[key] = writer(module, *value.shape)
        stored |= {f"{module}.{leaf}": tensor for leaf, tensor in parts.items()}
    save_file({key: value.clone() for key, value in stored.items()}, target / "model.safetensors")
    return {key: value.float() for key, value in meant.items()}


def load(folder: Path, quantization: str | None = None) -> Tensor:
    config = read_config(folder)
    model = load_model(folder, config, torch.float32, torch.device("cpu"), None, quantization)
    return logits(model, TOKENS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_is_what_its_format_says(name: str, tmp_path: Path, plain: tuple[Path, LlamaForCausalLM]) -> None:
    meant = write(tmp_path / "model", plain, name)
    reference = LlamaForCausalLM(plain[1].config).eval()
    reference.load_state_dict(meant)
    with torch.inference_mode():
        wanted = reference(TOKENS[None]).logits[0]
    found = load(tmp_path / "model")
    torch.testing.assert_close(found, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)
    scheme = name[:4] if name[:3] == "int" else "fp8" if "fp8" in name else "int4"
    assert torch.equal(load(tmp_path / "model", scheme), found)
    other = "int8" if scheme != "int8" else "fp8"
    with pytest.raises(ConfigError, match=f"quantized already .*, {scheme}\\), and cannot be {other}"):
        load(tmp_path / "model", other)


def test_borrowed_zero_points(tmp_path: Path, plain: tuple[Path, LlamaForCausalLM]) -> None:
    """The format gptq takes 1 off whole words, so that zero points of 0 borrow from the next."""
    folder = plain[0]
    configure(folder, FORMATS["gptq"][0])
    layout = read_format(folder)
    assert layout is not None
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"quantization_config": None})
    )
    zero = torch.tensor([[0, 5, 0, 15, 0, 0, 7, 3]])
    state, _ = FORMATS["gptq"][1]("q", 8, 32)
    state["qzeros"] = along(zero) - 0x11111111
    assert layout.read("q", state, (8, 32)).zero is not None
    assert layout.read("q", state, (8, 32)).zero.T.tolist() == zero.tolist()  # type: ignore[union-attr]


KEY = "model.layers.1.mlp.down_proj"


def drop(leaf: str) -> Callable[[State], Any]:
    return lambda state: state.pop(f"{KEY}.{leaf}")


def put(leaf: str, value: Tensor) -> Callable[[State], None]:
    return lambda state: state.update({f"{KEY}.{leaf}": value})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("int8 by row", drop("weight_scale"), r"down_proj.weight_scale is missing"),
        ("int8 by row", drop("weight"), r"down_proj.weight is missing"),
        ("int8 by row", put("weight_scale", torch.ones(63, 1)), r"weight_scale is float32 \(63, 1\), not"),
        (
            "int8 by row",
            put("weight_scale", torch.full((64, 1), torch.nan)),
            "weight_scale holds values that are not f",
        ),
        (
            "int8 by row",
            put("weight", torch.zeros(64, 64, dtype=torch.int8)),
            r"weight is int8 \(64, 64\), not int8 \(64, 96\)",
        ),
        (
            "int8 by row",
            put("weight_zero", torch.ones(64)),
            "key model.layers.1.mlp.down_proj.weight_zero belongs to no",
        ),
        ("int8 by row", put("bias", torch.ones(64)), "key model.layers.1.mlp.down_proj.bias belongs to no"),
        ("plain fp8", put("weight_scale_inv", torch.ones(1)), "both weight_scale and weight_scale_inv"),
        ("plain fp8", put("weight", torch.zeros(64, 96, dtype=torch.int8)), "weight is int8 .*, not float8_e4m3fn"),
        ("plain fp8", put("weight", torch.full((64, 96), torch.nan).to(torch.float8_e4m3fn)), "not finite"),
        ("int4", put("weight_shape", torch.tensor([64, 95])), r"weight_shape says \[64, 95\], not \[64, 96\]"),
        ("int4", put("weight", torch.zeros(64, 96)), "a weight that is quantized and one that is not"),
        ("int4 with zero points", drop("weight_zero_point"), "weight_zero_point is missing"),
        ("awq", drop("qzeros"), "qzeros is missing"),
        ("awq", put("qweight", torch.zeros(96, 8)), r"qweight is float32 \(96, 8\), not int32 \(96, 8\)"),
        ("gptq", put("g_idx", torch.arange(96, dtype=torch.int32).flip(0) // 32), "g_idx: .*desc_act=false"),
        ("gptq", put("bias", torch.ones(64)), "key model.layers.1.mlp.down_proj.bias belongs to no"),
    ],
)
def test_tensors_that_do_not_fit(
    name: str, change: Callable[[State], None], message: str, tmp_path: Path, plain: tuple[Path, LlamaForCausalLM]
) -> None:
    folder = tmp_path / "model"
    write(folder, plain, name)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_projections_that_are_not_quantized_alike(tmp_path: Path, plain: tuple[Path, LlamaForCausalLM]) -> None:
    folder = tmp_path / "model"
    write(folder, plain, "int4")
    state = load_file(folder / "model.safetensors")
    module = "model.layers.0.self_attn.k_proj"
    state = {key: value for key, value in state.items() if not key.startswith(module)}
    save_file(state | {f"{module}.weight": torch.zeros(16, 64)}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"self_attn.q_proj, k_proj, v_proj do not go together: some are quantized"
    ):
        load(folder)


def group(**weights: Any) -> dict[str, Any]:
    return weights_config(**weights)["config_groups"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "aqlm"},
            "quant_method 'aqlm' is not supported; supported are compressed-tensors, fp8, awq, gptq",
        ),
        (["awq"], "must be an object"),
        (FP8 | {"weight_block_size": [128, 128]}, "scale per block"),
        (FP8 | {"activation_scheme": "magic"}, "activation_scheme='magic'.*supported: 'dynamic', 'static'"),
        (awq()[0] | {"bits": 3}, "bits=3 .*supported: 4"),
        (awq()[0] | {"version": "gemv"}, "version='gemv' .*supported: 'gemm'"),
        (awq()[0] | {"zero_point": False}, "zero_point=False"),
        (awq()[0] | {"group_size": 0}, "group_size=0"),
        (gptq(None)[0] | {"bits": 8}, "bits=8 .*supported: 4"),
        (gptq(None)[0] | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' .*supported: 'gptq', 'gptq_v2'"),
        (gptq(None)[0] | {"dynamic": {"-:lm_head": {}}}, "dynamic="),
        (weights_config() | {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized'"),
        (weights_config() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
        (weights_config() | {"config_groups": group() | {"b": {}}}, "must be one group, not 2"),
        (weights_config() | {"config_groups": {"a": {"targets": ["re:.*mlp.*"]}}}, "targets="),
        (weights_config() | {"config_groups": {"a": {"targets": ["Linear"]}}}, "say nothing of weights"),
        (weights_config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format='sparse-24-bitmask'"),
        (weights_config(num_bits=4), "num_bits=4 .*supported: 8"),
        (weights_config(symmetric=False), "symmetric=False"),
        (weights_config(strategy="block"), "strategy='block' .*supported: 'tensor', 'channel'"),
        (weights_config(type="float"), "type='float' .*supported: 'int'"),
        (weights_config(num_bits=3) | {"format": "pack-quantized"}, "num_bits=3 .*supported: 4, 8"),
        (weights_config(num_bits=4, strategy="group", group_size=0) | {"format": "pack-quantized"}, "group_size=0"),
    ],
)
def test_configurations_that_are_not_supported(
    config: Any, message: str, tmp_path: Path, plain: tuple[Path, LlamaForCausalLM]
) -> None:
    (tmp_path / "config.json").write_text((plain[0] / "config.json").read_text())
    configure(tmp_path, config)
    with pytest.raises(ConfigError, match=message):
        read_format(tmp_path)
