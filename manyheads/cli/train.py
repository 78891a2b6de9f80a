"""`manyheads train` makes a drafter for a model, and `manyheads tree` measures what trees make of them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from manyheads.cli.parser import Parser, add_option
from manyheads.config import BUILTIN, ConfigError
from manyheads.train.settings import OWN, PROJECTIONS, TrainSettings

SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""The table shows these sizes of trees."""

GROUPS: dict[str, dict[str, tuple[type, str]]] = {
    "drafter": {"kind": (str, "Medusa heads, or an EAGLE-3 layer that goes on from its own features")},
    "Medusa heads": {
        "heads": (int, "how many; each looks one token further"),
        "blocks": (int, "residual blocks of each head"),
        "projection": (str, "own for each head, shared by all heads, or the base model's"),
        "tokens": (int, "the heads can say this many of the tokens that the base uses most (default: all)"),
        "init": (str, "heads to start from (default: heads that say what the base says)"),
    },
    "EAGLE-3": {
        "passes": (int, "how many follow one another in training, each with the features of the one before"),
        "draft_vocab": (int, "it can say this many of the tokens that the base uses most (default: 32000 at most)"),
    },
    "questions and answers": {
        "questions": (int, "the model comes up with so many prompts itself, beside those of --data"),
        "max_prompt_tokens": (int, "longer prompts are left out"),
        "max_new_tokens": (int, "longest answer"),
        "sampled": (float, "share of the prompts that are answered at --temperature, the others greedily"),
        "temperature": (float, "of the sampled answers"),
        "held_out": (float, "share of the answers to measure with"),
    },
    "training": {
        "length": (int, "tokens of a packed row"),
        "rows": (int, "packed rows that go through the model at once"),
        "accumulate": (int, "such groups of rows in a step"),
        "epochs": (int, "times that the answers are seen"),
        "max_steps": (int, "steps in all, whatever the epochs"),
        "rate": (float, "highest learning rate"),
        "warmup": (float, "share of the steps over which the rate grows"),
        "discount": (float, "the loss of each head or pass counts so much of the one before"),
        "weight_decay": (float, "of AdamW"),
        "clip": (float, "largest norm of the gradient"),
        "chunk": (int, "tokens (of EAGLE-3: times passes) whose logits exist at once"),
        "checkpoint_every": (int, "steps between checkpoints"),
        "seed": (int, "of everything that is drawn"),
        "device": (str, "auto, cpu or cuda"),
    },
    "joint training (Medusa-2)": {
        "joint": (bool, "the base model learns too, and is written with the heads"),
        "joint_start": (float, "share of the steps in which the heads learn alone"),
        "base_rate": (float, "highest learning rate of the base (default: a quarter of --rate)"),
        "heads_weight": (float, "of the heads' loss beside the base's"),
    },
}

CHOICES = {"kind": tuple(OWN), "projection": PROJECTIONS}


def add_commands(parser: Parser) -> None:
    """Add `manyheads train` and `manyheads tree` to the program."""
    example = "manyheads train lmsys/vicuna-7b-v1.3 --data prompts.jsonl --out heads"
    train = parser.add_command("train", "train a drafter for a model on its own answers", run_train, example)
    train.add_argument(
        "base", nargs="?", default=BUILTIN, help="a hub id, a local folder, a GGUF file, or builtin (default)"
    )
    _data(train, required=False)
    train.add_argument("--out", "-o", required=True, help="folder for the drafter, and for what the run needs to go on")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for title, options in GROUPS.items():
        _add_settings(train.add_argument_group(title), options)
    example = "manyheads tree heads --data heads/training/held_out.jsonl"
    tree = parser.add_command("tree", "measure a drafter, and the trees that it makes", run_tree, example)
    tree.add_argument("heads", help="a folder or a hub id; tree_statistics.json is written into it")
    _data(tree, required=True)
    tree.add_argument("--base", help="the base model (default: the one that the folder names)")
    tree.add_argument("--plot", metavar="FILE", help="draw tokens a step by nodes (.png, .svg, .pdf)")
    known = {name: option for options in GROUPS.values() for name, option in options.items()}
    names = ("max_new_tokens", "sampled", "temperature", "seed", "device")
    _add_settings(tree.add_argument_group("answers"), {name: known[name] for name in names})


def _data(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        required=required,
        metavar="FILE",
        help="JSON lines (.gz or not) with prompt, messages, conversations, turns or instruction; the model answers",
    )
    parser.add_argument("--chat-template", help="a file, or vicuna (default: the model's)")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress")


def _add_settings(group: argparse._ArgumentGroup, options: dict[str, tuple[type, str]]) -> None:
    defaults = {field.name: field.default for field in fields(TrainSettings)}
    for name, (kind, text) in options.items():
        add_option(group, name, kind, text, defaults[name], CHOICES.get(name))


def run_train(args: argparse.Namespace) -> int:
    """Train a drafter; it can be served when this ends."""
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
    _print_accuracy("head" if settings.kind == "medusa" else "pass", accuracy)
    model = args.out if settings.joint else f"{args.base} --heads {args.out}"
    print(f"manyheads serve {model}")
    return 0


def run_tree(args: argparse.Namespace) -> int:
    """Measure a drafter on answers of its base, and write what the planner starts from beside it."""
    from manyheads.checkpoint import resolve
    from manyheads.frontend.tokenizer import Tokenizer
    from manyheads.models.registry import read_config
    from manyheads.speculation.medusa.checkpoint import STATISTICS, locate_heads
    from manyheads.train.accuracy import right_ranks, tokens_per_step, write_statistics
    from manyheads.train.answers import answer_all
    from manyheads.train.base import Base, find_device
    from manyheads.train.dataset import pack
    from manyheads.train.kinds import read_weights, trained
    from manyheads.train.progress import Progress
    from manyheads.train.prompts import read_prompts
    from manyheads.train.speaker import Speaker

    folder, named = locate_heads(args.heads)
    name = args.base or named
    if name is None:
        raise ConfigError(f"{folder} does not name its base model; give --base")
    base = resolve(name)
    config = read_config(base)
    weights = read_weights(folder, config)
    progress = Progress(args.quiet)
    settings = TrainSettings(
        **{key: getattr(args, key) for key in ("max_new_tokens", "sampled", "temperature", "seed", "device")}
    )
    prompts = list(read_prompts(args.data, Tokenizer.load(base, args.chat_template)))
    with Speaker(name, settings) as speaker:
        answers = answer_all(speaker, prompts, None, progress)
    model = Base.load(base, find_device(settings.device))
    drafter = trained(weights, model, config)
    data = pack(answers, min(max(len(a.prompt) + len(a.tokens) for a in answers), config.max_position_embeddings))
    ranks = right_ranks(model, drafter, data, progress=progress)
    if not len(ranks):
        raise ConfigError("the answers are too short to measure anything")
    accuracy = write_statistics(folder, ranks, f"{len(answers)} answers of the base model")
    table = tokens_per_step(ranks, accuracy)
    _print_accuracy(drafter.part, accuracy)
    print("nodes  tokens a step  by the accuracies alone")
    for point in table:
        if point["nodes"] in SHOWN:
            print(f"{point['nodes']:5}  {point['measured']:13.2f}  {point['promised']:23.2f}")
    print(f"written to {folder / STATISTICS}")
    if args.plot:
        _plot(table, Path(args.plot), folder.resolve().name)
    return 0


def _print_accuracy(part: str, accuracy: list[list[float]]) -> None:
    for number, ranks in enumerate(accuracy):
        print(f"{part} {number}: right {ranks[0]:.1%} of the time, among its first {len(ranks)} {sum(ranks):.1%}")


def _plot(table: list[dict[str, Any]], path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'manyheads[train]'") from error

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="nodes", ylabel="tokens a step", title=title)
    nodes = [point["nodes"] for point in table]
    axes.plot(nodes, [point["measured"] for point in table], label="measured on held-out answers")
    axes.plot(nodes, [point["promised"] for point in table], "--", label="by the accuracies alone")
    axes.set_xlim(1, nodes[-1])
    axes.set_ylim(1)
    axes.legend()
    figure.savefig(path, dpi=150)
