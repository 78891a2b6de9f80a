"""LLM around the fake engine: the front end of offline use."""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any

import pytest

from manyheads import LLM, ConfigError, EngineConfig, Grammar, RequestError, SamplingParams
from manyheads.engine import build
from manyheads.frontend.conversation import Conversation
from manyheads.interrupt import between_steps
from tests.server.fake_engine import TEXT, FakeEngine
from tests.server.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IDS = TOKENIZER.encode("hello there")
HELLO = [{"role": "user", "content": "hello"}]


def make(**settings: Any) -> LLM:
    engine: Any = FakeEngine(EngineConfig(**settings))
    return LLM(engine=engine, tokenizer=TOKENIZER)


@pytest.fixture
def llm() -> LLM:
    return make()


def text_of(num_tokens: int) -> str:
    return TOKENIZER.decode(TOKENIZER.encode(TEXT)[:num_tokens])


def is_idle(llm: LLM) -> bool:
    llm.engine.step()  # the answers to aborts
    return not llm.engine.has_work() and not llm._open


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [
        ("hello there", ["hello there"]),
        (["hello there", "a"], ["hello there", "a"]),
        (IDS, [None]),
        ([IDS, "a"], [None, "a"]),
        ({"prompt": "a"}, ["a"]),
        ([{"prompt_token_ids": IDS}, {"prompt": "a"}], [None, "a"]),
        ({"prompt": "shown", "prompt_token_ids": IDS}, ["shown"]),
        ([], []),
    ],
)
def test_forms_of_prompts(llm: LLM, prompts: Any, texts: list[str | None]) -> None:
    outputs = llm.generate(prompts, SamplingParams(max_tokens=7))
    assert [o.prompt for o in outputs] == texts
    for output in outputs:
        assert output.prompt_token_ids == (TOKENIZER.encode("a") if output.prompt == "a" else IDS)
        assert output.finished
        (one,) = output.outputs
        assert (one.text, one.finish_reason, len(one.token_ids), one.num_steps) == (text_of(7), "length", 7, 3)
    assert is_idle(llm)


def test_grammars_need_a_tokenizer_that_an_engine_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(grammar=Grammar("regex", "[ab]"), max_tokens=5)
    make().generate("a", SamplingParams(max_tokens=5))
    monkeypatch.setattr(build, "build_engine", FakeEngine)
    with pytest.raises(RequestError, match="a grammar needs a tokenizer from a folder"):
        LLM(tokenizer=TOKENIZER).generate("a", params)


def test_params_for_each(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n) for n in (5, 2)]
    outputs = llm.generate(["a", "b"], params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [5, 2]
    with pytest.raises(RequestError, match="3 prompts but 2 sampling parameters"):
        llm.generate(["a", "b", "c"], params)


def test_without_params_it_goes_on_to_the_end(llm: LLM) -> None:
    (output,) = llm.generate("a")
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == (text_of(2047), "length")
    assert len(output.outputs[0].token_ids) == 2048 - len(output.prompt_token_ids)


def test_several_continuations(llm: LLM) -> None:
    first, second = llm.generate(["a", "b"], SamplingParams(n=3, max_tokens=4, seed=1, logprobs=2))
    assert [o.index for o in first.outputs] == [o.index for o in second.outputs] == [0, 1, 2]
    assert first.request_id != second.request_id
    for output in (*first.outputs, *second.outputs):
        assert output.text == text_of(4)
        assert [len(entry.top) for entry in output.logprobs or []] == [2] * 4


def test_stop_strings(llm: LLM) -> None:
    (output,) = llm.generate("a", SamplingParams(stop=("on the mat", "zz")))
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("The cat 🐈 sat ", "on the mat")
    assert output.outputs[0].finish_reason == "stop"
    (output,) = llm.generate("a", SamplingParams(stop=("mat",), include_stop_str_in_output=True))
    assert output.outputs[0].text == "The cat 🐈 sat on the mat"
    assert is_idle(llm)


def test_chat(llm: LLM) -> None:
    (output,) = llm.chat(HELLO, SamplingParams(max_tokens=6))
    assert output.prompt_token_ids == TOKENIZER.encode_chat(Conversation(HELLO))
    assert (output.prompt, output.outputs[0].text) == (None, text_of(6))
    two = llm.chat([HELLO, [{"role": "system", "content": "x"}, *HELLO]], SamplingParams(max_tokens=2))
    assert len(two[0].prompt_token_ids) < len(two[1].prompt_token_ids)
    assert llm.chat([]) == []
    with pytest.raises(RequestError, match="messages must not be empty"):
        llm.chat([[]])


def test_stream_chat(llm: LLM) -> None:
    texts = [o.outputs[0].text for o in llm.stream_chat(HELLO, SamplingParams(max_tokens=20))]
    assert len(texts) == 7
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == text_of(20)


def test_a_stream_that_is_left_is_aborted(llm: LLM) -> None:
    stream = llm.stream_chat(HELLO)
    next(stream)
    assert llm.engine.has_work()
    stream.close()  # type: ignore[attr-defined]
    assert is_idle(llm)


def test_generating_while_a_stream_is_open(llm: LLM) -> None:
    stream = llm.stream_chat(HELLO, SamplingParams(max_tokens=30))
    next(stream)
    assert llm.generate("a", SamplingParams(max_tokens=15))[0].outputs[0].text == text_of(15)
    *_, last = stream
    assert (last.outputs[0].text, last.outputs[0].finish_reason) == (text_of(30), "length")
    assert is_idle(llm)


def test_more_prompts_than_the_queue_holds() -> None:
    llm = make(max_queue=2)
    outputs = llm.generate([f"prompt {i}" for i in range(7)], SamplingParams(max_tokens=5, n=2))
    assert all(o.text == text_of(5) for output in outputs for o in output.outputs)
    assert [o.prompt for o in outputs] == [f"prompt {i}" for i in range(7)]


def test_a_sequence_that_fails_fails_alone(llm: LLM) -> None:
    good, bad = llm.generate(["a", "FAIL"], SamplingParams(max_tokens=5))
    assert good.outputs[0].finish_reason == "length"
    assert (bad.outputs[0].finish_reason, bad.outputs[0].error, bad.finished) == ("error", "told to fail", True)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([[]], {}, "the prompt is empty"),
        ({}, {}, "needs 'prompt'"),
        ([10**9], {}, "token ids must be between 0 and"),
        ([-1], {}, "token ids must be between 0 and"),
        ("a " * 3000, {}, "exceed the context of 2048 tokens"),
        ("a", {"max_tokens": 2048}, "exceed the context of 2048 tokens"),
        ("a", {"max_tokens": -1}, "max_tokens must be at least 0"),
        ("a", {"temperature": float("nan")}, "temperature must be between 0 and 100, not nan"),
        ("a", {"n": 10**6}, "n must be between 1 and 64"),
        ("a", {"stop": ("x",) * 10_000}, "at most 16 stop strings"),
        ("a", {"stop": ("",)}, "must not be empty"),
        ("a", {"stop_token_ids": (10**6,)}, "token ids must be between 0 and"),
        ("a", {"logit_bias": {10**6: 1.0}}, "token ids must be between 0 and"),
        ("a", {"acceptance": "most"}, "acceptance must be exact or typical, not 'most'"),
        ("a", {"top_k": 2**70}, "top_k must be below"),
        ("a", {"min_tokens": 2**62}, "min_tokens must be below"),
    ],
)
def test_bad_input(llm: LLM, prompt: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(["good", *(prompt if prompt == [[]] else [prompt])], SamplingParams(**params))
    assert is_idle(llm)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'tree'; there are: .*tree_size"):
        LLM(tree=3)
    with pytest.raises(ConfigError, match="tree_size must be between 1 and 64"):
        LLM(tree_size=0)
    with pytest.raises(ConfigError, match="'nowhere' is no folder; give a local folder, a hub id"):
        LLM("nowhere")


def test_ctrl_c_waits_for_the_end_of_a_step(llm: LLM) -> None:
    steps = 0
    plain = llm.engine.step

    def step() -> Any:
        nonlocal steps
        if steps == 2:
            os.kill(os.getpid(), signal.SIGINT)
        deltas = plain()
        steps += 1
        return deltas

    llm.engine.step = step  # type: ignore[method-assign]

    def run() -> None:
        with between_steps() as check:
            for _ in llm.stream_chat(HELLO):
                check()

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert steps == 3
    assert signal.getsignal(signal.SIGINT) is handler
    assert is_idle(llm)


def test_a_second_ctrl_c_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), between_steps():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
