"""A place in a grammar: down a tree and back, in vocabularies of every kind."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLExecutor
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from manyheads import Grammar
from manyheads.engine.compiler import Compiler
from manyheads.engine.matcher import Matcher, Words, first_line, write_nodes, write_roots
from manyheads.engine.vocabulary import Vocabulary
from manyheads.errors import RequestError
from manyheads.grammar import Kind
from tests.server.tiny_tokenizer import make_backend
from tests.structured import EOS, SCHEMA


def sentencepiece_like() -> Tokenizer:
    """Spaces are "▁", the first one is added, and what has no piece is spelt in bytes, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(['{"name": "the cat", "age": 12} the dog "tags": ["mat"]'] * 9, trainer)
    data = json.loads(tokenizer.to_str())
    # bytes are pieces of the vocabulary, not special tokens
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(data))


BACKENDS = {"byte-level": make_backend, "SentencePiece": sentencepiece_like}


@lru_cache
def backend(kind: str) -> Tokenizer:
    return BACKENDS[kind]()


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiler]:
    found = {}
    for kind in BACKENDS:
        folder: Path = tmp_path_factory.mktemp("vocabulary")
        backend(kind).save(str(folder / "tokenizer.json"))
        found[kind] = Compiler(Vocabulary(folder, backend(kind).get_vocab_size() + 5, (EOS,)))
    return found


def matcher(compiler: Compiler, grammar: Grammar) -> Matcher:
    return Matcher(compiler.start(grammar).result().deep_copy(), compiler.vocabulary, [EOS])


def allowed(place: Matcher, early_stops: tuple[int, ...] = ()) -> list[int]:
    words = written(place, early_stops)
    assert place.error is None
    return [int(token) for token in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]


def written(place: Matcher, early_stops: tuple[int, ...] = ()) -> Words:
    """The mask of one text."""
    words: Words = np.empty(place.vocabulary.num_words, dtype=np.int32)
    write_roots([place], words[None], [early_stops])
    return words


def walked(place: Matcher, below: dict[int, list[int]], tokens: list[int]) -> tuple[list[int], NDArray[np.int32]]:
    """The places of a tree that there is a way to, and the masks of what may come behind them."""
    room = np.empty((len(tokens), place.vocabulary.num_words), dtype=np.int32)
    places, _ = place.walk(below, tokens, written(place), room)
    write_nodes([place] * len(places), room[: len(places)], [()] * len(places))
    return places, room[: len(places)]


PIECES = st.sampled_from(
    [
        {"type": "string", "maxLength": 5},
        {"type": "integer", "minimum": -3, "maximum": 1200},
        {"type": "number", "minimum": 0, "maximum": 2},
        {"enum": ["é", "a", "ab", None, 7]},
        {"type": "boolean"},
        {"type": "string", "pattern": "^[a-c]{1,3}x$"},
    ]
)
SCHEMAS = st.recursive(
    PIECES,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["name", "age", "the cat", "ü"]), inner, min_size=1, max_size=3).map(
            lambda p: {"type": "object", "properties": p, "required": list(p), "additionalProperties": False}
        ),
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
        st.lists(inner, min_size=2, max_size=2).map(lambda any_of: {"anyOf": any_of}),
    ),
    max_leaves=4,
)


def looked_at(place: Matcher, others: list[int], choice: int) -> None:
    """What a tree of two depths finds is what texts find that go there; and no token has a way that is not allowed."""
    ways: list[tuple[int, ...]] = [(other,) for other in others]
    for other in others:
        there = deepcopied(place)
        there.take([other], 0)
        if not there.is_complete:
            inner = [token for token in allowed(there) if token != EOS]
            ways += [(other, inner[choice % len(inner)])] if inner else []
    forbidden = [token for token in range(40) if token not in {*allowed(place), EOS}][:3]
    ways += [(token,) for token in forbidden]
    below: dict[int, list[int]] = {}
    for i, way in enumerate(ways):
        below.setdefault(ways.index(way[:-1]) if len(way) > 1 else -1, []).append(i)
    places, words = walked(place, below, [way[-1] for way in ways])
    assert sorted(places) == list(range(len(ways) - len(forbidden)))
    for i, found in zip(places, words, strict=True):
        there = deepcopied(place)
        there.take(ways[i], 0)
        expected = written(there)
        assert there.error is None
        assert (found == expected).all()


def deepcopied(place: Matcher) -> Matcher:
    """Another one at the same place."""
    return Matcher(place._followed.deep_copy(), place.vocabulary, [EOS])


@pytest.mark.parametrize("kind", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(schema=SCHEMAS, choices=st.lists(st.integers(0, 10**6), min_size=150, max_size=150))
def test_any_way_through_a_schema_is_of_the_schema(
    compilers: dict[str, Compiler], kind: str, schema: dict[str, object], choices: list[int]
) -> None:
    compiler = compilers[kind]
    place = matcher(compiler, Grammar("json", json.dumps(schema)))
    text: list[int] = []
    for choice in choices:
        tokens = allowed(place)
        if EOS in tokens:
            # the end may come: JSON goes on behind it only where it is a number
            assert place.take([EOS], 0) == ([EOS], False)
            break
        token = tokens[choice % len(tokens)]
        if choice % 3 == 0:  # other ways are looked at before this one is taken
            others = [other for other in tokens[:: max(1, len(tokens) // 4)] if other != EOS]
            looked_at(place, others, choice)
            assert allowed(place) == tokens
        taken, is_whole = place.take([token], choice % 4)
        text += taken
        if choice % 5 == 0:  # the same place is found by the tokens alone
            again = matcher(compiler, Grammar("json", json.dumps(schema)))
            assert again.take(text, 0) == (text, is_whole)
            assert again.is_complete == place.is_complete
            assert again.is_complete or allowed(again) == allowed(place)
        if is_whole:
            break
    else:
        return
    value = json.loads(b"".join(_bytes(kind, token) for token in text))
    assert jsonschema_rs.is_valid(schema, value)


def _bytes(kind: str, token: int) -> bytes:
    """What a token stands for, by the tokenizer's own decoder."""
    piece = backend(kind).id_to_token(token) or ""
    if kind == "SentencePiece":
        is_byte = piece.startswith("<0x") and len(piece) == 6
        return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()
    from manyheads.frontend.tokenizer import _BYTE_OF_CHAR

    return bytes(_BYTE_OF_CHAR[c] for c in piece)


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_chain_is_the_only_way_and_ends_where_there_is_a_choice(compilers: dict[str, Compiler], kind: str) -> None:
    place = matcher(compilers[kind], Grammar("json", SCHEMA))
    chain, is_whole = place.take([], 100)
    # the last of what is certain may be part of a longer token
    text = b"".join(_bytes(kind, token) for token in chain)
    assert len(text) >= 3
    assert b'{"name": "'.startswith(text)
    assert not is_whole
    step = matcher(compilers[kind], Grammar("json", SCHEMA))
    for token in chain:
        assert allowed(step) == [token]
        assert walked(step, {-1: [0]}, [token + 1])[0] == []
        assert step.take([token], 0) == ([token], False)
    assert allowed(step) == allowed(place) != []
    assert len(allowed(place)) > 1


def test_complete_texts_go_nowhere(compilers: dict[str, Compiler]) -> None:
    compiler = compilers["byte-level"]
    place = matcher(compiler, Grammar("choice", '["hello"]'))
    tokens, is_whole = place.take([], 100)
    assert (backend("byte-level").decode(tokens), is_whole) == ("hello", True)
    assert place.take([7, 8], 100) == ([], True)
    assert walked(place, {-1: [0]}, [7])[0] == []
    assert len(allowed(place)) >= compiler.vocabulary.tokens.vocab_size  # whatever is drawn is dropped


def test_end_tokens_stand_beside_what_may_follow(compilers: dict[str, Compiler]) -> None:
    place = matcher(compilers["byte-level"], Grammar("regex", "a+"))
    assert EOS not in allowed(place)
    place.take(allowed(place)[:1], 0)
    assert EOS in allowed(place)
    assert EOS not in allowed(place, early_stops=(EOS,))
    assert walked(place, {-1: [0]}, [EOS])[0] == []  # nothing stands behind it
    only = matcher(compilers["byte-level"], Grammar("regex", "a"))
    (a,) = allowed(only)
    assert allowed(only, early_stops=(a,)) == [a]


def test_what_no_text_has_is_in_no_chain(tmp_path: Path) -> None:
    """A token that the model does not know, and an end of texts that the tokenizer takes for text."""
    tokenizer = backend("byte-level")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size, hello = tokenizer.get_vocab_size(), tokenizer.token_to_id("hello")
    foreign = Compiler(Vocabulary(tmp_path, size - 1, ())), Grammar("grammar", f'start: "the" <[{size - 1}]> "b" "c"')
    textual = Compiler(Vocabulary(tmp_path, size, (hello,))), Grammar("grammar", 'start: "the" "hello" "b" "c"')
    for compiler, grammar in (foreign, textual):
        place = matcher(compiler, grammar)
        assert place.take([], 9) == ([tokenizer.token_to_id("the")], False)
        written(place)
        assert place.error == "no token of the model's vocabulary goes on with the text"


def test_compiled_grammars_are_kept_and_the_oldest_forgotten(
    compilers: dict[str, Compiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyheads.engine.compiler.MAX_GRAMMARS", 2)
    compiler = Compiler(compilers["byte-level"].vocabulary)
    one, two, three = (Grammar("regex", text) for text in ("a", "b", "c"))
    first, second = compiler.start(one), compiler.start(two)
    assert compiler.start(one) is first
    compiler.start(three)
    assert compiler.start(one) is first
    assert compiler.start(two) is not second


FRAGMENTS = r"""
{"type": "object" "string" "properties": "items": "pattern": "$ref": "#" "anyOf": "allOf": "enum": "const": "format":
"date" "maxLength": "minItems": "x-guidance": true null { } [ ] , : ( ) a b* + ? {2,} {1,9999} | \ [^ ^ $ . -1 1e999
start: root ::= "a" %json %regex %ignore @x /a/ x é 😀
"""
PARTS = [*FRAGMENTS.split(), " ", "\n", "\0"]


@pytest.mark.parametrize("kind", ["json", "regex", "grammar", "choice", "structural_tag"])
@settings(max_examples=int(os.environ.get("HOSTILE_GRAMMARS", "40")), deadline=None)
@given(pieces=st.lists(st.sampled_from(PARTS), min_size=1, max_size=25), choices=st.lists(st.integers(0, 999)))
def test_no_grammar_breaks_the_engine(
    compilers: dict[str, Compiler], kind: Kind, pieces: list[str], choices: list[int]
) -> None:
    grammar = Grammar(kind, "".join(pieces))
    try:
        grammar.validate()
        place = matcher(compilers["byte-level"], grammar)
    except RequestError:
        return
    for choice in choices:
        raw = np.zeros(place.vocabulary.num_words, dtype=np.int32)
        if place.error is None and not place.is_complete:
            place._followed.unsafe_compute_mask_ptr(raw.ctypes.data, raw.nbytes)
            chain = place._find_chain()[:1]
            assert not chain or np.flatnonzero(np.unpackbits(raw.view(np.uint8), bitorder="little")).tolist() == [
                *chain
            ]
        words = written(place)
        if place.error is not None or place.is_complete:
            return
        tokens = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        place.take([int(tokens[choice % len(tokens)])], 10)


def test_masks_of_many_texts_are_those_of_each(compilers: dict[str, Compiler], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some open, some in a chain, one complete, one that the library gives up; by threads and without."""
    compiler = compilers["byte-level"]
    monkeypatch.setattr("manyheads.engine.matcher.MANY_MASKS", 2)
    monkeypatch.setitem(compiler.vocabulary.__dict__, "executor", Executor())
    rules = "\n".join(f'w{i}: "a" "b" "{i}"' for i in range(3000))
    ways = Grammar("grammar", "start: " + " | ".join(f"w{i}" for i in range(3000)) + f"\n{rules}")
    given_ = [Grammar("regex", "[a-c]{2,9}d"), Grammar("json", SCHEMA), Grammar("regex", "abc[xy]"), ways]
    given_ += [Grammar("regex", "[ab]"), Grammar("regex", "[a-z]+"), Grammar("regex", "(a|b)c*")]
    token = backend("byte-level").token_to_id("a")
    early = [(EOS,), (), (), (), (), (EOS,), ()]
    cases = [[matcher(compiler, grammar) for grammar in given_] for _ in range(3)]
    for places in cases:
        for place in (places[0], places[3], places[4]):
            assert place.take([token], 0)[0] == [token]
        assert places[2].chain
    expected = np.stack([written(place, stops) for place, stops in zip(cases[0], early, strict=True)])
    for by_threads, places in enumerate(cases[1:]):
        words = np.empty_like(expected)
        write_roots(places, words, early, bool(by_threads))
        assert (words == expected).all()
        assert [place.error for place in places] == [place.error for place in cases[0]]
        assert [place.is_complete for place in places] == [i == 4 for i in range(len(given_))]
        assert [place.error is None for place in places] == [i != 3 for i in range(len(given_))]
    assert compiler.vocabulary.executor.calls == 1  # type: ignore[union-attr]


class Executor:
    """The library's, on two threads, which counts what it is asked."""

    def __init__(self) -> None:
        self.inner, self.calls = LLExecutor(2), 0

    def unsafe_compute_mask_ptr(self, *args: Any) -> None:
        self.calls += 1
        self.inner.unsafe_compute_mask_ptr(*args)


@pytest.mark.parametrize(("cores", "threads"), [(2, 0), (4, 0), (8, 2), (16, 4), (32, 4)])
def test_few_threads_make_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int) -> None:
    made: list[int] = []
    monkeypatch.setattr("llguidance.LLExecutor", made.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    Vocabulary(tmp_path, 2, ()).executor  # noqa: B018
    assert made == [threads] * (threads > 0)


def test_a_vocabulary_without_the_letters_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    place = matcher(Compiler(Vocabulary(tmp_path, 2, ())), Grammar("regex", "a[xy]"))
    place.take([0], 0)
    written(place)
    assert place.error == "no token of the model's vocabulary goes on with the text"


@pytest.mark.parametrize(
    "message",
    [
        "initial lexer configuration (grammar) too big (limit for this grammar: 2000000); consider increasing "
        "limits.initial_lexer_fuel",
        "panic: assertion failed: grammar.symbols.len() < u16::MAX\n<backtrace>",
    ],
)
def test_who_asks_is_told_no_limits_to_raise(message: str) -> None:
    assert first_line(message) == "it is more than a grammar may take here; make it smaller, or simpler"
    assert first_line("regex parse error:\n  (a\nerror: unclosed group") == "regex parse error: error: unclosed group"
