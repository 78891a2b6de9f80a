"""Options of the commands around heads: inspect, convert, train, tree."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import MISSING, fields

from manyheads.config import BUILTIN
from manyheads.train.settings import PROJECTIONS, TrainSettings

Add = Callable[[str, str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]

FORMATS = ("manyheads", "reference", "reference-full", "tgi", "vllm")
GROUPS: dict[str, dict[str, tuple[type, str]]] = {
    "heads": {
        "heads": (int, "how many; each looks one token further"),
        "blocks": (int, "residual blocks of each head"),
        "projection": (str, "own for each head, shared by all heads, or the base model's"),
        "tokens": (int, "the heads can say this many of the tokens that the base uses most (default: all)"),
        "init": (str, "heads to start from (default: heads that say what the base says)"),
    },
    "answers": {
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
        "discount": (float, "each head's loss counts so much of the one before"),
        "weight_decay": (float, "of AdamW"),
        "clip": (float, "largest norm of the gradient"),
        "chunk": (int, "tokens whose logits exist at once"),
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


def add_commands(add: Add) -> None:
    """Add the commands.

    Args:
        add: makes a command of a name, a summary, what runs it, and an example.
    """
    _inspect(add("inspect", "say what a checkpoint of heads is", _run_inspect, "manyheads inspect builtin"))
    _convert(
        add(
            "convert",
            "write heads in another format",
            _run_convert,
            "manyheads convert builtin heads-for-vllm --to vllm",
        )
    )
    _train(
        add(
            "train",
            "train heads for a model on its own answers",
            _run_train,
            "manyheads train lmsys/vicuna-7b-v1.3 --data prompts.jsonl --out heads",
        )
    )
    _tree(
        add(
            "tree",
            "measure heads, and the trees that they make",
            _run_tree,
            "manyheads tree heads --data heads/training/held_out.jsonl",
        )
    )


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", help="a folder or a hub id")
    parser.add_argument("--base", help="the base model (default: the one that the heads name)")


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", help="a folder or a hub id")
    parser.add_argument("out", help="folder to write; must not be there, or empty")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument("--base", help="the base model, to be named and read (default: the one that the heads name)")
    parser.add_argument(
        "--expand",
        action="store_true",
        help="write out in full what the format cannot hold: a copy of a shared projection for every head, rows of "
        "zeros for tokens that the heads leave out",
    )


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", nargs="?", default=BUILTIN, help="a hub id, a local folder, or builtin (default)")
    _data(parser)
    parser.add_argument("--out", "-o", required=True, help="folder for the heads, and for what the run needs to go on")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for title, options in GROUPS.items():
        _add(parser.add_argument_group(title), options)


def _tree(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", help="a folder or a hub id; tree_statistics.json is written into it")
    _data(parser)
    parser.add_argument("--base", help="the base model (default: the one that the heads name)")
    parser.add_argument("--plot", metavar="FILE", help="draw tokens a step by nodes (.png, .svg, .pdf)")
    known = {name: option for options in GROUPS.values() for name, option in options.items()}
    names = ("max_new_tokens", "sampled", "temperature", "seed", "device")
    _add(parser.add_argument_group("answers"), {name: known[name] for name in names})


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines (.gz or not) with prompt, messages, conversations, turns or instruction; the model answers",
    )
    parser.add_argument("--chat-template", help="a file, or vicuna (default: the model's)")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress")


def _add(group: argparse._ArgumentGroup, options: dict[str, tuple[type, str]]) -> None:
    defaults = {field.name: field.default for field in fields(TrainSettings)}
    for name, (kind, text) in options.items():
        default = defaults[name]
        if default not in (None, False, MISSING):
            text += f" (default: {default})"
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            choices = PROJECTIONS if name == "projection" else None
            metavar = None if choices else name.upper()
            group.add_argument(flag, type=kind, default=default, help=text, choices=choices, metavar=metavar)


def _run_inspect(args: argparse.Namespace) -> int:
    from manyheads.cli.heads import run_inspect

    return run_inspect(args)


def _run_convert(args: argparse.Namespace) -> int:
    from manyheads.cli.heads import run_convert

    return run_convert(args)


def _run_train(args: argparse.Namespace) -> int:
    from manyheads.cli.train import run_train

    return run_train(args)


def _run_tree(args: argparse.Namespace) -> int:
    from manyheads.cli.train import run_tree

    return run_tree(args)
