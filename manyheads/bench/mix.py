"""A mix is traffic as servers see it: requests of many lengths at random times, which may begin with shared texts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from manyheads.bench.plan import BenchInputError, Question
from manyheads.bench.prompts import TOKENS_PER_WORD, Workload, sentences
from manyheads.bench.result import Level, holds
from manyheads.bench.server import Target, get

TEXT, PIECE = 1_000_000, 4_000
"""Prompts are cut from at most so many characters of text; the server counts the tokens of so many at a time."""
NEAR, LEAST = 1.1, 0.25
"""The highest rate that holds is known well enough if so many times it does not; rates this low are not halved."""
SLACK = 0.8
"""Where prompts are words, they take at most this share of what the server holds: their tokens are a guess."""


@dataclass(frozen=True)
class Lengths:
    """Lengths are a lognormal distribution of numbers of tokens between limits, or, without a spread, one number."""

    median: int
    sigma: float
    """The standard deviation of the logarithm."""
    least: int
    most: int

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """Read a number, or `lognormal:MEDIAN,SIGMA,LEAST,MOST`.

        Raises:
            BenchInputError: the option, which is named in the message, has neither.
        """
        form, _, rest = text.rpartition(":")
        parts = rest.split(",") if form else [rest, "0", rest, rest]
        try:
            median, sigma, least, most = (float(part) for part in parts)
            lengths = cls(int(median), sigma, int(least), int(most))
            if form not in ("", "lognormal") or (lengths.median, lengths.least, lengths.most) != (median, least, most):
                raise ValueError
        except (ValueError, OverflowError):
            form = f"a whole number or lognormal:MEDIAN,SIGMA,LEAST,MOST, not {text!r}"
            raise BenchInputError(f"{option} takes {form}") from None
        if not (0 < least <= median <= most <= 1e7 and 0 <= sigma <= 10):
            raise BenchInputError(f"{option} must be above 0, with LEAST <= MEDIAN <= MOST, not {text}")
        return lengths

    def __str__(self) -> str:
        spread = f"lognormal:{self.median},{self.sigma:g},{self.least},{self.most}"
        return str(self.median) if self.fixed else spread

    @property
    def fixed(self) -> bool:
        """Whether all are the same."""
        return self.least == self.most

    def draw(self, chance: random.Random) -> int:
        """Return a random length."""
        return int(min(self.most, max(self.least, chance.lognormvariate(math.log(self.median), self.sigma))))

    def cut(self, most: int) -> Lengths:
        """Return the same lengths with another upper limit."""
        return Lengths(min(self.median, most), self.sigma, min(self.least, most), most)


@dataclass(frozen=True)
class Mix:
    """A mix says what requests are drawn from."""

    prompts: Lengths
    answers: Lengths
    system_tokens: int = 0
    """Each prompt begins with so many tokens more, which are one of `system_prompts` texts."""
    system_prompts: int = 1
    attain: float = 0.95
    """A rate holds if this share of the requests that were sent met both objectives."""

    def settings(self, file: Path | None) -> dict[str, Any]:
        """Return what was asked for, as the report shows it; the file is that of the text."""
        told: dict[str, Any] = {"prompt_tokens": str(self.prompts), "output_tokens": str(self.answers)}
        told |= {"text": file.name} if file else {}
        return told | {"system_tokens": self.system_tokens, "system_prompts": self.system_prompts}

    def fit(self, context: int, exact: bool) -> Mix:
        """Return the mix with limits such that a request fits into a context of so many tokens.

        Raises:
            BenchInputError: the shared texts alone fill it.
        """
        room = (context if exact else int(context * SLACK)) - self.system_tokens
        asked = self.prompts.most + self.answers.most
        if asked <= room:
            return self
        prompts = room * self.prompts.most // asked
        if not 0 < prompts < room:
            raise BenchInputError(f"--system-tokens {self.system_tokens} leave no room in a context of {context}")
        return replace(self, prompts=self.prompts.cut(prompts), answers=self.answers.cut(room - prompts))


class Requests:
    """Requests of a mix are drawn here, anew for each rate, so that no rate finds the prompts of another in a cache.

    Times and lengths follow from seed and rate alone, whatever the server and the number of workers.
    """

    def __init__(self, mix: Mix, work: Workload, target: Target, api_key: str | None) -> None:
        self._work, self._target = work, target
        text = _text(work.file)
        self.notes = [f"prompts cut from {work.file.name}"] if work.file else []
        self._units: list[Any] = text.split()
        """The tokens or words of the text; a prompt is a run of them that begins anywhere."""
        self._first: list[int] = []
        """The tokens that the model wants before any text."""
        self._exact, self._ratio = False, TOKENS_PER_WORD
        try:
            tokens, self._first = tokenize(text, target, api_key)
            self._ratio = len(tokens) / len(self._units)
            if not work.chat:
                self._exact, self._units, self._ratio = True, tokens, 1.0
        except (OSError, ValueError, LookupError, TypeError):
            self.notes.append(f"no /tokenize: a word was taken for {TOKENS_PER_WORD} tokens; the tables have the count")
        self.mix = mix.fit(target.context, self._exact) if target.context else mix
        if self.mix != mix:
            lengths = f"at most {self.mix.prompts.most} tokens in and {self.mix.answers.most} out"
            self.notes.append(f"the server holds {target.context} tokens a request: lengths were cut to {lengths}")
        chance = random.Random(f"system {work.seed}")
        count = mix.system_prompts if mix.system_tokens else 0
        self._systems = [self._cut(chance, mix.system_tokens) for _ in range(count)]

    def draw(self, rate: float, seconds: float) -> list[Question]:
        """Return the requests that arrive in so many seconds at a rate in requests/s: at least one, in their order."""
        chance = random.Random(f"{self._work.seed} {rate}")
        places = random.Random(f"places {self._work.seed} {rate}")  # NOTE: texts have other numbers of tokens elsewhere
        at = min(chance.expovariate(rate), seconds * chance.random())
        questions = []
        while at < seconds:
            own = self._cut(places, self.mix.prompts.draw(chance))
            system = places.choice(self._systems) if self._systems else []
            questions.append(Question(self._body(system, own, self.mix.answers.draw(chance)), at))
            at += chance.expovariate(rate)
        return questions

    def _cut(self, chance: random.Random, tokens: int) -> list[Any]:
        """Return a run of the text with so many tokens, or about so many words."""
        count = max(1, round(tokens / self._ratio))
        start = chance.randrange(len(self._units))
        found = self._units[start : start + count]
        while len(found) < count:
            found += self._units[: count - len(found)]
        return found

    def _body(self, system: list[Any], own: list[Any], max_tokens: int) -> dict[str, Any]:
        if not self._work.chat:
            units = system + own
            prompt = (self._first + units)[: len(units)] if self._exact else " ".join(units)
            return dict(self._work.body(self._target, prompt, None, max_tokens))
        said = [("system", system), ("user", own)] if system else [("user", own)]
        messages = [{"role": role, "content": " ".join(units)} for role, units in said]
        return dict(self._work.body(self._target, None, messages, max_tokens))


def tokenize(text: str, target: Target, api_key: str | None) -> tuple[list[int], list[int]]:
    """Return the tokens of a text by the server's `/tokenize`, and those that the model wants before any text.

    Raises:
        OSError, ValueError, LookupError, TypeError: the server has no `/tokenize` in our and vLLM's shape.
    """

    def ask(piece: str, special: bool = False) -> list[int]:
        body = {"model": target.model, "prompt": piece, "add_special_tokens": special}
        return [int(token) for token in get(f"{target.url}/tokenize", body, api_key)["tokens"]]

    plain, whole = ask(text[:100]), ask(text[:100], special=True)
    first = whole[: len(whole) - len(plain)] if whole[len(whole) - len(plain) :] == plain else []
    with ThreadPoolExecutor(8) as pool:
        pieces = pool.map(ask, [text[i : i + PIECE] for i in range(0, len(text), PIECE)])
        return [token for piece in pieces for token in piece], first


def _text(file: Path | None) -> str:
    """Return the text that prompts are cut from: that of a file, or sentences that were made.

    A file whose name ends in `.jsonl` has a text on each line: `prompt`, `text`, or `turns`, which are several.

    Raises:
        BenchInputError: the file cannot be read, or has no text.
    """
    if file is None:
        return sentences(random.Random(0), 8_000)
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            lines = [msgspec.json.decode(line, type=_Texts) for line in text.splitlines() if line.strip()]
            texts = [" ".join([line.prompt, line.text, *line.turns]).strip() for line in lines]
            random.Random(0).shuffle(texts)  # what stands beyond the limit is of all kinds
            text = "\n\n".join(texts)
    except (OSError, ValueError) as error:
        raise BenchInputError(f"cannot read texts from {file}: {error}") from error
    if not text.strip():
        raise BenchInputError(f"{file} holds no text; lines of a .jsonl need `prompt`, `text` or `turns`")
    return text[:TEXT]


class _Texts(msgspec.Struct):
    """This is a line of a file of texts; what else it has does not matter."""

    prompt: str = ""
    text: str = ""
    turns: list[str] = []


def next_rate(levels: Sequence[Level], attain: float) -> float | None:
    """Return the rate to try after these, to find the highest that holds; None if it is known well enough."""
    low = max((level.load for level in levels if holds(level, attain)), default=0.0)
    high = min((level.load for level in levels if level.load > low), default=0.0)
    if high <= max(NEAR * low, LEAST):
        return None
    return float(f"{math.sqrt(low * high) or high / 2:.3g}")


def save_trace(questions: list[Question], path: Path) -> None:
    """Write requests so that `manyheads bench trace --prompts FILE` sends them again."""
    lines = []
    for question in questions:
        kept = {key: question.body[key] for key in ("prompt", "messages", "max_tokens") if key in question.body}
        lines.append(msgspec.json.encode(kept | {"at": question.at}) + b"\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))
