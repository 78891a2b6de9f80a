"""From a configuration to a running engine."""

from __future__ import annotations

from pathlib import Path

from manyheads.config import EngineConfig
from manyheads.engine.admission import Admission
from manyheads.engine.blueprint import Blueprint, Progress
from manyheads.engine.engine import Engine
from manyheads.engine.grammars import Grammars
from manyheads.engine.page_manager import PageManager
from manyheads.engine.ranks import leading_runner
from manyheads.engine.runner import Runner
from manyheads.engine.scheduler import Scheduler
from manyheads.engine.step_target import StepTarget
from manyheads.engine.warmup import exercise, measure_costs
from manyheads.request import EngineReady
from manyheads.speculation.planner import MIN_GAIN, Planner
from manyheads.stats import MemoryUse


def build_engine(config: EngineConfig, progress: Progress | None = None) -> Engine:
    """Load the model and its drafter, make the cache, measure what steps cost.

    Args:
        config: what to serve, and how.
        progress: told what start-up is doing, a line at a time.

    Raises:
        ConfigError, CheckpointError: a setting or a checkpoint cannot hold.
    """
    progress = progress or (lambda _: None)
    plan = Blueprint.draw(config, progress)
    shape = plan.shape
    shape.ops.watch(lambda _: None)  # what a start compiles holds up no request of an engine before it in the process
    runner = plan.runner(progress) if config.tensor_parallel_size == 1 else leading_runner(plan, progress)
    cache = runner.cache
    scheduler = Scheduler(
        PageManager(
            cache.num_pages, config.block_size, config.prefix_caching, shape.kept.window, shape.kept.num_companions
        ),
        _target(config, runner, shape.max_num_batched_tokens, shape.num_drawn, progress),
        max_num_seqs=shape.max_num_seqs,
        max_model_len=runner.state.max_len,
        max_queue=config.max_queue,
        admission=Admission(config.max_wait),
    )

    def memory() -> MemoryUse:
        return plan.meter.look(cache.nbytes, cache.num_text_pages * config.block_size, runner.graph_bytes)

    name = plan.folder.name if Path(config.model).exists() else config.model
    ready = _ready(config, plan, runner, name, memory())
    grammars = Grammars(plan.compiler())
    return Engine(runner, scheduler, ready, config.seed, memory, grammars)


def _ready(config: EngineConfig, plan: Blueprint, runner: Runner, model: str, memory: MemoryUse) -> EngineReady:
    """What is served, for the front end."""
    shape, drafter, size = plan.shape, runner.drafter, config.tensor_parallel_size
    return EngineReady(
        model=model,
        max_model_len=runner.state.max_len,
        vocab_size=shape.model.vocab_size,
        drafter=drafter.name if drafter else None,
        draft_depth=drafter.shape.max_depth if drafter else 0,
        dtype=str(shape.dtype).removeprefix("torch."),
        quantization=shape.scheme.name if shape.scheme else None,
        weights=plan.weights,
        kv_cache_dtype=config.kv_cache_dtype,
        device=str(shape.device) if size == 1 else f"{size} ranks ({shape.device.type})",
        num_pages=runner.cache.num_pages - 1,
        page_size=runner.state.page_size,
        eos_token_ids=list(shape.model.eos_token_ids),
        loras=list(config.loras),
        wanted_model_len=shape.max_model_len,
        memory=memory,
    )


def _target(config: EngineConfig, runner: Runner, max_tokens: int, max_inflight: int, progress: Progress) -> StepTarget:
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
    # what is measured here holds for all ranks
    runner.record_passes(max_tokens, max_inflight, runner.quickest_sizes(max_tokens, max_inflight))
    measure_costs(runner, planner, progress)
    if recorded is not None:
        progress("compiling what serves prompts")
        exercise(runner, planner, max_tokens)
    seconds = config.target_step_ms / 1000 if config.target_step_ms is not None else None
    return StepTarget(planner, max_tokens, seconds, recorded.prompt_sizes if recorded is not None else ())
