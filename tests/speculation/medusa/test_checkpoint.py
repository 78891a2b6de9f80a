from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from manyheads.config import CheckpointError, ConfigError, EngineConfig
from manyheads.models.registry import read_config
from manyheads.speculation.kinds import find_drafter
from manyheads.speculation.medusa.checkpoint import HeadWeights, read_heads, split_model
from manyheads.speculation.medusa.inspect import inspect_heads
from tests.tiny import save_model

HIDDEN, VOCAB, HEADS, LAYERS = 4, 11, 3, 2
CONFIG: Any = SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB)
State = dict[str, Tensor]

_RANDOM = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_RANDOM)


BLOCKS = [[(random(HIDDEN, HIDDEN), random(HIDDEN)) for _ in range(LAYERS)] for _ in range(HEADS)]
PROJECTIONS = [random(VOCAB, HIDDEN) for _ in range(HEADS)]
BASE = {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "lm_head.weight": random(VOCAB, HIDDEN)}
TOKEN_MAP = torch.tensor([3, 0, 10, 7])


def reference(prefix: str = "", layers: int = LAYERS, projections: bool = True) -> State:
    state = {}
    for h in range(HEADS):
        for b in range(layers):
            weight, bias = BLOCKS[h][b]
            state |= {f"{prefix}{h}.{b}.linear.weight": weight, f"{prefix}{h}.{b}.linear.bias": bias}
        if projections:
            state[f"{prefix}{h}.{layers}.weight"] = PROJECTIONS[h]
    return state


def vllm(bias: bool = True, rows: int = VOCAB) -> State:
    state = {f"lm_heads.{h}.weight": PROJECTIONS[h][:rows].clone() for h in range(HEADS)}
    for h in range(HEADS):
        for b in range(LAYERS):
            state[f"blocks.{h}.layers.{b}.weight"] = BLOCKS[h][b][0]
            if bias:
                state[f"blocks.{h}.layers.{b}.bias"] = BLOCKS[h][b][1]
    return state


def write(folder: Path, name: str, state: State, **config: Any) -> Path:
    """A checkpoint of one file, or with `*` in its name of two shards and their index."""
    parts = {name: state}
    if "*" in name:
        keys = sorted(state)
        parts = {name.replace("*", f"-0000{i + 1}-of-00002"): {k: state[k] for k in keys[i::2]} for i in range(2)}
        index = {"metadata": {}, "weight_map": {k: part for part in parts for k in parts[part]}}
        (folder / f"{name.replace('*', '')}.index.json").write_text(json.dumps(index))
    for part, tensors in parts.items():
        if part.endswith(".safetensors"):
            save_file(tensors, folder / part)
        else:
            torch.save(tensors, folder / part)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(
    weights: HeadWeights,
    layers: int = LAYERS,
    projections: list[Tensor] | None = PROJECTIONS,
    bias: bool = True,
    token_map: Tensor | None = None,
) -> None:
    assert len(weights.blocks) == HEADS
    for found, wanted in zip(weights.blocks, BLOCKS, strict=True):
        assert len(found) == layers
        for (w, b), (weight, wanted_bias) in zip(found, wanted[:layers], strict=True):
            assert torch.equal(w, weight)
            assert torch.equal(b, wanted_bias if bias else torch.zeros(HIDDEN))
    if projections is None:
        assert weights.projections is None
    else:
        assert weights.projections is not None
        assert len(weights.projections) == HEADS
        assert all(map(torch.equal, weights.projections, projections))
    if token_map is None:
        assert weights.token_map is None
    else:
        assert weights.token_map is not None
        assert weights.token_map.dtype == torch.int64
        assert torch.equal(weights.token_map, token_map)


MEDUSA: dict[str, Any] = {"medusa_num_heads": HEADS, "medusa_num_layers": LAYERS}
VLLM: dict[str, Any] = {"model_type": "medusa", "architectures": ["MedusaModel"], "num_heads": HEADS}


@pytest.mark.parametrize(
    ("name", "state", "format"),
    [
        ("medusa_lm_head.pt", reference(), "reference v0.1"),
        ("medusa_lm_head.safetensors", reference(), "reference v0.1"),  # TGI "V1"
        ("model.safetensors", reference(), "reference v0.1"),
        ("model.safetensors", BASE | reference("medusa_head."), "reference v1.0"),
        ("model*.safetensors", BASE | reference("medusa_head."), "reference v1.0"),
        ("pytorch_model.bin", BASE | reference("medusa_head."), "reference v1.0"),
        ("pytorch_model*.bin", BASE | reference("medusa_head."), "reference v1.0"),
        ("model.safetensors", vllm(), "vLLM"),
        ("pytorch_model.bin", vllm(), "vLLM"),
    ],
)
def test_every_format_reads_to_the_same_tensors(tmp_path: Path, name: str, state: State, format: str) -> None:
    config = VLLM | {"medusa_fc_bias": True} if format == "vLLM" else MEDUSA
    weights = read_heads(write(tmp_path, name, state, **config), CONFIG)
    check(weights)
    assert weights.format == format


@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
@pytest.mark.parametrize("config", [MEDUSA, MEDUSA | {"version": "2"}], ids=["old export", "new export"])
def test_tgi_v2_shares_the_bases_projection(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    weights = read_heads(write(tmp_path, name, reference(layers=1, projections=False), **config), CONFIG)
    check(weights, layers=1, projections=None)
    assert weights.format == 'TGI "V2"'


def test_vllm_without_biases(tmp_path: Path) -> None:
    check(read_heads(write(tmp_path, "model.safetensors", vllm(bias=False), **VLLM), CONFIG), bias=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_vllm_with_a_token_map(tmp_path: Path, dtype: torch.dtype) -> None:
    state = vllm(rows=4) | {"token_map": TOKEN_MAP.to(dtype)}
    weights = read_heads(write(tmp_path, "model.safetensors", state, truncated_vocab_size=4, **VLLM), CONFIG)
    check(weights, projections=[p[:4] for p in PROJECTIONS], token_map=TOKEN_MAP)


def test_vllm_with_one_projection_for_all_heads(tmp_path: Path) -> None:
    state = {k: t for k, t in vllm().items() if not k.startswith("lm_heads")} | {"lm_head.weight": PROJECTIONS[1]}
    weights = read_heads(write(tmp_path, "model.safetensors", state, original_lm_head=True, **VLLM), CONFIG)
    check(weights, projections=[PROJECTIONS[1]] * HEADS)


def test_vllm_saves_the_one_projection_as_the_first_heads_too(tmp_path: Path) -> None:
    state = {k: t for k, t in vllm().items() if not k.startswith(("lm_heads.1", "lm_heads.2"))}
    weights = read_heads(write(tmp_path, "model.safetensors", state, original_lm_head=True, **VLLM), CONFIG)
    check(weights, projections=[PROJECTIONS[0]] * HEADS)


def test_vllm_cuts_whole_projections_to_the_token_map(tmp_path: Path) -> None:
    state = vllm() | {"token_map": TOKEN_MAP}
    weights = read_heads(write(tmp_path, "model.safetensors", state, **VLLM), CONFIG)
    check(weights, projections=[p[TOKEN_MAP] for p in PROJECTIONS], token_map=TOKEN_MAP)


def test_vllm_with_a_prefix(tmp_path: Path) -> None:
    state = {f"medusa_heads.{key}": tensor for key, tensor in vllm().items()}
    check(read_heads(write(tmp_path, "model.safetensors", state, **VLLM), CONFIG))


@pytest.mark.parametrize("accuracy", [[["x"]], [[None]], [[1.5]], [[float("nan")]], [0.5], "many"])
def test_statistics_that_make_no_sense_are_named(tmp_path: Path, accuracy: object) -> None:
    folder = write(tmp_path, "medusa_lm_head.pt", reference(), **MEDUSA)
    (folder / "tree_statistics.json").write_text(json.dumps({"accuracy": accuracy}))
    with pytest.raises(CheckpointError, match=r"tree_statistics.json: accuracy must be"):
        read_heads(folder, CONFIG)


def test_heads_are_counted_from_the_keys(tmp_path: Path) -> None:
    """medusa-vicuna-7b-v1.3 declares 2 heads and holds 5."""
    config = {"medusa_num_heads": 2, "medusa_num_layers": 7}
    check(read_heads(write(tmp_path, "medusa_lm_head.pt", reference(), **config), CONFIG))


def test_more_than_ten_heads_stay_in_order(tmp_path: Path) -> None:
    state = {}
    for h in range(12):
        state |= {f"{h}.0.linear.weight": BLOCKS[0][0][0] + h, f"{h}.0.linear.bias": BLOCKS[0][0][1]}
        state[f"{h}.1.weight"] = PROJECTIONS[0] + h
    weights = read_heads(write(tmp_path, "medusa_lm_head.pt", state), CONFIG)
    assert weights.projections is not None
    for h in range(12):
        assert torch.equal(weights.blocks[h][0][0], BLOCKS[0][0][0] + h)
        assert torch.equal(weights.projections[h], PROJECTIONS[0] + h)


class ResBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN)


def test_the_references_shared_blocks(tmp_path: Path) -> None:
    """As the reference saves its heads: the state dict of `[ResBlock] * L` and a projection."""
    heads = torch.nn.ModuleList(
        torch.nn.Sequential(*[ResBlock()] * 3, torch.nn.Linear(HIDDEN, VOCAB, bias=False)) for _ in range(HEADS)
    )
    weights = read_heads(write(tmp_path, "medusa_lm_head.pt", heads.state_dict()), CONFIG)
    for blocks, head in zip(weights.blocks, heads, strict=True):
        assert len(blocks) == 3
        for weight, bias in blocks:
            assert torch.equal(weight, head[0].linear.weight)
            assert torch.equal(bias, head[0].linear.bias)


def without(state: State, key: str) -> State:
    return {k: t for k, t in state.items() if k != key}


NAN = torch.tensor(float("nan"))
FC_BIAS: dict[str, Any] = VLLM | {"medusa_fc_bias": True}
BAD: dict[str, tuple[str, State, dict[str, Any], str]] = {
    "no bias": ("medusa_lm_head.pt", without(reference(), "1.0.linear.bias"), MEDUSA, "block 0 of head 1 has no bias"),
    "no weight": (
        "medusa_lm_head.pt",
        without(reference(), "2.1.linear.weight"),
        MEDUSA,
        "block 1 of head 2 has no we",
    ),
    "gap in the heads": ("medusa_lm_head.pt", {k: t for k, t in reference().items() if k[0] != "1"}, MEDUSA, "head 1 "),
    "no projection": ("medusa_lm_head.pt", without(reference(), "1.2.weight"), MEDUSA, "key 1.2.weight is missing"),
    "unused key": ("medusa_lm_head.pt", reference() | {"0.0.linear.scale": NAN}, MEDUSA, "key 0.0.linear.scale"),
    "unused key v1.0": (
        "model.safetensors",
        BASE | reference("medusa_head.") | {"medusa_head.0.norm": random(HIDDEN)},
        MEDUSA,
        "key 0.norm",
    ),
    "projection too many": ("medusa_lm_head.pt", reference() | {"3.2.weight": PROJECTIONS[0]}, MEDUSA, "3.2.weight"),
    "block of another size": (
        "medusa_lm_head.safetensors",
        reference() | {"0.1.linear.weight": random(HIDDEN, 5)},
        MEDUSA,
        r"block 1 of head 0 has shape \(4, 5\).*\(4, 4\)",
    ),
    "bias of another size": (
        "medusa_lm_head.pt",
        reference() | {"0.1.linear.bias": random(5)},
        MEDUSA,
        r"block 1 of head 0 has .* a bias of shape \(5,\)",
    ),
    "another vocabulary": (
        "medusa_lm_head.pt",
        reference() | {"2.2.weight": random(12, HIDDEN)},
        MEDUSA,
        r"projection of head 2 has shape \(12, 4\).*\(11, 4\)",
    ),
    "not finite": (
        "medusa_lm_head.pt",
        reference() | {"1.1.linear.bias": BLOCKS[1][1][1] / 0},
        MEDUSA,
        "block 1 of head 1 holds values that are not finite",
    ),
    "projection not finite": (
        "medusa_lm_head.pt",
        reference() | {"1.2.weight": PROJECTIONS[1] * NAN},
        MEDUSA,
        "projection of head 1 holds values that are not finite",
    ),
    "no heads": ("model.safetensors", BASE, {}, "no Medusa heads; the first keys are .*lm_head.weight"),
    "vllm without promised biases": ("model.safetensors", vllm(bias=False), FC_BIAS, "block 0 of head 0 has no bias"),
    "vllm without a projection": (
        "model.safetensors",
        without(vllm(), "lm_heads.1.weight"),
        FC_BIAS,
        r"3 heads, but lm_heads \[0, 2\]",
    ),
    "vllm with an unused key": (
        "model.safetensors",
        vllm() | {"blocks.0.norm.weight": random(4)},
        FC_BIAS,
        "key blocks.0.norm.weight",
    ),
    "vllm truncated without a map": (
        "model.safetensors",
        vllm(rows=4),
        FC_BIAS,
        r"projection of head 0 has shape \(4, 4\)",
    ),
    "integer weights": (
        "medusa_lm_head.pt",
        reference() | {"0.1.linear.weight": torch.ones(HIDDEN, HIDDEN, dtype=torch.int8)},
        MEDUSA,
        "block 1 of head 0 has .* in torch.int8",
    ),
    "scalar weight": (
        "medusa_lm_head.pt",
        reference() | {"0.1.linear.weight": NAN},
        MEDUSA,
        r"block 1 of head 0 has a weight of shape \(\)",
    ),
    "empty token map": (
        "model.safetensors",
        vllm() | {"token_map": TOKEN_MAP[:0]},
        FC_BIAS,
        "projection of head 0|token_map is empty",
    ),
    "token outside": (
        "model.safetensors",
        vllm(rows=4) | {"token_map": TOKEN_MAP + 1},
        FC_BIAS,
        "outside the vocabulary of 11",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_wrong_is_named(tmp_path: Path, bad: str) -> None:
    name, state, config, message = BAD[bad]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_heads(write(tmp_path, name, state, **config), CONFIG)
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, "model*.safetensors", BASE | reference("medusa_head."))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json names model-00002-of-00002.safetensors"):
        read_heads(tmp_path, CONFIG)


@pytest.mark.parametrize("has_config", [True, False])
def test_hydra_heads_are_named(tmp_path: Path, has_config: bool) -> None:
    """By a server that is given them, and by `inspect`; their keys could be taken for Medusa's."""
    save_model(tmp_path / "base")
    heads = tmp_path / "hydra"
    heads.mkdir()
    torch.save({"0.0.linear.weight": torch.zeros(4, 8), "0.0.linear.bias": torch.zeros(4)}, heads / "hydra_lm_head.pt")
    if has_config:
        raw = {"hydra_num_heads": 4, "hydra_num_layers": 4, "hydra_head_arch": "prefix-mlp", "grounded_heads": True}
        (heads / "config.json").write_text(json.dumps(raw))
    kind = "prefix-mlp" if has_config else "of an unknown kind"
    message = re.escape(f"{heads} holds Hydra heads ({kind}), which are not read")
    with pytest.raises(CheckpointError, match=message):
        find_drafter(EngineConfig(), heads, read_config(tmp_path / "base"))
    (problem,) = inspect_heads(str(heads)).problems
    assert re.match(message, problem)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no weights"):
        read_heads(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, reference()) / name
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=str(file)):
        read_heads(tmp_path, CONFIG)


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save(reference() | {"x": Exploit(tmp_path / "ran")}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match=r"medusa_lm_head.pt cannot be read as plain tensors.*nothing .* was run"):
        read_heads(tmp_path, CONFIG)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("held", [[PROJECTIONS[0]], PROJECTIONS[0], {"0.0.linear.weight": 1.0}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match=r"medusa_lm_head.pt holds no plain dictionary of tensors"):
        read_heads(tmp_path, CONFIG)


def test_statistics_come_along(tmp_path: Path) -> None:
    write(tmp_path, "medusa_lm_head.pt", reference())
    assert read_heads(tmp_path, CONFIG).accuracy is None
    (tmp_path / "tree_statistics.json").write_text('{"accuracy": [[0.5, 0.25], [1, 0]]}')
    assert read_heads(tmp_path, CONFIG).accuracy == [[0.5, 0.25], [1.0, 0.0]]
    (tmp_path / "tree_statistics.json").write_text('{"accuracy": [0.5]}')
    with pytest.raises(CheckpointError, match=r"tree_statistics.json: accuracy must be"):
        read_heads(tmp_path, CONFIG)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and heads that name it relative to themselves."""
    base, heads = tmp_path / "base", tmp_path / "heads"
    for folder in (base, heads):
        folder.mkdir()
    write(base, "model.safetensors", BASE, model_type="llama")
    write(heads, "medusa_lm_head.pt", reference(), base_model_name_or_path="../base")
    return base, heads


def same(found: tuple[Path, Path | None], base: Path, heads: Path | None) -> bool:
    return found[0].resolve() == base.resolve() and (found[1] and found[1].resolve()) == (heads and heads.resolve())


def test_heads_alone_name_their_base(folders: tuple[Path, Path]) -> None:
    base, heads = folders
    assert same(split_model(str(heads), None), base, heads)
    (heads / "config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert same(split_model(str(heads), None), base, heads)


def test_vllm_heads_alone_name_their_base(folders: tuple[Path, Path]) -> None:
    base, heads = folders
    (heads / "medusa_lm_head.pt").unlink()
    write(heads, "model.safetensors", vllm(), base_model_name_or_path="../base", **VLLM)
    assert same(split_model(str(heads), None), base, heads)


def test_given_heads_win_over_what_they_name(folders: tuple[Path, Path]) -> None:
    base, heads = folders
    (heads / "config.json").write_text('{"base_model_name_or_path": "wrong/wrong/wrong"}')
    assert same(split_model(str(base), str(heads)), base, heads)
    with pytest.raises(ConfigError, match="wrong/wrong/wrong"):
        split_model(str(heads), None)


def test_heads_inside_beside_or_within_the_bases_files(folders: tuple[Path, Path]) -> None:
    base, heads = folders
    assert same(split_model(str(base), None), base, None)
    write(base, "model.safetensors", BASE | reference("medusa_head."), model_type="llama", **MEDUSA)
    assert same(split_model(str(base), None), base, base)  # Medusa-2
    write(base, "medusa_lm_head.pt", reference(), model_type="llama")
    assert same(split_model(str(base), None), base, base)
    heads.rename(base / "heads")
    assert same(split_model(str(base), None), base, base / "heads")


def test_a_tuned_model_that_names_its_base_is_read_itself(folders: tuple[Path, Path]) -> None:
    base, _ = folders
    write(base, "model.safetensors", BASE, model_type="llama", base_model_name_or_path="elsewhere")
    assert same(split_model(str(base), None), base, None)
