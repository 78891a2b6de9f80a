"""What a checkpoint of heads is, and what is wrong with it. Nothing in the files is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from manyheads.checkpoint import read_json, resolve
from manyheads.config import CheckpointError, ConfigError
from manyheads.models.registry import read_config
from manyheads.speculation.medusa.checkpoint import STATISTICS, HeadWeights, locate_heads, read_heads, vocab_size


@dataclass
class Report:
    """The lines of `manyheads inspect`."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def inspect_heads(heads: str, base: str | None = None) -> Report:
    """Read heads and say what they are; a checkpoint that cannot be read is a problem, not an exception.

    Args:
        heads: a folder or a hub id; else ConfigError is raised.
        base: the base model, in place of the one that the heads name.
    """
    folder, named = locate_heads(heads)
    base = base or named
    report = Report({"folder": str(folder)})
    try:
        weights = read_heads(folder, None)
    except (CheckpointError, ConfigError) as error:
        report.problems.append(str(error))
        return report
    _describe(report, weights, vocab_size(weights, folder))
    report.facts["base model"] = base or "not named"
    if base is None:
        report.problems.append("config.json names no base_model_name_or_path; serve with --heads beside the base")
    elif Path(base).is_dir() or base == "builtin":
        try:
            read_heads(folder, read_config(resolve(base)))
        except (CheckpointError, ConfigError) as error:
            report.problems.append(f"does not fit the base model: {error}")
    elif base.count("/") != 1:
        report.problems.append(f"the base model {base!r} is neither a folder nor a hub id; give --base")
    if (folder / "config.json").is_file():
        _compare(report, weights, read_json(folder / "config.json"))
    return report


def _describe(report: Report, weights: HeadWeights, vocab: int | None) -> None:
    own, shared = weights.projections, weights.shares_one_projection
    tensors = {id(t): t for head in weights.blocks for pair in head for t in pair}
    tensors |= {id(p): p for p in own or []}
    report.facts |= {
        "format": weights.format,
        "heads": str(len(weights.blocks)),
        "blocks a head": str(len(weights.blocks[0])),
        "hidden size": str(len(weights.blocks[0][0][0])),
        "vocabulary": "not known without the base" if vocab is None else str(vocab),
        "projection": "the base's" if own is None else "one for all heads" if shared else "each head's own",
        "tokens": "all" if weights.token_map is None else f"{len(weights.token_map)} (token_map)",
        "parameters": f"{sum(t.numel() for t in tensors.values()):,}",
        "bytes": f"{sum(t.nbytes for t in tensors.values()):,}",
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        "accuracy": "not measured (manyheads tree)"
        if weights.accuracy is None
        else "top-1 " + ", ".join(f"{ranks[0]:.3f}" for ranks in weights.accuracy),
    }
    if not any(bool(bias.any()) for head in weights.blocks for _, bias in head):
        report.facts["biases"] = "none, or all zero"
    if all(not bool(weight.any()) for head in weights.blocks for weight, _ in head):
        report.problems.append("all blocks are zero: these heads are untrained")
    if weights.accuracy is not None and len(weights.accuracy) != len(weights.blocks):
        sizes = f"of {len(weights.accuracy)} heads, the weights of {len(weights.blocks)}"
        report.problems.append(f"{STATISTICS} is {sizes}")
    if weights.token_map is not None and len(torch.unique(weights.token_map)) != len(weights.token_map):
        report.problems.append("token_map names a token twice")


def _compare(report: Report, weights: HeadWeights, config: dict[str, object]) -> None:
    """What the configuration declares against what the file holds; the file counts."""
    num_heads, num_layers = len(weights.blocks), len(weights.blocks[0])
    found = {"medusa_num_heads": num_heads, "num_heads": num_heads, "medusa_num_layers": num_layers}
    of_heads = config.get("model_type") == "medusa"
    for key, number in found.items():
        if (key != "num_heads" or of_heads) and config.get(key) not in (None, number):
            report.problems.append(
                f"config.json declares {key} {config[key]}, the weights hold {number}; the weights count here, "
                "other readers may believe the configuration"
            )
