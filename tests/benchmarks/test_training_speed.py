"""The counted operations are those that PyTorch sees."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyheads.train.medusa import TrainedHeads
from manyheads.train.settings import TrainSettings
from manyheads.train.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import training_speed

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
TEXT = {"vocab_size": 50, "length": 64, "prompt_tokens": 12, "answer_tokens": 20}


@pytest.mark.parametrize(("projection", "blocks"), [("own", 1), ("shared", 2), ("base", 1)])
def test_operations_are_those_that_pytorch_counts(tmp_path: Path, projection: str, blocks: int) -> None:
    args = argparse.Namespace(**SHAPE, **TEXT)
    base, data = training_speed.make_base(args, CPU), training_speed.make_data(args, 4)
    assert data.tokens.shape == (4, 64)
    heads = TrainedHeads(3, blocks, base.projection.detach(), projection)
    settings = TrainSettings(heads=3, blocks=blocks, projection=projection, length=64, rows=2, accumulate=2, chunk=16)
    trainer = Trainer(settings, base, None, heads, data, tmp_path)
    with FlopCounterMode(display=False) as counter:
        trainer.step(0)
    # of attention PyTorch counts the masked half, too
    of_attention = ("bmm", "attention")
    ops = counter.get_flop_counts()["Global"].items()
    seen = sum(n for op, n in ops if not any(name in str(op) for name in of_attention))
    counted = training_speed.count_operations(base, heads, data)
    assert seen == counted["base"] + counted["heads_forward"] + counted["heads_backward"]
    # two conversations of 32 tokens a row
    assert counted["attention"] == 4 * 64 * 3 * 8 * (32 * 33 / 2)


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = SHAPE | TEXT | {"heads": 2, "rows": 2, "chunk": 16, "steps": 2, "gemm": 64}
    command = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    training_speed.main([str(tmp_path / "out.json"), "--device", "cpu", *command])
    own, shared = json.loads((tmp_path / "out.json").read_text())["results"]
    for result in (own, shared):
        assert result["tokens_per_step"] == 128
        assert set(result["split_s"]) == {"base", "heads_forward", "heads_backward", "optimizer"}
        assert all(value > 0 for value in result["split_s"].values())
        assert result["share_of_peak"] > 0
        assert result["all_logits_bytes"] == 128 * 2 * 50 * 4
    assert own["weight_bytes"]["heads"] - shared["weight_bytes"]["heads"] == 50 * 64 * 4
    assert "| own | 16 |" in capsys.readouterr().out
