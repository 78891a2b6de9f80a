"""Texts under grammars: the same with trees and without, complete, and no trouble for anyone else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from manyheads import LLM, EngineConfig, Grammar, SamplingParams
from manyheads.engine import grammars
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.engine.scheduler import StepsUnread
from manyheads.engine.step import PendingStep, RowResult, StepPlan, StepResult
from manyheads.errors import RequestError
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import EngineRequest, RequestDelta
from manyheads.speculation.draft import Draft
from manyheads.speculation.tree import Tree
from tests.engine.test_graphs import record
from tests.structured import EOS, SCHEMA, save_structured

PROMPT = [60, 61, 62, 63, 64, 65]
JSON = Grammar("json", SCHEMA)
GRAMMARS = {
    "json": JSON,
    "any json": Grammar("json", '{"type": "object"}'),
    "regex": Grammar("regex", "[a-c]{2,9}(the cat|the dog)+"),
    "choice": Grammar("choice", '["hello", "hello there", "the mat é"]'),
    "lark": Grammar("grammar", 'start: "<" item+ ">"\nitem: /[a-z]{1,3}/ ","'),
    "gbnf": Grammar("grammar", 'root ::= "a" ("b" | "c")+ "end"'),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_structured(tmp_path_factory.mktemp("structured"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


def build(folder: Path, **settings: Any) -> Engine:
    settings = {"num_blocks": 256, "num_threads": 1, "dtype": "float32", "tree_size": 8} | settings
    return build_engine(EngineConfig(model=str(folder), **settings))


@pytest.fixture(scope="module")
def engine(model: Path, overlaps: bool) -> Engine:
    return build(model)


def answers(engine: Engine, *params: SamplingParams, **fields: Any) -> list[list[RequestDelta]]:
    """What comes of requests that are sent together."""
    found: dict[str, list[RequestDelta]] = {}
    for i, each in enumerate(params):
        engine.add_request(EngineRequest(request_id=f"{i}", prompt_token_ids=PROMPT, params=each, **fields))
        found[f"{i}"] = []
    while engine.has_work():
        for delta in engine.step():
            found[delta.request_id].append(delta)
        engine.check_integrity()
    return list(found.values())


def tokens_of(deltas: list[RequestDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.new_token_ids]


def under(grammar: Grammar, **params: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 60, "seed": 5, "grammar": grammar} | params)).validate()


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 5},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {70: 5.0}},
    "log-probabilities": {"temperature": 1.0, "logprobs": 2},
    "min_tokens": {"temperature": 1.0, "min_tokens": 20},
}


@pytest.mark.parametrize("way", WAYS)
def test_trees_write_what_one_token_a_step_writes(engine: Engine, way: str) -> None:
    some = GRAMMARS if way in ("greedy", "sampled") else {"json": JSON}
    params = [under(grammar, **WAYS[way]) for grammar in some.values()]
    params += [SamplingParams(max_tokens=20, seed=1), SamplingParams(max_tokens=20, temperature=0.0)]
    one_by_one = [SamplingParams(**{**_fields(each), "speculative": False}) for each in params]
    for deltas, plain in zip(answers(engine, *params), answers(engine, *one_by_one), strict=True):
        assert tokens_of(deltas) == tokens_of(plain)
        assert deltas[-1].finish_reason == plain[-1].finish_reason != "error"
        assert deltas[-1].num_steps <= plain[-1].num_steps


def test_no_step_waits_for_a_grammar(model: Path, overlaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are launched before the ones before are read, and write what they write one after the other. What grammars
    leave no choice about is known before it is read, and what follows it comes at once."""
    params = [under(grammar, **WAYS[way]) for grammar in GRAMMARS.values() for way in ("greedy", "sampled")]
    params += [under(JSON, **WAYS["log-probabilities"]), under(JSON, **WAYS["min_tokens"], return_steps=True)]
    params += [SamplingParams(max_tokens=80, temperature=0.0)]
    beside, in_turn = build(model), build(model)
    monkeypatch.setattr(beside.runner, "overlaps", True, raising=False)
    monkeypatch.setattr(in_turn.runner, "overlaps", False, raising=False)
    wanted = answers(in_turn, *params)
    foreseen: list[tuple[RowResult, int]] = []
    unread: list[bool] = []
    schedule, launch = beside.scheduler.schedule, beside.runner.launch

    def launching(plan: StepPlan, follow: Callable[[], None]) -> PendingStep:
        unread.append(any(request.unread and request.matcher is not None for request in plan.decoding))
        step = launch(plan, follow)
        foreseen.extend((row, len(row.request.tokens)) for row in step.foreseen)
        return step

    def scheduling() -> StepPlan | None:
        try:
            return schedule()
        except StepsUnread:
            raise AssertionError("there are pages for all") from None

    monkeypatch.setattr(beside.runner, "launch", launching)
    monkeypatch.setattr(beside.scheduler, "schedule", scheduling)
    for found, expected in zip(answers(beside, *params), wanted, strict=True):
        assert tokens_of(found) == tokens_of(expected)
        assert found[-1].finish_reason == expected[-1].finish_reason
    assert any(unread)
    assert len(foreseen) > len(params) / 2
    for row, known in foreseen:
        request = row.request
        assert request.params.logprobs is None
        assert not request.params.return_steps
        assert request.tokens[known : known + len(row.tokens)] == row.tokens
        assert len(request.tokens) > known + len(row.tokens)


@pytest.mark.parametrize("drafter", ["medusa", "ngram"])
@pytest.mark.parametrize("rule", ["exact", "typical", "none"])
def test_what_is_foreseen_is_what_the_step_does(
    model: Path, engine: Engine, overlaps: bool, drafter: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trees that hold what follows, or that are filled up; a rule that accepts none of it foresees nothing."""
    served = build(model, drafter=drafter)
    ways = {"typical": {"acceptance": "typical"}, "none": {"acceptance": "typical"}, "exact": {}}
    ways["none"] |= {"typical_epsilon": 1.0, "typical_alpha": 1.0}
    params = [under(JSON, seed=seed, **ways[rule]) for seed in range(4)]
    (known,) = answers(engine, under(JSON, temperature=0.0))
    monkeypatch.setattr(f"{__name__}.PROMPT", [*PROMPT, *tokens_of(known), *PROMPT])
    monkeypatch.setattr(served.planner, "choose", lambda *args: served.planner.draft(8))
    monkeypatch.setattr(served.runner, "overlaps", True, raising=False)
    found: list[tuple[RowResult, RowResult]] = []
    launch = served.runner.launch

    def launching(plan: StepPlan, follow: Callable[[], None]) -> PendingStep:
        step = launch(plan, follow)
        read, foreseen = step.read, {row.request: row for row in step.foreseen}

        def reading() -> StepResult:
            result = read()
            found.extend((foreseen[row.request], row) for row in result.rows if row.request in foreseen)
            return result

        monkeypatch.setattr(step, "read", reading)
        return step

    monkeypatch.setattr(served.runner, "launch", launching)
    for deltas in answers(served, *params):
        assert deltas[-1].finish_reason in ("stop", "length")
    assert bool(found) == (rule != "none")
    for expected, row in found:
        assert row == expected
    if drafter == "ngram" and found:
        assert any(len(row.tokens) > 1 for row, _ in found)


def test_what_is_foreseen_is_shared_once_it_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows before whether its numbers are finite; a request that is given up meanwhile shares the rest."""
    served = build(model)
    monkeypatch.setattr(type(served.runner), "overlaps", True)
    launch, steps = served.runner.launch, list[PendingStep]()
    registered: list[int] = []
    monkeypatch.setattr(served.runner, "launch", lambda *args: steps.append(launch(*args)) or steps[-1])
    monkeypatch.setattr(served.scheduler.pages, "register", lambda table, tokens, count: registered.append(count))
    served.add_request(EngineRequest(request_id="x", prompt_token_ids=PROMPT, params=under(JSON, temperature=0.0)))
    while not (steps and steps[-1].foreseen):
        served.step()
    (row,) = steps[-1].foreseen
    served.abort("x")
    assert registered[-1] == row.request.cached_len - len(row.tokens)


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_grammar_may_name_an_end_token(
    model: Path, tokenizer: Tokenizer, overlaps: bool, speculative: bool, ignore_eos: bool
) -> None:
    """Where nothing else may follow, where something else might, and in the middle of what is certain."""
    served = build(model, drafter="ngram")
    text = "the dog is hello world"
    forms = [
        f'start: "{text}" <|end|> "the cat"',
        'start: /[ab]{2}/ <|end|> "c"',
        'start: /[ab]{2}/ (<|end|> | "c") "d"',
    ]
    known = [token for end in (" ", "<|end|>the cat") for token in tokenizer.encode(text + end)]
    for form in forms:
        params = under(Grammar("grammar", form), speculative=speculative, ignore_eos=ignore_eos, logit_bias={EOS: 90.0})
        served.add_request(EngineRequest(request_id="x", prompt_token_ids=known, params=params))
        deltas: list[RequestDelta] = []
        while served.has_work():
            deltas += served.step()
        tokens = tokens_of(deltas)
        assert (deltas[-1].finish_reason, deltas[-1].error) == ("stop", None)
        assert EOS in tokens
        assert (tokens[-1] == EOS) is not ignore_eos


def test_recordings_end_steps_that_draw_in_one_pass(
    model: Path, engine: Engine, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with grammars and log-probabilities beside others, which go on alone: of their steps, all but the drawing is
    recorded, with dummy rows behind them and for trees of any depth."""
    params = [under(GRAMMARS[name], **WAYS["sampled"]) for name in ("json", "regex")]
    params += [under(JSON, **WAYS["log-probabilities"]), SamplingParams(max_tokens=80, temperature=0.0)]
    params += [SamplingParams(max_tokens=80, seed=2, repetition_penalty=1.3)]
    served = build(model)
    recorded = record(served)
    recorded.record_passes(64, 128, {})
    draft = served.planner.draft(8)
    flat = Draft(Tree(((), *((rank,) for rank in range(draft.tree.num_nodes - 1)))), draft.nodes)
    assert draft.tree.max_depth > flat.tree.max_depth
    recorded.record_steps([(rows, flat) for rows in (1, 2, 4, 8)])
    ended: list[int] = []
    finish = recorded.finish
    monkeypatch.setattr(recorded, "finish", lambda *args: (ended.append(1), finish(*args))[1])
    found, wanted = answers(served, *params), answers(engine, *params)
    assert [tokens_of(deltas) for deltas in found] == [tokens_of(deltas) for deltas in wanted]
    assert found[2][1].logprobs == wanted[2][1].logprobs
    assert ended


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__struct_fields__}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_finished_texts_are_of_the_schema(engine: Engine, tokenizer: Tokenizer, temperature: float) -> None:
    seeds = range(4)
    found = answers(engine, *(under(JSON, temperature=temperature, seed=seed, max_tokens=120) for seed in seeds))
    for deltas in found:
        assert deltas[-1].finish_reason == "stop"
        assert deltas[-1].stop_token_id is None  # nothing but the end was possible, so no step was made for it
        value = json.loads(tokenizer.decode(tokens_of(deltas)))
        assert jsonschema_rs.is_valid(json.loads(SCHEMA), value)


@pytest.mark.parametrize("acceptance", ["exact", "typical"])
def test_lossy_acceptance_keeps_to_the_grammar(engine: Engine, tokenizer: Tokenizer, acceptance: str) -> None:
    params = [under(JSON, acceptance=acceptance, typical_epsilon=0.0, seed=seed, max_tokens=120) for seed in range(4)]
    for deltas in answers(engine, *params):
        text = tokenizer.decode(tokens_of(deltas))
        assert jsonschema_rs.is_valid(json.loads(SCHEMA), json.loads(text))


@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_without_heads_too(model: Path, engine: Engine, drafter: str | None) -> None:
    """Chains alone pay then."""
    other = build(model, drafter=drafter, speculative=drafter is not None)
    params = [under(JSON, temperature=1.0), under(GRAMMARS["lark"], temperature=0.0), SamplingParams(max_tokens=9)]
    params = [SamplingParams(**{**_fields(each), "seed": 3}) for each in params]
    for deltas, expected in zip(answers(other, *params), answers(engine, *params), strict=True):
        assert tokens_of(deltas) == tokens_of(expected)
    chained = answers(other, under(JSON, temperature=0.0))[0]
    assert chained[-1].num_steps < len(tokens_of(chained)) - 10  # names of fields take no steps of their own


def test_a_few_pages_and_preemptions_change_nothing(model: Path, engine: Engine) -> None:
    params = [under(JSON, seed=seed, max_tokens=100) for seed in range(5)]
    small = build(model, num_blocks=14, block_size=8, max_num_seqs=5, max_num_batched_tokens=16)
    assert [tokens_of(d) for d in answers(small, *params)] == [tokens_of(d) for d in answers(engine, *params)]
    assert small.stats().preemptions > 0


@pytest.mark.parametrize("way", ["sampled", "log-probabilities"])
def test_another_engine_goes_on_where_one_died(engine: Engine, way: str) -> None:
    params = under(JSON, **WAYS[way])
    (whole,) = answers(engine, params)
    tokens = tokens_of(whole)
    for cut in {len(tokens_of(whole[:n])) for n in (1, len(whole) - 1)} | {7}:
        (rest,) = answers(engine, params, output_token_ids=tokens[:cut], num_steps=1, resumes=True)
        assert tokens_of(rest) == tokens[cut:]
        assert rest[-1].finish_reason == whole[-1].finish_reason


def test_output_that_no_engine_wrote_is_refused(engine: Engine) -> None:
    (deltas,) = answers(engine, under(JSON), output_token_ids=[70, 71], resumes=True)
    assert (deltas[-1].error_kind, deltas[-1].error) == ("invalid", "the output so far does not follow the grammar")


def test_end_of_text_may_come_where_the_text_is_complete(engine: Engine, tokenizer: Tokenizer) -> None:
    params = under(Grammar("regex", "[ab]{2,40}"), logit_bias={EOS: 100.0})
    (deltas,) = answers(engine, params)
    assert (deltas[-1].finish_reason, deltas[-1].stop_token_id) == ("stop", EOS)
    assert set(tokenizer.decode(tokens_of(deltas)[:-1])) <= {"a", "b"}
    assert 2 <= len(tokenizer.decode(tokens_of(deltas)[:-1])) <= 4
    (deltas,) = answers(engine, SamplingParams(**{**_fields(params), "min_tokens": 9}))
    assert len(tokens_of(deltas)) == 10
    (deltas,) = answers(engine, SamplingParams(**{**_fields(params), "ignore_eos": True, "max_tokens": 15}))
    assert (deltas[-1].finish_reason, len(tokens_of(deltas))) == ("length", 15)


def test_a_text_token_may_stop_it_and_counts_as_text(engine: Engine, tokenizer: Tokenizer) -> None:
    (stop,) = tokenizer.encode("c")
    (deltas,) = answers(engine, under(Grammar("regex", "[ab]{3}c+"), stop_token_ids=(stop,), min_tokens=2))
    assert (deltas[-1].finish_reason, deltas[-1].stop_token_id) == ("stop", stop)
    # where nothing else is allowed, it may come before min_tokens
    (deltas,) = answers(engine, under(Grammar("regex", "c{3}"), stop_token_ids=(stop,), min_tokens=9))
    assert tokens_of(deltas) == [stop]


def test_a_model_without_an_end_token_ends_all_the_same(tmp_path: Path, overlaps: bool) -> None:
    engine = build(save_structured(tmp_path, eos=None))
    (deltas,) = answers(engine, under(JSON, max_tokens=120))
    assert (deltas[-1].finish_reason, deltas[-1].stop_token_id) == ("stop", None)


def test_limits_cut_a_chain(engine: Engine) -> None:
    (whole,) = answers(engine, under(JSON, temperature=0.0))
    for most in range(1, 9):
        (deltas,) = answers(engine, under(JSON, temperature=0.0, max_tokens=most))
        assert tokens_of(deltas) == tokens_of(whole)[:most]
        assert deltas[-1].finish_reason == "length"
    (deltas,) = answers(engine, under(JSON, temperature=0.0, max_steps=1))
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json", '{"type": "object", "not": {}}', 'Unimplemented keys: ["not"]'),
        ("json", '{"type": "strin"}', "strin"),
        ("json", '{"$ref": "#/nowhere"}', "/nowhere"),
        ("json", "false", "the schema false holds for nothing"),
        ("json", '{"type": "string", "pattern": "(a"}', "pattern '(a': regex parse error: error: unclosed group"),
        ("json", '{"allOf": [{"pattern": "(?=a)b"}]}', "pattern '(?=a)b': "),
        ("json", '{"patternProperties": {"(?!a)": {}}}', "patternProperties '(?!a)': "),
        ("json", '{"$ref": "#"}', "no text keeps to it: a $ref leads back to itself"),
        ("regex", "(a", "unclosed group"),
        ("regex", "a(?=b)", "invalid regex"),
        ("grammar", "start: nobody", "unknown name"),
        ("grammar", "}{", "neither Lark nor GBNF"),
        ("structural_tag", '{"structures": []}', "structures"),
        ("structural_tag", '{"structures": [{"begin": "a"}], "triggers": ["a"]}', "a tag has begin and end"),
    ],
)
def test_a_grammar_that_is_none_is_refused_and_others_go_on(
    engine: Engine, kind: Any, value: str, message: str
) -> None:
    bad, good = answers(engine, under(Grammar(kind, value)), under(GRAMMARS["choice"]))
    assert len(bad) == 1
    assert (bad[0].finish_reason, bad[0].error_kind, bad[0].new_token_ids) == ("error", "invalid", [])
    assert message in str(bad[0].error)
    assert "\n" not in str(bad[0].error)
    assert good[-1].finish_reason == "stop"


def test_what_takes_too_long_to_compile_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    never: Future[Any] = Future()
    never.set_running_or_notify_cancel()
    assert engine._grammars is not None
    monkeypatch.setattr(engine._grammars._compiler, "start", lambda grammar: never)
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 0.0)
    late, free = answers(engine, under(JSON), SamplingParams(max_tokens=5, ignore_eos=True))
    assert "the grammar (json) takes longer than 0 s to compile" in str(late[-1].error)
    assert late[-1].error_kind == "invalid"
    assert len(tokens_of(free)) == 5


def test_a_request_is_aborted_while_its_grammar_is_compiled(engine: Engine) -> None:
    choices = json.dumps([f"option {i}" for i in range(2000)])
    request = EngineRequest(request_id="x", prompt_token_ids=PROMPT, params=under(Grammar("choice", choices)))
    engine.add_request(request)
    engine.abort("x")
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    assert [delta.finish_reason for delta in deltas] == ["abort"]
    (again,) = answers(engine, request.params)
    assert again[-1].finish_reason == "stop"


def test_a_matcher_that_fails_ends_its_request_alone(engine: Engine, tokenizer: Tokenizer) -> None:
    # a thousand ways to read every text: more than the library follows
    words = " | ".join(f"w{i}" for i in range(3000))
    rules = "\n".join(f'w{i}: "a" "b" "{i}"' for i in range(3000))
    bad, good = answers(engine, under(Grammar("grammar", f"start: {words}\n{rules}")), under(JSON, max_tokens=100))
    assert (bad[-1].finish_reason, bad[-1].error_kind) == ("error", "invalid")
    assert "the grammar cannot be followed after 1 tokens: Parser Error" in str(bad[-1].error)
    assert good[-1].finish_reason == "stop"


@pytest.mark.parametrize("lexeme", ["x[max_tokens=4]: /[a-c]+/", 'x[stop="d"]: /[a-c]+/'])
def test_grammars_that_cannot_go_back_have_no_trees(engine: Engine, lexeme: str) -> None:
    """Such lexemes are counted as they come. Beside them, others have theirs."""
    params = under(Grammar("grammar", f'start: "<" x\n{lexeme}'), **WAYS["greedy"], max_tokens=12, return_steps=True)
    own, beside = answers(engine, params, under(JSON, **WAYS["greedy"], return_steps=True))
    guessed = [[delta.trace.guesses for delta in deltas if delta.trace is not None] for deltas in (own, beside)]
    assert not any(guessed[0])
    assert any(guessed[1])
    (plain,) = answers(engine, SamplingParams(**{**_fields(params), "speculative": False}))
    assert tokens_of(own) == tokens_of(plain) != []
    assert own[-1].finish_reason == plain[-1].finish_reason != "error"
    assert beside[-1].finish_reason == "stop"


def test_structural_tags(engine: Engine, tokenizer: Tokenizer) -> None:
    properties = {"x": {"enum": [17, 18]}}
    schema = {"type": "object", "properties": properties, "required": ["x"], "additionalProperties": False}
    form = {"structures": [{"begin": "<do>", "schema": schema, "end": "</do>"}], "triggers": ["<"]}
    (opening,) = tokenizer.encode("<")
    (deltas,) = answers(engine, under(Grammar("structural_tag", json.dumps(form)), logit_bias={opening: 9.0}))
    text = tokenizer.decode(tokens_of(deltas))
    assert re.match(r'[^<]*<do>\{"x": (17|18)\}</do>', text)


def test_an_engine_without_grammars_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_grammars", None)
    with pytest.raises(RequestError, match="holds no text to a grammar"):
        answers(engine, under(JSON))


def test_grammars_are_of_the_tokenizer_that_is_given(model: Path, tmp_path: Path) -> None:
    other = json.loads((model / "tokenizer.json").read_text())
    vocab = other["model"]["vocab"]
    lower = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab |= dict(zip(lower, [vocab[letter] for letter in reversed(lower)], strict=True))
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text())
    llm = LLM(str(model), tokenizer=tmp_path, num_blocks=64, num_threads=1, dtype="float32", tree_size=4)
    assert llm.tokenizer.encode("az") != Tokenizer.load(model).encode("az")
    params = SamplingParams(grammar=Grammar("regex", "[a-c]{3,9}(xyz)+"), max_tokens=12, seed=1)
    text = llm.generate("the cat", params)[0].outputs[0].text
    assert re.match("[a-c]{3,9}x?", text), text
