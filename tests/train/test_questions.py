"""The base comes up with prompts: the same ones every time, each once, and what trains on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manyheads import LLM, ConfigError, SamplingParams
from manyheads.cli import main
from manyheads.frontend.conversation import Conversation
from manyheads.frontend.tokenizer import VICUNA_TEMPLATE, Tokenizer
from manyheads.train import run
from manyheads.train.progress import Progress
from manyheads.train.prompts import Answer, read_prompts
from manyheads.train.questions import TRIES, ask_for_questions, user_turn
from manyheads.train.run import train
from manyheads.train.speaker import Speaker
from tests.server.tiny_tokenizer import END, make_hf, save_tokenizer, tiny_tokenizer
from tests.tiny import make_model
from tests.train.conftest import QUIET, settings
from tests.train.test_run import Killed, digests

COUNT = 12
AROUND = 4
"""Tokens that the template puts around a user's text."""


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose turns end soon, at any of a few tokens."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    eos = [4, *range(40, 56)]
    model = make_model(vocab_size=len(tiny_tokenizer().hf), max_position_embeddings=256, eos_token_id=eos)
    model.save_pretrained(folder)
    return save_tokenizer(folder)


def ask(base: Path, file: Path, progress: Progress = QUIET, **changes: Any) -> list[dict[str, Any]]:
    tokenizer = Tokenizer.load(base)
    with Speaker(str(base), settings(**({"questions": COUNT} | changes))) as speaker:
        ask_for_questions(speaker, tokenizer, user_turn(tokenizer), file, progress)
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("template", [None, VICUNA_TEMPLATE], ids=["special tokens", "text"])
def test_a_users_turn_is_that_of_real_conversations(template: str | None) -> None:
    tokenizer = Tokenizer(make_hf(), template)
    turn = user_turn(tokenizer)
    for text in ("cat", "The dog sat", "<|end|>", "9", "été"):
        tokens = tokenizer.encode_chat(Conversation([{"role": "user", "content": text}]))
        assert tokens[: len(turn.opens)] == turn.opens
        assert tokens[-len(turn.closes) :] == turn.closes
        middle = tokenizer.decode(tokens[len(turn.opens) : -len(turn.closes)], skip_special_tokens=False)
        assert middle.strip() == text
    end = tokenizer.hf.convert_tokens_to_ids(END)
    by_text = {"stop": ("ASSISTANT:",), "stop_token_ids": ()}
    assert turn.ends(tokenizer) == (by_text if template else {"stop": (), "stop_token_ids": (end,)})


def test_no_users_turn_to_open() -> None:
    with pytest.raises(ConfigError, match="need a chat template, and its tokenizer has none"):
        user_turn(Tokenizer(make_hf(None)))
    with pytest.raises(ConfigError, match="come up with questions: the chat template refuses"):
        user_turn(Tokenizer(make_hf("{{ raise_exception('a system message must come first') }}")))
    with pytest.raises(ConfigError, match="puts nothing before a user's text"):
        user_turn(Tokenizer(make_hf("{{ messages[0]['content'] }}<|end|>")))


def test_questions_are_whole_turns_of_users_words(talker: Path, tmp_path: Path) -> None:
    lines = ask(talker, tmp_path / "questions.jsonl", max_prompt_tokens=AROUND + 20)
    last = lines[-1]["number"] + 1
    llm = LLM(str(talker), speculative=False, max_num_seqs=3, device="cpu")
    params = [SamplingParams(max_tokens=20, seed=-1 - n) for n in range(last)]
    wanted: dict[str, int] = {}
    dropped = set()
    for number, output in enumerate(llm.generate([user_turn(llm.tokenizer).opens] * last, params)):
        answer = output.outputs[0]
        if answer.finish_reason != "stop":
            dropped.add("has no end")
        elif llm.tokenizer.special_ids & set(answer.token_ids[:-1]):
            dropped.add("holds special tokens")
        elif answer.text.strip():
            wanted.setdefault(answer.text.strip(), number)
    assert dropped == {"has no end", "holds special tokens"}
    assert {line["prompt"]: line["number"] for line in lines} == wanted
    assert len(wanted) == COUNT
    asked = [tiny_tokenizer().encode_chat(Conversation([{"role": "user", "content": text}])) for text in wanted]
    assert list(read_prompts([tmp_path / "questions.jsonl"], tiny_tokenizer())) == [Answer(ids, []) for ids in asked]


def test_questions_are_the_same_wherever_a_run_was_broken_off(talker: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    lines = ask(talker, file)
    data = file.read_bytes()
    assert ask(talker, tmp_path / "few.jsonl", questions=4) == lines[:4]
    assert ask(talker, tmp_path / "others.jsonl", seed=1) != lines
    file.write_bytes(data[: len(data) // 2])
    assert ask(talker, file) == lines
    assert file.read_bytes() == data
    # one that was there before is dropped, and another one takes its place
    file.write_text(json.dumps({"prompt": lines[5]["prompt"], "number": -1}) + "\n")
    found = ask(talker, file)
    assert found[1:] == lines[:5] + lines[6:]
    assert len({line["prompt"] for line in found}) == COUNT


def test_a_base_that_has_few_questions(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(user_turn(tiny_tokenizer()).opens) + len(user_turn(tiny_tokenizer()).closes) == AROUND
    file = tmp_path / "questions.jsonl"
    lines = ask(talker, file, Progress(), questions=40, max_prompt_tokens=AROUND + 8)
    assert 0 < len(lines) < 40
    said = f"the model came up with {len(lines)} questions in {TRIES * 40} tries, not with 40"
    assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"no question in 36 tries; give prompts \(--data\)"):
        ask(talker, tmp_path / "none.jsonl", max_prompt_tokens=AROUND + 1)
    with pytest.raises(ConfigError, match="no room for questions: prompts have at most 4 tokens"):
        ask(talker, tmp_path / "none.jsonl", max_prompt_tokens=AROUND)


def test_a_run_on_data_and_questions_resumes(
    talker: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(questions=COUNT, max_steps=2, max_new_tokens=8)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(str(talker), [prompts], whole, chosen, progress=QUIET)
    files = {path.name: path.read_bytes() for path in (whole / "training").iterdir()}
    asked = [*read_prompts([prompts, whole / "training" / "questions.jsonl"], tiny_tokenizer())]
    answers = [*read_prompts([whole / "training" / "answers.jsonl"], tiny_tokenizer())]
    assert [answer.prompt for answer in answers] == [prompt.prompt for prompt in asked]
    assert len(answers) == 40 + COUNT

    def dies(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "answer_all", dies)
        with pytest.raises(Killed):
            train(str(talker), [prompts], broken, chosen, progress=QUIET)
    questions = broken / "training" / "questions.jsonl"
    assert questions.read_bytes() == files["questions.jsonl"]
    questions.write_bytes(questions.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"other settings: questions is 3 and was 12"):
        train(str(talker), [prompts], broken, settings(questions=3), resume=True, progress=QUIET)
    train(str(talker), [prompts], broken, chosen, resume=True, progress=QUIET)
    for name in ("questions.jsonl", "answers.jsonl", "held_out.jsonl", "settings.json"):
        assert (broken / "training" / name).read_bytes() == files[name]
    assert digests(broken) == digests(whole)
    monkeypatch.setattr(run, "ask_for_questions", dies)  # what was answered is all that there was to ask
    train(str(talker), [prompts], broken, chosen, resume=True, progress=QUIET)


def test_another_template_does_not_resume(talker: Path, tmp_path: Path) -> None:
    chosen = settings(questions=4, max_steps=1, max_new_tokens=8)
    train(str(talker), [], tmp_path / "out", chosen, progress=QUIET)
    with pytest.raises(ConfigError, match="other prompts or another base model"):
        train(str(talker), [], tmp_path / "out", chosen, resume=True, chat_template="vicuna", progress=QUIET)


def test_the_command(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    some = ["--heads", "2", "--max-new-tokens", "8", "--length", "64", "--max-steps", "1", "--device", "cpu", "-q"]
    assert main(["train", str(talker), "--questions", "6", "--out", str(out), *some]) == 0
    assert len((out / "training" / "answers.jsonl").read_text().splitlines()) == 6
    assert main(["train", str(talker), "--out", str(tmp_path / "none"), *some]) == 2
    said = capsys.readouterr().err
    assert said == (
        "manyheads: error: there is nothing to learn from: give prompts (--data), "
        "or have the base ask some (--questions)\n"
    )
    plain = tmp_path / "plain"
    make_model(vocab_size=len(tiny_tokenizer().hf), max_position_embeddings=64).save_pretrained(plain)
    save_tokenizer(plain, None)
    assert main(["train", str(plain), "--questions", "6", "--out", str(tmp_path / "none"), *some]) == 2
    assert "need a chat template" in capsys.readouterr().err
