"""What a seed of `stress.py` asks: a tiny random model, engines one after another, and requests to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from manyheads import EngineConfig, Grammar, SamplingParams
from manyheads.engine.page_manager import longest_text
from manyheads.models.registry import read_config
from manyheads.request import EngineRequest
from tests.eagle3 import make_drafter
from tests.lora import save_adapter
from tests.models.families import MODELS, reference
from tests.server.tiny_tokenizer import make_hf
from tests.structured import EOS, SCHEMA
from tests.tiny import VOCAB, make_model, save_heads

LLAMA = "tiny llama"
ODD = ("gemma3", "gemma2", "mistral with a window", "gpt-oss", "qwen3 with experts", "cohere2")
"""Windows, caps, sinks, experts; the first, with four layers of five that have a window, has companions of pages."""
FIVE = {"num_hidden_layers": 5, "layer_types": [*["sliding_attention"] * 4, "full_attention"]}
GRAMMARS = (
    Grammar("json", SCHEMA),
    Grammar("json", '{"type": "object"}'),
    Grammar("json", '{"properties": {"kind_of_animal": {"enum": ["cat", "dog"]}}, "required": ["kind_of_animal"]}'),
    Grammar("regex", "(the cat sat on the mat )+[0-9]"),
    Grammar("regex", "[a-z ]*"),
    Grammar("choice", '["hello", "hello there", "the mat é", "the cat sat on the mat and the dog sat on the log"]'),
    Grammar("grammar", 'start: "<" item+ ">"\nitem: /[a-z]{1,3}/ ","'),
    Grammar("grammar", 'root ::= "a" ("b" | "c")+ "end"'),
    Grammar("grammar", 'start: "<" x y\nx[max_tokens=4]: /[a-c]+/\ny: ">" /[0-9]{1,3}/'),
    Grammar("grammar", 'start: "<" x\nx[stop="d"]: /[a-c]+/'),
    Grammar("grammar", 'start: /[ab]{2}/ (<|end|> | "c") "d"'),
    Grammar("regex", "(((("),
)
"""Some leave no choice for many tokens, some cannot go back, the last one cannot be compiled."""
ALWAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "top": ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.05}, {"top_p": 0.5, "top_k": 3}, {"top_k": 1}),
    "penalties": (
        *({"repetition_penalty": 1.3}, {"presence_penalty": 0.7}, {"frequency_penalty": 0.9}),
        {"repetition_penalty": 0.8, "frequency_penalty": -0.6, "presence_penalty": 0.4},
    ),
    "no end token": ({"ignore_eos": True},),
    "log-probabilities": ({"logprobs": 0}, {"logprobs": 1}, {"logprobs": 4}),
    "prompt's log-probabilities": ({"prompt_logprobs": 0}, {"prompt_logprobs": 2}),
    "traces": ({"return_steps": True},),
    "plain decoding": ({"speculative": False},),
    "typical acceptance": (
        {"acceptance": "typical"},
        {"acceptance": "typical", "typical_epsilon": 1.0, "typical_alpha": 100.0},
    ),
    "most steps": tuple({"max_steps": steps} for steps in (1, 2, 5, 10, 20)),
    "least": tuple({"min_tokens": tokens} for tokens in (1, 3, 10, 20)),
}
"""What a request may ask of any model, by what it is counted as; `_params` has the rest."""
TOKENS = ("grammar", "bias", "allowed", "bad runs", "stop tokens")
SHARES = {"no end token": 0.5, "typical acceptance": 0.08, "most steps": 0.06}
"""Of requests that ask these; of those that ask any other it is 0.13, and 0.6 of what a mixture has most of."""


@dataclass(frozen=True)
class Life:
    """An engine, how it is driven, and after how many steps it dies; None of the last one."""

    config: EngineConfig
    steps: int | None
    overlaps: bool
    recorded: bool
    second_rank: bool
    skill: float
    """How often the drafter knows the text."""
    plain: float
    """How often a step has no trees."""

    @property
    def features(self) -> dict[str, bool]:
        config = self.config
        drafter = config.drafter or {None: "none", "heads": "medusa"}.get(
            config.heads and Path(config.heads).name, "eagle3"
        )
        return {
            f"drafter {drafter}": True,
            "prefix cache": config.prefix_caching,
            "overlapping steps": self.overlaps,
            "recorded steps": self.recorded,
            "second rank": self.second_rank,
        }


@dataclass(frozen=True)
class Asked:
    """A request, what it asks by names, and what its client does."""

    message: EngineRequest
    options: frozenset[str]
    at: int
    """The step before which it is sent,"""
    abort_at: int | None
    """and the one before which it is aborted,"""
    again: bool
    """and sent once more at once."""
    known: float
    """The share of its text that it brings, as one that another engine began."""


@dataclass(frozen=True)
class Mix:
    family: str
    broken: str
    """What is no number: some tokens' `embedding`, what the `last layer` makes of some places, or nothing."""
    plain: EngineConfig
    """The engine in which each request is alone."""
    lives: list[Life]
    asked: list[Asked]

    def features(self) -> set[str]:
        """What of it is worth counting."""
        plain, lives = self.plain, [name for life in self.lives for name, holds in life.features.items() if holds]
        about = {f"family {self.family}", f"K/V {plain.kv_cache_dtype}", f"weights {plain.quantization or plain.dtype}"}
        some = {"LoRA": bool(plain.loras), f"broken {self.broken}": bool(self.broken), "death": len(self.lives) > 1}
        return about | {*lives} | {name for name, holds in some.items() if holds}


def model_folder(root: Path, family: str, has_text: bool) -> Path:
    """A model in its folder, made when it is first asked for, with its drafters and adapters."""
    folder = root / f"{family} with text" if has_text else root / family
    if folder.exists():
        return folder
    tokenizer = make_hf()
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "eos_token_id": 3}
    if has_text:
        tokenizer.save_pretrained(str(folder))
        sizes = {"vocab_size": len(tokenizer) + 9, "eos_token_id": EOS}
    five: dict[str, Any] = FIVE if family == ODD[0] else {}
    model: PreTrainedModel = make_model(**sizes) if family == LLAMA else reference(family, **five, **sizes)
    model.save_pretrained(folder)
    torch.manual_seed(1)
    save_heads(folder, model.config.hidden_size)
    make_drafter(folder / "eagle3", read_config(folder), rope_scaling=None)
    save_adapter(folder / "a", model)
    save_adapter(folder / "b", model, targets=("o_proj",), rank=2, seed=1)
    return folder


def draw_mix(seed: int, root: Path) -> Mix:
    """The mixture of a seed.

    Args:
        root: where models stand, and are put.
    """
    rng = Random(seed)
    family = rng.choice([LLAMA, LLAMA, rng.choice(ODD), rng.choice(sorted(MODELS))])
    has_text, longest = rng.random() < 0.55, rng.choice([24, 48, 64])
    folder = model_folder(root, family, has_text)
    settings: dict[str, Any] = {
        "model": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "num_threads": 1,
        "seed": 0,
        "max_model_len": longest,
        "kv_cache_dtype": rng.choice(["auto", "auto", "auto", "int8", "fp8"]),
        "quantization": rng.choice([None, None, None, "int8", "fp8"]),
        "loras": {name: str(folder / name) for name in "ab"} if rng.random() < 0.3 else {},
    }
    alone: dict[str, Any] = {
        "speculative": False,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 512,
        "prefix_caching": False,
    }
    deaths = [rng.randint(1, 40) for _ in range(rng.choice([0, 0, 0, 1, 1, 2]))]
    plain = EngineConfig(**settings, **alone, num_blocks=400)
    return Mix(
        family=family,
        broken=rng.choice(["embedding", "last layer"]) if rng.random() < 0.2 else "",
        plain=plain,
        lives=[_life(rng, settings, folder, steps) for steps in (*deaths, None)],
        asked=_requests(rng, plain, read_config(folder).vocab_size, longest, has_text),
    )


def _life(rng: Random, settings: dict[str, Any], folder: Path, steps: int | None) -> Life:
    heads = [{"heads": str(folder / name)} for name in ("heads", "eagle3", "eagle3")]
    drafter: dict[str, Any] = rng.choice([*heads, {"drafter": "ngram"}, {"speculative": False}])
    page, least = rng.choice([1, 2, 4, 4, 8, 16]), 1
    shape = read_config(folder).kv_shape.with_layers(1 if drafter == heads[1] else 0)
    while longest_text(least + 1, page, shape.window, shape.num_companions) < settings["max_model_len"]:
        least += 1
    config = EngineConfig(
        **settings,
        **drafter,
        tree_size=8,
        block_size=page,
        num_blocks=int(least * rng.choice([1, 1, 1.2, 1.5, 2, 4])) + rng.choice([0, 0, 1, 2, 5]),
        prefix_caching=rng.random() < 0.75,
        max_num_seqs=rng.choice([1, 2, 3, 4, 6, 10, 16]),
        max_num_batched_tokens=rng.choice([1, 2, 3, 5, 8, 16, 32, 64]),
        max_queue=rng.choice([1000, 1000, 1000, 5]),
        max_wait=rng.choice([None, None, 2.0]),
    )
    overlaps, recorded, second_rank = (rng.random() < share for share in (0.5, 0.3, 0.25))
    return Life(config, steps, overlaps, recorded, second_rank, rng.choice([0, 0.5, 0.9, 1]), rng.choice([0, 0.1, 0.5]))


def _requests(rng: Random, plain: EngineConfig, vocab: int, longest: int, has_text: bool) -> list[Asked]:
    focus = set(rng.sample([*ALWAYS, *TOKENS], rng.choice([0, 2, 3, 4])))
    beginnings = [[rng.randrange(vocab) for _ in range(40)] for _ in range(rng.randint(1, 3))]
    clients, asked = rng.choice([[""], ["", "a", "b"]]), []
    for i in range(rng.randint(3, 22)):
        prompt = rng.choice(beginnings)[: rng.choice([0, 4, 8, 16, 17, 32, 40])]
        prompt = prompt + [rng.randrange(vocab) for _ in range(rng.choice([0, 1, 1, 3, 10, 30]))]
        prompt = prompt[: longest - 1] or [1]
        options = {
            name for name in (*ALWAYS, *TOKENS) if rng.random() < (0.6 if name in focus else SHARES.get(name, 0.13))
        }
        options -= set() if has_text else {"grammar"}
        message = EngineRequest(
            request_id=str(i),
            prompt_token_ids=prompt,
            params=_params(rng, options, vocab, longest - len(prompt), plain.kv_cache_dtype != "auto"),
            client=rng.choice(clients),
            priority=rng.choice([0, 0, 0, -1, 1]),
            cache_salt=rng.choice(["", "", "s", "t"]),
            lora=rng.choice(["", *plain.loras]),
            timeout=rng.choice([0.3, 1.0, 3.0]) if rng.random() < 0.1 else None,
        )
        at = rng.choice([0, 0, rng.randint(0, 10), rng.randint(0, 40)])
        abort_at = at + rng.randint(0, 30) if rng.random() < 0.15 else None
        known = rng.random() if rng.random() < 0.2 else 0.0
        asked.append(Asked(message, frozenset(options), at, abort_at, rng.random() < 0.3, known))
    return asked


def _params(rng: Random, options: set[str], vocab: int, room: int, is_greedy: bool) -> SamplingParams:
    def tokens(most: int, of: int = vocab) -> tuple[int, ...]:
        return tuple(rng.randrange(of) for _ in range(rng.randint(1, most)))

    some: dict[str, Any] = {"seed": rng.getrandbits(40)}
    for name in sorted(options & ALWAYS.keys()):
        some |= rng.choice(ALWAYS[name])
    if "grammar" in options:
        some["grammar"] = rng.choice(GRAMMARS)
    if "bias" in options:
        some["logit_bias"] = {token: rng.choice([-100.0, -3.0, 2.0, 5.0]) for token in tokens(5)}
    if "allowed" in options:
        some["allowed_token_ids"] = tuple(rng.sample(range(vocab), rng.choice([2, vocab // 3, vocab // 2])))
    if "bad runs" in options:
        some["bad_token_ids"] = tuple(tokens(3, min(vocab, 40)) for _ in range(rng.randint(1, 12)))
    if "stop tokens" in options:
        some["stop_token_ids"] = tokens(3)
    most = rng.choice([0, 1, 2, 5, 10, 20, 30, 40, None])
    room = room if most is None else min(most, room)
    some |= {"max_tokens": None if most is None else room, "min_tokens": min(some.get("min_tokens", 0), room)}
    return SamplingParams(**some, temperature=0.0 if is_greedy else rng.choice([0.0, 0.0, 0.7, 1.0, 1.3]))
