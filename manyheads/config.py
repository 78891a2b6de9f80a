"""Configuration: one frozen dataclass, resolved once; the command line takes its defaults from it."""

from __future__ import annotations

from dataclasses import dataclass, field

BUILTIN = "builtin"
QUANTIZATIONS = ("int8", "fp8", "int4", "bitsandbytes-8bit", "bitsandbytes-4bit")
"""What weights can be quantized to (docs/quantization.md)."""
DRAFTERS = ("medusa", "eagle3", "ngram")
"""What may guess tokens (docs/heads.md): heads or a drafter for the model, or what followed the same words earlier in
the text."""
KV_CACHE_DTYPES = ("auto", "fp8", "int8")


class ConfigError(ValueError):
    """A setting cannot hold; the message names the setting and what to change."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read as what it claims to be; the message names file and key."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine needs to know. `None` means: found out from the checkpoint or the machine.

    Names follow vLLM where a setting means the same.
    """

    model: str = BUILTIN
    """A hub id, a local folder, a GGUF file, or `builtin`."""
    heads: str | None = None
    """Medusa heads or an EAGLE-3 drafter: a hub id or a local folder; None takes what comes with the model, if any."""
    tokenizer: str | None = None
    """A local folder with another tokenizer; None takes the model's."""
    drafter: str | None = None
    """What guesses tokens: one of `DRAFTERS`; None takes the heads that come with the model, if any."""
    loras: dict[str, str] = field(default_factory=dict)
    """Adapters beside the base (LoRA, in peft's format), by the names that requests choose them by: hub ids or local
    folders."""
    speculative: bool = True
    """False serves the model without a drafter, as a plain engine."""
    dtype: str = "auto"
    """`auto` (float32 on a CPU, the checkpoint's own on a GPU), `float32`, `bfloat16` or `float16`."""
    quantization: str | None = None
    """Bits of the weights: one of `QUANTIZATIONS`, for the model and its heads; None or `none` leaves them as they
    come. A checkpoint that is quantized already needs nothing here."""
    kv_cache_dtype: str = "auto"
    """`auto` (as `dtype`), or 8 bits: `fp8` or `int8`, with a scale per token, layer and kv head."""
    device: str = "auto"
    tensor_parallel_size: int = 1
    """Ranks that share the model, each a process with a GPU of its own (on a CPU, with a share of its cores)."""
    max_model_len: int | None = None
    """Longest sequence, prompt and output together, in tokens; None takes the checkpoint's."""
    max_num_seqs: int | None = None
    """Most requests that run at once (rows of a step); None is 64 on a CPU, 256 on a GPU."""
    max_num_batched_tokens: int | None = None
    """Most prompt tokens that one step computes (chunked prefill); None is 1024 on a CPU, 2048 on a GPU."""
    target_step_ms: float | None = None
    """How long a step should be where rows decode, in milliseconds: it computes as many prompt tokens as fit, and no
    more rows run than fit. None lets its prompts take three times as long as its decoding rows do by themselves, or as
    long as a step with a single token of a prompt does. `LLM` has no limit where nothing else is said."""
    block_size: int = 16
    """Tokens in a page of the K/V cache."""
    num_blocks: int | None = None
    """Pages of the K/V cache; None takes what `kv_cache_bytes` or the memory gives."""
    kv_cache_bytes: int | None = None
    memory_bytes: int | None = None
    """Most memory to take in all: on a GPU the device's, on a CPU the engine's process's. None: on a GPU what
    `gpu_memory_utilization` says; on a CPU the K/V cache takes at most a quarter of what is free."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, K/V cache and scratch may take together; `memory_bytes` goes before it."""
    prefix_caching: bool = True
    tree_size: int | None = None
    """Nodes that a decoding row brings, on average over the rows of a step; None lets the planner choose from measured
    costs."""
    max_queue: int = 1024
    """Most requests that wait; one more is rejected."""
    max_wait: float | None = None
    """Longest time from a request's arrival to its start, in seconds; one that would wait longer is rejected at once.
    None lets all wait; `manyheads serve` takes 30 s."""
    seed: int | None = None
    """Seed for requests that bring none; None takes one from the operating system."""
    num_threads: int | None = None
    """CPU threads of the engine; None chooses by measuring, again and again (`engine/threads.py`)."""

    def __post_init__(self) -> None:
        names = ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_queue", "tensor_parallel_size")
        for name in (*names, "max_model_len", "num_blocks", "kv_cache_bytes", "memory_bytes", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.max_wait is not None and not self.max_wait > 0:
            raise ConfigError(f"max_wait must be above 0, not {self.max_wait}")
        if self.target_step_ms is not None and not self.target_step_ms > 0:
            raise ConfigError(f"target_step_ms must be above 0, not {self.target_step_ms}")
        if not 0 < self.gpu_memory_utilization <= 1:
            share = self.gpu_memory_utilization
            raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, not {share}")
        if self.tree_size is not None and not 1 <= self.tree_size <= 64:
            raise ConfigError(f"tree_size must be between 1 and 64, not {self.tree_size}")
        if self.drafter not in (None, *DRAFTERS):
            raise ConfigError(f"drafter must be one of {', '.join(DRAFTERS)}, not {self.drafter!r}")
        if self.drafter == "ngram" and self.heads is not None:
            raise ConfigError("drafter=ngram needs no heads; leave heads out, or drafter")
        if "" in self.loras or BUILTIN in self.loras:
            raise ConfigError(f"an adapter needs a name, and {BUILTIN!r} is the built-in model's")
        if self.loras and self.tensor_parallel_size > 1:
            raise ConfigError(f"loras: adapters need tensor_parallel_size=1, not {self.tensor_parallel_size}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, not {self.dtype!r}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(f"kv_cache_dtype must be {', '.join(KV_CACHE_DTYPES)}, not {self.kv_cache_dtype!r}")
        if self.quantization not in (None, "none", *QUANTIZATIONS):
            known = ", ".join(("none", *QUANTIZATIONS))
            raise ConfigError(f"quantization must be one of {known}, not {self.quantization!r}")
