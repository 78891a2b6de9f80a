"""Do vLLM's own classes take the heads that `manyheads convert --to vllm` writes, and draft the same tokens with them?

1. The built-in heads are exported as they are (one shared projection, a token_map), with a projection of the whole
   vocabulary for every head, and with such projections that a token_map has cut. vLLM's `MedusaConfig` reads the
   configuration, its `Medusa` is built from that and loads the file. `load_weights` passes over keys that it does not
   know and parameters that the file lacks, so both are counted here, and every parameter is compared with the file.
2. vLLM's `MedusaProposer` drafts four tokens at every place of greedy replies, from the base's hidden states; these
   are compared with the best candidates of our own reader's heads. They can differ where heads were written out in
   full: tokens that were left out have logit 0 then, which now and then is the largest.
3. The same drafts are counted as vLLM accepts them. results/gpu_vllm/vllm_medusa.json holds how many vLLM drafted on a
   GPU for the same prompts, with the model and heads of commit bd074c0; heads that are not those give other counts,
   and half precision now and then another text.

    python benchmarks/vllm_heads.py VLLM        # vllm_parts.py says what is in that folder

No GPU and none of vLLM's compiled parts are needed. Its files models/medusa.py, configs/medusa.py,
vocab_parallel_embedding.py, logits_processor.py and spec_decode/medusa.py run as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import vllm_parts
from common import BUILTIN, ROOT, SPEC_BENCH, machine, save, table
from gpu import spec_bench_prompts
from safetensors.torch import load_file
from torch import Tensor

from manyheads import LLM, SamplingParams
from manyheads.checkpoint import read_json
from manyheads.models.registry import read_config
from manyheads.speculation.medusa.checkpoint import read_heads
from manyheads.speculation.medusa.export import fitting, write_heads
from manyheads.train.base import Base
from manyheads.train.dataset import pack
from manyheads.train.medusa import TrainedHeads
from manyheads.train.prompts import Answer

TOKENS_IN, TOKENS_OUT = 128, 256  # gpu.py's
FILES = (
    "envs",
    "model_executor.custom_op",
    "model_executor.layers.logits_processor",
    "model_executor.layers.quantization.base_config",
    "model_executor.layers.vocab_parallel_embedding",
    "model_executor.models.interfaces",
    "model_executor.models.interfaces_base",
    "model_executor.models.medusa",
    "model_executor.models.utils",
    "model_executor.parameter",
    "model_executor.utils",
    "transformers_utils.configs.medusa",
    "transformers_utils.utils",
    "utils.collection_utils",
    "utils.func_utils",
    "v1.spec_decode.medusa",
)


def vllm_classes(folder: Path) -> tuple[Any, Any, Any]:
    """vLLM's MedusaConfig, Medusa and MedusaProposer from an unpacked wheel."""
    vllm_parts.install(folder, FILES, {})
    return (
        importlib.import_module("vllm.transformers_utils.configs.medusa").MedusaConfig,
        importlib.import_module("vllm.model_executor.models.medusa").Medusa,
        importlib.import_module("vllm.v1.spec_decode.medusa").MedusaProposer,
    )


def export(out: Path, kind: str) -> Path:
    """The built-in heads as `manyheads convert --to vllm` writes them.

    Args:
        kind: `shared` as they are; `own` with a whole projection for every head, each twice the one before, which
            changes no choice; `own, cut` the same with a token_map, which is written out.
    """
    source, options = BUILTIN, ["--base", str(BUILTIN)]
    if kind != "shared":
        weights = read_heads(BUILTIN / "heads", read_config(BUILTIN))
        assert weights.projections is not None
        own = dataclasses.replace(weights, projections=[p * 2**h for h, p in enumerate(weights.projections)])
        source, vocab_size = out / "own", read_config(BUILTIN).vocab_size
        if kind == "own":
            own = fitting(own, "reference", vocab_size, None, expand=True)
        else:
            options.append("--expand")
        write_heads(own, source, base=str(BUILTIN), vocab_size=vocab_size)
    command = [sys.executable, "-m", "manyheads", "convert", str(source), str(out / "vllm"), "--to", "vllm"]
    subprocess.run([*command, *options], check=True)
    return out / "vllm"


def load(classes: tuple[Any, Any, Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """vLLM's proposer with the heads of a folder in float32, and what its reader made of the files."""
    config_class, model_class, proposer_class = classes
    config = config_class.from_pretrained(folder)
    draft = types.SimpleNamespace(hf_config=config)
    settings = types.SimpleNamespace(speculative_config=types.SimpleNamespace(draft_model_config=draft))
    model = model_class(vllm_config=settings)
    state = load_file(folder / "model.safetensors")
    for param in model.parameters():
        param.data.fill_(torch.nan)
    loaded = model.load_weights(state.items())
    params = dict(model.named_parameters(remove_duplicate=False))
    params.pop("token_map", None)
    named = {"lm_heads.0.weight": "lm_head.weight"} if getattr(config, "original_lm_head", False) else {}
    file = {named.get(key, key): tensor for key, tensor in state.items() if key != "token_map"}
    if model.token_map is not None:
        file["token_map"], params["token_map"] = state["token_map"], model.token_map
    same = [key for key in file.keys() & params.keys() if torch.equal(params[key][: len(file[key])], file[key].float())]
    declared = read_json(folder / "config.json")
    fields = ("hidden_size", "vocab_size", "truncated_vocab_size", "num_heads", "num_hidden_layers", "medusa_fc_bias")
    proposer = proposer_class.__new__(proposer_class)  # its own set-up asks for a device and a whole configuration
    proposer.model, proposer.num_speculative_tokens = model, config.num_heads
    return proposer, {
        "config_as_declared": all(getattr(config, name) == declared[name] for name in fields),
        "keys": sorted(state),
        "parameters": len(params),
        "parameters_loaded": len(loaded | ({"token_map"} if model.token_map is not None else set())),
        "keys_without_parameter": sorted(file.keys() - params.keys()),
        "parameters_equal_to_file": len(same),
        "not_finite": sum(int((~p.isfinite()).any()) for p in model.parameters() if p.is_floating_point()),
    }


def drafted(prompt: int, tokens: list[int], drafts: Tensor) -> int:
    """How often vLLM drafts for a reply: each time the drafts up to the first wrong one and a token more are kept.

    Args:
        prompt: tokens of the prompt, the first of `tokens`.
        drafts: [tokens, heads], from the hidden state of each token.
    """
    count, known = 0, prompt + 1
    while known < len(tokens):
        right = 0
        for guess in drafts[known - 2].tolist():
            if known + right >= len(tokens) or guess != tokens[known + right]:
                break
            right += 1
        count, known = count + 1, known + right + 1
    return count


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("vllm", type=Path, help="the folder of the unpacked wheel")
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    parser.add_argument("--requests", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_heads.json")
    args = parser.parse_args()
    classes = vllm_classes(args.vllm)
    result: dict[str, Any] = {"machine": machine(), "vllm": vllm_parts.version(args.vllm), "read": {}}
    proposers = []
    with tempfile.TemporaryDirectory() as name:
        for title in ("shared", "own", "own, cut"):
            proposer, found = load(classes, export(Path(name) / title, title))
            proposers.append(proposer)
            result["read"][title] = found
            print(title, json.dumps(found))
    base = Base.load(BUILTIN, torch.device("cpu"))
    ours = TrainedHeads.of(read_heads(BUILTIN / "heads", read_config(BUILTIN)), base.projection.float())
    assert ours.token_map is not None
    prompts = spec_bench_prompts(BUILTIN, args.spec_bench, TOKENS_IN, max(args.requests))
    llm = LLM(str(BUILTIN), speculative=False, max_num_seqs=16)
    recorded = json.loads((ROOT / "benchmarks/results/gpu_vllm/vllm_medusa.json").read_text())["rows"]
    on_gpu = {row["users"] * row["rounds"]: row["counters"]["vllm:spec_decode_num_drafts"] for row in recorded}
    compared, equal, counts = 0, [0] * len(proposers), []
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS_OUT, ignore_eos=True)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        reply = list(output.outputs[0].token_ids)
        hidden = base.hidden(pack([Answer(prompt, reply)], len(prompt) + len(reply))).float()
        wanted = torch.stack([ours.token_map[ours.logits(h, hidden).argmax(-1)] for h in range(4)], dim=1)
        offered = [proposer.propose(4, hidden, None) for proposer in proposers]
        compared += wanted.numel()
        equal = [n + int((drafts == wanted).sum()) for n, drafts in zip(equal, offered, strict=True)]
        counts.append(drafted(len(prompt), [*prompt, *reply], offered[0]))
    result["drafts"] = {
        "vLLM on a GPU": [on_gpu.get(n) for n in args.requests],
        "here": [sum(counts[:n]) for n in args.requests],
    }
    result |= {"requests": args.requests, "drafted_tokens": compared}
    result["equal_to_ours"] = dict(zip(result["read"], equal, strict=True))
    print(f"of {compared} drafted tokens equal to ours: {result['equal_to_ours']}")
    table(["drafts by requests", *map(str, args.requests)], [[key, *row] for key, row in result["drafts"].items()])
    save(args.out, "vllm", result)


if __name__ == "__main__":
    main()
