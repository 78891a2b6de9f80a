"""The page of support says what the result says, of all families; and a comparison that fails ends the run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

pytest.importorskip("gguf")

from manyheads.models.registry import FAMILIES
from tests.engine.test_families import save
from tests.models.families import MODELS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import common
import support


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(support.RESULT.read_text())
    return found


def test_the_page_is_that_of_the_result(result: dict[str, Any], tmp_path: Path) -> None:
    page = Path(shutil.copy(support.PAGE, tmp_path))
    common.write_between(page, support.BEGIN, support.END, support.tables(result))
    assert page.read_text() == support.PAGE.read_text(), "run benchmarks/support.py --write-docs"


def test_the_result_has_every_configuration_of_its_families(result: dict[str, Any]) -> None:
    """A family that is new has no result yet, which the page says of those that it does not have."""
    there = [found["family"] for found in result["families"]]
    assert there == [name for name in FAMILIES if name in there]
    assert support.KNOWN.keys() <= FAMILIES.keys()
    for found in result["families"]:
        model_type = FAMILIES[found["family"]].model_type
        names = [name for name, (of, _) in MODELS.items() if of == model_type]
        assert sorted(found["configurations"]) == sorted(names), "run benchmarks/support.py: a configuration is new"
    assert "not been run yet" in support.PAGE.read_text()


def test_a_family_that_is_new_has_a_name() -> None:
    assert support.known_of("SomethingForCausalLM") == support.Known("Something")


@pytest.mark.parametrize(
    ("architecture", "windows", "ranks", "files"),
    [
        ("Starcoder2ForCausalLM", ["every layer", "none"], support.EQUAL, ["starcoder2"]),
        ("Olmo2ForCausalLM", ["none"], "tensor_parallel_size=2: a Olmo2ForCausalLM cannot be shared among ranks", []),
    ],
)
def test_a_family_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, windows: list[str], ranks: str, files: list[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where folders of GGUF files are made
    found = support.family(architecture, (3, 20), (2, 20))
    assert found["windows"] == windows
    assert found["two_ranks"] == ranks
    assert found["gguf_files"] == files
    assert found["texts"] == 3 * len(found["configurations"])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: support.texts("granite", 3, 20), "granite: greedy text against transformers failed"),
        (lambda: support.quantized("granite", "int4", 3, 20), "granite: greedy text in int4 against"),
    ],
    ids=["plain", "int4"],
)
def test_another_text_ends_the_run(monkeypatch: pytest.MonkeyPatch, step: Any, message: str) -> None:
    def other(folder: Path, name: str, **changes: Any) -> PreTrainedModel:
        """Not the model that is served: its last layer adds nothing."""
        model = save(folder, name, **changes)
        model.model.layers[-1].mlp.down_proj.weight.data.zero_()
        return model

    step()
    monkeypatch.setattr(support, "save", other)
    with pytest.raises(support.Mismatch, match=message) as caught:
        step()
    assert isinstance(caught.value.__cause__, AssertionError)


def test_what_is_shared_though_it_should_be_refused_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "shared", lambda config, ranks: config)
    with pytest.raises(support.Mismatch, match="Olmo2ForCausalLM: the refusal of two ranks failed"):
        support.two_ranks("Olmo2ForCausalLM", ["olmo2"])
