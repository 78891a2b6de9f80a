"""Heads are trained on models in GGUF files, and written with them in one folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as Kind

from manyheads.checkpoint import read_json, resolve
from manyheads.frontend.llm import LLM
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.request import SamplingParams
from manyheads.speculation.medusa.checkpoint import read_heads
from manyheads.speculation.medusa.export import write_full
from manyheads.train.run import train
from tests.forward import logits
from tests.gguf.write import tiny, write
from tests.train.conftest import QUIET, settings


def test_heads_are_trained_and_served(tmp_path: Path) -> None:
    kinds = dict.fromkeys(["attn_q", "attn_k", "attn_v", "ffn_down", "output"], Kind.Q4_0)
    path = write(tmp_path / "model.gguf", tiny("llama"), kinds)
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"hello {word}"}) for word in ("cat", "dog", "mat", "log")))
    heads = tmp_path / "heads"
    train(str(path), [data], heads, settings(max_steps=2), progress=QUIET)
    config = read_config(resolve(str(path)))
    assert read_json(heads / "config.json")["base_model_name_or_path"] == str(path)
    llm = LLM(str(heads), num_blocks=64, max_num_seqs=4, num_threads=1)
    assert llm.engine.ready.drafter == "medusa"
    assert llm.engine.ready.weights is not None
    assert llm.engine.ready.weights.startswith("matrices of model.gguf: 9 in Q4_0 stay as they are; ")
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    plain = LLM(str(path), num_blocks=64, max_num_seqs=4, num_threads=1).generate("hello cat", params)
    assert llm.generate("hello cat", params)[0].outputs[0].token_ids == plain[0].outputs[0].token_ids

    both = tmp_path / "both"
    write_full(read_heads(heads, config), resolve(str(path)), both, expand=True)
    tokens = torch.arange(5, 30)
    whole, base = (
        load_model(folder, read_config(folder), torch.float32, torch.device("cpu"))
        for folder in (both, resolve(str(path)))
    )
    torch.testing.assert_close(logits(whole, tokens), logits(base, tokens))
