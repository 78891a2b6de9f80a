"""EAGLE-3: the passes against a rollout place by place, the loss against one without slices, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from manyheads import ConfigError
from manyheads.models.registry import read_config
from manyheads.speculation.eagle3.checkpoint import read_drafter
from manyheads.train.accuracy import NUM_RANKS, accuracy_table, right_ranks
from manyheads.train.attention import FlashAttention, Spans, _Joined, chain_attention
from manyheads.train.base import Base
from manyheads.train.dataset import Batch, pack
from manyheads.train.drafter import most_used
from manyheads.train.eagle3 import TrainedEagle3, layers_read
from manyheads.train.kinds import read_weights, trained
from manyheads.train.prompts import Answer
from manyheads.train.run import train
from manyheads.train.trainer import Trainer
from tests.server.tiny_tokenizer import save_tokenizer, tiny_tokenizer
from tests.tiny import make_model
from tests.train.conftest import QUIET, settings
from tests.train.test_run import metrics

CPU = torch.device("cpu")
PASSES = 4
ITEMS = [Answer([5, 6, 7], [8, 9, 10, 12]), Answer([11], [12, 13]), Answer([14, 15], list(range(20, 60)))]
SAID = torch.tensor([*range(3, 50, 2), *range(50, 60)])


def make(base: Path, token_map: Tensor | None = SAID, rows: int = 16) -> tuple[Base, TrainedEagle3, Batch]:
    """A base, a drafter with weights that matter, and packed rows."""
    model, config = Base.load(base, CPU), read_config(base)
    torch.manual_seed(2)
    projection = model.projection.detach() if token_map is None else model.projection.detach()[token_map]
    drafter = TrainedEagle3(config, PASSES, layers_read(config.num_layers), torch.rand(32), projection, token_map)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model, drafter, pack(ITEMS, rows)


def test_layers_ascend_and_exist() -> None:
    assert layers_read(32) == (2, 16, 29)
    assert layers_read(8) == (2, 4, 5)
    assert [layers_read(n) for n in (2, 3, 4, 6)] == [(0, 1, 2), (1, 2, 3), (1, 2, 3), (2, 3, 4)]
    for n in range(2, 80):
        low, middle, high = layers_read(n)
        assert 0 <= low < middle < high <= n
    with pytest.raises(ConfigError, match="a base of one layer has too few"):
        layers_read(1)


def rollout(base: Base, drafter: TrainedEagle3, tokens: list[int], inputs: Tensor, start: int) -> list[Tensor]:
    """The features [hidden] of each pass of one chain, from the checkpoint's tensors, one place after another."""
    config = base.model.config
    w = drafter.state_dict()
    dim = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + config.rms_norm_eps).sqrt() * w[f"{name}.weight"]

    def heads(x: Tensor, name: str, position: int | None = None) -> Tensor:
        y = (w[f"midlayer.self_attn.{name}_proj.weight"] @ x).view(-1, dim)
        if position is None:
            return y
        theta = config.rope_parameters["rope_theta"]
        turns = torch.polar(torch.ones(dim // 2), position * theta ** -(torch.arange(0, dim, 2) / dim))
        turned = torch.complex(*y.chunk(2, dim=-1)) * turns
        return torch.cat([turned.real, turned.imag], dim=-1)

    def joined(token: int, feature: Tensor) -> Tensor:
        embedding = norm(base.embed(torch.tensor(token)), "midlayer.input_layernorm")
        return torch.cat([embedding, norm(feature, "midlayer.hidden_norm")])

    features = [w["fc.weight"] @ inputs[t] for t in range(start + 1)]
    result = []
    for step in range(drafter.depth):
        seen = [joined(tokens[t + 1], feature) for t, feature in enumerate(features)]
        at = start + step
        key = torch.stack([heads(x, "k", t) for t, x in enumerate(seen)]).repeat_interleave(group, dim=1)
        value = torch.stack([heads(x, "v") for x in seen]).repeat_interleave(group, dim=1)
        scores = (heads(seen[at], "q", at) * key).sum(-1) / dim**0.5  # [keys, heads]
        attended = (scores.softmax(0)[..., None] * value).sum(0).flatten()
        x = features[at] + w["midlayer.self_attn.o_proj.weight"] @ attended
        y = norm(x, "midlayer.post_attention_layernorm")
        gate, up = (w[f"midlayer.mlp.{name}_proj.weight"] @ y for name in ("gate", "up"))
        result.append(x + w["midlayer.mlp.down_proj.weight"] @ (F.silu(gate) * up))
        features.append(result[-1])
    return result


@torch.no_grad()
def test_passes_are_a_rollout_place_by_place(base: Path) -> None:
    model, drafter, batch = make(base)
    hidden, inputs = model.hidden_and_inputs(batch, drafter.layers)
    bounds = torch.tensor([0, 16])
    states = model.model(batch.tokens[1:], output_hidden_states=True, cu_seq_lens_q=bounds, max_length_q=16)
    # transformers norms the last of these
    first, second, third = inputs[16:].chunk(3, dim=-1)
    for found, expected in zip((first, second, model.model.model.norm(third)), states.hidden_states, strict=True):
        assert torch.allclose(found, expected[0], atol=1e-5)
    assert torch.equal(hidden, model.hidden(batch))
    chains = torch.tensor([2, 3, 4, 5, 6, 7, 8, 9, *range(17, 32)])
    features = drafter.unroll(model, batch, inputs, chains)
    compared = 0
    for begin, end in ((0, 7), (7, 10), (16, 32)):
        tokens = batch.tokens.flatten()[begin:end].tolist()
        for start in (s for s in chains.tolist() if begin <= s < end - PASSES):
            slow = rollout(model, drafter, tokens, inputs[begin:end], start - begin)
            fast = features[:, chains.tolist().index(start)]
            assert torch.allclose(fast, torch.stack(slow), atol=1e-4, rtol=1e-4)
            compared += 1
    assert compared == 1 + 0 + 11


def plain_loss(base: Base, drafter: TrainedEagle3, batch: Batch, discount: float) -> tuple[list[float], Tensor]:
    """The mean loss of each pass, and their weighted sum with a graph, from all logits of all places at once."""
    with torch.no_grad():
        hidden, inputs = base.hidden_and_inputs(batch, drafter.layers)
        said = base.logits(hidden)  # [R · L, V]
    answer = batch.answer.flatten()
    chains = (answer | F.pad(answer[1:], (0, 1))).nonzero()[:, 0]
    features = drafter.unroll(base, batch, inputs, chains)
    tokens, part = batch.tokens.flatten(), (batch.part + 100 * torch.arange(len(batch.part))[:, None]).flatten()
    losses = []
    for number in range(drafter.depth):
        each = []
        for m, s in enumerate(chains.tolist()):
            end = s + number + 2  # the guessed token
            if end < len(tokens) and part[s] == part[end] and answer[end] and tokens[end] in SAID:
                logits, wanted = drafter.logits(features[number, m]), said[end - 1]
                right = float(wanted.argmax() in SAID)
                each.append(-right * (wanted[SAID].softmax(-1) * logits.log_softmax(-1)).sum())
        losses.append(torch.stack(each).mean())
    return [loss.item() for loss in losses], sum((discount**k * loss for k, loss in enumerate(losses)), torch.zeros(()))


def test_slices_have_the_loss_and_gradient_of_the_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, drafter, batch = make(base)
    losses, total = plain_loss(model, drafter, batch, 0.8)
    total.backward()  # type: ignore[no-untyped-call]
    whole = [p.grad for p in drafter.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in whole)
    drafter.zero_grad(set_to_none=True)
    widest = 0

    def watched(features: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, features[..., 0].numel())
        return TrainedEagle3.logits(drafter, features)

    monkeypatch.setattr(drafter, "logits", watched)
    chosen = settings(kind="eagle3", passes=PASSES, rows=2, length=16, chunk=12, clip=1e9)
    trainer = Trainer(chosen, model, None, drafter, batch, tmp_path)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda set_to_none: None)
    record = trainer.step(0)
    assert widest == 12  # of 22 chains with four passes each
    assert record["pass_losses"] == pytest.approx(losses, rel=1e-4)
    for there, here in zip(whole, (p.grad for p in drafter.parameters()), strict=True):
        assert there is not None
        assert here is not None
        assert torch.allclose(there, here, atol=1e-5, rtol=1e-4)


class Explicit(FlashAttention):
    """What the kernels compute, written out: gradients from the output and the sums alone."""

    def __init__(self, spans: Spans) -> None:
        self.seen = torch.block_diag(*(torch.ones(q, k).tril(k - q) for q, k in spans.sizes)).bool()[:, None]

    def weights(self, query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        scores = torch.einsum("qhd,khd->qhk", query, key) * query.shape[-1] ** -0.5
        return torch.where(self.seen, (scores - lse[..., None]).exp(), 0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("qhd,khd->qhk", query, key) * query.shape[-1] ** -0.5
        lse = scores.masked_fill(~self.seen, -torch.inf).logsumexp(-1)
        return torch.einsum("qhk,khd->qhd", self.weights(query, key, lse), value), lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> list[Tensor]:
        weights = self.weights(query, key, lse)
        of_scores = torch.einsum("qhd,khd->qhk", grad, value) - (grad * out).sum(-1)[..., None]
        of_scores = weights * of_scores * query.shape[-1] ** -0.5
        by_key = (torch.einsum("qhk,qhd->khd", of_scores, query), torch.einsum("qhk,qhd->khd", weights, grad))
        return [torch.einsum("qhk,khd->qhd", of_scores, key), *by_key]


SIZES = [(3, 7), (0, 2), (5, 5), (2, 9)]


@pytest.mark.parametrize("steps", [0, 3])
def test_kernels_and_chains_joined_have_the_gradient_of_one_softmax(steps: int) -> None:
    torch.manual_seed(0)
    spans = Spans(SIZES, CPU)
    shapes = [10, 23, 23, *[10] * 2 * steps]
    given = [torch.randn(n, 2, 4, requires_grad=True) for n in shapes]
    query, key, value, *rest = given
    plain = chain_attention(query, key, value, list(zip(rest[::2], rest[1::2], strict=True)), spans)
    own = [torch.stack(part) if part else query.new_empty(0, 10, 2, 4) for part in (rest[::2], rest[1::2])]
    joined = _Joined.apply(query, key, value, *own, Explicit(spans))  # type: ignore[no-untyped-call]
    assert torch.allclose(plain, joined, atol=1e-5)
    grad = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(plain, given, grad), torch.autograd.grad(joined, given, grad), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("steps", [0, 3])
def test_chains_on_a_gpu_are_the_cpus(kv_heads: int, steps: int) -> None:
    torch.manual_seed(0)
    counts = [(10, 4), (23, kv_heads), (23, kv_heads), *[(10, kv_heads)] * 2 * steps]
    given = [torch.randn(n, heads, 32).bfloat16() for n, heads in counts]
    results = []
    for device in (CPU, torch.device("cuda")):
        moved = [t.to(device).requires_grad_() for t in given]
        query, key, value, *rest = moved
        own = list(zip(rest[::2], rest[1::2], strict=True))
        out = chain_attention(query, key, value, own, Spans(SIZES, device))
        results.append([out, *torch.autograd.grad(out.float().square().sum(), moved)])
    for cpu, gpu in zip(*results, strict=True):
        assert torch.allclose(cpu.float(), gpu.float().cpu(), atol=0.05, rtol=0.05)


def test_ranks_end_where_the_path_was_not_guessed(base: Path) -> None:
    model, drafter, batch = make(base, rows=64)
    ranks = right_ranks(model, drafter, batch, rows=1)
    with torch.no_grad():
        _, inputs = model.hidden_and_inputs(batch, drafter.layers)
        chains = (batch.answer | F.pad(batch.answer[:, 1:], (0, 1))).flatten().nonzero()[:, 0]
        features = drafter.unroll(model, batch, inputs, chains)
    wanted = batch.ahead(PASSES)[..., 1:].flatten(0, 1)
    expected = []
    for m, s in enumerate(chains.tolist()):
        row: list[int] = []
        for number, token in enumerate(wanted[s].tolist()):
            best = drafter.logits(features[number, m]).topk(NUM_RANKS).indices
            found = (SAID[best] == token).nonzero()[:, 0].tolist()
            follows = token >= 0 and NUM_RANKS not in row and -1 not in row
            row.append((found or [NUM_RANKS])[0] if follows else -1)
        if wanted[s, 0] >= 0:
            expected.append(row)
    assert ranks.tolist() == expected
    assert {-1, NUM_RANKS} < set(ranks.flatten().tolist())
    table = accuracy_table(ranks)
    assert len(table) == PASSES
    known = ranks[:, 1][ranks[:, 1] >= 0]
    assert table[1][0] == pytest.approx(float((known == 0).float().mean()), abs=1e-4)


def test_rows_without_an_answer_teach_nothing(base: Path, tmp_path: Path) -> None:
    model, drafter, _ = make(base)
    batch = pack([Answer(list(range(5, 20)), [20, 21])] * 2, 15)
    chosen = settings(kind="eagle3", passes=PASSES, length=15)
    record = Trainer(chosen, model, None, drafter, batch, tmp_path).step(0)
    assert (record["loss"], record["grad_norm"]) == (0, 0)
    assert right_ranks(model, drafter, batch).shape == (0, PASSES)


def test_a_drafter_learns_and_reads_back(base: Path, prompts: Path, tmp_path: Path) -> None:
    chosen = settings(kind="eagle3", passes=3, draft_vocab=100, max_steps=20)
    accuracy = train(str(base), [prompts], tmp_path / "out", chosen, progress=QUIET)
    records = metrics(tmp_path / "out")
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert len(records[-1]["held_out_top1"]) == 3
    config = read_config(base)
    weights = read_drafter(tmp_path / "out", config)
    assert weights.config.feature_layers(2) == (0, 1, 2)
    assert (weights.base, weights.accuracy) == (str(base.resolve()), accuracy)
    assert weights.token_map is not None
    tokens = weights.token_map
    answers = [json.loads(line) for line in (tmp_path / "out" / "training" / "answers.jsonl").read_text().splitlines()]
    held_out = (tmp_path / "out" / "training" / "held_out.jsonl").read_text()
    learnt = [Answer([], answer["token_ids"]) for answer in answers if json.dumps(answer["token_ids"]) not in held_out]
    assert torch.equal(tokens, most_used(learnt, 100, config.vocab_size))
    model = Base.load(base, CPU)
    drafter = trained(read_weights(tmp_path / "out", config), model, config)
    items = [Answer(line["prompt_token_ids"], line["token_ids"]) for line in map(json.loads, held_out.splitlines())]
    assert accuracy_table(right_ranks(model, drafter, pack(items, 64), 2)) == accuracy
    other = replace(weights, config=replace(weights.config, norm_before_residual=True))
    with pytest.raises(ConfigError, match="with other norm_before_residual than manyheads train gives"):
        trained(other, model, config)
    embedding = {"embed_tokens.weight": model.model.model.embed_tokens.weight}
    with pytest.raises(ConfigError, match="with other embed_tokens than"):
        trained(replace(weights, tensors=weights.tensors | embedding), model, config)


def test_files_are_laid_out_as_specforge_does(prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    size = len(tiny_tokenizer().hf)
    make_model(vocab_size=size, num_hidden_layers=4, max_position_embeddings=256, eos_token_id=4).save_pretrained(
        folder
    )
    save_tokenizer(folder)
    chosen = settings(kind="eagle3", passes=2, draft_vocab=50, max_steps=1)
    train(str(folder), [prompts], tmp_path / "out", chosen, progress=QUIET)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (raw["num_hidden_layers"], raw["draft_vocab_size"], raw["vocab_size"]) == (1, 50, size)
    assert raw["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    norms = ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm")
    assert shapes == {f"{name}.weight": (32,) for name in norms} | {
        "fc.weight": (32, 96),
        "midlayer.self_attn.q_proj.weight": (32, 64),
        "midlayer.self_attn.k_proj.weight": (16, 64),
        "midlayer.self_attn.v_proj.weight": (16, 64),
        "midlayer.self_attn.o_proj.weight": (32, 32),
        "midlayer.mlp.gate_proj.weight": (48, 32),
        "midlayer.mlp.up_proj.weight": (48, 32),
        "midlayer.mlp.down_proj.weight": (32, 48),
        "lm_head.weight": (50, 32),
        "d2t": (50,),
        "t2d": (size,),
    }


def test_a_whole_vocabulary_needs_no_map(base: Path, prompts: Path, tmp_path: Path) -> None:
    train(str(base), [prompts], tmp_path / "out", settings(kind="eagle3", passes=2, max_steps=1), progress=QUIET)
    weights = read_drafter(tmp_path / "out", read_config(base))
    assert weights.token_map is None
    assert len(weights.tensors["lm_head.weight"]) == read_config(base).vocab_size
    short = settings(kind="eagle3", passes=30, max_steps=1)
    with pytest.raises(ConfigError, match="no answer is longer than 30 tokens: nothing for the last pass to learn"):
        train(str(base), [prompts], tmp_path / "short", short, progress=QUIET)


def test_it_begins_as_the_last_layer(base: Path) -> None:
    model, config = Base.load(base, CPU), read_config(base)
    drafter = TrainedEagle3.start(settings(kind="eagle3", draft_vocab=9), model, config, ITEMS)
    layer, mine = model.model.model.layers[-1], drafter.midlayer
    assert torch.equal(mine.self_attn.q_proj.weight[:, 32:], layer.self_attn.q_proj.weight)
    assert torch.equal(mine.mlp.down_proj.weight, layer.mlp.down_proj.weight)
    assert torch.equal(drafter.fc.weight[:, 64:], torch.eye(32))
    assert drafter.token_map is not None
    assert torch.equal(drafter.lm_head.weight, model.projection[drafter.token_map])
    assert torch.equal(drafter.norm.weight, model.model.model.norm.weight)
    again = TrainedEagle3.start(settings(kind="eagle3", draft_vocab=9), model, config, ITEMS)
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), again.parameters(), strict=True))
