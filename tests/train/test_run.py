"""Runs from prompts to heads: they learn, leave the base alone, and go on after being killed as if nothing was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manyheads import LLM, ConfigError, SamplingParams
from manyheads.cli import main
from manyheads.models.registry import read_config
from manyheads.speculation.medusa.checkpoint import read_heads
from manyheads.train import trainer
from manyheads.train.run import train
from tests.train.conftest import QUIET, settings

CHANGING = ("seconds", "tokens_per_s")


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "training" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CHANGING} for line in lines]


@pytest.mark.parametrize("projection", ["own", "shared", "base"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_heads_learn_and_the_base_stays(
    base: Path, prompts: Path, tmp_path: Path, projection: str, blocks: int
) -> None:
    before = digests(base)
    tokens = None if projection == "base" else 100
    changes = {"projection": projection, "blocks": blocks, "tokens": tokens, "max_steps": 20}
    train(str(base), [prompts], tmp_path / "out", settings(**changes), progress=QUIET)
    assert digests(base) == before
    losses = [record["loss"] for record in metrics(tmp_path / "out")]
    assert len(losses) == 20
    assert losses[-1] < 0.95 * losses[0]
    config = read_config(base)
    weights = read_heads(tmp_path / "out", config)
    assert (len(weights.blocks), len(weights.blocks[0])) == (2, blocks)
    assert (weights.projections is None) == (projection == "base")
    assert weights.accuracy is not None
    if weights.projections is not None:
        assert weights.projections[0].shape == (100, config.hidden_size)
        assert (weights.projections[0] is weights.projections[1]) == (projection == "shared")


def tokens_per_step(base: Path, heads: Path) -> float:
    llm = LLM(str(base), heads=str(heads), tree_size=8, max_num_seqs=8)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    chats = [[{"role": "user", "content": f"{word} and cat"}] for word in ("cat", "dog", "hello", "world", "log")]
    outputs = [output.outputs[0] for output in llm.chat(chats, params)]
    return sum(len(o.token_ids) for o in outputs) / sum(o.num_steps for o in outputs)


def test_trained_heads_give_more_tokens_a_step(base: Path, prompts: Path, tmp_path: Path) -> None:
    for name, rate, steps in (("untrained", 1e-12, 1), ("trained", 1e-2, 200)):
        chosen = settings(rate=rate, max_steps=steps, sampled=0, rows=8)
        train(str(base), [prompts], tmp_path / name, chosen, progress=QUIET)
    untrained, trained = (tokens_per_step(base, tmp_path / name) for name in ("untrained", "trained"))
    assert trained > untrained + 0.3


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {"projection": "shared", "tokens": 120},
        {"projection": "shared", "tokens": 120, "joint": True, "joint_start": 0.3},
        {"kind": "eagle3", "passes": 3, "draft_vocab": 120},
    ],
    ids=["Medusa-1", "joint", "EAGLE-3"],
)
def test_a_killed_run_resumes_to_the_same_result(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    chosen = settings(accumulate=2, **changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(str(base), [prompts], whole, chosen, progress=QUIET)
    step = trainer.Trainer.step

    def dies(self: trainer.Trainer, number: int) -> dict[str, Any]:
        if number == 3:  # after a checkpoint, and a step that it does not hold
            raise Killed
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", dies)
        with pytest.raises(Killed):
            train(str(base), [prompts], broken, chosen, progress=QUIET)
    with pytest.raises(ConfigError, match="holds a run already; go on with it by --resume"):
        train(str(base), [prompts], broken, chosen, progress=QUIET)
    torch.manual_seed(99)
    answers = (broken / "training" / "answers.jsonl").read_bytes()
    # the machine went down while an answer was written
    (broken / "training" / "answers.jsonl").write_bytes(answers[: len(answers) // 2])
    train(str(base), [prompts], broken, chosen, resume=True, progress=QUIET)
    assert metrics(broken) == metrics(whole)
    assert digests(broken) == digests(whole)
    if chosen.joint:
        for name in ("model.safetensors", "tree_statistics.json"):
            assert digests(broken / "heads")[name] == digests(whole / "heads")[name]


def test_other_settings_or_prompts_do_not_resume(base: Path, prompts: Path, tmp_path: Path) -> None:
    train(str(base), [prompts], tmp_path / "out", settings(max_steps=1), progress=QUIET)
    with pytest.raises(ConfigError, match=r"other settings: rate is 0.5 and was 0.01"):
        train(str(base), [prompts], tmp_path / "out", settings(max_steps=1, rate=0.5), resume=True, progress=QUIET)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "cat"}\n' * 20)
    with pytest.raises(ConfigError, match="other prompts"):
        train(str(base), [other], tmp_path / "out", settings(max_steps=1), resume=True, progress=QUIET)
    (tmp_path / "out" / "training" / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ConfigError, match=r"state.pt cannot be taken up again"):
        train(str(base), [prompts], tmp_path / "out", settings(max_steps=1), resume=True, progress=QUIET)


def test_joint_training_writes_base_and_heads(base: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(str(base), [prompts], out, settings(joint=True, joint_start=0.5, max_steps=12), progress=QUIET)
    old, new = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert old.keys() == new.keys()
    assert not torch.equal(old["model.layers.0.mlp.up_proj.weight"], new["model.layers.0.mlp.up_proj.weight"])
    rates = [record["base_rate"] for record in metrics(out)]
    assert rates[:6] == [0.0] * 6
    assert all(rates[6:])
    # found without being told, tokenizer and all
    llm = LLM(str(out), tree_size=4, max_num_seqs=2)
    assert llm.engine.ready.draft_depth == 2
    llm.chat([{"role": "user", "content": "cat"}], SamplingParams(max_tokens=4))


def test_heads_to_start_from(base: Path, prompts: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(str(base), [prompts], first, settings(max_steps=20, projection="shared"), progress=QUIET)
    more = settings(max_steps=1, projection="shared", tokens=200, init=str(first), rate=1e-12)
    train(str(base), [prompts], second, more, progress=QUIET)
    here, there = (read_heads(folder, read_config(base)) for folder in (first, second))
    assert there.token_map is not None
    assert here.projections is not None
    assert there.projections is not None
    assert torch.allclose(there.projections[0], here.projections[0][there.token_map])
    assert metrics(second)[0]["loss"] < metrics(first)[0]["loss"]
    with pytest.raises(ConfigError, match=r"have projection 'shared'; give --projection shared, not own"):
        train(str(base), [prompts], tmp_path / "third", settings(init=str(first)), progress=QUIET)


def test_the_commands(base: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    some = ["--heads", "2", "--max-new-tokens", "24", "--length", "64", "--rows", "2", "--device", "cpu", "-q"]
    assert main(["train", str(base), "--data", str(prompts), "--out", str(out), "--max-steps", "2", *some]) == 0
    assert "head 1: right" in capsys.readouterr().out
    statistics = (out / "tree_statistics.json").read_bytes()
    held_out = out / "training" / "held_out.jsonl"
    assert main(["tree", str(out), "--data", str(held_out), "--device", "cpu", "-q"]) == 0
    table = capsys.readouterr().out
    assert "nodes  tokens a step" in table
    measured = json.loads((out / "tree_statistics.json").read_bytes())
    assert measured["accuracy"] == json.loads(statistics)["accuracy"]
    more = ["--kind", "eagle3", "--passes", "2", "--draft-vocab", "40", "--max-steps", "1", *some[2:]]
    drafter, answers = tmp_path / "drafter", out / "training" / "answers.jsonl"
    assert main(["train", str(base), "--data", str(answers), "--out", str(drafter), *more]) == 0
    assert main(["tree", str(drafter), "--data", str(held_out), "--device", "cpu", "-q"]) == 0
    assert capsys.readouterr().out.count("pass 1: right") == 2
    assert main(["inspect", str(out)]) == 0
    assert str(base) in capsys.readouterr().out
    assert main(["train", str(base), "--data", str(tmp_path / "none"), "--out", str(out), *some]) == 2
    assert "cannot be read" in capsys.readouterr().err
