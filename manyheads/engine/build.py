"""From a configuration to a running engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from manyheads.config import ConfigError, EngineConfig
from manyheads.engine.block_manager import BlockManager
from manyheads.engine.engine import Engine
from manyheads.engine.runner import NUM_RANKS, Runner
from manyheads.engine.scheduler import Scheduler
from manyheads.engine.warmup import measure_costs
from manyheads.medusa.checkpoint import read_heads, split_model
from manyheads.medusa.heads import MedusaHeads
from manyheads.medusa.planner import DEFAULT_ACCEPTANCE, MIN_GAIN, Planner
from manyheads.medusa.tree import MAX_NODES
from manyheads.models.config import ModelConfig
from manyheads.models.loader import load_model
from manyheads.quantization.formats import read_format
from manyheads.request import EngineReady


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
    model_folder, heads_folder = split_model(config.model, config.heads)
    model_config = ModelConfig.from_folder(model_folder)
    dtype = _dtype(config.dtype, device, model_config.dtype)
    quantization = None if config.quantization == "none" else config.quantization
    layout = read_format(model_folder)
    scheme = quantization or (layout.scheme if layout is not None else None)
    progress(f"loading {model_folder.name}" + (f" in {scheme}" if scheme else ""))
    if scheme == "int4" and device.type == "cpu":
        progress("int4 saves neither time nor memory on a CPU: its weights are widened as they are loaded")
    model = load_model(model_folder, model_config, dtype, device, progress, quantization)
    heads: MedusaHeads | None = None
    prior: list[list[float]] = []
    if heads_folder is not None and config.speculative:
        weights = read_heads(heads_folder, model_config)
        heads = MedusaHeads(weights, model, dtype, device, quantization)
        prior = _prior(weights.accuracy, heads.num_heads, min(NUM_RANKS, heads.num_tokens))

    num_rows = config.max_num_seqs or (64 if device.type == "cpu" else 256)
    num_blocks = _num_blocks(config, model_config, dtype, device, num_rows)
    max_model_len = _max_model_len(config, model_config, num_blocks)
    runner = Runner(
        model,
        heads,
        num_rows=num_rows,
        max_len=max_model_len,
        num_blocks=num_blocks,
        block_size=config.block_size,
    )
    planner = Planner(prior, config.tree_size, MIN_GAIN if device.type == "cpu" else 1.04)
    if heads is not None and config.tree_size is None:
        planner.costs = measure_costs(runner, planner, num_rows, max_model_len, progress)
    scheduler = Scheduler(
        BlockManager(num_blocks, config.block_size, config.prefix_caching),
        planner,
        max_num_seqs=num_rows,
        max_num_batched_tokens=config.max_num_batched_tokens or (512 if device.type == "cpu" else 2048),
        max_queue=config.max_queue,
    )
    ready = EngineReady(
        model=_model_name(config.model, model_folder),
        max_model_len=max_model_len,
        vocab_size=model_config.vocab_size,
        num_heads=heads.num_heads if heads else 0,
        dtype=str(dtype).removeprefix("torch."),
        quantization=scheme,
        device=str(device),
        num_blocks=num_blocks - 1,
        block_size=config.block_size,
        eos_token_ids=list(model_config.eos_token_ids),
    )
    return Engine(runner, scheduler, ready, config.seed)


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
        return torch.float32 if device.type == "cpu" else checkpoint
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _prior(accuracy: list[list[float]] | None, num_heads: int, ranks: int) -> list[list[float]]:
    """Acceptance by [depth][rank] to start from, as wide as a row's candidates."""
    table = accuracy or DEFAULT_ACCEPTANCE
    table = [*table, *[table[-1]] * num_heads][:num_heads]
    return [[*row, *[0.0] * ranks][:ranks] for row in table]


def _num_blocks(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, num_rows: int
) -> int:
    """Pages of the K/V cache, the dummy page included."""
    if config.num_blocks is not None:
        return config.num_blocks + 1
    page = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize * config.block_size
    if config.kv_cache_bytes is not None:
        count = config.kv_cache_bytes // page
        if count < 2:
            raise ConfigError(f"kv_cache_bytes={config.kv_cache_bytes} holds no page; a page takes {page} bytes")
        return count
    longest = config.max_model_len or model.max_position_embeddings
    enough = num_rows * -(-(longest + MAX_NODES) // config.block_size)
    if device.type == "cpu":
        return max(2, min(enough + 1, _host_memory() // 4 // page))
    free, total = torch.cuda.mem_get_info(device)
    room = int(free - (1 - config.gpu_memory_utilization) * total - _SCRATCH_BYTES)
    if room < 2 * page:
        raise ConfigError(
            f"{device} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB left beside the weights, which leaves no room "
            f"for the K/V cache at gpu_memory_utilization={config.gpu_memory_utilization:g}"
        )
    return min(enough + 1, room // page)


_SCRATCH_BYTES = 4 * 2**30
"""Left free on a GPU for activations, logits and graphs."""


def _host_memory() -> int:
    """Bytes of memory that the operating system counts as available."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * 2**30


def _max_model_len(config: EngineConfig, model: ModelConfig, num_blocks: int) -> int:
    longest = model.max_position_embeddings
    if config.max_model_len is not None:
        if config.max_model_len > longest:
            raise ConfigError(f"max_model_len={config.max_model_len}: the model was made for at most {longest}")
        longest = config.max_model_len
    fits = (num_blocks - 1) * config.block_size
    if fits < 2:
        raise ConfigError("the K/V cache holds less than 2 tokens; give it more blocks")
    return min(longest, fits)


def _model_name(model: str, folder: Path) -> str:
    return folder.name if Path(model).exists() else model
