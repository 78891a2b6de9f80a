"""Libraries that hold text to a grammar, on this machine's CPU; writes results/grammars.json.

    python benchmarks/grammars.py                 # llguidance and, where it is installed, xgrammar

Two hundred JSON Schemas (schemas.py), with the vocabulary of the built-in model and with a large one that is trained
here on Python's own sources: how long a schema takes to compile, how long the mask of a token takes and the step of a
matcher, for how many tokens of a text there is no choice, and which schemas are refused. The texts that the matchers
follow are drawn at random among what the masks allow, the same way for both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import statistics
import sysconfig
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
from common import BUILTIN, ROOT, machine, save, table
from numpy.typing import NDArray
from schemas import Schema, schemas
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

MOST_TOKENS = 150
"""Tokens after which a text is given up."""


class Library(ABC):
    """One library with one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        self.eos, self.size = eos, tokenizer.get_vocab_size()
        self.bits = np.zeros((1, -(-self.size // 32)), dtype=np.int32)

    @abstractmethod
    def compile(self, schema: Schema) -> Any:
        """A matcher. Raises ValueError: the schema is refused."""

    @abstractmethod
    def mask(self, matcher: Any) -> None:
        """Fill `bits` with what may come next."""

    @abstractmethod
    def accept(self, matcher: Any, token: int) -> None:
        """Go on."""

    @abstractmethod
    def forced(self, matcher: Any) -> list[int]:
        """Tokens to which there is no alternative, if the library says so."""

    @abstractmethod
    def ended(self, matcher: Any) -> bool:
        """Whether the text is whole."""


class Llguidance(Library):
    name = "llguidance"

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        super().__init__(tokenizer, eos)
        from llguidance import LLTokenizer

        self.tokenizer = LLTokenizer(tokenizer.to_str(), eos_token=[eos])

    def compile(self, schema: Schema) -> Any:
        from llguidance import LLMatcher

        options: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        matcher = LLMatcher(self.tokenizer, LLMatcher.grammar_from_json_schema(schema, options), log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def mask(self, matcher: Any) -> None:
        matcher.unsafe_compute_mask_ptr(self.bits.ctypes.data, self.bits.nbytes)

    def accept(self, matcher: Any, token: int) -> None:
        matcher.consume_token(token)

    def forced(self, matcher: Any) -> list[int]:
        tokens: list[int] = matcher.compute_ff_tokens()
        return tokens

    def ended(self, matcher: Any) -> bool:
        return bool(matcher.is_stopped())


class Xgrammar(Library):
    name = "xgrammar"

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        super().__init__(tokenizer, eos)
        import torch
        import xgrammar

        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        self.info = xgrammar.TokenizerInfo(
            [piece for piece, _ in vocabulary], xgrammar.VocabType.BYTE_LEVEL, stop_token_ids=[eos]
        )
        self.compiler = xgrammar.GrammarCompiler(self.info, max_threads=1, cache_enabled=False)
        self.tensor = torch.from_numpy(self.bits)

    def compile(self, schema: Schema) -> Any:
        import xgrammar

        try:
            compiled = self.compiler.compile_json_schema(schema, any_whitespace=False, separators=(", ", ": "))
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return xgrammar.GrammarMatcher(compiled)

    def mask(self, matcher: Any) -> None:
        # it leaves the mask as it is where everything is allowed
        self.bits.fill(-1)
        matcher.fill_next_token_bitmask(self.tensor)

    def accept(self, matcher: Any, token: int) -> None:
        matcher.accept_token(token)

    def forced(self, matcher: Any) -> list[int]:
        tokens: list[int] = matcher.find_jump_forward_tokens()
        return tokens

    def ended(self, matcher: Any) -> bool:
        return bool(matcher.is_terminated())


def large_tokenizer(size: int) -> Tokenizer:
    """A byte-level vocabulary of so many tokens, of Python's own sources."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py"))
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8", errors="replace") for path in files), trainer)
    return tokenizer


def follow(library: Library, matcher: Any, rng: random.Random) -> dict[str, Any]:
    """A text of a schema at random: microseconds of each mask and step, how many tokens were forced, and the tokens."""
    masks: list[float] = []
    steps: list[float] = []
    tokens: list[int] = []
    forced = 0
    while len(tokens) < MOST_TOKENS and not library.ended(matcher):
        start = time.perf_counter()
        chain = library.forced(matcher)
        for token in chain:
            library.accept(matcher, token)
        steps.append((time.perf_counter() - start) * 1e6)
        tokens += chain
        forced += len(chain)
        if library.ended(matcher):
            break
        start = time.perf_counter()
        library.mask(matcher)
        masks.append((time.perf_counter() - start) * 1e6)
        allowed = np.flatnonzero(np.unpackbits(library.bits[0].view(np.uint8), bitorder="little"))
        if library.eos in allowed:
            tokens.append(library.eos)
            break
        token = int(rng.choice(allowed))
        start = time.perf_counter()
        library.accept(matcher, token)
        steps.append((time.perf_counter() - start) * 1e6)
        tokens.append(token)
    return {"masks": masks, "steps": steps, "tokens": tokens, "forced": forced}


def measure(library: Library, tokenizer: Tokenizer, count: int) -> dict[str, Any]:
    compiled: list[float] = []
    masks: list[float] = []
    steps: list[float] = []
    refused: list[str] = []
    num_tokens = forced = whole = valid = 0
    for i, schema in enumerate(schemas(count)):
        start = time.perf_counter()
        try:
            matcher = library.compile(schema)
            # the first mask belongs to it: a library may put work off
            library.mask(matcher)
        except ValueError as error:
            refused.append(str(error).splitlines()[0][:100])
            continue
        compiled.append((time.perf_counter() - start) * 1e3)
        followed = follow(library, matcher, random.Random(i))
        masks += followed["masks"]
        steps += followed["steps"]
        num_tokens += len(followed["tokens"])
        forced += followed["forced"]
        if followed["tokens"][-1:] == [library.eos] or library.ended(matcher):
            whole += 1
            text = tokenizer.decode([token for token in followed["tokens"] if token != library.eos])
            valid += _holds(schema, text)
    return {
        "schemas": count,
        "refused": refused,
        "whole": whole,
        "valid": valid,
        "compile_ms": _spread(compiled),
        "mask_us": _spread(masks),
        "step_us": _spread(steps),
        "forced_share": round(forced / num_tokens, 3),
    }


def _holds(schema: Schema, text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return bool(jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(value))


def _spread(values: list[float]) -> dict[str, float]:
    ordered: NDArray[np.float64] = np.array(values)
    return {
        "mean": round(statistics.mean(values), 3),
        "p50": round(float(np.percentile(ordered, 50)), 3),
        "p99": round(float(np.percentile(ordered, 99)), 3),
        "most": round(max(values), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="schemas")
    parser.add_argument("--large", type=int, default=60_000, help="tokens of the large vocabulary")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/grammars.json")
    args = parser.parse_args()
    builtin = Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
    large = large_tokenizer(args.large)
    end = builtin.token_to_id("<|end|>")
    assert end is not None
    vocabularies = {"built-in": (builtin, end), "large": (large, 0)}
    rows: list[dict[str, Any]] = []
    for kind in (Llguidance, Xgrammar):
        try:
            version = importlib.metadata.version(kind.name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{kind.name} is not installed")
            continue
        for name, (tokenizer, eos) in vocabularies.items():
            start = time.perf_counter()
            library = kind(tokenizer, eos)
            ready = time.perf_counter() - start
            row = {"library": kind.name, "version": version, "vocabulary": name, "tokens": library.size}
            rows.append({**row, "ready_ms": round(ready * 1e3, 1), **measure(library, tokenizer, args.count)})
            print(rows[-1], flush=True)
    columns = ["library", "vocabulary", "refused", "whole, valid", "compile ms p50, p99", "mask µs p50, p99", "forced"]
    lines = [
        [
            row["library"],
            row["tokens"],
            len(row["refused"]),
            f"{row['whole']}, {row['valid']}",
            f"{row['compile_ms']['p50']}, {row['compile_ms']['p99']}",
            f"{row['mask_us']['p50']}, {row['mask_us']['p99']}",
            f"{row['forced_share']:.0%}",
        ]
        for row in rows
    ]
    table(columns, lines)
    save(args.out, "grammars", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
