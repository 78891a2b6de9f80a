"""Texts and conversations for the built-in model (see README.md for sources and licences).

`documents` is running text, for the first phase; `entries` and `conversations` are what the model is to be good at.
`everyday/` holds answers written for this model. spec_bench.jsonl is for measuring and is never read here.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Conversation = list[dict[str, str]]

ASK = [
    "Tell me something about {}.", "Tell me something about {}", "Tell me about {}.", "tell me about {}", "What is {}?",
    "What do you know about {}?", "Describe {}.", "Can you tell me about {}?", "Explain what {} is.", "{}?",
    "Give me some information about {}.", "I would like to know more about {}.", "Please describe {}.",
    "Write a short paragraph about {}.", "what is {}", "Could you explain {}?", "Write something about {}.",
]  # fmt: skip
ASK_PERSON = ["Who is {}?", "Who was {}?", "Tell me something about {}.", "Tell me about {}.", "who was {}",
              "What do you know about {}?", "What is {} known for?"]  # fmt: skip
ASK_SHORT = ["In one sentence, what is {}?", "Define {}.", "Describe {} in one sentence.", "What is {}, briefly?"]


def read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def clean(text: str) -> str:
    """Undo tokenizer spacing and the holes that stripped markup left."""
    text = text.replace("<|endoftext|>", "").replace("``", '"').replace("''", '"').replace("\u00a0", " ")
    text = re.sub(r"-LRB- ?", "(", re.sub(r" ?-RRB-", ")", text))
    text = re.sub(r"<br ?/?>", "\n", text)
    text = re.sub(r"&[a-z]+;|\\\\?", " ", text)
    text = re.sub(r" +([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[]) +", r"\1", text)
    text = re.sub(r"\(\s*[,;]*\s*\)|\(\s*[,;:]+\s*", lambda m: "" if ")" in m[0] else "(", text)
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    text = re.sub(r"(\d{4}) (\d{1,2} [A-Z][a-z]+ \d{4}\))", r"\1 – \2", text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", text) if s]


def whole(text: str) -> bool:
    """Ends like a finished text, and holds no stretch that repeats."""
    words = text.split()
    return text.endswith((".", "!", "?", '"', ")")) and len(set(words)) > 0.4 * len(words)


def openings(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Subject → encyclopedia opening, from the lists in the wiki_hop prompts."""
    found: dict[str, str] = {}
    for row in rows:
        if not row["task"].startswith("wiki_hop"):
            continue
        for item in re.split(r"\n\s*- |^- ", row["prompt"])[1:]:
            good = [s for s in sentences(clean(item.split("\n")[0])) if not re.search(r" of,| of \.|\(,|  |,,", s)]
            text = " ".join(good)
            match = re.match(r"(?:The |An? |In )?([A-Za-z0-9\"][^.]{1,60}?)(?: \(|, | is | are | was | were )", text)
            if match and len(text) > 60 and re.search(r" (is|are|was|were) ", text) and text.endswith("."):
                found.setdefault(match[1].strip('"').split(" or ")[0], text)
    return found


@dataclass(frozen=True)
class Entry:
    """One thing to learn to say, asked in several ways. Every epoch draws `weight` of the variants."""

    variants: list[Conversation]
    weight: int = 1


def about(subject: str, text: str, rng: random.Random) -> Entry:
    """Questions about a subject, each with its opening cut to a few sentences."""
    parts = sentences(text)
    person = bool(re.search(r"\((born|\d{1,2} [A-Z]\w+ \d{4}|[A-Z]\w+ \d{1,2}, \d{4})", text[:140]))
    variants = []
    for _ in range(16):
        name = subject if rng.random() < 0.75 else subject.lower()
        if not person and rng.random() < 0.12:
            variants.append(turn(rng.choice(ASK_SHORT).format(name), parts[0]))
        else:
            cut = " ".join(parts[: rng.choice((2, 3, 3, 4, 5))])[:1200]
            variants.append(turn(rng.choice(ASK_PERSON if person else ASK).format(name), cut))
    return Entry(variants)


def turn(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def entries(folder: Path) -> tuple[list[Entry], list[Entry]]:
    """What the model is to be good at: questions with short, whole, English answers. No answer comes twice.

    Returns:
        Those of `everyday/`, and those made from the data files.
    """
    rng = random.Random(0)
    everyday = []
    for file in sorted((Path(__file__).parent / "everyday").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            everyday.append(Entry([turn(question, item["answer"]) for question in item["questions"]], weight=8))
    rows = list(read(folder / "t0_50k.jsonl.gz"))
    result = [about(subject, text, rng) for subject, text in openings(rows).items()]
    for row in read(folder / "gpteacher.jsonl.gz"):
        question = clean(row["instruction"]) + ("\n" + row["input"].strip() if row["input"].strip() else "")
        answer = row["response"].strip()
        if 1 < len(answer) < 2400:
            result.append(Entry([turn(question, answer)]))
    for row in read(folder / "gsm8k_train.jsonl.gz"):
        answer = re.sub(r"<<[^>]*>>", "", row["answer"]).replace("\n#### ", "\nThe answer is ") + "."
        result.append(Entry([turn(row["question"], answer)]))
    by_answer: dict[str, list[Conversation]] = {}
    for row in rows:
        prompt, completion = clean(row["prompt"]), clean(row["completion"])
        long = 80 < len(completion) < 1600 and whole(completion) and not row["task"].startswith("wiki_bio")
        if len(prompt) < 3000 and (long or (len(completion) > 3 and rng.random() < 0.03)):
            by_answer.setdefault(completion, []).append(turn(prompt, completion))
    result += [Entry(variants) for variants in by_answer.values()]
    rng.shuffle(result)
    return everyday, result


def conversations(items: list[Entry], rng: random.Random) -> list[Conversation]:
    """One epoch: variants drawn, shuffled, and now and then two short ones joined to a longer talk."""
    talks = [talk for item in items for talk in rng.choices(item.variants, k=item.weight)]
    rng.shuffle(talks)
    joined = [a + b for a, b in zip(talks[::12], talks[1::12], strict=False) if len(str(a + b)) < 2000]
    return talks + joined


def documents(folder: Path) -> list[str]:
    """Running text: the passages of the T0 prompts. The same passage comes under many questions; each sentence is kept
    once."""
    seen: set[str] = set()
    result: list[str] = []
    for row in read(folder / "t0_50k.jsonl.gz"):
        fresh: list[str] = []
        for line in clean(f"{row['prompt']}\n{row['completion']}").split("\n"):
            for sentence in sentences(line):
                key = re.sub(r"\W", "", sentence.lower())
                if len(key) > 12 and key not in seen:
                    seen.add(key)
                    fresh.append(sentence)
        if len(text := " ".join(fresh)) > 150:
            result.append(text)
    return result
