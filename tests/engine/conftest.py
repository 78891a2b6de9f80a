from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.tiny import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny") / "model"


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    return save_model(folder)
