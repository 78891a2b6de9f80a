"""Heads written in every format: key for key, lossless, and refused where a format cannot hold them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyheads import LLM, SamplingParams
from manyheads.cli import main
from manyheads.cli.heads import FORMATS as OFFERED
from manyheads.config import ConfigError
from manyheads.models.registry import read_config
from manyheads.speculation.medusa.checkpoint import HeadWeights, read_heads
from manyheads.speculation.medusa.export import FORMATS, read_projection, write_heads
from manyheads.speculation.medusa.inspect import inspect_heads
from tests.server.tiny_tokenizer import tiny_tokenizer
from tests.tiny import HEADS, HIDDEN, VOCAB, save_model

State = dict[str, Tensor]
_RANDOM = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_RANDOM).half()


TOKENS = torch.tensor([3, 1, 15, 7, 8])


def make(blocks: int = 1, projection: str = "own", cut: bool = False, same_blocks: bool = False) -> HeadWeights:
    """Heads of any kind; `same_blocks` as the reference has them."""
    grid = []
    for _ in range(HEADS):
        row = [(random(HIDDEN, HIDDEN), random(HIDDEN)) for _ in range(blocks)]
        grid.append([row[0]] * blocks if same_blocks else row)
    rows = len(TOKENS) if cut else VOCAB
    own = {
        "own": lambda: [random(rows, HIDDEN) for _ in range(HEADS)],
        "shared": lambda: [random(rows, HIDDEN)] * HEADS,
        "base": lambda: None,
    }[projection]()
    return HeadWeights(grid, own, TOKENS if cut else None, "made", None)


def equal(a: HeadWeights, b: HeadWeights) -> bool:
    def tensors(weights: HeadWeights) -> list[Tensor]:
        return [t for head in weights.blocks for pair in head for t in pair] + list(weights.projections or [])

    def one(weights: HeadWeights) -> bool:
        return weights.projections is not None and weights.projections[0] is weights.projections[-1]

    maps = (a.token_map is None) == (b.token_map is None) and (
        a.token_map is None or b.token_map is None or torch.equal(a.token_map, b.token_map)
    )
    same = [torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(tensors(a), tensors(b), strict=True)]
    return all(same) and one(a) == one(b) and maps and (a.projections is None) == (b.projections is None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(folder)
    return folder


def heads_at(folder: Path, weights: HeadWeights, base: Path, form: str = "manyheads") -> Path:
    write_heads(weights, folder, form, base=str(base), vocab_size=VOCAB)
    return folder


def state_of(folder: Path) -> State:
    """Every tensor of a folder."""
    state: State = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            state |= load_file(file)
        elif file.suffix == ".pt":
            state |= torch.load(file, weights_only=True)
    return state


def convert(source: Path, out: Path, form: str, *more: str) -> int:
    return main(["convert", str(source), str(out), "--to", form, *more])


# what every format can hold comes back


ROUND_TRIPS: list[tuple[str, dict[str, Any]]] = [
    *((form, {}) for form in FORMATS),
    *((form, {"blocks": 3, "same_blocks": True}) for form in FORMATS),
    *((form, {"blocks": 2}) for form in ("manyheads", "tgi", "vllm")),
    *((form, {"projection": "shared"}) for form in ("manyheads", "vllm")),
    ("manyheads", {"projection": "own", "cut": True}),
    *((form, {"projection": "shared", "cut": True}) for form in ("manyheads", "vllm")),
    *((form, {"projection": "base"}) for form in ("manyheads", "tgi")),
    ("manyheads", {"projection": "base", "blocks": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "kind"), ROUND_TRIPS)
def test_round_trips_are_lossless(tmp_path: Path, base: Path, form: str, kind: dict[str, Any]) -> None:
    weights = make(**kind)
    first = heads_at(tmp_path / "first", weights, base)
    (first / "tree_statistics.json").write_text('{"accuracy": [[0.5], [0.25], [0.1]], "tokens": 7}')
    config = read_config(base)
    assert equal(read_heads(first, config), weights)
    assert convert(first, tmp_path / "there", form) == 0
    assert equal(read_heads(tmp_path / "there", config), weights)
    assert convert(tmp_path / "there", tmp_path / "back", "manyheads", "--base", str(base)) == 0
    here, back = state_of(first), state_of(tmp_path / "back")
    assert here.keys() == back.keys()
    assert all(torch.equal(here[key], back[key]) for key in here)
    for file in ("config.json", "tree_statistics.json"):
        assert json.loads((first / file).read_text()) == json.loads((tmp_path / "back" / file).read_text())
    assert not list(tmp_path.rglob(".*"))


def test_keys_of_the_reference_and_tgi(tmp_path: Path, base: Path) -> None:
    wanted = {f"{h}.{key}" for h in range(HEADS) for key in ("0.linear.weight", "0.linear.bias", "1.weight")}
    for form, name in (("reference", "medusa_lm_head.pt"), ("tgi", "medusa_lm_head.safetensors")):
        folder = heads_at(tmp_path / form, make(), base, form)
        assert state_of(folder).keys() == wanted
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", name]
        config = json.loads((folder / "config.json").read_text())
        assert config == {
            "medusa_num_heads": HEADS,
            "medusa_num_layers": 1,
            "base_model_name_or_path": str(base.resolve()),
        }
    shared = heads_at(tmp_path / "v2", make(projection="base"), base, "tgi")
    assert state_of(shared).keys() == {key for key in wanted if "linear" in key}


def test_a_whole_model_as_the_reference_has_it(tmp_path: Path, base: Path) -> None:
    weights = make()
    assert convert(heads_at(tmp_path / "heads", weights, base), tmp_path / "full", "reference-full") == 0
    state, own = state_of(tmp_path / "full"), state_of(base)
    assert all(torch.equal(state[key], own[key]) for key in own)
    assert {key for key in state if key not in own} == {
        f"medusa_head.{h}.{key}" for h in range(HEADS) for key in ("0.linear.weight", "0.linear.bias", "1.weight")
    }
    index = json.loads((tmp_path / "full" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    assert {path.name for path in (tmp_path / "full").glob("*.safetensors")} == set(index["weight_map"].values())
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["medusa_num_heads"] == HEADS
    assert config["model_type"] == "llama"
    report = inspect_heads(str(tmp_path / "full"))
    assert report.facts["format"] == "reference v1.0"
    assert not report.problems


# vLLM: what its loader expects (vllm/model_executor/models/medusa.py: Medusa.__init__ and load_weights)


def vllm_parameters(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that vLLM's Medusa makes of a configuration, token_map included."""
    hidden, heads = config["hidden_size"], config["num_heads"]
    expected: dict[str, tuple[int, ...]] = {}
    for h in range(heads):
        for layer in range(config["num_hidden_layers"]):
            expected[f"blocks.{h}.layers.{layer}.weight"] = (hidden, hidden)
            if config.get("medusa_fc_bias", False):
                expected[f"blocks.{h}.layers.{layer}.bias"] = (hidden,)
    rows = config["truncated_vocab_size"]
    if config.get("original_lm_head", False):
        expected["lm_head.weight"] = (rows, hidden)
    else:
        expected |= {f"lm_heads.{h}.weight": (config["vocab_size"], hidden) for h in range(heads)}
    if rows < config["vocab_size"]:  # otherwise vLLM passes over a map
        expected["token_map"] = (rows,)
    return expected


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ({}, []),
        ({"blocks": 2}, []),
        ({"projection": "shared"}, []),
        ({"cut": True}, ["--expand"]),
        ({"projection": "shared", "cut": True}, []),
        ({"projection": "base"}, ["--expand"]),
    ],
)
def test_vllm_finds_every_key_and_no_other(tmp_path: Path, base: Path, kind: dict[str, Any], more: list[str]) -> None:
    assert convert(heads_at(tmp_path / "heads", make(**kind), base), tmp_path / "out", "vllm", *more) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "medusa"
    assert config["architectures"] == ["MedusaModel"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == vllm_parameters(config)
    # MedusaConfig.from_pretrained takes whatever has "num" and "heads" or "layers" in its name
    assert [key for key in config if "num" in key and ("heads" in key or "layers" in key)] == [
        "num_heads",
        "num_hidden_layers",
    ]


def test_a_map_of_the_whole_vocabulary_is_put_in_order_for_vllm(tmp_path: Path, base: Path) -> None:
    order = torch.randperm(VOCAB, generator=_RANDOM)
    weights = HeadWeights(make().blocks, make().projections, order, "made", None)
    source = heads_at(tmp_path / "heads", weights, base)
    assert convert(source, tmp_path / "out", "vllm") == 2
    assert convert(source, tmp_path / "out", "vllm", "--expand") == 0
    state = state_of(tmp_path / "out")
    assert "token_map" not in state
    assert weights.projections is not None
    assert torch.equal(state["lm_heads.1.weight"][order], weights.projections[1])


# refusals, and what --expand makes of them


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("reference", {"cut": True}, "no token_map: its projections span the whole vocabulary; --expand writes a row of z"),
    ("tgi", {"cut": True}, "no token_map"),
    ("reference-full", {"cut": True}, "no token_map"),
    ("reference", {"projection": "shared"}, "share one projection, .*--expand writes it out for every head"),
    ("tgi", {"projection": "shared"}, "share one projection"),
    ("reference", {"projection": "base"}, "cannot use the base's vocabulary projection; --expand"),
    ("reference-full", {"projection": "base"}, "cannot use the base's vocabulary projection; --expand"),
    ("vllm", {"cut": True}, "vLLM reads a token_map only with one projection for all heads, .*--expand"),
    ("vllm", {"projection": "base"}, "vllm format cannot use the base's vocabulary projection"),
    ("tgi", {"projection": "base", "blocks": 2}, "cannot use the base's .* for heads of several blocks"),
]


@pytest.mark.parametrize(("form", "kind", "message"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_or_expanded(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], form: str, kind: dict[str, Any], message: str
) -> None:
    weights = make(**({"same_blocks": True} | kind))
    source = heads_at(tmp_path / "heads", weights, base)
    assert convert(source, tmp_path / "out", form) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", form, "--expand") == 0
    read = read_heads(tmp_path / "out", read_config(base))
    assert read.token_map is None
    assert read.projections is not None
    whole = weights.projections or [read_projection(base)] * HEADS
    for found, wanted in zip(read.projections, whole, strict=True):
        assert found.shape == (VOCAB, HIDDEN)
        if weights.token_map is None:
            assert torch.equal(found, wanted)
        else:
            left_out = [token for token in range(VOCAB) if token not in TOKENS]
            assert torch.equal(found[TOKENS], wanted)
            assert not found[left_out].any()


@pytest.mark.parametrize("form", ["reference", "reference-full"])
def test_blocks_that_differ_are_not_for_the_reference(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    source = heads_at(tmp_path / "heads", make(blocks=2), base)
    assert convert(source, tmp_path / "out", form, "--expand") == 2
    assert "these blocks differ, so there is no way to write them" in capsys.readouterr().err


def test_what_would_have_to_be_guessed_is_refused(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "heads"
    write_heads(make(projection="base"), source, "manyheads", base=None, vocab_size=VOCAB)
    for form, more, message in (
        ("reference", ["--expand"], "names the base model, and these heads name none; give --base"),
        ("reference-full", [], "give --base"),
        ("vllm", ["--expand"], "the base is needed to write it out; give --base"),
    ):
        assert convert(source, tmp_path / "out", form, *more) == 2
        assert message in capsys.readouterr().err
    assert convert(source, tmp_path / "out", "vllm", "--expand", "--base", str(base)) == 0
    assert convert(source, tmp_path / "out", "vllm", "--expand", "--base", str(base)) == 2
    assert "not empty" in capsys.readouterr().err
    no_vocabulary = tmp_path / "v2"
    write_heads(make(projection="base"), no_vocabulary, "tgi", base="name/model", vocab_size=None)
    assert convert(no_vocabulary, tmp_path / "other", "manyheads") == 2
    assert "size of the base's vocabulary is needed" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown format 'gguf'"):
        write_heads(make(), tmp_path / "other", "gguf", base="a/b", vocab_size=VOCAB)


def test_a_base_on_the_hub_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("went to the hub"))
    write_heads(make(), tmp_path / "heads", "reference", base="name/model", vocab_size=None)
    assert convert(tmp_path / "heads", tmp_path / "out", "vllm") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["base_model_name_or_path"] == "name/model"
    assert inspect_heads(str(tmp_path / "out")).facts["base model"] == "name/model"


def test_converted_heads_are_served_alike(tmp_path: Path, base: Path) -> None:
    """The same text in as many steps, whatever the format."""
    source = heads_at(tmp_path / "source", make(projection="shared"), base)
    params = SamplingParams(temperature=0, max_tokens=40)
    found = []
    for form in FORMATS:
        assert convert(source, tmp_path / form, form, "--expand") == 0
        llm = LLM(str(tmp_path / form), tokenizer=tiny_tokenizer(), tree_size=16, max_num_seqs=2)
        output = llm.generate([[1, 2, 3]], params)[0].outputs[0]
        found.append((output.token_ids, output.num_steps))
    assert found[0][1] < 40
    assert found == found[:1] * len(FORMATS)


# inspect


def test_inspect_the_builtin_heads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "builtin"]) == 0
    out = capsys.readouterr().out
    for words in ("vLLM", "one for all heads", "3000 (token_map)", "float16", "top-1 0."):
        assert words in out


def test_inspect_names_problems(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = heads_at(tmp_path / "heads", make(), base, "reference")
    assert main(["inspect", str(folder)]) == 0
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "elsewhere"}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "declares medusa_num_heads 2, the weights hold 3" in out
    assert "'elsewhere' is neither a folder nor a hub id" in out
    other = tmp_path / "wide"
    wide = HeadWeights([[(random(8, 8), random(8))]], [random(VOCAB, 8)], None, "made", None)
    write_heads(wide, other, "tgi", base=str(base), vocab_size=VOCAB)
    assert main(["inspect", str(other)]) == 1
    assert "does not fit the base model" in capsys.readouterr().out


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def _code(folder: Path) -> None:
    state = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    torch.save(state | {"x": Exploit(folder / "ran")}, folder / "medusa_lm_head.pt")


def _truncated(folder: Path) -> None:
    file = folder / "medusa_lm_head.pt"
    file.write_bytes(file.read_bytes()[:-60])


def _change(change: Callable[[State], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        state = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "medusa_lm_head.pt")

    return run


def _unknown(folder: Path) -> None:
    (folder / "medusa_lm_head.pt").unlink()
    save_file({"a.weight": random(2)}, folder / "model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "code in the file": (_code, "cannot be read as plain tensors"),
    "truncated": (_truncated, "medusa_lm_head.pt cannot be read"),
    "unknown format": (_unknown, "no Medusa heads; the first keys are ['a.weight']"),
    "missing key": (_change(lambda state: state.pop("1.0.linear.bias")), "block 0 of head 1 has no bias"),
    "wrong shape": (
        _change(lambda state: state.update({"2.1.weight": random(9, 9)})),
        "projection of head 2 has shape",
    ),
    "not finite": (_change(lambda state: state["0.1.weight"].fill_(float("nan"))), "are not finite"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_are_named_and_nothing_is_run(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    folder = heads_at(tmp_path / "heads", make(), base, "reference")
    spoil, message = BROKEN[broken]
    spoil(folder)
    assert main(["inspect", str(folder)]) == 1
    assert message in capsys.readouterr().out
    assert convert(folder, tmp_path / "out", "vllm") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (folder / "ran").exists()


def test_the_command_offers_every_format() -> None:
    assert OFFERED == FORMATS


def test_no_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_files_are_readable_as_others_are(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_heads(make(projection="shared"), tmp_path / "heads", base="base", vocab_size=VOCAB)
    assert {file.stat().st_mode for file in (tmp_path / "heads").iterdir()} == {(tmp_path / "usual").stat().st_mode}
