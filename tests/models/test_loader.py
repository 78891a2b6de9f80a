from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from manyheads.checkpoint import BUILTIN_FOLDER, read_tensors, resolve, tensor_files
from manyheads.config import BUILTIN, CheckpointError, ConfigError
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from tests.forward import logits

torch.set_num_threads(1)

State = dict[str, Tensor]
TOKENS = torch.arange(12)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **options: Any) -> Tensor:
    """The logits of what was loaded."""
    config = read_config(folder)
    loaded = load_model(folder, config, torch.float32, torch.device("cpu"), **options)
    return logits(loaded, TOKENS)


def check(found: Tensor, model: PreTrainedModel) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(found, model(TOKENS[None]).logits[0], atol=1e-4, rtol=1e-4)


def rewrite(folder: Path, change: Callable[[State], None]) -> Path:
    """The checkpoint with its tensors changed; the file."""
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    return file


def pickled(folder: Path, num_shards: int) -> None:
    """The same checkpoint as .bin files."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if num_shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for i in range(num_shards):
        name = f"pytorch_model-{i + 1:05}-of-{num_shards:05}.bin"
        part = {key: state[key] for key in sorted(state)[i::num_shards]}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert num_files > 1
    lines: list[str] = []
    check(load(tmp_path, progress=lines.append), model)
    assert len(lines) == num_files
    assert lines[-1].endswith(f"file {num_files} of {num_files}")


@pytest.mark.parametrize("num_shards", [1, 3])
def test_pickles(folder: Path, model: PreTrainedModel, num_shards: int) -> None:
    pickled(folder, num_shards)
    assert len(tensor_files(folder)) == num_shards
    check(load(folder), model)


def test_safetensors_come_before_pickles(folder: Path, model: PreTrainedModel) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    check(load(folder), model)


def test_what_nobody_needs_is_passed_over(folder: Path, model: PreTrainedModel) -> None:
    def change(state: State) -> None:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        state["medusa_head.0.0.linear.weight"] = torch.zeros(16, 16)

    rewrite(folder, change)
    check(load(folder), model)


def test_a_tied_head_that_was_saved_all_the_same_is_passed_over(tmp_path: Path, model: PreTrainedModel) -> None:
    tied = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"tie_word_embeddings": True})).eval()
    tied.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state.update({"lm_head.weight": torch.zeros(61, 16)}))
    check(load(tmp_path), tied)


KEY = "model.layers.1.self_attn.k_proj.weight"


def drop(state: State) -> None:
    del state[KEY]
    del state["model.norm.weight"]


def poison(value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[KEY][3, 3] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"parameter layers.1.self_attn.k_proj.weight is missing \(2 in all\)"),
        (lambda state: state.pop("lm_head.weight"), "parameter lm_head.weight is missing"),
        (lambda state: state.update({KEY: torch.zeros(8, 17)}), rf"{KEY} has shape \(8, 17\), not \(8, 16\)"),
        (lambda state: state.update({KEY: torch.zeros(16, 16)}), rf"{KEY} has shape \(16, 16\), not \(8, 16\)"),
        (lambda state: state.update({KEY: torch.zeros(8 * 16)}), rf"{KEY} has shape \(128,\)"),
        (
            lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}),
            "key model.layers.0.self_attn.q_proj.bias belongs to no parameter of a LlamaForCausalLM",
        ),
        (
            lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16)}),
            "layers.2.* to no par",
        ),
        (poison(float("nan")), f"{KEY} holds values that are not finite"),
        (poison(float("-inf")), f"{KEY} holds values that are not finite"),
    ],
    ids=["missing", "no head", "wide", "full heads", "flat", "unknown bias", "layer too many", "nan", "inf"],
)
def test_what_is_wrong_is_named(folder: Path, change: Callable[[State], None], message: str) -> None:
    file = rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(file if "missing" not in message else folder) in str(caught.value)


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def garble_header(raw: bytes) -> bytes:
    return raw[:20] + b"\x00\xff" + raw[22:]


@pytest.mark.parametrize(
    "damage",
    [cut, garble_header, lambda raw: raw + b"tail", lambda raw: raw[:4], lambda raw: b"", lambda raw: b"\xff" * 64],
    ids=["cut", "header", "tail", "few bytes", "empty", "huge header"],
)
def test_damaged_safetensors_are_named(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{file} is damaged: \S"):
        load(folder)


def flip(raw: bytes) -> bytes:
    """Bits of the pickled dictionary, not of the tensors."""
    at = raw.index(b"_rebuild_tensor")
    return raw[:at] + bytes(b ^ 0x15 for b in raw[at : at + 40]) + raw[at + 40 :]


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda raw: b"", lambda raw: b"words"], ids=["cut", "flipped", "empty", "text"]
)
def test_damaged_pickles_are_named(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    pickled(folder, 1)
    file = folder / "pytorch_model.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{file} cannot be read as plain tensors"):
        load(folder)


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_pickle_is_not_run(folder: Path) -> None:
    pickled(folder, 1)
    file = folder / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True) | {"x": Exploit(folder / "ran")}, file)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        load(folder)
    assert not (folder / "ran").exists()
    torch.load(file, weights_only=False)  # it would have been
    assert (folder / "ran").exists()


@pytest.mark.parametrize(
    "held", [[torch.zeros(2)], torch.zeros(2), {0: torch.zeros(2)}, {"a": {"b": torch.zeros(2)}}, {"a": 1}]
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"x.bin holds no plain dictionary of tensors"):
        list(read_tensors(tmp_path / "x.bin"))


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_map_is_named(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index.json has no weight_map"):
        load(folder)


def test_a_missing_shard_is_named(tmp_path: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"index.json names {shard.name}, which is not there"):
        load(tmp_path)


def test_a_folder_without_weights_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{folder} holds no weights"):
        load(folder)


@pytest.mark.parametrize("config", [{"architectures": ["GPT2LMHeadModel"]}, {}])
def test_an_unknown_architecture_is_refused(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=rf"{folder}.*architecture \S+ is not supported; supported are LlamaForCausalLM"
    ):
        load(folder)


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(BUILTIN) == BUILTIN_FOLDER
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file", tmp_path / "no", "./no/folder", "no-such-folder", "a/b/c"):
        with pytest.raises(ConfigError, match="is no folder; give a local folder, a hub id"):
            resolve(str(name))


def test_a_model_that_the_hub_does_not_give_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("no route\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ConfigError, match=r"'some/model' .* \(no route\).*hf auth login.*builtin"):
        resolve("some/model")
