"""A small drafter inside a large one: the same guesses with the same chances, the same texts in as many steps."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manyheads.checkpoint import BUILTIN_FOLDER
from manyheads.engine.runner import Runner
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.models.registry import read_config
from manyheads.request import EngineRequest, SamplingParams
from manyheads.speculation.eagle3.checkpoint import Eagle3Weights, read_drafter
from manyheads.speculation.eagle3.export import write_drafter
from tests.benchmarks.test_enlarge import CPU, LAYERS, QUESTIONS, SHAPES, enlarge
from tests.eagle3 import make_drafter
from tests.engine.test_exactness import engine

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import enlarge_eagle3

DRAFT_VOCAB = 300


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Eagle3Weights]:
    """A random drafter of the built-in model, whose numbers half precision holds, as it does the model's."""
    made, folder = (tmp_path_factory.mktemp(name) for name in ("made", "drafter"))
    config = read_config(BUILTIN_FOLDER)
    weights = make_drafter(made, config, draft_vocab=DRAFT_VOCAB)
    halves = {name: t.half().float() if t.is_floating_point() else t for name, t in weights.tensors.items()}
    write_drafter(replace(weights, tensors=halves), folder, "specforge", base=None)
    return folder, read_drafter(folder, config)


def enlarger_of(name: str) -> Any:
    sizes, dtype = SHAPES[name]
    shape = enlarge.Shape(num_layers=LAYERS, vocab_size=4500, max_position_embeddings=4096, **sizes)
    return enlarge.Enlarger(BUILTIN_FOLDER, shape, dtype, CPU)


def run(model: Path, drafter: Path) -> tuple[list[list[int]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Greedy texts, and candidates with their chances after each step."""
    served = engine(model, 8, heads=str(drafter), num_blocks=200, max_num_batched_tokens=64, max_model_len=256)
    assert isinstance(served.runner, Runner)
    assert served.ready.drafter == "eagle3"
    texts: dict[str, list[int]] = {}
    guesses = []
    for i, question in enumerate(QUESTIONS[:2]):
        prompt = Tokenizer.load(BUILTIN_FOLDER).encode(question)
        params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
        served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    while served.has_work():
        for delta in served.step():
            texts.setdefault(delta.request_id, []).extend(delta.new_token_ids)
        state = served.runner.state
        guesses.append((state.candidates[:2].clone(), state.chances[:2].clone()))
    return list(texts.values()), guesses


@pytest.mark.parametrize("name", SHAPES)
def test_texts_candidates_and_chances(small: tuple[Path, Eagle3Weights], tmp_path: Path, name: str) -> None:
    base = enlarger_of(name)
    enlarge.write(tmp_path / "base", base)
    assert enlarge_eagle3.shape_of(tmp_path / "base") == (base.shape, base.dtype)
    write_drafter(
        enlarge_eagle3.DrafterEnlarger(base, small[1]).weights(), tmp_path / "drafter", "specforge", base=None
    )
    wanted, got = run(BUILTIN_FOLDER, small[0]), run(tmp_path / "base", tmp_path / "drafter")
    assert got[0] == wanted[0]
    assert len(got[1]) == len(wanted[1]) > 8
    same = 0
    for (tokens, chances), (old_tokens, old_chances) in zip(got[1], wanted[1], strict=True):
        same += int((tokens == old_tokens).sum())
        # float32 sums in another order may turn near ties
        torch.testing.assert_close(chances, old_chances, rtol=1e-3, atol=1e-5)
    assert same > 0.99 * sum(tokens.numel() for tokens, _ in got[1])


@pytest.mark.parametrize("size", [DRAFT_VOCAB, 1000, 4500])
def test_added_draft_tokens(small: tuple[Path, Eagle3Weights], tmp_path: Path, size: int) -> None:
    """The rows of the small drafter stand for the tokens for which they stood; all others are the mean."""
    base, (_, weights) = enlarger_of("1152"), small
    large = enlarge_eagle3.DrafterEnlarger(base, weights, size).weights()
    assert large.config.draft_vocab_size == size
    tokens = torch.arange(size) if large.token_map is None else large.token_map
    assert (large.token_map is None) == (size == 4500)
    assert len(set(tokens.tolist())) == size
    assert weights.token_map is not None
    rows = large.tensors["lm_head.weight"][:, :384].float()
    small_rows = weights.tensors["lm_head.weight"]
    place = {token: i for i, token in enumerate(tokens.tolist())}
    mine = torch.tensor([place[token] for token in weights.token_map.tolist()])
    assert torch.equal(rows[mine], small_rows)
    others = torch.ones(size, dtype=torch.bool).index_fill_(0, mine, False)
    mean = small_rows.mean(dim=0).expand(int(others.sum()), -1)
    torch.testing.assert_close(rows[others], mean, rtol=0, atol=1e-3)
    write_drafter(large, tmp_path, "speculators", base="large")
    assert read_drafter(tmp_path, None).config == large.config


@pytest.mark.parametrize("amplitudes", [(1.0,), (1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 2.0), (2.0, 4.0)])
def test_shares(amplitudes: tuple[float, ...]) -> None:
    shares = enlarge_eagle3.find_shares(amplitudes)
    assert sum(a * s for a, s in zip(amplitudes, shares, strict=True)) == 1.0


def test_what_cannot_be_enlarged(small: tuple[Path, Eagle3Weights], tmp_path: Path) -> None:
    base, config = enlarger_of("1152"), read_config(BUILTIN_FOLDER)
    normed = make_drafter(tmp_path, config, draft_vocab=DRAFT_VOCAB, fc_norm=True)
    with pytest.raises(ValueError, match="a drafter with fc_norm cannot be enlarged"):
        enlarge_eagle3.DrafterEnlarger(base, normed)
    with pytest.raises(ValueError, match="draft_vocab_size must be between 300 and 4500, not 299"):
        enlarge_eagle3.DrafterEnlarger(base, small[1], 299)
