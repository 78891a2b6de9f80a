"""A tiny base with a tokenizer, prompts for it, and settings for runs of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manyheads.train.progress import Progress
from manyheads.train.settings import TrainSettings
from tests.server.tiny_tokenizer import save_tokenizer, tiny_tokenizer
from tests.tiny import make_model

QUIET = Progress(quiet=True)


def settings(**changes: Any) -> TrainSettings:
    some: dict[str, Any] = {
        "heads": 2,
        "max_new_tokens": 24,
        "length": 64,
        "rows": 2,
        "held_out": 0.1,
        "max_steps": 6,
        "checkpoint_every": 2,
        "chunk": 16,
        "rate": 1e-2,
        "device": "cpu",
    }
    if changes.get("kind") == "eagle3":
        del some["heads"]
    return TrainSettings(**(some | changes))


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    model = make_model(vocab_size=len(tiny_tokenizer().hf), max_position_embeddings=256, eos_token_id=4)
    model.save_pretrained(folder)
    return save_tokenizer(folder)


@pytest.fixture(scope="package")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["cat", "dog", "mat", "log", "hello", "world", "there", "elegant"]
    lines = [{"prompt": f"{a} and {b}"} for a in words for b in words[:5]]
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file
