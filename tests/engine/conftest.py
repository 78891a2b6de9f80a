from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from manyheads.engine import warmup
from manyheads.engine.runner import Runner
from tests.tiny import save_model


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of engines are built, and none of them needs costs that can be relied on."""
    monkeypatch.setattr(warmup, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(warmup, "TURN_SECONDS", 0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny") / "model"


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    return save_model(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "overlapping"])
def overlaps(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The engine as on a CPU, and as on a GPU: there it launches a step before it reads the one before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "overlaps", request.param)
        yield request.param
