"""Each sampling parameter against a plain loop over the reference model, with and without trees."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from manyheads import EngineConfig, SamplingParams
from manyheads.batch import RowState
from manyheads.engine import logprobs
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.engine.runner import Runner
from manyheads.engine.sampler import draw, last_nodes
from manyheads.engine.state import admit
from manyheads.engine.step import Request
from manyheads.ops.noise import gumbel
from manyheads.ops.torch import TorchOps
from manyheads.request import EngineRequest, RequestDelta
from manyheads.speculation.tree import ROOT, tree_tensors
from tests.tiny import VOCAB

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NEW = 24


@pytest.fixture(scope="module", params=[1, 16], ids=["one node", "16 nodes"])
def engine(folder: Path, reference: LlamaForCausalLM, overlaps: bool, request: pytest.FixtureRequest) -> Engine:
    return build(folder, request.param)


def build(folder: Path, tree_size: int, **settings: Any) -> Engine:
    settings = {"seed": 0, "num_blocks": 64} | settings
    return build_engine(
        EngineConfig(model=str(folder), dtype="float32", tree_size=tree_size, num_threads=1, **settings)
    )


def answer(engine: Engine, **params: Any) -> list[RequestDelta]:
    (deltas,) = answers(engine, params)
    return deltas


def answers(engine: Engine, *asked: dict[str, Any]) -> list[list[RequestDelta]]:
    """Of requests that run side by side."""
    for i, params in enumerate(asked):
        wanted = SamplingParams(**{"max_tokens": NEW} | params).validate()
        engine.add_request(EngineRequest(request_id=str(i), prompt_token_ids=PROMPT, params=wanted))
    deltas: list[list[RequestDelta]] = [[] for _ in asked]
    while engine.has_work():
        for delta in engine.step():
            deltas[int(delta.request_id)].append(delta)
    return deltas


def tokens_of(deltas: list[RequestDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.new_token_ids]


def raw_logits(reference: LlamaForCausalLM, tokens: list[int]) -> Tensor:
    return logits_after(reference, tuple(tokens))


@functools.cache  # each engine is asked for the same texts
@torch.inference_mode()
def logits_after(reference: LlamaForCausalLM, tokens: tuple[int, ...]) -> Tensor:
    logits: Tensor = reference(torch.tensor([tokens])).logits[0, -1].float()
    return logits


def edited(reference: LlamaForCausalLM, output: list[int], **params: Any) -> Tensor:
    """The next token's logits after penalties and bias, token by token as their papers and APIs say."""
    logits = raw_logits(reference, PROMPT + output).tolist()
    for token in range(VOCAB):
        count = output.count(token)
        if count or token in PROMPT:
            penalty = params.get("repetition_penalty", 1.0)
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        logits[token] -= params.get("frequency_penalty", 0.0) * count
        logits[token] -= params.get("presence_penalty", 0.0) * (count > 0)
        logits[token] += params.get("logit_bias", {}).get(token, 0.0)
    return torch.tensor(logits)


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"logit_bias": {2: 4.0, 7: -3.0}},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": -0.4, "logit_bias": {1: 1.0}},
    ],
    ids=lambda params: ", ".join(params),
)
def test_penalties_and_bias(engine: Engine, reference: LlamaForCausalLM, params: dict[str, Any]) -> None:
    wanted: list[int] = []
    for _ in range(NEW):
        wanted.append(int(edited(reference, wanted, **params).argmax()))
    assert tokens_of(answer(engine, temperature=0.0, **params)) == wanted
    assert wanted != tokens_of(answer(engine, temperature=0.0)), "the parameter has an effect here"


def kept(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """Tokens that may be drawn."""
    order = logits.argsort(descending=True).tolist()
    order = order[: top_k or VOCAB]
    p = dict(zip(order, torch.softmax(logits[order], 0).tolist(), strict=True))
    result, mass = set(), 0.0
    for token in order:
        if mass >= top_p or p[token] < min_p * p[order[0]]:
            break
        result.add(token)
        mass += p[token]
    return result


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 5, "top_p": 0.8, "min_p": 0.1}], ids=str
)
def test_filters_keep_the_draw_among_the_likely(
    engine: Engine, reference: LlamaForCausalLM, params: dict[str, Any]
) -> None:
    """The noise is known, so the very token is."""
    seeds = range(5)
    found = answers(engine, *({"temperature": 1.5, "seed": seed, **params} for seed in seeds))
    for seed, deltas in zip(seeds, found, strict=True):
        wanted: list[int] = []
        for _ in range(NEW):
            logits = raw_logits(reference, PROMPT + wanted) / 1.5
            position = torch.tensor([[len(PROMPT) + len(wanted)]])
            noisy = logits + gumbel(torch.tensor([seed]), position, VOCAB)[0, 0]
            allowed = kept(logits, **params)
            wanted.append(max(allowed, key=lambda t, noisy=noisy: float(noisy[t])))  # type: ignore[misc]
        assert tokens_of(deltas) == wanted


@pytest.mark.parametrize("at_once", [1, 256])
def test_logprobs_are_the_models(
    engine: Engine, reference: LlamaForCausalLM, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "AT_ONCE", at_once)
    deltas = answer(engine, temperature=1.0, seed=3, logprobs=4)
    output = tokens_of(deltas)
    entries = [entry for delta in deltas for entry in delta.logprobs or []]
    assert len(entries) == len(output) == NEW
    for i, entry in enumerate(entries):
        wanted = torch.log_softmax(raw_logits(reference, PROMPT + output[:i]), 0)
        assert entry.logprob == pytest.approx(float(wanted[output[i]]), abs=1e-4)
        best = wanted.topk(4)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_the_text_ends_at_a_stop_token_but_not_too_early(engine: Engine) -> None:
    free = tokens_of(answer(engine, temperature=0.0))
    stop = free[9]
    at = free.index(stop)
    deltas = answer(engine, temperature=0.0, stop_token_ids=(stop,))
    assert tokens_of(deltas) == free[: at + 1]
    assert (deltas[-1].finish_reason, deltas[-1].stop_token_id) == ("stop", stop)
    late = tokens_of(answer(engine, temperature=0.0, stop_token_ids=(stop,), min_tokens=15))
    assert stop not in late[:14]
    assert len(late) >= 15


def test_steps_are_counted(engine: Engine) -> None:
    deltas = answer(engine, temperature=0.0, max_steps=5)
    assert len([d for d in deltas if d.new_token_ids]) == 5 == deltas[-1].num_steps
    assert deltas[-1].finish_reason == "length"


def test_a_request_can_do_without_speculation(engine: Engine) -> None:
    assert len([d for d in answer(engine, temperature=0.0, speculative=False) if d.new_token_ids]) == NEW


def test_the_lowest_temperatures_are_greedy(engine: Engine) -> None:
    """Logits over a temperature of 1e-38 would be infinite, and the first of those drawn."""
    bias = {2: 50.0, 7: 60.0}
    greedy = tokens_of(answer(engine, temperature=0.0, logit_bias=bias))
    for temperature in (1e-20, 1e-38, 1e-300):
        assert tokens_of(answer(engine, temperature=temperature, seed=1, logit_bias=bias)) == greedy


def test_what_stands_beside_a_row_drops_none_of_its_tokens() -> None:
    """Of a large vocabulary, float32 has the mass of the first tokens reach 1 long before the last one."""
    size = 128_000
    state = RowState(2, 64, 16, 0, size, torch.device("cpu"))
    requests = []
    for row, params in enumerate((SamplingParams(), SamplingParams(top_p=0.5))):
        message = EngineRequest(request_id=str(row), prompt_token_ids=[1], params=params)
        requests.append(Request.from_message(message, 64, (), 3))
        requests[-1].held_row = row
    admit(state, None, requests)
    logits = 5 * torch.randn(size, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    drawn: list[Tensor] = []

    class Watched(TorchOps):
        def draw(self, logits: Tensor, *args: Any) -> Tensor:
            drawn.append(logits)
            return super().draw(logits, *args)

    root = tree_tensors(ROOT, [0], state.device)
    draw(logits.clone(), last_nodes(requests, torch.arange(2), root, state), state, Watched())
    assert torch.equal(drawn[0][0], logits[0])
    assert 0 < int(drawn[0][1].isfinite().sum()) < size // 2


def test_typical_acceptance_takes_more(engine: Engine) -> None:
    """With every draft typical (ε = 0 accepts what has any probability), whole paths are accepted."""
    if engine.planner.tree_size == 1:
        pytest.skip("nothing to accept")
    loose = answer(engine, temperature=1.0, seed=1, acceptance="typical", typical_epsilon=0.0)
    exact = answer(engine, temperature=1.0, seed=1)
    assert loose[-1].num_steps < exact[-1].num_steps


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"temperature": 0.0, "frequency_penalty": 0.8, "logprobs": 3},
    {"temperature": 0.0, "presence_penalty": 1.5, "min_tokens": 9, "stop_token_ids": (1, 2, 3, 4)},
    {"temperature": 0.0, "stop_token_ids": (5, 6, 7, 8)},
    {"temperature": 0.0, "max_steps": 4, "speculative": False},
    {"temperature": 1.2, "seed": 1, "repetition_penalty": 1.2, "logprobs": 0},
    {"temperature": 0.9, "seed": 2, "top_k": 5, "top_p": 0.9, "min_tokens": 12, "stop_token_ids": (1, 9)},
    {"temperature": 1.0, "seed": 3, "min_p": 0.1, "logit_bias": {2: 2.0}, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": 4, "stop_token_ids": (3, 11), "logprobs": 2},
    {"temperature": 1.0, "seed": 5, "max_tokens": 7, "presence_penalty": 0.7},
    {"temperature": 1.0, "seed": 6, "bad_token_ids": ((3,), (1, 2), (2, 6, 0, 5), (7, 7))},
    {"temperature": 1.0, "seed": 7, "allowed_token_ids": (1, 5, 8, 9), "bad_token_ids": ((8, 5, 1), (5, 9))},
]
"""Parameters whose text does not depend on the tree."""


@pytest.mark.parametrize("tree_size", [1, 16])
def test_overlapping_steps_change_nothing_that_is_said(
    folder: Path, reference: LlamaForCausalLM, tree_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, over too few pages: text, reasons and log-probabilities as in steps taken in turn."""

    def said(overlaps: bool) -> list[list[RequestDelta]]:
        monkeypatch.setattr(Runner, "overlaps", overlaps)
        settings = {"max_num_seqs": 5, "max_num_batched_tokens": 8, "block_size": 4, "num_blocks": 15}
        engine = build(folder, tree_size, **settings)
        deltas: list[list[RequestDelta]] = [[] for _ in range(2 * len(MIXED))]
        for i in range(len(deltas)):
            params = SamplingParams(**{"max_tokens": NEW} | MIXED[i % len(MIXED)])
            prompt = [*PROMPT[i % 3 :], i % VOCAB]
            engine.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
        while engine.has_work():
            for delta in engine.step():
                deltas[int(delta.request_id)].append(delta)
            engine.check_integrity()
        assert engine.stats().preemptions > 0
        return deltas

    reasons = set()
    for overlapped, in_turn in zip(said(True), said(False), strict=True):
        assert tokens_of(overlapped) == tokens_of(in_turn)
        last, wanted = overlapped[-1], in_turn[-1]
        assert (last.finish_reason, last.stop_token_id) == (wanted.finish_reason, wanted.stop_token_id)
        found, given = ([e for d in deltas for e in d.logprobs or []] for deltas in (overlapped, in_turn))
        assert [(e.token_id, e.rank) for e in found] == [(e.token_id, e.rank) for e in given]
        assert [e.logprob for e in found] == pytest.approx([e.logprob for e in given], abs=1e-4)
        reasons.add(last.finish_reason)
    assert reasons == {"stop", "length"}


def test_overlapping_steps_accept_what_is_typical_as_steps_in_turn_do(
    folder: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typical text depends on the trees: the planner gets nothing to learn from, and the end (where what is unread may
    be all that is missing, and trees are small) does not count."""

    def text(overlaps: bool, seed: int) -> tuple[list[int], int]:
        monkeypatch.setattr(Runner, "overlaps", overlaps)
        engine = build(folder, 16)
        monkeypatch.setattr(engine.planner, "observe", lambda hits, trials: None)
        params = {"acceptance": "typical", "typical_epsilon": 0.05, "seed": seed, "repetition_penalty": 1.1}
        tokens = tokens_of(answer(engine, temperature=1.0, max_tokens=2 * NEW, **params))
        return tokens[: 2 * NEW - 10], engine.stats().accepted_tokens

    for seed in range(4):
        wanted, accepted = text(False, seed)
        assert text(True, seed)[0] == wanted
        assert accepted > 0


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(torch.arange(64), torch.arange(20).expand(64, -1), 1000)
    assert float(noise.double().mean()) == pytest.approx(0.57722, abs=0.005)  # Euler's constant
    assert float(noise.double().var()) == pytest.approx(1.64493, abs=0.01)  # π² / 6
    assert len(noise.unique()) > 0.95 * 64 * 20 * 1000 * 0.9
    again = gumbel(torch.tensor([7]), torch.tensor([[3]]), 1000)
    assert torch.equal(again[0, 0], noise[7, 3])


def test_noise_is_finite_where_all_bits_of_its_counter_are_ones() -> None:
    """Else this token would be drawn whatever the logits say, even one that may not be."""
    noise = gumbel(torch.tensor([6]), torch.tensor([[4]]), 32768)[0, 0]
    assert noise.argmax() == 22767
    assert 16 < noise[22767] < 17


def unbanned(logits: Tensor, text: list[int], allowed: tuple[int, ...], bad: tuple[tuple[int, ...], ...]) -> Tensor:
    """The logits without what must not follow the text."""
    logits = logits.clone()
    for token in range(VOCAB):
        is_bad = any(run[-1] == token and (len(run) == 1 or text[-len(run) + 1 :] == [*run[:-1]]) for run in bad)
        if is_bad or (allowed and token not in allowed):
            logits[token] = float("-inf")
    return logits


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_bans(engine: Engine, reference: LlamaForCausalLM, temperature: float) -> None:
    """Bad runs are those of the text that it would have written without, in turn, and one that begins in the prompt."""
    allowed: tuple[int, ...] = ()
    bad: tuple[tuple[int, ...], ...] = ()
    seen = set()
    for turn in range(5):
        wanted: list[int] = []
        for _ in range(NEW):
            logits = unbanned(raw_logits(reference, PROMPT + wanted), PROMPT + wanted, allowed, bad)
            position = torch.tensor([[len(PROMPT) + len(wanted)]])
            noise = gumbel(torch.tensor([3]), position, VOCAB)[0, 0]
            wanted.append(int((logits if temperature == 0 else logits / temperature + noise).argmax()))
        bans = {"allowed_token_ids": allowed, "bad_token_ids": bad}
        assert tokens_of(answer(engine, temperature=temperature, seed=3, **bans)) == wanted
        seen.add(tuple(wanted))
        last = [(*PROMPT[-2:], wanted[0]), (wanted[5],), tuple(wanted[8:10]), tuple(wanted[2:16])][turn % 4]
        bad, allowed = (*bad, last), tuple(range(0, VOCAB, 2)) if turn == 3 else ()
    assert len(seen) == 5, "each ban has an effect here"


def test_bans_that_leave_nothing(engine: Engine) -> None:
    """A request must not end as if the model were broken: the least evil is drawn."""
    deltas = answer(engine, temperature=0.0, allowed_token_ids=(5,), bad_token_ids=((5, 5), (6,)), max_tokens=4)
    assert tokens_of(deltas) == [5] * 4
    everything = tuple((token,) for token in range(VOCAB))
    assert len(tokens_of(answer(engine, temperature=0.0, bad_token_ids=everything))) == NEW
    early = answer(engine, temperature=0.0, allowed_token_ids=(5,), stop_token_ids=(5,), min_tokens=3)
    tokens = tokens_of(early)
    assert (tokens.index(5), len(tokens)) == (3, 4)
