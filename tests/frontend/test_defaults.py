"""How a model wants to be sampled where nobody says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manyheads import SamplingParams
from manyheads.config import ConfigError
from manyheads.frontend.bad_words import with_bad_tokens
from manyheads.frontend.defaults import default_params
from tests.server.tiny_tokenizer import tiny_tokenizer


def read(folder: Path, config: dict[str, Any]) -> SamplingParams:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return default_params(folder)


def test_what_generation_config_says(tmp_path: Path) -> None:
    assert default_params(tmp_path) == SamplingParams()
    config = {"temperature": 1, "top_p": 0.8, "top_k": 20, "min_p": None, "repetition_penalty": 1.05, "eos_token_id": 3}
    assert read(tmp_path, config) == SamplingParams(temperature=1.0, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert read(tmp_path, {"temperature": 0.6, "do_sample": False}).greedy
    assert read(tmp_path, {"suppress_tokens": [3, 4]}).bad_token_ids == ((3,), (4,))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"top_p": 7}, "top_p must be between 0 and 1"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens must be a list of token ids"),
    ],
)
def test_what_cannot_hold(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {message}"):
        read(tmp_path, config)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_what_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"generation_config\.json (is no valid|holds no) JSON"):
        default_params(tmp_path)


def test_bad_words_are_tokens() -> None:
    tokenizer = tiny_tokenizer()
    params = with_bad_tokens(SamplingParams(bad_words=("cat", "cat"), bad_token_ids=((7,),)), tokenizer)
    assert params.bad_token_ids == ((7,), tuple(tokenizer.encode("cat")), tuple(tokenizer.encode(" cat")))
    assert with_bad_tokens(SamplingParams(), tokenizer) == SamplingParams()
