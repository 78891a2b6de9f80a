"""What stands for a GGUF file elsewhere, and every way in which a file is refused."""

from __future__ import annotations

import builtins
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from manyheads.checkpoint import read_json, resolve
from manyheads.config import CheckpointError, ConfigError
from manyheads.frontend.llm import LLM
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.gguf.file import opened
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.request import SamplingParams
from tests.gguf.write import tiny, write
from tests.server.tiny_tokenizer import TEMPLATE, make_backend


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.Q8_0.gguf", tiny("llama"), {"ffn_down": Kind.Q8_0})


def test_a_file_has_one_folder_until_it_changes(path: Path, own_cache: Path) -> None:
    folder = resolve(str(path))
    assert folder.is_relative_to(own_cache)
    assert folder.name == "tiny.Q8_0"
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {file.name for file in folder.iterdir()}
    made = (folder / "config.json").stat().st_mtime_ns
    assert resolve(str(path)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    write(path, tiny("llama tied"))
    assert resolve(str(path)) != folder
    assert read_config(resolve(str(path))).tie_word_embeddings
    assert sorted(file.name for file in folder.parent.iterdir()) == ["tiny.Q8_0"]  # nothing half made


def test_text_ends_as_the_file_says(path: Path) -> None:
    config = read_config(resolve(str(path)))
    assert config.eos_token_ids == (4,)
    assert config.dtype == torch.float32  # of most matrices
    assert read_json(resolve(str(path)) / "config.json")["quantization_config"] == {"quant_method": "gguf"}


def test_the_tokenizer_is_the_one_that_was_written(path: Path) -> None:
    tokenizer = Tokenizer.load(resolve(str(path)))
    for text in ("The cat sat, élégant.", "<|user|>hello<|end|>\n"):
        assert tokenizer.encode(text) == make_backend().encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.chat_template() == TEMPLATE


def test_greedy_text_with_and_without_trees(path: Path) -> None:
    settings: dict[str, Any] = {"num_blocks": 64, "max_num_seqs": 4, "num_threads": 1}
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    prompts = ["The cat sat on the mat and the cat sat on", "hello world"]
    plain, trees = (
        [
            output.outputs[0].token_ids
            for output in LLM(str(path), drafter=drafter, **settings).generate(prompts, params)
        ]
        for drafter in (None, "ngram")
    )
    assert plain == trees


def test_a_file_on_the_hub_is_named_behind_the_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert resolve("someone/model-GGUF/q8/model.gguf") == resolve(str(path))
    assert asked == [("someone/model-GGUF", "q8/model.gguf")]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.gguf' is no folder; give .* a GGUF file"):
        resolve(str(tmp_path / "none.gguf"))
    with pytest.raises(ConfigError, match=r"'none\.gguf' is no folder; give .* a GGUF file"):
        resolve("none.gguf")


@pytest.mark.parametrize("size", [0, 3, 20, 100, 5000, 20000, -1])
def test_a_file_that_ends_too_early(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"tiny\.Q8_0\.gguf is no GGUF file, or not a whole one: .+") as error:
        resolve(str(path))
    assert "\n" not in str(error.value)


def test_another_kind_of_file(path: Path) -> None:
    path.write_text(json.dumps({"a": 1}) * 10)
    with pytest.raises(CheckpointError, match="GGUF magic invalid"):
        resolve(str(path))


def changed_type(path: Path, number: int) -> None:
    """Say that the last layer's `ffn_down` is in another type."""
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_down.weight")
    # name with its length, number of dimensions, dimensions, then the type
    place = tensor.field.offset + 8 + len(tensor.name) + 4 + 8 * len(tensor.shape)
    data = bytearray(path.read_bytes())
    assert struct.unpack_from("<I", data, place)[0] == Kind.Q8_0
    struct.pack_into("<I", data, place, number)
    path.write_bytes(data)


def test_a_type_that_nobody_knows(path: Path) -> None:
    changed_type(path, 999)
    with pytest.raises(CheckpointError, match=r"999\)? is not a valid GGMLQuantizationType"):
        resolve(str(path))


def test_a_type_that_cannot_be_widened(path: Path) -> None:
    changed_type(path, Kind.I8)
    with pytest.raises(ConfigError, match=r"blk\.1\.ffn_down\.weight is in I8, which the package gguf does not widen"):
        resolve(str(path))


def refused(tmp_path: Path, name: str = "llama", **more: Any) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as error:
        resolve(
            str(write(tmp_path / "model.gguf", tiny(name), more={k.replace("__", "."): v for k, v in more.items()}))
        )
    assert "\n" not in str(error.value)
    return str(error.value).partition("model.gguf: ")[2]


def test_what_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "granite").startswith("architecture 'granite' is not supported; supported are llama, ")
    assert refused(tmp_path, expert_count=8) == "llama.expert_count 8 is not supported, only 0"
    assert refused(tmp_path, attention__clamp_kqv=3.0) == "llama.attention.clamp_kqv 3.0 is not supported"
    assert refused(tmp_path, block_count=None) == "llama.block_count is missing"
    assert refused(tmp_path, block_count=0) == "llama.block_count must be a positive integer, not 0"
    wanted = "llama.attention.head_count_kv must be a positive integer, not [2, 1]"
    assert refused(tmp_path, attention__head_count_kv=[2, 1]) == wanted
    assert refused(tmp_path, attention__value_length=4) == "llama.attention.value_length 4 is not supported, only 8"
    assert refused(tmp_path, rope__dimension_count=4) == "llama.rope.dimension_count 4 is not supported, only 8"
    assert refused(tmp_path, rope__scaling__type="ntk").startswith("llama.rope.scaling.type 'ntk' is not supported")
    assert refused(tmp_path, rope__scaling__factor=2.0).startswith("llama.rope.scaling.factor 2.0 is not supported")
    assert refused(tmp_path, **{"rope.scaling.type": "yarn"}).startswith("llama.rope.scaling.type 'yarn' is not")


def test_one_of_several_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = opened(path)
    monkeypatch.setitem(file._metadata, "split.count", 3)
    fields = {key: type("Field", (), {"contents": lambda _, v=value: v}) for key, value in file._metadata.items()}

    class Reader:
        def __init__(self, _: Path) -> None:
            self.fields, self.tensors = {key: field() for key, field in fields.items()}, file.tensors

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    opened.__globals__["_opened"].cache_clear()
    with pytest.raises(ConfigError, match=r"tiny\.Q8_0\.gguf is one of 3 parts; join them"):
        resolve(str(path))


def test_a_tensor_that_has_no_place(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", tiny("llama"), extra={"blk.0.ffn_gate_exps.weight": torch.zeros(32, 32)})
    folder = resolve(str(path))
    with pytest.raises(
        CheckpointError, match=r"tensor blk\.0\.ffn_gate_exps\.weight belongs to no parameter of a llama"
    ):
        load_model(folder, read_config(folder), torch.float32, torch.device("cpu"))


def test_the_package_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs a package: pip install 'manyheads\[gguf\]'"):
        resolve(str(path))


def test_nowhere_to_keep_the_folder(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        resolve(str(path))
