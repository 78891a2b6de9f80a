"""Self-distillation: what the base itself says to the prompts (Cai et al. 2024, section 2.3.2), by our own engine."""

from __future__ import annotations

import gc
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from manyheads.checkpoint import resolve
from manyheads.config import ConfigError
from manyheads.frontend.llm import LLM
from manyheads.models.registry import read_config
from manyheads.request import SamplingParams
from manyheads.train.progress import Progress
from manyheads.train.prompts import Answer
from manyheads.train.settings import TrainSettings

GROUP = 2048
"""Prompts that are given to the engine at once."""


def answer_all(
    base: str, prompts: list[Answer], settings: TrainSettings, file: Path | None, progress: Progress
) -> list[Answer]:
    """What the base says to the prompts that have no answer yet; those that are too long are left out.

    An answer depends on the prompt, its place and the seed alone, so a run that was broken off goes on where it was.

    Args:
        base: a hub id, a local folder, or `builtin`.
        file: keeps the answers as they come, one JSON line each.

    Raises:
        ConfigError: no prompt is left or could be answered.
    """
    config = read_config(resolve(base))
    longest = min(settings.max_prompt_tokens, config.max_position_embeddings - settings.max_new_tokens)
    asked = [prompt for prompt in prompts if prompt.tokens or 0 < len(prompt.prompt) <= longest]
    if len(asked) < len(prompts):
        progress.say(f"{len(prompts) - len(asked)} of {len(prompts)} prompts have more than {longest} tokens: left out")
    known = _known(file) if file is not None else []
    if len(known) < len(asked):
        llm: LLM | None = None
        if not all(prompt.tokens for prompt in asked[len(known) :]):
            engine: dict[str, Any] = {"max_model_len": longest + settings.max_new_tokens, "max_queue": GROUP}
            llm = LLM(base, speculative=False, device=settings.device, **engine)
        known += _ask(llm, asked, len(known), settings, file, progress)
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    answers = [answer for answer in known if answer.tokens]
    if len(answers) < len(known):
        progress.say(f"{len(known) - len(answers)} prompts could not be answered: left out")
    if not answers:
        raise ConfigError(f"there is no answer to any of the {len(prompts)} prompts of the data")
    return answers


def _ask(
    llm: LLM | None, asked: list[Answer], start: int, settings: TrainSettings, file: Path | None, progress: Progress
) -> list[Answer]:
    """Answers from number `start` on; without an engine where all of these are answered already."""
    found: list[Answer] = []
    tokens = 0
    with progress.task("answers", len(asked), start) as advance:
        for first in range(start, len(asked), GROUP):
            group = asked[first : first + GROUP]
            for new in _in_order(llm, group, [_params(settings, first + i) for i in range(len(group))]):
                found += new
                if file is not None and new:
                    append_answers(file, new)
                tokens += sum(len(answer.tokens) for answer in new)
                advance(len(new), f"{tokens:,} tokens")
    return found


def _in_order(llm: LLM | None, group: list[Answer], params: list[SamplingParams]) -> Iterator[list[Answer]]:
    """After each step of the engine, the answers that are there and not yielded before, in the prompts' order."""
    generations = [
        None if prompt.tokens or llm is None else llm.prepare(prompt.prompt, p)
        for prompt, p in zip(group, params, strict=True)
    ]
    steps = llm.steps([g for g in generations if g is not None]) if llm is not None else iter(())
    waiting = deque(zip(group, generations, strict=True))
    for _ in chain(steps, [None]):
        new = []
        while waiting and ((generation := waiting[0][1]) is None or generation.finished):
            answer, _ = waiting.popleft()
            if generation is not None:
                output = generation.outputs[0]
                answer = Answer(answer.prompt, [] if output.error is not None else list(output.token_ids))
            new.append(answer)
        yield new


def append_answers(file: Path, answers: Iterable[Answer]) -> None:
    """Add answers to a file of JSON lines."""
    with file.open("a", encoding="utf-8") as out:
        for answer in answers:
            out.write(json.dumps({"prompt_token_ids": answer.prompt, "token_ids": answer.tokens}) + "\n")


def _known(file: Path) -> list[Answer]:
    """The answers in a file; a line that was cut off is removed from it."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)
    lines = (json.loads(line) for line in data[:whole].splitlines())
    return [Answer(line["prompt_token_ids"], line["token_ids"]) for line in lines]


def _params(settings: TrainSettings, number: int) -> SamplingParams:
    """Sampled ones are spread evenly among the greedy ones."""
    sampled = int((number + 1) * settings.sampled) > int(number * settings.sampled)
    return SamplingParams(
        max_tokens=settings.max_new_tokens,
        temperature=settings.temperature if sampled else 0.0,
        seed=settings.seed * 1_000_003 + number,
    )
