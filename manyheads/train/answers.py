"""Self-distillation: what the base itself says to the prompts (Cai et al. 2024, section 2.3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from manyheads.config import ConfigError
from manyheads.request import SamplingParams
from manyheads.train.lines import append_lines, whole_lines
from manyheads.train.progress import Progress
from manyheads.train.prompts import Answer
from manyheads.train.settings import TrainSettings
from manyheads.train.speaker import GROUP, Speaker


def answer_all(speaker: Speaker, prompts: list[Answer], file: Path | None, progress: Progress) -> list[Answer]:
    """What the base says to the prompts that have no answer yet; those that are too long are left out.

    An answer depends on the prompt, its place and the seed alone, so a run that was broken off goes on where it was.

    Args:
        speaker: the base, which is not started where all is answered.
        file: keeps the answers as they come, one JSON line each.

    Raises:
        ConfigError: no prompt is left or could be answered.
    """
    longest = speaker.longest
    asked = [prompt for prompt in prompts if prompt.tokens or 0 < len(prompt.prompt) <= longest]
    if len(asked) < len(prompts):
        progress.say(f"{len(prompts) - len(asked)} of {len(prompts)} prompts have more than {longest} tokens: left out")
    lines = whole_lines(file) if file is not None else []
    known = [Answer(line["prompt_token_ids"], line["token_ids"]) for line in lines]
    if len(known) < len(asked):
        known += _ask(speaker, asked, len(known), file, progress)
    answers = [answer for answer in known if answer.tokens]
    if len(answers) < len(known):
        progress.say(f"{len(known) - len(answers)} prompts could not be answered: left out")
    if not answers:
        raise ConfigError(f"there is no answer to any of the {len(prompts)} prompts")
    return answers


def _ask(speaker: Speaker, asked: list[Answer], start: int, file: Path | None, progress: Progress) -> list[Answer]:
    """Answers from number `start` on."""
    found: list[Answer] = []
    tokens = 0
    with progress.task("answers", len(asked), start) as advance:
        for first in range(start, len(asked), GROUP):
            group = asked[first : first + GROUP]
            prompts = [
                None if prompt.tokens else (prompt.prompt, _params(speaker.settings, number))
                for number, prompt in enumerate(group, first)
            ]
            waiting = iter(group)
            for outputs in speaker.say(prompts):
                new = []
                for output in outputs:
                    answer = next(waiting)
                    if output is not None:
                        answer = Answer(answer.prompt, [] if output.error is not None else list(output.token_ids))
                    new.append(answer)
                found += new
                if file is not None and new:
                    append_answers(file, new)
                tokens += sum(len(answer.tokens) for answer in new)
                advance(len(new), f"{tokens:,} tokens")
    return found


def append_answers(file: Path, answers: Iterable[Answer]) -> None:
    """Add answers to a file of JSON lines."""
    append_lines(file, ({"prompt_token_ids": answer.prompt, "token_ids": answer.tokens} for answer in answers))


def _params(settings: TrainSettings, number: int) -> SamplingParams:
    """Sampled ones are spread evenly among the greedy ones."""
    sampled = int((number + 1) * settings.sampled) > int(number * settings.sampled)
    return SamplingParams(
        max_tokens=settings.max_new_tokens,
        temperature=settings.temperature if sampled else 0.0,
        seed=settings.seed * 1_000_003 + number,
    )
