"""One prompt, its continuations, and what the engine says of them."""

from __future__ import annotations

from manyheads import SamplingParams
from manyheads.frontend.generation import Generation, OpenSequences, Place, Prompt, child_params, take
from manyheads.request import RequestDelta
from tests.server.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOKENS = TOKENIZER.encode("a cat")


def opened(generation: Generation) -> OpenSequences:
    return {request.request_id: output for request, output in generation.requests()}


def test_children_have_seeds_of_their_own() -> None:
    params = SamplingParams(n=3, seed=2**63 - 2)
    seeds = [child_params(params, i).seed for i in range(3)]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert child_params(SamplingParams(n=2), 1).seed is None


def test_a_request_for_each_continuation() -> None:
    generation = Generation("g", Prompt([1, 2], text="a"), SamplingParams(n=2, seed=5, max_tokens=3), TOKENIZER)
    requests = [request for request, _ in generation.requests()]
    assert [r.request_id for r in requests] == ["g-0", "g-1"]
    assert [(r.params.n, r.params.seed, r.params.max_tokens) for r in requests] == [(1, 5, 3), (1, 6, 3)]
    assert all(r.prompt_token_ids == [1, 2] for r in requests)


def test_requests_say_where_they_belong() -> None:
    place = Place(client="a", session="s", priority=2, timeout=1.5, cache_salt="x")
    generation = Generation("id", Prompt([1, 2]), SamplingParams(n=2), TOKENIZER, place)
    for request, _ in generation.requests():
        assert (request.client, request.session, request.priority) == ("a", "s", 2)
        assert (request.timeout, request.cache_salt) == (1.5, "x")


def test_deltas_find_their_continuation() -> None:
    first, second = (Generation(name, Prompt([1]), SamplingParams(n=2), TOKENIZER) for name in "fs")
    sequences = opened(first) | opened(second)
    aborted: list[str] = []
    update = take(RequestDelta(request_id="s-1", new_token_ids=TOKENS), sequences, aborted.append)
    assert update is not None
    assert (update.output, update.delta.text) == (second.outputs[1], "a cat")
    for name in ("s-1", "s-0"):
        take(RequestDelta(request_id=name, new_token_ids=[], finish_reason="length"), sequences, aborted.append)
    assert (second.finished, first.finished, list(sequences), aborted) == (True, False, ["f-0", "f-1"], [])
    result = second.result()
    assert (result.request_id, [o.text for o in result.outputs], result.finished) == ("s", ["", "a cat"], True)


def test_what_a_stop_string_ended_is_aborted_once() -> None:
    generation = Generation("g", Prompt([1]), SamplingParams(stop=("cat",)), TOKENIZER)
    sequences = opened(generation)
    aborted: list[str] = []
    update = take(RequestDelta(request_id="g-0", new_token_ids=TOKENS), sequences, aborted.append)
    assert update is not None
    assert (update.delta.text, update.delta.finish_reason, aborted, sequences) == ("a ", "stop", ["g-0"], {})
    answer = RequestDelta(request_id="g-0", new_token_ids=TOKENS, finish_reason="abort")
    assert take(answer, sequences, aborted.append) is None
    assert (generation.outputs[0].text, generation.outputs[0].finish_reason, aborted) == ("a ", "stop", ["g-0"])
