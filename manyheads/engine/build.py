"""From a configuration to a running engine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from manyheads.batch import MAX_NODES
from manyheads.config import ConfigError, EngineConfig
from manyheads.engine.admission import Admission
from manyheads.engine.engine import Engine
from manyheads.engine.estimate import Parts, Shape
from manyheads.engine.memory import Limit, Meter, available_bytes, enforce, limit
from manyheads.engine.page_manager import PageManager
from manyheads.engine.runner import Runner
from manyheads.engine.scheduler import Scheduler
from manyheads.engine.step_target import StepTarget
from manyheads.engine.threads import Threads
from manyheads.engine.warmup import exercise, measure_costs
from manyheads.kv_cache import CODES
from manyheads.models.config import ModelConfig
from manyheads.models.llama import Llama
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.ops import ops_for, shortfalls
from manyheads.quantization.base import Scheme
from manyheads.quantization.formats import read_format
from manyheads.quantization.schemes import find
from manyheads.request import EngineReady, MemoryUse
from manyheads.speculation.drafter import Drafter, DrafterSource
from manyheads.speculation.kinds import find_drafter
from manyheads.speculation.medusa.checkpoint import split_model
from manyheads.speculation.planner import MIN_GAIN, Planner


def build_engine(config: EngineConfig, progress: Callable[[str], None] | None = None) -> Engine:
    """Load the model and its drafter, make the cache, measure what steps cost.

    Args:
        config: what to serve, and how.
        progress: told what start-up is doing, a line at a time.

    Raises:
        ConfigError, CheckpointError: a setting or a checkpoint cannot hold.
    """
    progress = progress or (lambda _: None)
    device = _device(config.device)
    threads = _threads(config, device)
    gc.collect()  # an engine that nobody uses any more refers to itself, and holds its memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    meter = Meter(device)
    there = limit(config, device)
    model_folder, heads_folder = split_model(config.model, config.heads)
    model_config = read_config(model_folder)
    source = find_drafter(config, heads_folder, model_config)
    shape = _shape(config, model_config, source, device, _scheme(config, model_folder))
    _announce(config, shape, progress)
    _require(config, shape, there, shape.parts())  # before gigabytes are loaded in vain
    if there is not None and config.memory_bytes is not None:
        enforce(there, device)
    model, drafter = _load(config, shape, source, model_folder, progress)
    meter.loaded(model.memory_bytes(), drafter.memory_bytes() if drafter else 0)

    num_pages = _num_pages(config, shape, there, meter)
    runner = Runner(
        model,
        drafter,
        num_rows=shape.max_num_seqs,
        max_len=_max_model_len(shape, num_pages),
        num_pages=num_pages,
        page_size=config.block_size,
        kv_dtype=shape.kv_dtype,
    )
    runner.threads = threads
    scheduler = Scheduler(
        PageManager(num_pages, config.block_size, config.prefix_caching),
        _target(config, runner, shape.max_num_batched_tokens, progress),
        max_num_seqs=shape.max_num_seqs,
        max_queue=config.max_queue,
        admission=Admission(config.max_wait),
    )

    def memory() -> MemoryUse:
        return meter.look(runner.cache.nbytes, (num_pages - 1) * config.block_size, runner.graph_bytes)

    name = model_folder.name if Path(config.model).exists() else config.model
    ready = _ready(config, shape, runner, name, memory())
    return Engine(runner, scheduler, ready, config.seed, memory)


def _ready(config: EngineConfig, shape: Shape, runner: Runner, model: str, memory: MemoryUse) -> EngineReady:
    """What is served, for the front end."""
    drafter = runner.drafter
    return EngineReady(
        model=model,
        max_model_len=runner.state.max_len,
        vocab_size=shape.model.vocab_size,
        drafter=drafter.name if drafter else None,
        draft_depth=drafter.shape.max_depth if drafter else 0,
        dtype=str(shape.dtype).removeprefix("torch."),
        quantization=shape.scheme.name if shape.scheme else None,
        kv_cache_dtype=config.kv_cache_dtype,
        device=str(shape.device),
        num_pages=runner.cache.num_pages - 1,
        page_size=runner.state.page_size,
        eos_token_ids=list(shape.model.eos_token_ids),
        wanted_model_len=shape.max_model_len,
        memory=memory,
    )


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


def _load(
    config: EngineConfig, shape: Shape, source: DrafterSource | None, folder: Path, progress: Callable[[str], None]
) -> tuple[Llama, Drafter | None]:
    """The model and its drafter, on the device."""
    scheme, device = shape.scheme, shape.device
    progress(f"loading {folder.name}" + (f" in {scheme}" if scheme else ""))
    if scheme is not None and scheme.note_on_cpu and device.type == "cpu":
        progress(scheme.note_on_cpu)
    model = load_model(folder, shape.model, shape.dtype, device, progress, config.quantization, shape.ops)
    return model, source.build(model, shape.dtype, device, config.quantization) if source is not None else None


def _target(config: EngineConfig, runner: Runner, max_tokens: int, progress: Callable[[str], None]) -> StepTarget:
    """A planner that knows what steps cost here, and how long they may be; steps are recorded where they can be."""
    drafter, recorded = runner.drafter, runner.recorded
    min_gain = MIN_GAIN if runner.device.type == "cpu" else 1.04
    if drafter is None:
        planner = Planner([], config.tree_size, min_gain)
    else:
        planner = Planner(
            drafter.prior,
            config.tree_size,
            min_gain,
            drafter.passes_per_depth,
            drafter.prior_holds,
            drafter.offered,
            drafter.shape.scratch_tokens,
        )
    if recorded is not None:
        recorded.record_passes(max_tokens)
    measure_costs(runner, planner, progress)
    if recorded is not None:
        progress("compiling what serves prompts")
        exercise(runner, planner, max_tokens)
    seconds = config.target_step_ms / 1000 if config.target_step_ms is not None else None
    return StepTarget(planner, max_tokens, seconds, recorded.prompt_sizes if recorded is not None else ())


def _threads(config: EngineConfig, device: torch.device) -> Threads | None:
    """What chooses threads; from here on, so that loading and measuring are not held up by others' work either."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif device.type == "cpu" and torch.get_num_threads() > 1:
        return Threads(torch.get_num_threads())
    return None


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


def _shape(
    config: EngineConfig,
    model: ModelConfig,
    source: DrafterSource | None,
    device: torch.device,
    scheme: Scheme | None,
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
    enough = shape.max_num_seqs * -(-(shape.max_model_len + MAX_NODES) // shape.page_size) + 1
    if there is not None:
        return min(enough, shape.pages_within(there, parts))
    return max(2, min(enough, available_bytes() // 4 // shape.page_bytes))


def _max_model_len(shape: Shape, num_pages: int) -> int:
    """What the K/V cache holds, if that is less than what was asked for."""
    fits = (num_pages - 1) * shape.page_size
    if fits < 2:
        raise ConfigError("the K/V cache holds less than 2 tokens; give it more pages")
    return min(shape.max_model_len, fits)
