"""Memory: what is estimated before anything is loaded, what is taken, and what is refused."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from manyheads import EngineConfig, SamplingParams
from manyheads.batch import RowState
from manyheads.checkpoint import BUILTIN_FOLDER
from manyheads.config import ConfigError
from manyheads.engine import memory
from manyheads.engine.blueprint import _kv_dtype
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.engine.estimate import GRAPH_BYTES, Shape
from manyheads.engine.memory import Limit, base_bytes
from manyheads.engine.record_sizes import pass_keys
from manyheads.engine.recorded import all_steps
from manyheads.engine.runner import Runner
from manyheads.kv_cache import CODES
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.models.rope import Rope
from manyheads.models.size import weights_bytes
from manyheads.ops import ops_for
from manyheads.quantization.schemes import SCHEMES
from manyheads.request import EngineRequest
from manyheads.speculation.drafter import DEFAULT_ACCEPTANCE, DrafterShape
from manyheads.speculation.eagle3.drafter import ACCEPTANCE
from manyheads.speculation.eagle3.template import Template
from manyheads.speculation.planner import Planner
from tests.tiny import model_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB, GIB = 2**20, 2**30
VICUNA = model_config(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ropes=(Rope(10000.0, 128),) * 32,
    windows=(None,) * 32,
    max_position_embeddings=2048,
    eos_token_ids=(2,),
    dtype=torch.float16,
)
HEADS = DrafterShape(
    max_depth=5,
    num_candidates=5 * 10,
    layer_weights=5 * (4096 + 1) * 4096,
    vocabulary_weights=5 * 32000 * 4096,
    row_logits=5 * 32000,
)
T4 = Shape(
    model=VICUNA,
    drafter=HEADS,
    dtype=torch.float16,
    device=GPU,
    ops=ops_for(GPU),
    max_num_seqs=8,
    max_num_batched_tokens=512,
    max_model_len=2048,
    page_size=16,
    scheme=SCHEMES["int8"],
)
FIFTEEN = Limit(15 * GIB, memory.CONTEXT_BYTES, "a memory of 15.0 GiB")


# arithmetic


def test_a_7b_model_in_8_bits_with_five_users_fits_a_t4() -> None:
    parts = T4.parts()
    assert parts.weights == pytest.approx(6.9e9, rel=0.01)
    assert parts.heads == pytest.approx(0.74e9, rel=0.01)
    assert T4.page_bytes == T4.page_cost == 16 * MIB // 2
    tokens = T4.pages_within(FIFTEEN, parts) * T4.page_size
    assert 5 * 2048 < tokens < 7 * 2048
    T4.require(FIFTEEN, parts, 5 * 2048 // 16 + 1)


def test_in_half_precision_it_does_not() -> None:
    half = replace(T4, scheme=None, max_num_seqs=256, max_num_batched_tokens=2048)
    assert half.parts().weights == pytest.approx(13.48e9, rel=0.01)
    with pytest.raises(ConfigError) as refused:
        half.require(FIFTEEN, half.parts(), 2)
    text = str(refused.value)
    needed = r"a memory of 15\.0 GiB is too little: 18\.\d GiB are needed \(weights 12\.6 GiB, heads 1\.4 GiB,"
    assert re.match(needed, text)
    assert "the process itself 512 MiB, one page of K/V 16 MiB)" in text
    assert "max_num_seqs=8 instead of 256 saves 2." in text
    assert "max_num_batched_tokens=256 instead of 2048 saves" in text
    assert "speculative=False saves" in text
    with pytest.raises(ConfigError, match=r"K/V cache 15\.\d GiB\).* change: a smaller num_blocks; "):
        T4.require(FIFTEEN, T4.parts(), 2000, "num_blocks")


def test_what_is_widened_for_many_tokens_counts_once() -> None:
    """A piece of the widest weight, in a step and in the graphs' own memory."""
    many = replace(T4, max_num_batched_tokens=4096)
    widened = many.ops.widened_rows * 11008 * 2
    assert widened > 0
    half = replace(many, scheme=None)
    assert many.parts().scratch - half.parts().scratch == widened
    few = replace(T4, max_num_batched_tokens=512)
    assert few.parts().scratch == replace(few, scheme=None).parts().scratch
    in_4_bits, plain = replace(many, scheme=SCHEMES["int4"]).parts(), half.parts()
    assert in_4_bits.graphs - plain.graphs == widened


def test_what_grows_with_what() -> None:
    parts = T4.parts()
    assert replace(T4, max_num_seqs=200).parts().scratch > parts.scratch
    assert replace(T4, max_num_seqs=16).parts().graphs > parts.graphs
    assert replace(T4, max_num_batched_tokens=1024).parts().scratch > parts.scratch
    assert replace(T4, max_num_batched_tokens=1024).parts().graphs > parts.graphs  # passes over longer prompts
    assert replace(T4, max_model_len=1024).parts().state < parts.state
    assert replace(T4, tree_size=4).parts().scratch < parts.scratch
    assert replace(T4, tree_size=4).parts().graphs < parts.graphs
    plain = replace(T4, drafter=None).parts()
    assert plain.heads == 0
    assert plain.graphs < replace(T4, tree_size=4).parts().graphs
    assert replace(T4, dtype=torch.float32).parts().scratch > parts.scratch
    on_cpu = replace(T4, device=CPU, ops=ops_for(CPU))
    assert on_cpu.parts().graphs == 0
    assert on_cpu.page_bytes < on_cpu.page_cost < on_cpu.page_bytes * 1.1


@pytest.mark.parametrize("most", [1, 8, 256])
@pytest.mark.parametrize("kind", ["medusa", "eagle3"])
def test_all_that_recordings_return_is_counted(kind: str, most: int) -> None:
    """Of the largest step logits and hidden states, of the largest pass hidden states; and CUDA's own of each, at every
    depth where these cost passes."""
    if kind == "medusa":
        planner, drafter = Planner(DEFAULT_ACCEPTANCE), HEADS
    else:
        template = Template(ACCEPTANCE)
        planner = Planner(ACCEPTANCE, passes_per_depth=1, offered=frozenset(template.choices))
        drafter = DrafterShape(
            max_depth=template.max_depth,
            num_candidates=template.num_candidates,
            base_layers=(2, 16, 29),
            scratch_tokens=template.num_inner,
            nodes_within=template.nodes_within,
        )
    shape = replace(T4, max_num_seqs=most, drafter=drafter)
    hidden = (1 + len(drafter.base_layers)) * 4096
    steps = {
        (rows, draft.tree.num_nodes, draft.num_tokens(rows), draft.passes) for rows, draft in all_steps(planner, most)
    }
    passes = pass_keys(most, shape.max_num_batched_tokens, shape.num_drawn)
    kept = max(tokens for _, _, tokens, _ in steps) * 2 * (32000 + hidden)
    kept += max(chunks[0] + trees[0] for chunks, trees in passes) * 2 * hidden
    kept += GRAPH_BYTES * (len(steps) + len(passes))
    assert kept < shape.parts().graphs < 1.15 * kept + 1.5 * GIB  # with what they compute in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_known_before_they_are_loaded(dtype: torch.dtype) -> None:
    """The built-in model is tied, and holds float16 numbers: in float32 its products have packed copies."""
    config = read_config(BUILTIN_FOLDER)
    assert weights_bytes(config, dtype, CPU) == load_model(BUILTIN_FOLDER, config, dtype, CPU).memory_bytes()


def test_weights_that_are_not_known_count_as_few(folder: Path, reference: LlamaForCausalLM) -> None:
    """A checkpoint in float32 could hold float16 numbers: nothing is refused that might fit."""
    config = read_config(folder)
    loaded = load_model(folder, config, torch.float32, CPU).memory_bytes()
    assert loaded == sum(p.numel() * 4 for p in reference.parameters())
    assert loaded / 2 <= weights_bytes(config, torch.float32, CPU) < loaded
    assert weights_bytes(config, torch.bfloat16, CPU) == loaded / 2


def test_state_is_that_of_the_rows() -> None:
    shape = replace(T4, model=replace(VICUNA, vocab_size=50, max_position_embeddings=10), max_model_len=10)
    state = RowState(8, 10, 16, 5 * 10, 50, CPU)
    own = [t for t in vars(state).values() if isinstance(t, Tensor) and t._base is None]
    penalties = 9 * 50 * 5
    rope = 2 * 74 * 128 * 2
    assert shape.parts().state == sum(t.nbytes for t in own) + penalties + rope
    assert state.nbytes == sum(t.nbytes for t in own)
    state.count_tokens()
    assert shape.parts().state == state.nbytes + rope


@pytest.mark.parametrize(
    "drafter", [None, HEADS, DrafterShape(2, 7, row_state={"text": ((99,), torch.int32)})], ids=str
)
def test_state_is_what_a_device_would_keep(drafter: DrafterShape | None) -> None:
    """With what a drafter keeps of each row, and whether or not it has candidates; rotations beside it."""
    shape = replace(T4, drafter=drafter)
    candidates, kept = (drafter.num_candidates, drafter.row_state) if drafter else (0, None)
    state = RowState(T4.max_num_seqs, T4.max_model_len, T4.page_size, candidates, VICUNA.vocab_size, CPU, kept)
    state.count_tokens()
    rope = 2 * (2048 + 64) * 128 * 2
    assert shape.parts().state == state.nbytes + rope
    extra = 9 * 99 * 4 if kept else 0
    plain = RowState(T4.max_num_seqs, T4.max_model_len, T4.page_size, candidates, VICUNA.vocab_size, CPU)
    plain.count_tokens()
    assert state.nbytes == plain.nbytes + extra


def test_a_drafters_layers_are_in_every_page() -> None:
    attending = replace(T4, drafter=replace(HEADS, kv_layers=2))
    assert attending.page_bytes == T4.page_bytes * 34 // 32
    assert attending.pages_within(FIFTEEN, T4.parts()) < T4.pages_within(FIFTEEN, T4.parts())


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on, and how many were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor) and not _is_opaque(a)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and not _is_opaque(tensor):
                storage = tensor.untyped_storage()
                at, size = storage.data_ptr(), storage.nbytes()
                if at and at not in own and at not in self._seen:
                    self._seen.add(at)
                    self.now += size
                    weakref.finalize(storage, self._free, at, size)
        self.most = max(self.most, self.now)
        return result

    def _free(self, at: int, size: int) -> None:
        self._seen.discard(at)
        self.now -= size


def _is_opaque(tensor: Tensor) -> bool:
    return tensor.is_mkldnn or tensor.layout != torch.strided


def request(name: str, length: int, **params: Any) -> EngineRequest:
    tokens = [(7 * i + len(name)) % 4000 for i in range(length)]
    return EngineRequest(request_id=name, prompt_token_ids=tokens, params=SamplingParams(ignore_eos=True, **params))


def finish(engine: Engine) -> None:
    while engine.has_work():
        engine.step()
    engine.check_integrity()


@pytest.mark.parametrize(
    ("quantization", "gigabytes"),
    [("int8", 6.87), ("fp8", 6.87), ("int4", 4.04), ("bitsandbytes-8bit", 7.0), ("bitsandbytes-4bit", 4.22)],
)
def test_bits_of_weights(quantization: str, gigabytes: float) -> None:
    """6.48 G numbers in layers, 0.13 in the projection, and as many in the embedding, which stays in half precision."""
    scheme = SCHEMES[quantization]
    assert weights_bytes(VICUNA, torch.float16, GPU, scheme) == pytest.approx(gigabytes * 1e9, rel=0.01)
    tied = replace(VICUNA, tie_word_embeddings=True)
    same = weights_bytes(VICUNA, torch.float16, GPU, scheme)
    if scheme.vocabulary is None:
        same -= 2 * 32000 * 4096  # the projection is the embedding
    assert weights_bytes(tied, torch.float16, GPU, scheme) == same


def test_fewer_bits_are_recommended_where_there_is_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    half = replace(T4, scheme=None)
    monkeypatch.setattr(EngineConfig, "quantization", None, raising=False)
    with pytest.raises(ConfigError, match=r"quantization=int8 saves 6\.8 GiB; quantization=int4 saves 9\.\d GiB"):
        half.require(FIFTEEN, half.parts(), 2)


def test_a_cache_in_8_bits_holds_twice_as_many_tokens() -> None:
    scales = 2 * 32 * 32 * 16 * 4
    for kv_dtype in CODES.values():
        short = replace(T4, kv_dtype=kv_dtype)
        assert short.page_bytes == short.page_cost == T4.page_bytes // 2 + scales
        assert short.pages_within(FIFTEEN, short.parts()) > 1.9 * T4.pages_within(FIFTEEN, T4.parts())
        on_cpu = replace(short, device=CPU, ops=ops_for(CPU))  # gathers codes, and widens them
        assert on_cpu.page_cost - on_cpu.page_bytes == 2 * (short.page_bytes + T4.page_bytes) // 32


def test_fp8_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(ConfigError, match="kv_cache_dtype=fp8: A100 has no fp8; int8 takes as little"):
        _kv_dtype("fp8", GPU)
    assert _kv_dtype("int8", GPU) == torch.int8
    assert _kv_dtype("fp8", CPU) == torch.float8_e4m3fn
    assert _kv_dtype("auto", GPU) is None
    with pytest.raises(ConfigError, match="kv_cache_dtype must be auto, fp8, int8, not 'fp4'"):
        EngineConfig(kv_cache_dtype="fp4")


# a real engine


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_cache_in_8_bits_takes_what_was_estimated(folder: Path, reference: LlamaForCausalLM, kv_dtype: str) -> None:
    ready = build_engine(EngineConfig(model=str(folder), device="cpu", kv_cache_dtype=kv_dtype, num_blocks=9)).ready
    assert ready.kv_cache_dtype == kv_dtype
    assert ready.memory.kv_cache == 10 * 16 * 2 * 2 * 2 * (8 + 4)  # layers, K and V, kv heads; codes and a scale


@pytest.mark.parametrize(
    ("params", "share"),
    [
        ({"temperature": 0.0}, 0.05),
        ({"temperature": 1.0, "top_p": 0.9}, 0.2),
        ({"temperature": 1.0, "top_p": 0.9, "logprobs": 5}, 0.3),
        ({"temperature": 1.0, "min_p": 0.1, "acceptance": "typical", "presence_penalty": 0.5}, 0.2),
    ],
)
def test_scratch_is_enough(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], share: float) -> None:
    """Prompts beside trees, everybody sampling: it takes no more than was estimated, and a good part of it."""
    shapes: list[Shape] = []
    plain = Shape.require
    monkeypatch.setattr(Shape, "require", lambda self, *args: (shapes.append(self), plain(self, *args))[1])
    engine = build_engine(
        EngineConfig(
            memory_bytes=base_bytes(CPU) + 500 * MIB,
            device="cpu",
            max_num_seqs=8,
            max_num_batched_tokens=128,
            max_model_len=256,
            tree_size=16,
            num_blocks=128,
            num_threads=1,
            seed=0,
            target_step_ms=60_000,  # whatever steps turn out to take, prompts fill them
        )
    )
    for i in range(8):
        engine.add_request(request(str(i), 100 + i, max_tokens=16, **params))
    with Live() as live:
        finish(engine)
    assert share < live.most / shapes[0].parts().scratch < 1


def test_an_engine_lives_inside_its_memory() -> None:
    cap = base_bytes(CPU) + 280 * MIB
    engine = build_engine(
        EngineConfig(
            memory_bytes=cap, device="cpu", max_num_seqs=64, tree_size=4, num_threads=1, max_model_len=512, seed=0
        )
    )
    use = engine.ready.memory
    assert use.kv_cache_tokens == engine.ready.num_pages * 16 < 64 * 512  # the memory was what counted
    assert use.kv_cache_tokens > 512
    assert use.heads > MIB
    assert use.graphs == 0
    for i in range(20):
        engine.add_request(request(str(i), 300, max_tokens=8, temperature=1.0, top_p=0.9))
    finish(engine)
    after = engine.stats().memory
    assert use.total <= after.total <= cap
    assert (after.weights, after.heads, after.kv_cache) == (use.weights, use.heads, use.kv_cache)


def test_too_little_memory_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyheads.engine.blueprint.load_model", lambda *_: pytest.fail("it was loaded"))
    gc.collect()  # as building does: earlier tests' engines are no part of the process itself
    config = EngineConfig(memory_bytes=base_bytes(CPU) + 40 * MIB, device="cpu")
    with pytest.raises(ConfigError, match=r"is too little: .*weights 33 MiB, heads 3 MiB, .*max_num_seqs=8 instead"):
        build_engine(config)


def test_weights_that_turn_out_larger_are_refused_then(
    monkeypatch: pytest.MonkeyPatch, folder: Path, reference: LlamaForCausalLM
) -> None:
    shapes: list[Shape] = []
    plain = Shape.require
    monkeypatch.setattr(Shape, "require", lambda self, *args: (shapes.append(self), plain(self, *args))[1])
    config = EngineConfig(model=str(folder), device="cpu", memory_bytes=1, max_num_seqs=2, num_threads=1)
    room = 0

    def limit(*_: Any) -> Limit:
        return Limit(room, 0, "a memory of so much")

    monkeypatch.setattr("manyheads.engine.blueprint.limit", limit)
    with pytest.raises(ConfigError, match="a memory of so much is too little"):
        build_engine(config)
    room = shapes[0].parts().total + 2 * shapes[0].page_cost
    monkeypatch.setattr(memory, "taken_bytes", lambda _: 0)  # nothing beside what is known
    with pytest.raises(ConfigError, match="a memory of so much is too little"):
        build_engine(config)
    assert len(shapes) == 3  # refused, let through, refused
    room += sum(p.numel() * 4 for p in reference.parameters()) + MIB
    assert isinstance(build_engine(config).runner, Runner)


def test_a_cache_that_was_asked_for_must_fit_too() -> None:
    settings: dict[str, Any] = {"device": "cpu", "max_num_seqs": 2, "memory_bytes": base_bytes(CPU) + 300 * MIB}
    with pytest.raises(ConfigError, match=r"K/V cache 1\.\d GiB\).* change: a smaller kv_cache_bytes"):
        build_engine(EngineConfig(kv_cache_bytes=GIB, **settings))
    with pytest.raises(ConfigError, match="change: a smaller num_blocks"):
        build_engine(EngineConfig(num_blocks=100_000, **settings))


def test_context_that_does_not_fit_is_said(folder: Path, reference: LlamaForCausalLM) -> None:
    ready = build_engine(EngineConfig(model=str(folder), device="cpu", num_blocks=3, tree_size=2)).ready
    assert (ready.max_model_len, ready.wanted_model_len, ready.memory.kv_cache_tokens) == (48, 128, 48)


# a GPU's, without one


def test_limits_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GIB, 16 * GIB))
    found = memory.limit(EngineConfig(gpu_memory_utilization=0.75), GPU)
    assert found is not None
    assert found.total - found.base == 6 * GIB  # 4 of 16 stay free
    assert "gpu_memory_utilization=0.75 (10.0 GiB of 16.0 GiB free)" in found.name
    assert memory.limit(EngineConfig(memory_bytes=8 * GIB), GPU) == Limit(8 * GIB, GIB // 2, "a memory of 8.0 GiB")
    found = memory.limit(EngineConfig(memory_bytes=15 * GIB), GPU)
    assert found is not None
    assert found.total == 10 * GIB + GIB // 2
    assert found.name == "the free memory of cuda (10.5 GiB, where 15.0 GiB may be taken)"


def test_a_gpus_limit_holds_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, at: said.append((share, at)))
    memory.enforce(Limit(8 * GIB + GIB // 2, GIB // 2, ""), torch.device("cuda:1"))
    memory.enforce(Limit(99 * GIB, GIB // 2, ""), GPU)
    memory.enforce(Limit(1, 0, ""), CPU)
    assert said == [(0.5, 1), (1.0, 0)]


def test_the_meter_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 14 * GIB  # others have 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 16 * GIB))
    meter = memory.Meter(GPU)
    free -= 5 * GIB
    meter.loaded(3 * GIB, GIB)
    assert meter.rest == GIB + memory.CONTEXT_BYTES
    free -= 4 * GIB
    use = meter.look(2 * GIB, 1000, GIB)
    assert (use.weights, use.heads, use.kv_cache, use.graphs) == (3 * GIB, GIB, 2 * GIB, GIB)
    assert use.rest == 2 * GIB + memory.CONTEXT_BYTES
    assert use.total == 9 * GIB + memory.CONTEXT_BYTES
