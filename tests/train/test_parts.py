"""Prompts, packing, the order of rows, losses in chunks, and what trees make of heads."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from manyheads import ConfigError
from manyheads.frontend.conversation import Conversation
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.speculation.medusa.checkpoint import HeadWeights
from manyheads.speculation.medusa.heads import MedusaHeads
from manyheads.speculation.tree import grow
from manyheads.train.accuracy import NUM_RANKS, accuracy_table, right_ranks, tokens_per_step
from manyheads.train.answers import answer_all
from manyheads.train.attention import packed_attention
from manyheads.train.base import Base
from manyheads.train.dataset import Batch, Order, ahead, pack
from manyheads.train.loss import chunked, cross_entropy, divergence
from manyheads.train.medusa import TrainedHeads
from manyheads.train.prompts import Answer, read_prompts
from manyheads.train.run import split
from manyheads.train.speaker import Speaker
from manyheads.train.trainer import Trainer
from tests.models.families import reference
from tests.server.tiny_tokenizer import tiny_tokenizer
from tests.train.conftest import QUIET, settings

CPU = torch.device("cpu")
ASKED = [{"role": "user", "content": "hello there"}]


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "hello there", "completion": "not read"},
        {"messages": ASKED},
        {"messages": [*ASKED, {"role": "assistant", "content": "not read"}]},
        {"conversations": [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "not read"}]},
        {"turns": ["hello there", "not asked"], "category": "greetings"},
        {"instruction": "hello there", "input": "", "output": "not read"},
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_shapes_of_prompts(tmp_path: Path, line: Any, suffix: str) -> None:
    file = tmp_path / f"prompts{suffix}"
    data = f"{json.dumps(line)}\n\n".encode()
    file.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    wanted = Answer(tiny_tokenizer().encode_chat(Conversation(ASKED)), [])
    assert list(read_prompts([file, file], tiny_tokenizer())) == [wanted, wanted]


def test_an_instruction_with_input_and_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"instruction": "sat", "input": "cat"}\n{"prompt_token_ids": [5, 6], "token_ids": [7]}')
    asked, answered = read_prompts([file], tiny_tokenizer())
    assert asked.prompt == tiny_tokenizer().encode_chat(Conversation([{"role": "user", "content": "sat\n\ncat"}]))
    assert answered == Answer([5, 6], [7])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: no JSON object"),
        ('{"text": "a", "id": 3}', "line 2: needs prompt, messages, .* its keys are id, text"),
        ('{"prompt": 3}', "line 2: a message is empty or no text"),
        ('{"prompt": " "}', "line 2: a message is empty"),
        ('{"turns": []}', "line 2: holds no question"),
        ('{"messages": "a"}', "line 2: messages must be a list"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: holds no question"),
        ('{"prompt_token_ids": [9999]}', "line 2: token id 9999 is outside"),
        ('{"prompt_token_ids": [-1]}', "line 2: .* must be lists of token ids"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ConfigError, match=f"prompts.jsonl, {message}"):
        list(read_prompts([file], tiny_tokenizer()))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 999)[:-20])
    with pytest.raises(ConfigError, match=r"prompts.jsonl.gz cannot be read"):
        list(read_prompts([file], tiny_tokenizer()))


def test_targets_end_with_the_answer() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 4, 5]])
    answer = torch.tensor([[False, False, True, True, True, True, False]])
    assert ahead(tokens, answer, 2).tolist() == [
        [[-1, -1, -1], [7, 8, 9], [8, 9, 4], [9, 4, -1], [4, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    ]


ITEMS = [Answer([5, 6, 7], [8, 9, 10]), Answer([11], [12, 13]), Answer([14, 15], list(range(20, 60)))]


def test_packed_conversations_do_not_see_each_other(base: Path) -> None:
    model = Base.load(base, CPU)
    data = pack(ITEMS, 16)
    assert data.tokens.shape == (2, 16)
    assert data.part.tolist() == [[1] * 6 + [2] * 3 + [0] * 7, [1] * 16]
    assert data.positions[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    with torch.no_grad():
        packed = model.hidden(data).view(2, 16, -1)
        alone = [model.hidden(pack([item], len(item.prompt + item.tokens))) for item in ITEMS]
        # without any packing, and with transformers' own attention
        reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").model
        plain = reference(torch.tensor([[*ITEMS[2].prompt, *ITEMS[2].tokens]])).last_hidden_state[0]
    assert torch.allclose(alone[2], plain, atol=1e-5)
    assert torch.allclose(packed[0, :6], alone[0], atol=1e-5)
    assert torch.allclose(packed[0, 6:9], alone[1], atol=1e-5)
    assert torch.allclose(packed[1], alone[2][:16], atol=1e-5)


@pytest.mark.parametrize("name", ["mistral with a window", "gemma2", "gpt-oss"])
def test_packed_conversations_have_windows_caps_and_sinks(tmp_path: Path, name: str) -> None:
    """Hidden states are those of transformers' own attention, conversation by conversation."""
    reference(name).save_pretrained(tmp_path)
    model = Base.load(tmp_path, CPU)
    tokens = torch.randint(0, 61, (1, 30), generator=torch.Generator().manual_seed(1))
    part = torch.tensor([[1] * 18 + [2] * 12])
    with torch.inference_mode():
        found = model.hidden(Batch(tokens, part, part == 2))
        eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").model
        wanted = [eager(piece).last_hidden_state[0] for piece in (tokens[:, :18], tokens[:, 18:])]
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_attention_on_a_gpu_is_the_cpus(kv_heads: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, 50, 32).bfloat16() for n in (4, kv_heads, kv_heads))
    bounds = pack([Answer([1] * n, [1] * 10) for n in (3, 20, 5, 25)], 50).bounds
    results = []
    for device in ("cpu", "cuda"):
        moved = [t.to(device).detach().requires_grad_() for t in (query, key, value)]
        out, _ = packed_attention(
            None, *moved, None, scaling=0.2, cu_seq_lens_q=bounds.to(device), max_length_q=int(bounds.diff().max())
        )
        out.float().square().sum().backward()
        results.append([out, *(t.grad for t in moved)])
    for cpu, gpu in zip(*results, strict=True):
        difference = cpu.float() - gpu.float().cpu()  # both round to 8 bits, in other places
        assert difference.norm() < 0.01 * cpu.float().norm()


def test_the_order_of_rows_depends_on_seed_and_step_alone() -> None:
    order = Order(10, 3, seed=1)
    assert order.steps_per_epoch == 3
    rows = [order.rows(step).tolist() for step in range(9)]
    assert [Order(10, 3, seed=1).rows(step).tolist() for step in (7, 2)] == [rows[7], rows[2]]
    assert len({row for step in rows[:3] for row in step}) == 9
    assert rows[:3] != rows[3:6]
    assert Order(2, 8, seed=0).rows(5).numel() == 2


def test_chunks_have_the_gradient_of_the_whole() -> None:
    torch.manual_seed(0)
    heads = TrainedHeads(2, 2, torch.randn(11, 8))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    hidden, targets = torch.randn(20, 8), torch.randint(0, 11, (20,))
    leaf = hidden.clone().requires_grad_()
    index = torch.arange(3, 20)
    wanted = F.cross_entropy(heads.logits(1, leaf)[index], targets[index], reduction="sum")
    (wanted * 0.7).backward()
    whole = [p.grad for p in heads.parameters()]
    heads.zero_grad(set_to_none=True)
    grad = torch.zeros_like(hidden)
    widest = 0

    def loss(states: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, len(states))
        return cross_entropy(heads.logits(1, states), targets[part])

    total = chunked(loss, hidden, index, 0.7, 4, grad)
    assert widest == 4
    assert torch.allclose(total, wanted)
    assert leaf.grad is not None
    assert torch.allclose(grad, leaf.grad, atol=1e-6)
    for there, here in zip(whole, (p.grad for p in heads.parameters()), strict=True):
        assert (there is None) == (here is None)
        assert there is None or torch.allclose(there, here, atol=1e-6)  # type: ignore[arg-type]


def test_divergence_of_the_same_is_nothing() -> None:
    logits = torch.randn(5, 7)
    assert divergence(logits, logits).abs() < 1e-5
    assert divergence(logits, logits.roll(1)) > 0


def test_accumulated_steps_are_as_one_large_step(base: Path, tmp_path: Path) -> None:
    answers = [Answer([5, 6, i], list(range(20, 26 + i))) for i in range(8)]
    results = []
    for rows, accumulate in ((4, 1), (1, 4)):
        model = Base.load(base, CPU)
        heads = TrainedHeads(2, 1, model.projection.detach())
        chosen = settings(rows=rows, accumulate=accumulate, length=20)
        trainer = Trainer(chosen, model, None, heads, pack(answers, 20), tmp_path)
        record = trainer.step(0)
        results.append((record["loss"], record["grad_norm"], heads.weight[0].detach().clone()))
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-4)
    # Adam's first step is the sign of the gradient, where that is not next to nothing
    same = torch.isclose(results[0][2], results[1][2], atol=1e-4).float().mean()
    assert same > 0.99


@pytest.mark.parametrize("kind", ["own", "shared", "base"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_heads_are_served_as_they_are_trained(base: Path, kind: str, blocks: int) -> None:
    torch.manual_seed(1)
    config = read_config(base)
    model = load_model(base, config, torch.float32, CPU)
    token_map = None if kind == "base" else torch.arange(3, 90, 2)
    projection = Base.load(base, CPU).projection.detach()
    heads = TrainedHeads(3, blocks, projection if token_map is None else projection[token_map], kind, token_map)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    hidden = torch.randn(4, config.hidden_size)
    weights = heads.weights(torch.float32)
    served = MedusaHeads(weights, model, torch.float32, CPU).candidates(hidden, 5)[0]
    for trained in (heads, TrainedHeads.of(weights, projection)):
        for h in range(3):
            best = trained.logits(h, hidden).topk(5).indices
            assert torch.equal(served[:, h], best if token_map is None else token_map[best])


def test_ranks_of_untrained_heads(base: Path) -> None:
    """Untrained heads say what the base says next, so each is right where the text repeats itself."""
    model = Base.load(base, CPU)
    heads = TrainedHeads(2, 1, model.projection.detach())
    data = pack(ITEMS, 64)
    ranks = right_ranks(model, heads, data, rows=1)
    with torch.no_grad():
        logits = model.logits(model.hidden(data))
    wanted = data.ahead(2)[..., 1:].flatten(0, 1)
    use = wanted[:, 0] >= 0
    assert ranks.shape == (int(use.sum()), 2)
    place = (logits[use, None] > logits[use].gather(1, wanted[use].clamp(min=0))[..., None]).sum(-1)
    assert torch.equal(ranks, torch.where(wanted[use] < 0, -1, place.clamp(max=NUM_RANKS)))


def test_tokens_per_step_counts_paths() -> None:
    # three of four places: head 0 right at once; two of them: head 1's second candidate; the last: nothing known
    ranks = torch.tensor([[0, 1], [0, 1], [0, NUM_RANKS], [2, -1]])
    accuracy = accuracy_table(ranks)
    assert accuracy[0][:3] == [0.75, 0.0, 0.25]
    assert accuracy[1][:2] == [0.0, round(2 / 3, 5)]
    table = tokens_per_step(ranks, accuracy)
    tree, _ = grow(accuracy, 64)
    assert tree.choices[:3] == ((), (0,), (0, 1))
    assert [point["measured"] for point in table] == [1.0, 1.75, 2.25, 2.5, 2.5]
    assert [point["nodes"] for point in table] == [1, 2, 3, 4, 5]
    assert table[2]["promised"] == pytest.approx(1 + 0.75 + 0.5, abs=1e-4)


def test_answers_are_the_same_wherever_a_run_was_broken_off(base: Path, prompts: Path, tmp_path: Path) -> None:
    asked = list(read_prompts([prompts], tiny_tokenizer()))[:6]
    asked[2] = Answer(asked[2].prompt, [9, 9, 9])  # answered by somebody else
    asked.append(Answer(list(range(5, 205)) * 2, []))  # too long
    chosen = settings(sampled=0.5, temperature=1.0, seed=3)
    file = tmp_path / "answers.jsonl"
    speaker = Speaker(str(base), chosen)
    whole = answer_all(speaker, asked, file, QUIET)
    assert len(whole) == 6
    assert whole[2].tokens == [9, 9, 9]
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:10])
    assert answer_all(speaker, asked, file, QUIET) == whole
    assert file.read_bytes() == b"".join(lines)
    assert answer_all(speaker, asked[2:3], None, QUIET) == [whole[2]]
    with pytest.raises(ConfigError, match="two answers or more"):
        split(whole[:1], chosen)
    with pytest.raises(ConfigError, match="no answer to any of the 1 prompts"):
        answer_all(speaker, asked[-1:], None, QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads must be at least 1"),
        ({"held_out": 1.0}, "held_out must be"),
        ({"questions": -1}, "questions must be at least 0"),
        ({"rate": float("nan")}, "rate must be above 0"),
        ({"projection": "none"}, "projection must be one of own, shared, base"),
        ({"projection": "base", "tokens": 10}, "tokens cuts"),
        ({"projection": "base", "joint": True}, "joint training"),
        ({"length": 3}, "length must be at least 4"),
        ({"kind": "eagle"}, "kind must be one of medusa, eagle3, not 'eagle'"),
        ({"kind": "eagle3", "heads": 3}, "heads is for kind medusa; this is eagle3"),
        ({"kind": "eagle3", "joint": True}, "joint is for kind medusa"),
        ({"kind": "eagle3", "draft_vocab": 0}, "draft_vocab must be at least 1"),
        ({"kind": "eagle3", "length": 6}, "length must be at least 7 for 5 passes"),
        ({"passes": 3}, "passes is for kind eagle3; this is medusa"),
    ],
)
def test_settings_that_cannot_hold(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**change)


def test_weights_of_heads_that_own_nothing_say_so() -> None:
    weights: HeadWeights = TrainedHeads(2, 1, torch.randn(9, 4), "base").weights(torch.float16)
    assert weights.projections is None
    assert weights.blocks[0][0][0].dtype == torch.float16


def test_serving_imports_no_training() -> None:
    code = (
        "import sys, manyheads.server.app, manyheads.frontend.engine_process, manyheads.engine.build;"
        "import manyheads.frontend.llm;"
        "sys.exit(any(name.startswith('manyheads.train') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
