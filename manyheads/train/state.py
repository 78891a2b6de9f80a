"""Checkpoints of a run, and its metrics: what is needed to go on as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import torch

from manyheads.config import ConfigError
from manyheads.speculation.medusa.export import replace

STATE = "state.pt"
METRICS = "metrics.jsonl"


def save_state(folder: Path, step: int, parts: dict[str, Any]) -> None:
    """Write a checkpoint after so many steps; the one before stays until this one is whole.

    Args:
        parts: name → module or optimizer.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": step, "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    replace(folder / STATE, lambda path: torch.save(state, path))


def load_state(folder: Path, parts: dict[str, Any]) -> int:
    """Take up the last checkpoint, if there is one; the steps done by then.

    It raises ConfigError where the checkpoint is damaged, or of another run.
    """
    path = folder / STATE
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available() and "cuda_rng" in state:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return int(state["step"])
    except Exception as error:  # a damaged file can fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path} cannot be taken up again ({reason}); begin in another folder") from error


def open_metrics(path: Path, step: int) -> TextIO:
    """A file of JSON lines, one a step, that each line is added to at once.

    Args:
        step: steps done; lines of later ones, from before a run was broken off, are removed.
    """
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line, cut off
                break
            if record["step"] > step:
                break
            kept.append(line + "\n")
    replace(path, lambda beside: beside.write_text("".join(kept), encoding="utf-8"))
    return path.open("a", encoding="utf-8", buffering=1)  # a line at a time
