"""What a checkpoint of an EAGLE-3 drafter is, and what is wrong with it. Nothing in the files is run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from manyheads.checkpoint import read_tensors, resolve, tensor_files
from manyheads.config import CheckpointError, ConfigError
from manyheads.models.registry import read_config
from manyheads.speculation.eagle3.checkpoint import Eagle3Config, Eagle3Weights, read_drafter
from manyheads.speculation.eagle3.declared import FLAGS
from manyheads.speculation.medusa.inspect import Report


def inspect_drafter(folder: Path, base: str | None) -> Report:
    """Read a drafter and say what it is; a checkpoint that cannot be read is a problem, not an exception.

    Args:
        base: the base model, a folder or a hub id; None where neither the drafter nor the user names one.
    """
    report = Report({"folder": str(folder), "kind": "EAGLE-3 drafter"})
    try:
        weights = read_drafter(folder, None)
    except (CheckpointError, ConfigError) as error:
        report.problems.append(str(error))
        return report
    report.facts |= _facts(weights)
    report.facts["base model"] = base or "not named"
    if base is None:
        report.problems.append("config.json names no base model; serve with --heads beside the base")
    elif Path(base).is_dir() or base == "builtin":
        _compare(report, weights, folder, resolve(base))
    elif base.count("/") != 1:
        report.problems.append(f"the base model {base!r} is neither a folder nor a hub id; give --base")
    if not bool(weights.tensors["fc.weight"].any()):
        report.problems.append("fc.weight is all zero: this drafter is untrained")
    return report


def _facts(weights: Eagle3Weights) -> dict[str, str]:
    config, tensors = weights.config, weights.tensors.values()
    layers = "2, n/2 and n-3 of n" if config.layer_ids is None else ", ".join(map(str, config.layer_ids))
    cut = "the whole vocabulary" if weights.token_map is None else f"{config.draft_vocab_size} (d2t)"
    norms = [name for name in (*FLAGS, "qk_norm") if getattr(config, name)]
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * 2
    return {
        "format": weights.format,
        "hidden size": f"{config.hidden_size}, the base's {config.target_hidden_size}",
        "reads": f"what goes into layers {layers}",
        "attention": f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} of keys and values",
        "inner size": str(config.intermediate_size),
        "vocabulary": str(config.vocab_size),
        "tokens": cut,
        "rotary": _rotary(config),
        "norms": ", ".join(norms) or "as EAGLE-3 was published",
        "embedding": "the base's" if weights.embedding is None else "its own",
        "parameters": f"{sum(t.numel() for t in tensors if t.is_floating_point()):,}",
        "bytes": f"{sum(t.nbytes for t in tensors):,}",
        "K/V of a token": f"{kv_bytes:,} bytes in half precision",
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()})),
        "accuracy": "not measured"
        if weights.accuracy is None
        else "top-1 " + ", ".join(f"{ranks[0]:.3f}" for ranks in weights.accuracy),
    }


def _rotary(config: Eagle3Config) -> str:
    scaling = config.rope_scaling
    more = "" if scaling is None else f", {scaling.kind} by {scaling.factor:g}"
    return f"base {config.rope_theta:g}{more}"


def _compare(report: Report, weights: Eagle3Weights, folder: Path, base: Path) -> None:
    """The drafter against a base that is at hand."""
    try:
        read_drafter(folder, read_config(base))
        own = weights.embedding
        theirs = None if own is None else _embedding(base)
    except (CheckpointError, ConfigError) as error:
        report.problems.append(f"does not fit the base model: {error}")
        return
    if own is not None and theirs is not None and own.shape == theirs.shape:
        same = torch.equal(own, theirs.to(own.dtype))
        report.facts["embedding"] = "a copy of the base's" if same else "its own, other than the base's"


def _embedding(base: Path) -> Tensor | None:
    """The base's embedding, [V, hidden]; None where its name is another one."""
    for path in tensor_files(base):
        for key, tensor in read_tensors(path):
            if key.removeprefix("model.") == "embed_tokens.weight":
                return tensor
    return None
