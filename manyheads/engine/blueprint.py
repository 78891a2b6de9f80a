"""From a configuration to a runner: what is to be built is known, and seen to fit, before anything is loaded."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from manyheads.checkpoint import described
from manyheads.config import ConfigError, EngineConfig
from manyheads.engine.compiler import Compiler
from manyheads.engine.estimate import Parts, Shape
from manyheads.engine.memory import Limit, Meter, available_bytes, enforce, limit
from manyheads.engine.page_manager import longest_text
from manyheads.engine.runner import Runner
from manyheads.engine.threads import Threads, given_threads
from manyheads.engine.vocabulary import Vocabulary
from manyheads.kv_cache import CODES
from manyheads.models.adapters import attach, count_numbers
from manyheads.models.config import ModelConfig
from manyheads.models.loader import load_model
from manyheads.models.lora import Adapter, read_adapters
from manyheads.models.parallel import ALONE, Ranks
from manyheads.models.registry import read_config, shared
from manyheads.ops import blocks, ops_for, shortfalls
from manyheads.quantization.base import Scheme
from manyheads.quantization.formats import read_format
from manyheads.quantization.schemes import find
from manyheads.speculation.drafter import DrafterSource
from manyheads.speculation.kinds import find_drafter
from manyheads.speculation.medusa.checkpoint import split_model

Progress = Callable[[str], None]
"""Told what start-up is doing, a line at a time."""


@dataclass(frozen=True, eq=False)
class Blueprint:
    """What a rank is to build."""

    config: EngineConfig
    model: ModelConfig
    """Of the whole model."""
    folder: Path
    """Of the model's checkpoint."""
    source: DrafterSource | None
    adapters: list[Adapter]
    shape: Shape
    """Of this rank."""
    threads: Threads | None
    limit: Limit | None
    meter: Meter

    @classmethod
    def draw(cls, config: EngineConfig, progress: Progress, rank: int = 0) -> Blueprint:
        """Read what there is, and see that it fits.

        Raises:
            ConfigError, CheckpointError: a setting or a checkpoint cannot hold.
        """
        device = _device(config, rank)
        threads = _threads(config, device)
        gc.collect()  # an engine that nobody uses any more refers to itself, and holds its memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
        meter = Meter(device)
        there = limit(config, device)
        model_folder, heads_folder = split_model(config.model, config.heads)
        model = read_config(model_folder)
        part = shared(model, config.tensor_parallel_size)
        source = find_drafter(config, heads_folder, part)
        adapters = read_adapters(config.loras, part)
        shape = _shape(config, part, source, device, _scheme(config, model_folder), count_numbers(adapters, part))
        _announce(config, shape, progress)
        _require(config, shape, there, shape.parts())  # before gigabytes are loaded in vain
        if there is not None and config.memory_bytes is not None:
            enforce(there, device)
        return cls(config, model, model_folder, source, adapters, shape, threads, there, meter)

    def runner(self, progress: Progress, make: Callable[..., Runner] = Runner, ranks: Ranks = ALONE) -> Runner:
        """Load the model and its drafter, and make the cache.

        Args:
            make: the runner's class, or what makes one with its arguments.
            ranks: those who build the same beside this one.

        Raises:
            CheckpointError: a checkpoint cannot hold.
        """
        config, shape, source = self.config, self.shape, self.source
        scheme, device = shape.scheme, shape.device
        progress(f"loading {self.folder.name}" + (f" in {scheme}" if scheme else ""))
        if (weights := self.weights) is not None:
            progress(weights)
        elif scheme is not None and scheme.note_on_cpu and device.type == "cpu":
            progress(scheme.note_on_cpu)
        model = load_model(
            self.folder, self.model, shape.dtype, device, progress, config.quantization, shape.ops, ranks
        )
        if self.adapters:
            attach(model, self.adapters)
        drafter = source.build(model, shape.dtype, device, config.quantization) if source is not None else None
        self.meter.loaded(model.memory_bytes(), drafter.memory_bytes() if drafter else 0)
        num_pages = ranks.least(_num_pages(config, shape, self.limit, self.meter))
        runner = make(
            model,
            drafter,
            num_rows=shape.max_num_seqs,
            max_len=_max_model_len(shape, num_pages),
            num_pages=num_pages,
            page_size=config.block_size,
            kv_dtype=shape.kv_dtype,
        )
        runner.threads = self.threads
        return runner

    @property
    def weights(self) -> str | None:
        """A line on what becomes of the checkpoint's weights, if that is not plain."""
        is_rounded = find(self.config.quantization) is not None
        return described(self.folder, self.shape.dtype, is_rounded, blocks.serves(self.shape.dtype, self.shape.device))

    @property
    def row_bytes(self) -> int:
        """Of a row of hidden states."""
        return self.model.hidden_size * self.shape.dtype.itemsize

    def compiler(self) -> Compiler:
        """What compiles grammars for the tokens that texts are made of."""
        folder = self.folder if self.config.tokenizer is None else Path(self.config.tokenizer)
        return Compiler(Vocabulary(folder, self.model.vocab_size, self.model.eos_token_ids))


def _scheme(config: EngineConfig, model_folder: Path) -> Scheme | None:
    """What weights are rounded to: as the configuration says, else as the checkpoint is."""
    layout = read_format(model_folder)
    return find(config.quantization) or (layout.scheme if layout is not None else None)


def _announce(config: EngineConfig, shape: Shape, progress: Callable[[str], None]) -> None:
    """Say what this machine does not get of what there is."""
    device, checkpoint = shape.device, shape.model.dtype
    for line in shortfalls(device):
        progress(line)
    if config.dtype == "auto" and shape.dtype != checkpoint and device.type == "cuda":
        progress(f"{device} has no {str(checkpoint).removeprefix('torch.')}: float16 instead")


def _threads(config: EngineConfig, device: torch.device) -> Threads | None:
    """What chooses threads; from here on, so that loading and measuring are not held up by others' work either."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif config.tensor_parallel_size > 1:  # a rank cannot tell what the others are at
        torch.set_num_threads(max(1, given_threads() // config.tensor_parallel_size))
    elif device.type == "cpu" and given_threads() > 1:
        return Threads(given_threads())
    return None


def _device(config: EngineConfig, rank: int) -> torch.device:
    name, size = config.device, config.tensor_parallel_size
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {config.device!r}")
    if kind == "cpu":
        return torch.device(name)
    there = f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
    if int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: {there}")
    if size == 1:
        return torch.device(name)
    if number:
        raise ConfigError(f"device {name} is one GPU, and tensor_parallel_size={size} takes {size}; say cuda")
    if size > torch.cuda.device_count():
        raise ConfigError(f"tensor_parallel_size={size}: {there}")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _dtype(name: str, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.float16 if checkpoint == torch.bfloat16 and not has_bfloat16 else checkpoint
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _kv_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Of the K/V cache; None is the model's."""
    if name == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"kv_cache_dtype=fp8: {torch.cuda.get_device_name(device)} has no fp8; int8 takes as little")
    return CODES.get(name)


def _shape(
    config: EngineConfig,
    model: ModelConfig,
    source: DrafterSource | None,
    device: torch.device,
    scheme: Scheme | None,
    adapter_numbers: int,
) -> Shape:
    longest = config.max_model_len or model.max_position_embeddings
    if longest > model.max_position_embeddings:
        most = model.max_position_embeddings
        raise ConfigError(f"max_model_len={longest}: the model was made for at most {most}")
    on_cpu = device.type == "cpu"
    return Shape(
        model=model,
        drafter=source.shape if source is not None else None,
        dtype=_dtype(config.dtype, device, model.dtype),
        device=device,
        ops=ops_for(device),
        max_num_seqs=config.max_num_seqs or (64 if on_cpu else 256),
        max_num_batched_tokens=config.max_num_batched_tokens or (1024 if on_cpu else 2048),
        max_model_len=longest,
        page_size=config.block_size,
        tree_size=config.tree_size,
        scheme=scheme,
        adapter_numbers=adapter_numbers,
        kv_dtype=_kv_dtype(config.kv_cache_dtype, device),
    )


def _asked_pages(config: EngineConfig, shape: Shape) -> tuple[int, str] | None:
    """Pages of the K/V cache that a setting asks for, the dummy page included, and which setting."""
    if config.num_blocks is not None:
        return config.num_blocks + 1, "num_blocks"
    if config.kv_cache_bytes is None:
        return None
    count, page = config.kv_cache_bytes // shape.page_bytes, shape.page_bytes
    if count < 2:
        raise ConfigError(
            f"kv_cache_bytes={config.kv_cache_bytes} holds no page beside the dummy page; a page takes {page} bytes"
        )
    return count, "kv_cache_bytes"


def _require(config: EngineConfig, shape: Shape, there: Limit | None, parts: Parts) -> None:
    """See that it all fits with the pages that were asked for, or with one.

    Raises:
        ConfigError: it does not.
    """
    asked = _asked_pages(config, shape)
    if there is not None and (asked is None or config.memory_bytes is not None):
        shape.require(there, parts, *(asked or (2,)))


def _num_pages(config: EngineConfig, shape: Shape, there: Limit | None, meter: Meter) -> int:
    """Pages of the K/V cache, the dummy page included, now that the weights are loaded and known."""
    parts = replace(shape.parts(), weights=meter.weights, heads=meter.heads)
    if there is not None:
        there = replace(there, base=max(there.base, meter.rest))
    _require(config, shape, there, parts)
    if (asked := _asked_pages(config, shape)) is not None:
        return asked[0]
    enough = shape.max_num_seqs * shape.most_pages + 1
    if there is not None:
        return min(enough, shape.pages_within(there, parts))
    share = available_bytes() // 4 // config.tensor_parallel_size
    return max(2, min(enough, share // shape.page_bytes))


def _max_model_len(shape: Shape, num_pages: int) -> int:
    """What the K/V cache holds, if that is less than what was asked for."""
    kept = shape.kept
    fits = longest_text(num_pages, shape.page_size, kept.window, kept.num_companions)
    if fits < 2:
        raise ConfigError("the K/V cache holds less than 2 tokens; give it more pages")
    return min(shape.max_model_len, fits)
