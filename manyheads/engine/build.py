"""From a configuration to a running engine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from manyheads.config import ConfigError, EngineConfig
from manyheads.engine.block_manager import BlockManager
from manyheads.engine.engine import Engine
from manyheads.engine.estimate import HeadsShape, Parts, Shape
from manyheads.engine.memory import Limit, Meter, available_bytes, enforce, limit
from manyheads.engine.runner import NUM_RANKS, Runner
from manyheads.engine.scheduler import Scheduler
from manyheads.engine.warmup import measure_costs
from manyheads.kv_cache import CODES
from manyheads.models.config import ModelConfig
from manyheads.models.loader import load_model
from manyheads.models.ops import shortfalls
from manyheads.quantization.formats import read_format
from manyheads.request import EngineReady, MemoryUse
from manyheads.speculation.medusa.checkpoint import HeadWeights, read_heads, split_model
from manyheads.speculation.medusa.heads import MedusaHeads
from manyheads.speculation.planner import DEFAULT_ACCEPTANCE, MIN_GAIN, Planner
from manyheads.speculation.tree import MAX_NODES


def build_engine(config: EngineConfig, progress: Callable[[str], None] | None = None) -> Engine:
    """Load the model and its heads, make the cache, measure what steps cost.

    Args:
        config: what to serve, and how.
        progress: told what start-up is doing, a line at a time.

    Raises:
        ConfigError, CheckpointError: a setting or a checkpoint cannot hold.
    """
    progress = progress or (lambda _: None)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = _device(config.device)
    gc.collect()  # an engine that nobody uses any more refers to itself, and holds its memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    meter = Meter(device)
    there = limit(config, device)
    model_folder, heads_folder = split_model(config.model, config.heads)
    model_config = ModelConfig.from_folder(model_folder)
    dtype = _dtype(config.dtype, device, model_config.dtype)
    for line in shortfalls(device):
        progress(line)
    if config.dtype == "auto" and dtype != model_config.dtype and device.type == "cuda":
        progress(f"{device} has no {str(model_config.dtype).removeprefix('torch.')}: float16 instead")
    quantization = None if config.quantization == "none" else config.quantization
    layout = read_format(model_folder)
    scheme = quantization or (layout.scheme if layout is not None else None)
    weights: HeadWeights | None = None
    if heads_folder is not None and config.speculative:
        weights = read_heads(heads_folder, model_config)
    shape = _shape(config, model_config, weights, dtype, device, scheme)
    _require(config, shape, there, shape.parts())  # before gigabytes are loaded in vain
    if there is not None and config.memory_bytes is not None:
        enforce(there, device)
    progress(f"loading {model_folder.name}" + (f" in {scheme}" if scheme else ""))
    if scheme == "int4" and device.type == "cpu":
        progress("int4 saves neither time nor memory on a CPU: its weights are widened as they are loaded")
    model = load_model(model_folder, model_config, dtype, device, progress, quantization)
    heads: MedusaHeads | None = None
    prior: list[list[float]] = []
    if weights is not None:
        heads = MedusaHeads(weights, model, dtype, device, quantization)
        prior = _prior(weights.accuracy, heads.num_heads, min(NUM_RANKS, heads.num_tokens))
    meter.loaded(model.memory_bytes(), heads.memory_bytes() if heads else 0)

    num_rows = shape.max_num_seqs
    num_blocks = _num_blocks(config, shape, there, meter)
    max_model_len = _max_model_len(shape, num_blocks)
    runner = Runner(
        model,
        heads,
        num_rows=num_rows,
        max_len=max_model_len,
        num_blocks=num_blocks,
        block_size=config.block_size,
        kv_dtype=shape.kv_dtype,
    )
    planner = Planner(prior, config.tree_size, MIN_GAIN if device.type == "cpu" else 1.04)
    if runner.prompt_graphs is not None:
        runner.prompt_graphs.capture()
    if heads is not None and config.tree_size is None:
        planner.costs = measure_costs(runner, planner, num_rows, max_model_len, progress)
    scheduler = Scheduler(
        BlockManager(num_blocks, config.block_size, config.prefix_caching),
        planner,
        max_num_seqs=num_rows,
        max_num_batched_tokens=shape.max_num_batched_tokens,
        max_queue=config.max_queue,
    )

    def memory() -> MemoryUse:
        graphs = runner.recorder.memory_bytes if runner.recorder is not None else 0
        return meter.look(runner.cache.nbytes, (num_blocks - 1) * config.block_size, graphs)

    ready = EngineReady(
        model=_model_name(config.model, model_folder),
        max_model_len=max_model_len,
        vocab_size=model_config.vocab_size,
        num_heads=heads.num_heads if heads else 0,
        dtype=str(dtype).removeprefix("torch."),
        quantization=scheme,
        kv_cache_dtype=config.kv_cache_dtype,
        device=str(device),
        num_blocks=num_blocks - 1,
        block_size=config.block_size,
        eos_token_ids=list(model_config.eos_token_ids),
        wanted_model_len=shape.max_model_len,
        memory=memory(),
    )
    return Engine(runner, scheduler, ready, config.seed, memory)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    return torch.device(name)


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


def _prior(accuracy: list[list[float]] | None, num_heads: int, ranks: int) -> list[list[float]]:
    """Acceptance by [depth][rank] to start from, as wide as a row's candidates."""
    table = accuracy or DEFAULT_ACCEPTANCE
    table = [*table, *[table[-1]] * num_heads][:num_heads]
    return [[*row, *[0.0] * ranks][:ranks] for row in table]


def _shape(
    config: EngineConfig,
    model: ModelConfig,
    heads: HeadWeights | None,
    dtype: torch.dtype,
    device: torch.device,
    scheme: str | None,
) -> Shape:
    longest = config.max_model_len or model.max_position_embeddings
    if longest > model.max_position_embeddings:
        most = model.max_position_embeddings
        raise ConfigError(f"max_model_len={longest}: the model was made for at most {most}")
    on_cpu = device.type == "cpu"
    return Shape(
        model=model,
        heads=HeadsShape.of(heads, model.vocab_size) if heads is not None else None,
        dtype=dtype,
        device=device,
        max_num_seqs=config.max_num_seqs or (64 if on_cpu else 256),
        max_num_batched_tokens=config.max_num_batched_tokens or (1024 if on_cpu else 2048),
        max_model_len=longest,
        block_size=config.block_size,
        tree_size=config.tree_size,
        quantization=scheme,
        kv_dtype=_kv_dtype(config.kv_cache_dtype, device),
    )


def _asked_blocks(config: EngineConfig, shape: Shape) -> tuple[int, str] | None:
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
    asked = _asked_blocks(config, shape)
    if there is not None and (asked is None or config.memory_bytes is not None):
        shape.require(there, parts, *(asked or (2,)))


def _num_blocks(config: EngineConfig, shape: Shape, there: Limit | None, meter: Meter) -> int:
    """Pages of the K/V cache, the dummy page included, now that the weights are loaded and known."""
    parts = replace(shape.parts(), weights=meter.weights, heads=meter.heads)
    if there is not None:
        there = replace(there, base=max(there.base, meter.rest))
    _require(config, shape, there, parts)
    if (asked := _asked_blocks(config, shape)) is not None:
        return asked[0]
    enough = shape.max_num_seqs * -(-(shape.max_model_len + MAX_NODES) // shape.block_size) + 1
    if there is not None:
        return min(enough, shape.blocks_within(there, parts))
    return max(2, min(enough, available_bytes() // 4 // shape.page_bytes))


def _max_model_len(shape: Shape, num_blocks: int) -> int:
    """What the K/V cache holds, if that is less than what was asked for."""
    fits = (num_blocks - 1) * shape.block_size
    if fits < 2:
        raise ConfigError("the K/V cache holds less than 2 tokens; give it more blocks")
    return min(shape.max_model_len, fits)


def _model_name(model: str, folder: Path) -> str:
    return folder.name if Path(model).exists() else model
