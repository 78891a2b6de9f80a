"""What quantization costs in quality: perplexity, the same greedy choices, tokens a step; writes
results/quantization_quality.json.

    python benchmarks/quantization_quality.py                                   # the built-in model, on the CPU
    python benchmarks/quantization_quality.py --model DIR --device cuda --part enlarged

- perplexity: of texts in files of JSON lines: the first of `turns` as it is, or an answer given its question
  (`question` and `answer`, `instruction` and `response`) in the model's chat template; and how often the most likely
  token is that of the weights as they come.
- greedy: replies to the first turns of Spec-Bench, compared with those of the weights as they come; steps are counted
  with a tree of a fixed size.

`int4, vocabulary too` is int4 with the projection to the vocabulary in 4 bits, which `--quantization int4` keeps in 8.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

import torch
from common import BUILTIN, ROOT, SPEC_BENCH, machine, save, spec_bench, table
from torch import Tensor
from transformers import AutoTokenizer

from manyheads import LLM, SamplingParams
from manyheads.attention.base import Group
from manyheads.attention.torch import TorchAttention
from manyheads.kv_cache import KVCache
from manyheads.models.linear import Linear
from manyheads.models.llama import Llama
from manyheads.models.loader import load_model
from manyheads.models.registry import read_config
from manyheads.quantization.int4 import INT4

SCHEMES = ("none", "int8", "fp8", "int4")
VOCABULARY_TOO = "int4, vocabulary too"
PAGE = 16


def read_pairs(path: Path, tokenizer: Any, count: int, longest: int) -> list[tuple[list[int], int]]:
    """(tokens of question and answer, tokens of the question), `count` of them drawn with a fixed seed."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        lines = [json.loads(line) for line in file]
    random.Random(0).shuffle(lines)
    pairs: list[tuple[list[int], int]] = []
    for line in lines:
        if "turns" in line:  # a text as it is, all but its first token
            tokens = tokenizer(line["turns"][0], add_special_tokens=False).input_ids[:longest]
            if len(tokens) > 1:
                pairs.append((tokens, 1))
            continue
        question, answer = line.get("question", line.get("instruction")), line.get("answer", line.get("response"))
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        start = tokenizer(text, add_special_tokens=False).input_ids
        tokens = start + tokenizer(answer, add_special_tokens=False).input_ids
        if len(start) < len(tokens) <= longest:
            pairs.append((tokens, len(start)))
    return pairs[:count]


@torch.inference_mode()
def score(model: Llama, tokens: list[int], start: int) -> tuple[Tensor, Tensor]:
    """Log-probability of each token from `start` on, and the most likely one in its place: [n] both, on the CPU."""
    config, n, device = model.config, len(tokens), model.device
    pages = -(-n // PAGE)
    kept = config.kv_shape
    cache = KVCache.zeros(kept, 1 + pages * len(kept.groups), PAGE, model.dtype, device)
    attention = TorchAttention(cache, model.heads)
    chain = Group(
        start=0,
        stop=n,
        row_start=torch.tensor([0, n], dtype=torch.int32, device=device),
        bits=torch.zeros(n, dtype=torch.int64, device=device),
        cached_len=torch.zeros(1, dtype=torch.int64, device=device),
        page_table=torch.arange(1, pages + 1, device=device)[None],
        max_tokens=n,
        max_cached_len=0,
        is_chain=True,
    )
    places = torch.arange(n, device=device)
    attention.plan([chain], places, places + PAGE)
    ids = torch.tensor(tokens, device=device)
    logits = model.logits(model.forward(ids, attention)[start - 1 : -1])
    chosen = logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0]
    return chosen.cpu(), logits.argmax(-1).cpu()


def load(args: argparse.Namespace, dtype: torch.dtype, scheme: str) -> Llama:
    config = read_config(args.model)
    device = torch.device(args.device)
    if scheme != VOCABULARY_TOO:
        return load_model(args.model, config, dtype, device, None, scheme)
    weight = load_model(args.model, config, dtype, device).embedding  # before it is used in the place of lm_head
    if not config.tie_word_embeddings:
        raise SystemExit(f"{VOCABULARY_TOO}: written for tied embeddings")
    model = load_model(args.model, config, dtype, device, None, INT4.name)
    model.lm_head = Linear(INT4.quantize(weight), None, dtype, model.ops)
    return model


def perplexities(args: argparse.Namespace, dtype: torch.dtype, pairs: list[tuple[list[int], int]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    base: list[Tensor] = []
    for scheme in (*args.schemes, *([VOCABULARY_TOO] if args.vocabulary_too else [])):
        model = load(args, dtype, scheme)
        scores = [score(model, tokens, start) for tokens, start in pairs]
        loss = -torch.cat([chosen for chosen, _ in scores]).double()
        best = [top for _, top in scores]
        base = base or best
        result[scheme] = {
            "weights_mb": model.memory_bytes() / 1e6,
            "nats_per_token": loss.mean().item(),
            "perplexity": loss.mean().exp().item(),
            "same_choice": (torch.cat(best) == torch.cat(base)).double().mean().item(),
            "tokens": loss.numel(),
        }
        print(scheme, json.dumps(result[scheme]), flush=True)
    return result


def replies(args: argparse.Namespace, scheme: str, prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Greedy replies, and how many decoding steps each took."""
    llm = LLM(
        model=str(args.model),
        device=args.device,
        dtype=args.dtype,
        quantization=scheme,
        tree_size=args.tree_size,
        max_num_seqs=args.max_num_seqs,
    )
    params = SamplingParams(temperature=0.0, max_tokens=args.new_tokens, ignore_eos=True)
    outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
    # the prompt's step gives a token too
    return [list(o.token_ids) for o in outputs], [o.num_steps - 1 for o in outputs]


def agreement(found: list[list[int]], base: list[list[int]]) -> dict[str, float]:
    """Shares of replies that are the same, and of tokens before the first that differs."""
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(found, base, strict=True)
    ]
    return {
        "same_replies": sum(n == len(x) for n, x in zip(same, base, strict=True)) / len(base),
        "same_tokens": sum(same) / sum(map(len, base)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="auto is float32 on a CPU and the checkpoint's own on a GPU")
    parser.add_argument(
        "--schemes", nargs="+", default=list(SCHEMES), help="the first is what others are compared with"
    )
    parser.add_argument("--vocabulary-too", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--texts", type=Path, nargs="*", default=[SPEC_BENCH], help="JSON lines, .gz or not")
    parser.add_argument("--num-texts", type=int, default=200)
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--tree-size", type=int, default=16)
    parser.add_argument("--part", default="builtin", help="name of this run in the results file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quantization_quality.json")
    args = parser.parse_args()

    config = read_config(args.model)
    auto = torch.float32 if args.device == "cpu" else config.dtype
    dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    result: dict[str, Any] = {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "dtype": str(dtype),
        "new_tokens": args.new_tokens,
        "tree_size": args.tree_size,
        "prompts": args.prompts,
        "perplexity": {},
        "greedy": {},
    }
    for path in args.texts:
        pairs = read_pairs(path, tokenizer, args.num_texts, config.max_position_embeddings)
        print(f"{path.name}: {len(pairs)} texts", flush=True)
        result["perplexity"][path.name] = perplexities(args, dtype, pairs)
    fitting = spec_bench(tokenizer, max_prompt_tokens=args.max_prompt_tokens, path=args.spec_bench)
    prompts = [prompt.token_ids for prompt in fitting[: args.prompts]]
    base: list[list[int]] = []
    for scheme in args.schemes:
        found, steps = replies(args, scheme, prompts)
        base = base or found
        result["greedy"][scheme] = agreement(found, base) | {
            "tokens_per_step": (args.new_tokens - 1) * len(prompts) / sum(steps),
            "steps": steps,
        }
        print(scheme, {k: v for k, v in result["greedy"][scheme].items() if k != "steps"}, flush=True)
    for name, measured in result["perplexity"].items():
        rows = [[s, f"{m['perplexity']:.3f}", f"{m['same_choice']:.4f}"] for s, m in measured.items()]
        table([name, "perplexity", "same choice"], rows)
    keys = ("same_replies", "same_tokens", "tokens_per_step")
    table(["", *keys], [[s, *(f"{m[key]:.3f}" for key in keys)] for s, m in result["greedy"].items()])
    save(args.out, args.part, result)


if __name__ == "__main__":
    main()
