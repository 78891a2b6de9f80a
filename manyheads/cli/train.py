"""`manyheads train` and `manyheads tree`: heads for a model, and what trees make of them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from manyheads.config import ConfigError
from manyheads.train.settings import TrainSettings

SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Tree sizes that are printed."""


def run_train(args: argparse.Namespace) -> int:
    """Train heads; they can be served when this ends."""
    from manyheads.train.progress import Progress
    from manyheads.train.run import train

    settings = TrainSettings(**{f.name: getattr(args, f.name) for f in fields(TrainSettings)})
    accuracy = train(
        args.base,
        args.data,
        Path(args.out),
        settings,
        resume=args.resume,
        chat_template=args.chat_template,
        progress=Progress(args.quiet),
    )
    for h, ranks in enumerate(accuracy):
        print(f"head {h}: right {ranks[0]:.1%} of the time, among its first {len(ranks)} {sum(ranks):.1%}")
    model = args.out if settings.joint else f"{args.base} --heads {args.out}"
    print(f"manyheads serve {model}")
    return 0


def run_tree(args: argparse.Namespace) -> int:
    """Measure heads on answers of their base, and write what the planner starts from beside them."""
    from manyheads.checkpoint import resolve
    from manyheads.frontend.tokenizer import Tokenizer
    from manyheads.models.registry import read_config
    from manyheads.speculation.medusa.checkpoint import STATISTICS, locate_heads, read_heads
    from manyheads.train.accuracy import right_ranks, tokens_per_step, write_statistics
    from manyheads.train.answers import answer_all
    from manyheads.train.base import Base, find_device
    from manyheads.train.dataset import pack
    from manyheads.train.heads import TrainedHeads
    from manyheads.train.progress import Progress
    from manyheads.train.prompts import read_prompts

    folder, named = locate_heads(args.heads)
    name = args.base or named
    if name is None:
        raise ConfigError(f"{folder} does not name its base model; give --base")
    base = resolve(name)
    config = read_config(base)
    weights = read_heads(folder, config)
    progress = Progress(args.quiet)
    settings = TrainSettings(
        **{key: getattr(args, key) for key in ("max_new_tokens", "sampled", "temperature", "seed", "device")}
    )
    prompts = list(read_prompts(args.data, Tokenizer.load(base, args.chat_template)))
    answers = answer_all(name, prompts, settings, None, progress)
    model = Base.load(base, find_device(settings.device))
    heads = TrainedHeads.of(weights, model.projection.detach().float().cpu()).to(model.device)
    data = pack(answers, min(max(len(a.prompt) + len(a.tokens) for a in answers), config.max_position_embeddings))
    ranks = right_ranks(model, heads, data, progress=progress)
    if not len(ranks):
        raise ConfigError("the answers are too short to measure anything")
    accuracy = write_statistics(folder, ranks, f"{len(answers)} answers of the base model")
    table = tokens_per_step(ranks, accuracy)
    for h, row in enumerate(accuracy):
        print(f"head {h}: right {row[0]:.1%} of the time, among its first {len(row)} {sum(row):.1%}")
    print("nodes  tokens a step  by the accuracies alone")
    for point in table:
        if point["nodes"] in SHOWN:
            print(f"{point['nodes']:5}  {point['measured']:13.2f}  {point['promised']:23.2f}")
    print(f"written to {folder / STATISTICS}")
    if args.plot:
        _plot(table, Path(args.plot), folder.resolve().name)
    return 0


def _plot(table: list[dict[str, Any]], path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'manyheads[train]'") from error

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="nodes", ylabel="tokens a step", title=title)
    nodes = [point["nodes"] for point in table]
    axes.plot(nodes, [point["measured"] for point in table], label="measured on held-out answers")
    axes.plot(nodes, [point["promised"] for point in table], "--", label="by the heads' accuracies alone")
    axes.set_xlim(1, nodes[-1])
    axes.set_ylim(1)
    axes.legend()
    figure.savefig(path, dpi=150)
