"""What K/V takes of memory where most layers look back through a window: the layers of Gemma 3, long texts at once.

    python benchmarks/windows.py results/windows.json
    python benchmarks/windows.py results/windows.json --texts 16 --tokens 16384

A model of random weights has the layers and windows that a checkpoint has, and is else as small as can be: the share
depends on nothing else. The engine runs all texts at once in a cache that is too small for full attention. Compared are
the bytes of all pages that are needed when these are most, and of those that the same texts would need at that moment
if every layer looked to the beginning. One of the texts is held against transformers' own.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, save
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from manyheads.config import EngineConfig
from manyheads.engine.build import build_engine
from manyheads.engine.engine import Engine
from manyheads.kv_cache import KVCache, KVShape
from manyheads.request import EngineRequest, SamplingParams

SHAPES: dict[str, dict[str, int]] = {
    "gemma-3-1b": {"num_hidden_layers": 26, "sliding_window": 512},
    "gemma-3-4b": {"num_hidden_layers": 34, "sliding_window": 1024},
    "gemma-3-12b": {"num_hidden_layers": 48, "sliding_window": 1024},
    "gemma-3-27b": {"num_hidden_layers": 62, "sliding_window": 1024},
}
"""As the published config.json have them; every sixth layer looks to the beginning."""
VOCAB, DRAWN = 64, 512
"""Tokens of the vocabulary, and drawn by each text."""


def model_of(folder: Path, shape: dict[str, Any], longest: int) -> torch.nn.Module:
    """Random weights, saved to a folder."""
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=longest,
        **shape,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config)
    model.save_pretrained(folder)
    return model.requires_grad_(False)


def bytes_of(kept: KVShape, page_size: int) -> int:
    """Of a page."""
    return KVCache.zeros(kept, 1, page_size, torch.float32, torch.device("meta")).nbytes


def run(engine: Engine, prompts: list[list[int]], whole: int) -> dict[str, Any]:
    """Bytes when they are most.

    Args:
        whole: bytes of a page of all layers.
    """
    params = SamplingParams(temperature=0.0, max_tokens=DRAWN, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    pages = engine.scheduler.pages
    cache: KVCache = engine.runner.cache  # type: ignore[attr-defined]
    page, most = cache.nbytes // cache.num_pages, dict[str, Any](full_attention_mib=0.0)
    texts: list[list[int]] = [[] for _ in prompts]
    began = time.perf_counter()
    while engine.has_work():
        for delta in engine.step():
            texts[int(delta.request_id)] += delta.new_token_ids
        tables = [request.table for request in engine.scheduler.running]
        full = sum(len(table.pages) for table in tables) * whole / 2**20
        if full > most["full_attention_mib"]:
            most = {
                "rows": len(tables),
                "tokens": sum(request.cached_len for request in engine.scheduler.running),
                "needed_mib": round(pages.num_needed * page / 2**20, 1),
                "full_attention_mib": round(full, 1),
            }
    engine.check_integrity()
    most["share"] = round(most["needed_mib"] / most["full_attention_mib"], 3)
    most["cache_mib"] = round(cache.nbytes / 2**20, 1)
    most["preemptions"], most["seconds"] = engine.stats().preemptions, round(time.perf_counter() - began, 1)
    return most | {"texts": texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16384, help="of each text, with those that are drawn")
    parser.add_argument("--memory", type=float, default=0.4, help="K/V that there is, of full attention's")
    args = parser.parse_args()
    choose = random.Random(0)
    prompts = [[choose.randrange(VOCAB) for _ in range(args.tokens - DRAWN)] for _ in range(args.texts)]
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            model = model_of(Path(folder), SHAPES[name], args.tokens + 64)
            layers, page_size = SHAPES[name]["num_hidden_layers"], 16
            whole = bytes_of(KVShape((None,) * layers, 1, 32), page_size)
            config = EngineConfig(
                model=folder,
                dtype="float32",
                max_num_seqs=args.texts,
                max_num_batched_tokens=1024,
                kv_cache_bytes=int(args.memory * args.texts * -(-args.tokens // page_size) * whole),
                prefix_caching=False,
            )
            found = run(build_engine(config), prompts, whole)
            texts = found.pop("texts")
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            ids = torch.tensor([prompts[-1] + texts[-1]], device=next(model.parameters()).device)
            logits = model(ids, logits_to_keep=DRAWN + 1).logits[0, :-1]
            found["same_text"] = logits.argmax(-1).tolist() == texts[-1]
        found |= {"texts": args.texts, "tokens_each": args.tokens, "machine": machine()}
        print(name, found, flush=True)
        save(args.out, name, found)


if __name__ == "__main__":
    main()
