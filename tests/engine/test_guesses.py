"""A request that asks for its steps is told what each guessed and gave."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from transformers import LlamaForCausalLM

from manyheads import SamplingParams
from manyheads.engine.engine import Engine
from manyheads.engine.guesses import TreeGuesses
from manyheads.request import EngineRequest, Guess, StepTrace
from manyheads.speculation.tree import Tree
from tests.engine.test_exactness import engine, prompts, run

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, return_steps=True)


def steps_of(served: Engine, params: SamplingParams) -> list[tuple[list[int], StepTrace | None]]:
    served.add_request(EngineRequest(request_id="a", prompt_token_ids=prompts(1)[0], params=params))
    deltas = [delta for _ in iter(served.has_work, False) for delta in served.step()]
    return [(delta.new_token_ids, delta.trace) for delta in deltas]


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize(("drafter", "tree_size"), [(None, 16), ("ngram", 16), (None, 1)])
def test_guesses_say_what_came_of_each(folder: Path, overlaps: bool, drafter: str | None, tree_size: int) -> None:
    steps = steps_of(engine(folder, tree_size, drafter=drafter), GREEDY)
    accepted = 0
    for tokens, trace in steps:
        assert trace is not None
        assert trace.num_tokens == len(tokens)
        path = [i for i, guess in enumerate(trace.guesses) if guess.accepted]
        # the last step may be cut by the limit
        assert [trace.guesses[i].token_id for i in path][: len(tokens)] == tokens[: len(path)]
        assert [trace.guesses[i].parent for i in path] == [-1, *path][: len(path)]
        for i, guess in enumerate(trace.guesses):
            assert guess.parent < i
            above = path.index(guess.parent) + 1 if guess.parent in path else 0
            if not guess.accepted and (guess.parent == -1 or guess.parent in path) and above < len(tokens):
                assert guess.token_id != tokens[above], "what was right is accepted"
        accepted += len(path)
    assert steps[0][1] == StepTrace(1, []), "the prompt's step guesses nothing"
    if tree_size > 1:
        assert accepted > 5
        assert max(len(trace.guesses) for _, trace in steps if trace is not None) > 3
    else:
        assert all(trace == StepTrace(1, []) for _, trace in steps)


def test_who_does_not_ask_pays_nothing(
    folder: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is the same, and nothing is read of the trees."""
    wanted = [tokens for tokens, _ in steps_of(engine(folder, 16), GREEDY)]
    monkeypatch.setattr(TreeGuesses, "__init__", None)
    plain = steps_of(engine(folder, 16), msgspec.structs.replace(GREEDY, return_steps=False))
    assert [token for tokens, _ in plain for token in tokens] == [token for tokens in wanted for token in tokens]
    assert all(trace is None for _, trace in plain)


def test_beside_others_it_is_told_of_its_own_row(folder: Path, reference: LlamaForCausalLM) -> None:
    """Rows of one step share what is read, and each finds its own."""
    jobs = [(p, msgspec.structs.replace(GREEDY, return_steps=i % 2 == 0)) for i, p in enumerate(prompts(6))]
    plain = run(engine(folder, 16), [(p, msgspec.structs.replace(GREEDY, return_steps=False)) for p, _ in jobs])
    served = engine(folder, 16)
    for i, (prompt, params) in enumerate(jobs):
        served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    told: list[list[int]] = [[] for _ in jobs]
    for delta in (delta for _ in iter(served.has_work, False) for delta in served.step()):
        i, trace = int(delta.request_id), delta.trace
        assert (trace is not None) == (i % 2 == 0)
        if trace is not None:
            path = [guess.token_id for guess in trace.guesses if guess.accepted]
            if delta.finish_reason is None:  # the last step may be cut by the limit
                assert path == delta.new_token_ids[:-1]
        told[i] += delta.new_token_ids
    assert told == plain


def test_nodes_that_were_not_taken_are_left_out() -> None:
    tree = Tree(((), (0,), (1,), (0, 0), (1, 0), (1, 0, 0)))
    taken = torch.tensor([[True] * 6, [True, False, True, False, True, True]])
    guesses = TreeGuesses(taken, tree, [0, 1, 2, 3, 3, 4]).of(1, [10, 11, 12, 13], [2, 4])
    assert guesses == [Guess(11, -1, True), Guess(12, 0, True), Guess(13, 1, False)]
