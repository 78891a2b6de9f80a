"""Ranks that share a model give the text of one that holds it alone."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaForCausalLM

from manyheads import EngineConfig, SamplingParams
from manyheads.config import CheckpointError, ConfigError
from manyheads.engine import blueprint, ranks
from manyheads.engine.blueprint import Blueprint
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.engine.masks import Masks, TreeWalk
from manyheads.engine.rank import build
from manyheads.engine.rank_messages import Clear, Follower, Message, RecordPasses
from manyheads.engine.ranks import LeadingRunner, Others, RankFailed, RankLaunch
from manyheads.engine.runner import Runner
from manyheads.engine.warmup import exercise
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.grammar import Grammar
from manyheads.models.parallel import Ranks
from manyheads.models.registry import read_config
from manyheads.request import EngineRequest, RequestDelta
from manyheads.speculation.tree import Tree
from tests.eagle3 import make_drafter
from tests.engine.test_families import save
from tests.structured import SCHEMA, save_structured
from tests.tiny import VOCAB, make_model, save_model

SAMPLED = SamplingParams(temperature=1.0, seed=5, top_p=0.9, max_tokens=12)
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=14),
    SAMPLED,
    SamplingParams(temperature=0.7, seed=6, max_tokens=12, acceptance="typical"),
    SamplingParams(
        temperature=0.0, max_tokens=12, logprobs=2, prompt_logprobs=2, repetition_penalty=1.3, presence_penalty=0.2
    ),
    SamplingParams(temperature=0.0, max_tokens=8, speculative=False, min_tokens=4, logit_bias={3: 1.0}),
)


class ThreadRanks:
    """The other ranks as threads of this process, which start at once."""

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        self.inboxes = [queue.SimpleQueue[bytes | None]() for _ in range(1, config.tensor_parallel_size)]
        self.followers: list[Follower] = []
        self.error: BaseException | None = None
        self._ranks = Ranks()
        for rank, inbox in enumerate(self.inboxes, 1):
            launch = RankLaunch(config=config, rank=rank, folder=str(folder), version=ranks.version("manyheads"))
            threading.Thread(target=self._run, args=(launch, inbox), daemon=True).start()

    def join(self, folder: Path, plan: Blueprint) -> Ranks:
        self._ranks = Ranks.join(0, len(self.inboxes) + 1, folder, plan.shape.device)
        return self._ranks

    def tell(self, message: Message) -> None:
        if self.error is not None:
            raise self.error
        for inbox in self.inboxes:
            inbox.put(msgspec.msgpack.encode(message))

    def blamed(self) -> Any:
        return contextlib.nullcontext()

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)

    def _run(self, launch: RankLaunch, inbox: queue.SimpleQueue[bytes | None]) -> None:
        try:
            follower = build(launch, lambda: msgspec.msgpack.decode(inbox.get() or b"", type=Message))
            self.followers.append(follower)
            while (data := inbox.get()) is not None:
                follower.follow(msgspec.msgpack.decode(data, type=Message))
        except BaseException as error:
            self.error = error
            self._ranks.abort()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ThreadRanks]]:
    made: list[ThreadRanks] = []

    def others(config: EngineConfig, folder: Path) -> ThreadRanks:
        made.append(ThreadRanks(config, folder))
        return made[-1]

    monkeypatch.setattr(ranks, "Others", others)
    yield made
    for each in made:
        for inbox in each.inboxes:
            inbox.put(None)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers whose columns can be shared in groups of 64."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    save_model(folder, hidden=128, intermediate=256, head_dim=32)
    return folder


def engine(model: Path, size: int, **settings: Any) -> Engine:
    # which tokens come in a step follows from nothing that is measured: typical acceptance depends on it
    settings = {"tree_size": 6, "target_step_ms": 60_000, "seed": 0} | settings
    settings = {"max_num_seqs": 5, "max_num_batched_tokens": 8, "block_size": 4, "num_blocks": 34} | settings
    settings = {"device": "cpu", "dtype": "float32", "num_threads": 1} | settings
    return build_engine(EngineConfig(model=str(model), tensor_parallel_size=size, **settings))


def texts(engine: Engine, count: int = 10) -> list[list[int]]:
    """Everyone's tokens: prompts in chunks that share a beginning, and pages for a part of what is asked."""
    rng = random.Random(1)
    common = [rng.randrange(VOCAB) for _ in range(9)]
    for i in range(count):
        prompt = common + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 25))]
        params = PARAMS[i % len(PARAMS)]
        engine.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    replies: dict[str, list[int]] = {str(i): [] for i in range(count)}
    while engine.has_work():
        for delta in engine.step():
            replies[delta.request_id] += delta.new_token_ids
        engine.check_integrity()
    return list(replies.values())


def finish(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


@pytest.mark.parametrize(("drafter", "size"), [("none", 2), ("medusa", 2), ("ngram", 2), ("eagle3", 2), ("medusa", 4)])
def test_text_is_that_of_one_rank(
    folder: Path,
    reference: LlamaForCausalLM,
    tmp_path: Path,
    threads: list[ThreadRanks],
    overlaps: bool,
    drafter: str,
    size: int,
) -> None:
    """Four ranks hold each of two K/V heads twice; some rows of the vocabulary and of the inner size may be padding."""
    if overlaps and size == 4:
        pytest.skip("two ranks show it")
    settings: dict[str, Any] = {}
    if drafter == "none":
        settings = {"speculative": False}
    elif drafter == "medusa":
        settings["heads"] = str(folder / "heads")
    elif drafter == "ngram":
        settings["drafter"] = "ngram"
    else:
        make_drafter(tmp_path / "drafter", read_config(folder), draft_vocab=11)
        settings["heads"] = str(tmp_path / "drafter")
    alone, shared = (engine(folder, each, num_blocks=24, **settings) for each in (1, size))
    assert isinstance(shared.runner, LeadingRunner)
    count = 6 if size == 2 else 5
    assert texts(shared, count) == texts(alone, count)
    stats = shared.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert drafter == "none" or stats.accepted_tokens > 0
    check_ranks(shared, threads[0], size)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("drafter", "scheme"),
    [
        *(("none", None), ("medusa", None), ("ngram", None), ("eagle3", None)),
        *(("medusa", "int8"), ("medusa", "int4"), ("medusa", "fp8"), ("eagle3", "int4")),
    ],
)
def test_two_gpus_give_the_text_of_one(wide: Path, tmp_path: Path, drafter: str, scheme: str | None) -> None:
    """In processes of their own, with steps that are recorded."""
    settings: dict[str, Any] = {"device": "cuda", "block_size": 16, "num_blocks": 60, "max_num_batched_tokens": 64}
    settings["quantization"] = scheme
    if drafter == "none":
        settings["speculative"] = False
    elif drafter == "ngram":
        settings["drafter"] = "ngram"
    elif drafter == "medusa":
        settings["heads"] = str(wide / "heads")
    else:
        make_drafter(tmp_path / "drafter", read_config(wide), draft_vocab=11)
        settings["heads"] = str(tmp_path / "drafter")
    shared, alone = engine(wide, 2, **settings), engine(wide, 1, **settings)
    assert texts(shared) == texts(alone)
    assert drafter == "none" or shared.stats().accepted_tokens > 0


def test_ranks_run_what_no_recording_serves(
    folder: Path, reference: LlamaForCausalLM, threads: list[ThreadRanks]
) -> None:
    """Steps of all kinds before an engine is ready; of prompts that are scored again, too, where one rank alone knows
    what came of it."""
    alone, shared = engine(folder, 1), engine(folder, 2)
    assert isinstance(shared.runner, LeadingRunner)
    exercise(shared.runner, shared.planner, 8)
    assert texts(shared, 4) == texts(alone, 4)


def check_ranks(engine: Engine, others: ThreadRanks, size: int) -> None:
    """All ranks' rows are the same, and each holds its part of the weights only."""
    assert isinstance(engine.runner, LeadingRunner)
    mine = engine.runner
    assert len(others.followers) == size - 1
    for follower in others.followers:
        their = follower._runner
        for name in ("cached_len", "drafts", "chances", "page_table", "ints", "floats"):
            assert torch.equal(getattr(mine.state, name), getattr(their.state, name)), name
        assert their.model.embedding.shape == (-(-VOCAB // size), 32)
        assert their.cache.nbytes == mine.cache.nbytes
        assert their.model.memory_bytes() == mine.model.memory_bytes()


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_text_of_fewer_bits_is_that_of_one_rank(wide: Path, threads: list[ThreadRanks], scheme: str) -> None:
    """int4's groups of 128 columns are cut."""
    settings = {"quantization": scheme, "heads": str(wide / "heads")}
    assert texts(engine(wide, 2, **settings), 5) == texts(engine(wide, 1, **settings), 5)


def test_ranks_agree_on_companions(tmp_path: Path, threads: list[ThreadRanks], overlaps: bool) -> None:
    """One layer looks through a window, and its pages are others than the other's."""
    save(tmp_path, "gemma3")
    shared, alone = (engine(tmp_path, size, heads=str(tmp_path / "heads"), num_blocks=48) for size in (2, 1))
    assert texts(shared, 6) == texts(alone, 6)
    assert shared.scheduler.pages.num_companions == 1
    assert isinstance(shared.runner, LeadingRunner)
    for follower in threads[0].followers:
        mine, theirs = shared.runner.cache.companions, follower._runner.cache.companions
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)


def test_text_under_a_grammar_is_that_of_one_rank(tmp_path: Path, threads: list[ThreadRanks], overlaps: bool) -> None:
    """Each rank follows the grammars by itself; what they leave no choice about is not drawn."""
    model = save_structured(tmp_path / "model")

    def said(size: int) -> list[list[int]]:
        served = engine(model, size, heads=str(model / "heads"), num_blocks=90)
        grammar = Grammar(kind="json", value=SCHEMA)
        for i in range(6):
            params = SamplingParams(temperature=i % 2, seed=i, max_tokens=60, grammar=grammar if i < 4 else None)
            served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=[7 + i, 8], params=params))
        replies: dict[str, list[int]] = {str(i): [] for i in range(6)}
        while served.has_work():
            for delta in served.step():
                assert delta.error is None
                replies[delta.request_id] += delta.new_token_ids
        return list(replies.values())

    assert said(2) == said(1)


@pytest.mark.parametrize("ends_by", ["stop", "length"])
def test_ranks_draw_alike_where_a_text_ends_within_a_step(
    tmp_path: Path, threads: list[ThreadRanks], monkeypatch: pytest.MonkeyPatch, ends_by: str
) -> None:
    """The last token has others behind it in the tree, and its row is in the next step already. A drafter that looks at
    the whole batch, on each rank by itself, would choose by what that row draws."""
    made: dict[threading.Thread, list[torch.Tensor]] = {}
    masks = TreeWalk.masks

    def watched(walk: TreeWalk, tree: Tree) -> Masks:
        found = masks(walk, tree)
        made.setdefault(threading.current_thread(), []).append(found.words)
        return found

    monkeypatch.setattr(Runner, "overlaps", True)
    model = save_structured(tmp_path / "model")
    params = SamplingParams(temperature=0.0, logprobs=0, max_tokens=60, grammar=Grammar(kind="json", value=SCHEMA))
    text = Tokenizer.load(model).encode('{"name": "a", "age": 1')
    stop = text[4]
    served = engine(model, 2, drafter="ngram", num_blocks=90)
    monkeypatch.setattr(TreeWalk, "masks", watched)
    monkeypatch.setattr(served.planner, "choose", lambda *args: served.planner.draft(6))
    end = {"stop_token_ids": (stop,)} if ends_by == "stop" else {"max_tokens": 5}
    message = EngineRequest(request_id="a", prompt_token_ids=[*text, 7], params=msgspec.structs.replace(params, **end))
    served.add_request(message)
    # of a row that may have all its tokens, the next step is for others
    served.add_request(EngineRequest(request_id="b", prompt_token_ids=[7], params=msgspec.structs.replace(params)))
    deltas: list[RequestDelta] = []
    while served.has_work():
        deltas += [delta for delta in served.step() if delta.request_id == "a"]
    assert [token for delta in deltas for token in delta.new_token_ids] == text[:5]
    assert len(deltas) < 5
    texts(served, 1)  # which the other rank has to be done for
    mine, theirs = made.values()
    assert len(mine) == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_a_tied_vocabulary_that_does_not_divide(tmp_path: Path, threads: list[ThreadRanks]) -> None:
    make_model(tie_word_embeddings=True, vocab_size=19, intermediate_size=49).save_pretrained(tmp_path)
    assert texts(engine(tmp_path, 2, drafter="ngram"), 5) == texts(engine(tmp_path, 1, drafter="ngram"), 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide the model's number of heads of 4"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, not 0"),
        ({"tensor_parallel_size": 2, "quantization": "int4"}, "int4 needs weights whose columns come in groups"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    folder: Path, reference: LlamaForCausalLM, threads: list[ThreadRanks], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_engine(EngineConfig(model=str(folder), device="cpu", num_blocks=9, **settings))


def test_fewer_gpus_than_asked_are_refused(
    folder: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=4: torch [\w.+]+ sees 2 GPUs"):
        build_engine(EngineConfig(model=str(folder), device="cuda", tensor_parallel_size=4))
    with pytest.raises(ConfigError, match="device cuda:1 is one GPU, and tensor_parallel_size=2 takes 2; say cuda"):
        build_engine(EngineConfig(model=str(folder), device="cuda:1", tensor_parallel_size=2))


def test_a_rank_that_dies_ends_the_engine(folder: Path, reference: LlamaForCausalLM) -> None:
    """Real processes; the text before is right, and the error says who died."""
    alone, shared = engine(folder, 1, speculative=False), engine(folder, 2, speculative=False)
    assert texts(shared, 5) == texts(alone, 5)
    assert isinstance(shared.runner, LeadingRunner)
    others = shared.runner._others
    assert isinstance(others, Others)
    shared.add_request(EngineRequest(request_id="a", prompt_token_ids=[1, 2], params=PARAMS[0]))
    shared.step()
    [process] = others._processes
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RankFailed, match="rank 1 ended by signal 9"):
        finish(shared)


def test_a_start_that_fails_leaves_the_ranks(
    folder: Path, reference: LlamaForCausalLM, threads: list[ThreadRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have met already, and the process would wait for them at its end."""

    def load(*args: Any) -> None:
        raise CheckpointError("no weights")

    left: list[Ranks] = []
    monkeypatch.setattr(blueprint, "load_model", load)
    monkeypatch.setattr(ranks, "_leave", lambda ranks, recorded: left.append(ranks))
    with pytest.raises(CheckpointError, match="no weights"):
        engine(folder, 2, speculative=False)
    assert [(each.rank, each.size) for each in left] == [(0, 2)]


def test_ranks_that_are_let_go_abort_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who watches them has ended by then: at a program's end it may not be found in the middle of torch."""
    ended: list[int] = []
    monkeypatch.setattr(ranks, "COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(ranks.Others, "ended", lambda self, rank, process: ended.append(rank))
    before = threading.active_count()
    others = ranks.Others(EngineConfig(tensor_parallel_size=3), tmp_path)
    assert threading.active_count() == before + 2
    others.close()
    assert [process.poll() for process in others._processes] == [-signal.SIGKILL] * 2
    assert threading.active_count() == before
    assert ended == []
    assert others.failure is None


def test_a_message_of_passes_arrives_as_it_was() -> None:
    message = RecordPasses(2048, 1024, {416: 432, 512: 512})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Message) == message


PROGRAM = """
import sys
from manyheads import EngineConfig, SamplingParams
from manyheads.engine.build import build_engine
from manyheads.request import EngineRequest, RequestDelta
from manyheads.speculation.tree import Tree
model, device = sys.argv[1:]
engine = build_engine(EngineConfig(model=model, device=device, tensor_parallel_size=2, speculative=False))
params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
engine.add_request(EngineRequest(request_id="a", prompt_token_ids=[1, 2, 3], params=params))
tokens = []
while engine.has_work():
    for delta in engine.step():
        tokens += delta.new_token_ids
print(len(tokens))
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_program_that_used_ranks_ends(device: str, wide: Path) -> None:
    """By itself: nothing waits for ranks that have ended, or for graphs that nobody lets go of."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    command = [sys.executable, "-c", PROGRAM, str(wide), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.stdout, done.returncode) == ("5\n", 0), done.stderr


@pytest.mark.parametrize("patience", [0.0, 0.5])
def test_a_rank_that_never_comes_is_not_waited_for(
    patience: float, folder: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is seen before anybody waits for it in a group."""
    monkeypatch.setattr(
        ranks, "COMMAND", (sys.executable, "-c", f"import sys, time; time.sleep({patience}); sys.exit(3)")
    )
    with pytest.raises(RankFailed, match="rank 1 ended with status 3"):
        engine(folder, 2, speculative=False)


def test_a_rank_of_another_version_is_refused(folder: Path, reference: LlamaForCausalLM) -> None:
    launch = RankLaunch(config=EngineConfig(model=str(folder)), rank=1, folder="", version="0.0")
    with pytest.raises(ValueError, match=r"this is manyheads [\d.]+, and rank 0 is 0\.0"):
        build(launch, Clear)
