"""Two ranks that share a model compute the logits of one that holds it, for every family."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyheads.config import ConfigError
from manyheads.models.loader import load_model
from manyheads.models.parallel import Ranks
from manyheads.models.registry import FAMILIES, read_config, shared
from tests.forward import logits
from tests.models.families import MODELS, reference

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 61, (24,), generator=torch.Generator().manual_seed(5))


def join(folder: Path) -> list[Ranks]:
    """Two that have found each other, both in this process."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda rank: Ranks.join(rank, 2, folder, CPU), range(2)))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Ranks]:
    return join(tmp_path_factory.mktemp("ranks"))


def shareable(name: str) -> bool:
    model_type, _ = MODELS[name]
    return next(family.can_be_shared for family in FAMILIES.values() if family.model_type == model_type)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", [name for name in MODELS if shareable(name)])
def test_logits_are_those_of_one_rank(tmp_path: Path, ranks: list[Ranks], name: str, quantization: str | None) -> None:
    reference(name).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    alone = load_model(tmp_path, config, torch.float32, CPU, None, quantization)

    def share(of: Ranks) -> tuple[Tensor, int]:
        model = load_model(tmp_path, config, torch.float32, CPU, None, quantization, None, of)
        return logits(model, TOKENS), model.memory_bytes()

    with ThreadPoolExecutor(2) as threads:
        (first, size), (second, other) = threads.map(share, ranks)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, logits(alone, TOKENS), atol=1e-4, rtol=1e-4)
    # norms, routers and what pads a vocabulary are every rank's
    assert max(size, other) < 0.75 * alone.memory_bytes()


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    name = next(name for name in MODELS if not shareable(name))
    reference(name).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tensor_parallel_size=2: a Olmo2ForCausalLM cannot be shared among ranks"):
        shared(read_config(tmp_path), 2)
