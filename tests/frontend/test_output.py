from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.frontend.output import SequenceOutput, StopScanner
from manyheads.request import RequestDelta, SamplingParams, TokenLogprobs
from tests.server.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.hf.eos_token_id


def delta(ids: list[int], **kwargs: Any) -> RequestDelta:
    return RequestDelta(request_id="r", new_token_ids=ids, **kwargs)


def run(text: str, size: int = 1, **params: Any) -> tuple[SequenceOutput, list[str]]:
    """Feed a text's tokens, `size` a step; the deltas that came out."""
    output = SequenceOutput(TOKENIZER, SamplingParams(**params))
    ids = TOKENIZER.encode(text)
    deltas = []
    for i in range(0, len(ids), size):
        last = i + size >= len(ids)
        deltas.append(output.push(delta(ids[i : i + size], finish_reason="length" if last else None)).text)
    return output, deltas


@settings(max_examples=300, deadline=None)
@given(
    st.text("abcé🐈", max_size=40),
    st.lists(st.text("abcé🐈", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 7),
    st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_cuts_and_never_leak(
    text: str, stops: list[str], size: int, include: bool
) -> None:
    output, deltas = run(text, size, stop=tuple(stops), include_stop_str_in_output=include)
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    if ends:
        end, start, stop = min(ends)
        assert output.text == text[: end if include else start]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    else:
        assert (output.text, output.stop_reason) == (text, None)
    assert "".join(deltas) == output.text
    if not include:
        assert not any(stop in output.text for stop in stops)


def test_beginnings_of_a_stop_string_are_held_back() -> None:
    scanner = StopScanner(["<stop>"])
    assert [scanner.feed(t) for t in ("a<", "st", "x<sto", "p")] == ["a", "", "<stx", ""]
    assert scanner.release() == "<stop"
    scanner = StopScanner(["aab"])
    assert [scanner.feed(c) for c in "aaab"] == ["", "", "a", ""]
    assert scanner.matched == "aab"


def test_tokens_after_the_stop_string_are_dropped() -> None:
    output = SequenceOutput(TOKENIZER, SamplingParams(stop=("cat",), logprobs=0))
    ids = TOKENIZER.encode("The cat sat on")
    logprobs = [TokenLogprobs(t, -1.0, 1, []) for t in ids]
    result = output.push(delta(ids, logprobs=logprobs, num_steps=1))
    assert result.text == "The " == output.text
    assert TOKENIZER.decode(output.token_ids) == "The cat"
    assert len(result.logprobs or []) == len(output.token_ids) == len(output.logprobs or [])
    assert output.needs_abort
    assert output.finish_reason == "stop"


def test_the_answer_to_an_abort_changes_nothing() -> None:
    output = SequenceOutput(TOKENIZER, SamplingParams(stop=("cat",)))
    output.push(delta(TOKENIZER.encode("The cat")))
    late = output.push(delta(TOKENIZER.encode(" sat"), finish_reason="abort"))
    assert (late.text, late.token_ids, late.finish_reason) == ("", [], None)
    assert (output.text, output.finish_reason, output.stop_reason) == ("The ", "stop", "cat")


def test_a_stop_string_in_the_last_delta_needs_no_abort() -> None:
    output, _ = run("The cat", size=10, stop=("cat",))
    assert (output.finish_reason, output.needs_abort) == ("stop", False)


def test_eos_is_not_shown() -> None:
    ids = [*TOKENIZER.encode("The cat"), EOS]
    for skip, shown in ((True, "The cat"), (False, "The cat<|end|>")):
        output = SequenceOutput(TOKENIZER, SamplingParams(skip_special_tokens=skip))
        output.push(delta(ids, finish_reason="stop", stop_token_id=EOS))
        assert (output.text, output.stop_reason, len(output.token_ids)) == (shown, None, len(ids))


@pytest.mark.parametrize(("include", "shown"), [(False, "The"), (True, "The cat")])
def test_stop_token(include: bool, shown: str) -> None:
    ids = TOKENIZER.encode("The cat")
    params = SamplingParams(stop_token_ids=(ids[-1],), include_stop_str_in_output=include)
    output = SequenceOutput(TOKENIZER, params)
    output.push(delta(ids, finish_reason="stop", stop_token_id=ids[-1]))
    assert (output.text, output.stop_reason) == (shown, ids[-1])


def test_no_stop_string_before_min_tokens() -> None:
    output, _ = run("cat cat cat cat", stop=("cat",), min_tokens=3)
    assert (output.text, len(output.token_ids), output.finish_reason) == ("cat cat ", 3, "stop")


def test_held_text_comes_out_at_the_end() -> None:
    output, _ = run("The ca", stop=("cat",))
    assert (output.text, output.finish_reason) == ("The ca", "length")
    output = SequenceOutput(TOKENIZER, SamplingParams(stop=("cat",)))
    output.push(delta(TOKENIZER.encode("The ca")))
    assert output.push(delta([], finish_reason="abort")).text == "ca"


def test_error() -> None:
    output = SequenceOutput(TOKENIZER, SamplingParams())
    output.push(delta([], finish_reason="error", error="no", error_kind="engine"))
    assert (output.result().finish_reason, output.result().error) == ("error", "no")
