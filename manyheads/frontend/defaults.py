"""A model says in its generation_config.json how it wants to be sampled where a request says nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from manyheads.config import ConfigError
from manyheads.errors import RequestError
from manyheads.request import SamplingParams

FILE = "generation_config.json"
_NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def default_params(folder: Path) -> SamplingParams:
    """Read the parameters that hold where a request says nothing.

    They are transformers' `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty`; `do_sample: false` is
    greedy, and `suppress_tokens` are never drawn.

    Raises:
        ConfigError: a value cannot hold.
    """
    path = folder / FILE
    config = _read(path) if path.is_file() else {}
    given: dict[str, Any] = {}
    for name in _NUMBERS:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{path}: {name} must be a number, not {value!r}")
        given[name] = int(value) if name == "top_k" else float(value)
    if config.get("do_sample") is False:
        given["temperature"] = 0.0
    tokens = config.get("suppress_tokens") or ()
    if not isinstance(tokens, (list, tuple)) or not all(type(token) is int for token in tokens):
        raise ConfigError(f"{path}: suppress_tokens must be a list of token ids, not {tokens!r}")
    try:
        return SamplingParams(**given, bad_token_ids=tuple((token,) for token in tokens)).validate()
    except RequestError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    # NOTE: not `checkpoint.read_json`, which brings torch: the server's own process does without
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return config
