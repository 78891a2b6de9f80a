"""A training run from prompts to a drafter that can be served: `manyheads train`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from manyheads.checkpoint import read_json, resolve
from manyheads.config import BUILTIN, ConfigError
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.models.config import ModelConfig
from manyheads.models.registry import read_config
from manyheads.speculation.medusa.export import files_beside_weights, replace, write_json
from manyheads.train.accuracy import accuracy_table, right_ranks, write_statistics
from manyheads.train.answers import answer_all, append_answers
from manyheads.train.base import Base, find_device
from manyheads.train.dataset import pack
from manyheads.train.kinds import KINDS
from manyheads.train.progress import Progress
from manyheads.train.prompts import Answer, read_prompts
from manyheads.train.questions import UserTurn, ask_for_questions, user_turn
from manyheads.train.settings import TrainSettings
from manyheads.train.speaker import Speaker
from manyheads.train.trainer import Trainer

WORK = "training"
"""Folder in the run's: settings.json, questions.jsonl, answers.jsonl, held_out.jsonl, metrics.jsonl, state.pt."""
WATCHED_ROWS = 32
"""Held-out rows that are measured at each checkpoint; all are at the end."""


def train(
    base: str,
    files: Sequence[str | Path],
    out: Path,
    settings: TrainSettings,
    *,
    resume: bool = False,
    chat_template: str | None = None,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Answer the prompts, train a drafter, write it to `out`; its accuracy [depth][rank] on the held-out answers.

    Args:
        base: a hub id, a local folder, or `builtin`.
        files: prompts, see prompts.py; there may be none if the settings ask for questions of the base's own.
        out: the drafter's folder; with `joint` the new base's, the heads inside it in `heads`.
        resume: go on with the run in `out`.
        chat_template: a file or a known template; None takes the tokenizer's.

    Raises:
        ConfigError, CheckpointError: a setting, a file or the base cannot be used.
    """
    progress = progress or Progress()
    folder = resolve(base)
    config = read_config(folder)
    work = out / WORK
    tokenizer = Tokenizer.load(folder, chat_template)
    learnt, held_out = split(_answers(base, files, tokenizer, work, settings, resume, progress), settings)
    replace(work / "held_out.jsonl", lambda path: append_answers(path, held_out))
    device = find_device(settings.device)
    model = Base.load(folder, device, trained=settings.joint)
    teacher = Base.load(folder, device) if settings.joint else None
    drafter = KINDS[settings.kind].start(settings, model, config, learnt).to(device)
    data, valid = (pack(items, min(settings.length, config.max_position_embeddings)) for items in (learnt, held_out))
    if not bool((data.ahead(drafter.depth)[..., -1] >= 0).any()):
        what = f"nothing for the last {drafter.part} to learn"
        raise ConfigError(f"no answer is longer than {drafter.depth} tokens: {what}")
    few = valid.take(torch.arange(min(WATCHED_ROWS, len(valid.tokens))))

    def evaluate() -> dict[str, Any]:
        table = accuracy_table(right_ranks(model, drafter, few, settings.rows))
        return {"held_out_top1": [ranks[0] for ranks in table]}

    trainer = Trainer(settings, model, teacher, drafter, data, work)
    progress.say(
        f"{len(learnt)} answers ({int(data.answer.sum()):,} tokens) to learn from in {len(data.tokens)} rows, "
        f"{len(held_out)} held out; {trainer.total} steps on {device}"
    )
    trainer.run(progress, evaluate)
    local = Path(base).expanduser()
    where, name = out, str(local.resolve()) if base != BUILTIN and local.exists() else base
    if settings.joint:
        _write_base(model, config, folder, out)
        where, name = out / "heads", str(out.resolve())
    drafter.write(where, name, config)
    ranks = right_ranks(model, drafter, valid, settings.rows)
    return write_statistics(where, ranks, f"{len(held_out)} held-out answers of the base model")


def split(answers: list[Answer], settings: TrainSettings) -> tuple[list[Answer], list[Answer]]:
    """Answers to learn from and to measure with, in an order of the seed's. Raises ConfigError for fewer than two."""
    if len(answers) < 2:
        raise ConfigError("training needs two answers or more: to learn from, and to measure with")
    order = list(answers)
    random.Random(settings.seed).shuffle(order)
    count = max(1, round(len(order) * settings.held_out))
    return order[count:], order[:count]


def _answers(
    base: str,
    files: Sequence[str | Path],
    tokenizer: Tokenizer,
    work: Path,
    settings: TrainSettings,
    resume: bool,
    progress: Progress,
) -> list[Answer]:
    """What the base says to the prompts of the data, and behind them to those that it comes up with."""
    if not files and not settings.questions:
        raise ConfigError(
            "there is nothing to learn from: give prompts (--data), or have the base ask some (--questions)"
        )
    prompts = list(read_prompts(files, tokenizer))
    turn = user_turn(tokenizer) if settings.questions else None
    _begin(work, settings, resolve(base), prompts, turn, resume)
    questions, answers = work / "questions.jsonl", work / "answers.jsonl"
    with Speaker(base, settings) as speaker:
        if turn is not None:
            if not answers.exists():  # once answers came, there are all the questions that there will be
                ask_for_questions(speaker, tokenizer, turn, questions, progress)
            prompts += read_prompts([questions], tokenizer)
        return answer_all(speaker, prompts, answers, progress)


def _begin(
    work: Path, settings: TrainSettings, base: Path, prompts: list[Answer], turn: UserTurn | None, resume: bool
) -> None:
    """Write down what the run is, or see that it is the one that is to go on.

    What the base comes up with follows from its settings and from how a user's turn is opened.
    """
    path = work / "settings.json"
    data = json.dumps([[prompt.prompt, prompt.tokens] for prompt in prompts])
    if turn is not None:
        data += json.dumps([turn.opens, turn.closes])
    data += json.dumps(read_json(base / "config.json"), sort_keys=True)
    digest = hashlib.sha256(data.encode()).hexdigest()
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": dataclasses.asdict(settings), "data": digest})
        return
    if not resume:
        raise ConfigError(f"{work} holds a run already; go on with it by --resume, or give another --out")
    known = read_json(path)
    try:
        difference = settings.differs_from(TrainSettings(**known["settings"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a run of this version: {error}") from error
    if difference is not None:
        raise ConfigError(f"{path}: the run that is to go on had other settings: {difference}")
    if known.get("data") != digest:
        raise ConfigError(f"{path}: the run that is to go on had other prompts or another base model")


def _write_base(model: Base, config: ModelConfig, folder: Path, out: Path) -> None:
    """The new base in the old one's precision, with its tokenizer."""
    state = {key: tensor.to("cpu", config.dtype) for key, tensor in model.model.state_dict().items()}
    model.model.to(config.dtype).save_pretrained(out, state_dict=state)
    for file in files_beside_weights(folder):
        if not (out / file.name).exists():
            replace(out / file.name, partial(shutil.copyfile, file))
    model.model.float()
