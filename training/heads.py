"""Medusa heads on the base's own answers: heads.py DATA MODEL [--seconds N].

The base answers prompts of the conversations (greedily, and some at temperature 0.7), and the heads learn to predict
what it said two and more tokens ahead (Medusa-1, Cai et al. 2024, section 2.2.1, with self-distillation, section
2.3.2). A head is one residual block whose output goes through the base's own vocabulary projection ("V2").
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from base import DEVICE, pack
from data import entries
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

NUM_HEADS = 4
NUM_RANKS = 10
MAX_NEW = 192
END = 4


Generate = Callable[[list[list[int]], float], list[list[int]]]
"""Prompts and a temperature to what the base says."""


def generator(folder: Path) -> Generate:
    """manyheads itself on a CPU, transformers on a GPU."""
    if DEVICE == "cpu":
        from manyheads import LLM, SamplingParams

        llm = LLM(str(folder), speculative=False, max_num_seqs=64)

        def served(prompts: list[list[int]], temperature: float) -> list[list[int]]:
            params = SamplingParams(max_tokens=MAX_NEW, temperature=temperature, seed=0)
            return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

        return served
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()

    @torch.inference_mode()
    def generated(prompts: list[list[int]], temperature: float) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=DEVICE)
        sampled = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        return model.generate(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=MAX_NEW,
            eos_token_id=END,
            pad_token_id=0,
            **sampled,
        )[:, width:].tolist()

    return generated


def answers(generate: Generate, prompts: list[list[int]], seconds: float) -> list[tuple[list[int], list[int]]]:
    """(tokens, 1 where the model speaks) of as many prompts as the time allows, three of four answered greedily."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = 2048 if DEVICE == "cuda" else 256
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    random.Random(0).shuffle(groups)
    result: list[tuple[list[int], list[int]]] = []
    start = time.time()
    for number, group in enumerate(groups):
        if time.time() - start > seconds:
            break
        out = generate([prompts[i] for i in group], 0.7 if number % 4 == 3 else 0.0)
        for i, new in zip(group, out, strict=True):
            said = new[: new.index(END) + 1] if END in new else new
            result.append((prompts[i] + said, [0] * len(prompts[i]) + [1] * len(said)))
    print(f"answers: {len(result)}, {sum(sum(m) for _, m in result)} tokens, {time.time() - start:.0f} s", flush=True)
    return result


class Heads(torch.nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(NUM_HEADS, hidden, hidden))
        self.bias = torch.nn.Parameter(torch.zeros(NUM_HEADS, 1, hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, D] → [heads, N, D]: what goes through the vocabulary projection."""
        return hidden + F.silu(torch.baddbmm(self.bias, hidden.expand(NUM_HEADS, -1, -1), self.weight.transpose(1, 2)))


def targets(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[heads, rows, T] tokens that head h is to predict, and whether they were said by the model."""
    wanted, valid = [], []
    for h in range(NUM_HEADS):
        shift = h + 2
        wanted.append(F.pad(tokens[:, shift:], (0, shift)))
        # the position itself must be able to propose: it draws a token of the answer
        said = F.pad(mask[:, shift:], (0, shift)) & F.pad(mask[:, 1:], (0, 1))
        valid.append(said)
    return torch.stack(wanted), torch.stack(valid)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=75, help="for training")
    parser.add_argument("--answer-seconds", type=float, default=75)
    parser.add_argument("--init", type=Path, help="start from these heads")
    parser.add_argument("--share", type=float, default=1.0, help="of the questions that come from the data files")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    user, assistant, end = (tokenizer.token_to_id(f"<|{name}|>") for name in ("user", "assistant", "end"))
    # everyday questions first, in all their variants: the heads are to be good at what the base is good at
    everyday, others = entries(args.data)
    questions = {talk[0]["content"]: None for entry in everyday for talk in entry.variants}
    questions |= {entry.variants[0][0]["content"]: None for entry in others[: int(len(others) * args.share)]}
    encoded = tokenizer.encode_batch(list(questions))
    prompts = [[user, *e.ids, end, assistant] for e in encoded if len(e.ids) < 400]
    random.Random(1).shuffle(prompts)
    said = answers(generator(args.model), prompts, args.answer_seconds)
    random.Random(2).shuffle(said)
    held_out, said = said[: len(said) // 20], said[len(said) // 20 :]
    train, valid = ([torch.from_numpy(a).to(DEVICE) for a in pack(part, 1024)] for part in (said, held_out))

    # float32: hidden states as the engine sees them on a CPU
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE).eval().requires_grad_(False)
    torch.set_float32_matmul_precision("high")
    projection = model.lm_head.weight
    heads = Heads(model.config.hidden_size).to(DEVICE)
    if args.init:
        state = load_file(args.init / "medusa_lm_head.safetensors", device=DEVICE)
        heads.weight.data.copy_(torch.stack([state[f"{h}.0.linear.weight"] for h in range(NUM_HEADS)]))
        heads.bias.data.copy_(torch.stack([state[f"{h}.0.linear.bias"] for h in range(NUM_HEADS)])[:, None])
    optimizer = torch.optim.AdamW(heads.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    start, step = time.time(), 0
    rows = 24 if DEVICE == "cuda" else 4
    while (done := (time.time() - start) / args.seconds) < 1:
        index = torch.randint(len(train[0]), (rows,), device=DEVICE)
        tokens, mask = train[0][index].long(), train[1][index]
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            hidden = model.model(input_ids=tokens).last_hidden_state
        wanted, use = targets(tokens, mask)
        loss = torch.zeros((), device=DEVICE)
        states = heads(hidden.flatten(0, 1).float())
        for h in range(NUM_HEADS):
            at = use[h].flatten()
            with torch.autocast(DEVICE, torch.bfloat16):
                logits = states[h][at] @ projection.T
            loss = loss + 0.8**h * F.cross_entropy(logits.float(), wanted[h].flatten()[at])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % (200 if DEVICE == "cuda" else 20) == 0:
            print(step, f"{done:.2f} loss {loss.item():.3f}", flush=True)

    hits = torch.zeros(NUM_HEADS, NUM_RANKS, dtype=torch.float64)
    counts = torch.zeros(NUM_HEADS, dtype=torch.float64)
    with torch.no_grad():
        for i in range(0, len(valid[0]), rows):
            tokens, mask = valid[0][i : i + rows].long(), valid[1][i : i + rows]
            states = heads(model.model(input_ids=tokens).last_hidden_state.flatten(0, 1))
            wanted, use = targets(tokens, mask)
            for h in range(NUM_HEADS):
                at = use[h].flatten()
                top = (states[h][at] @ projection.T).topk(NUM_RANKS).indices
                hits[h] += (top == wanted[h].flatten()[at][:, None]).double().sum(0).cpu()
                counts[h] += int(at.sum())
    accuracy = (hits / counts[:, None]).tolist()
    for h, ranks in enumerate(accuracy):
        print(f"head {h}: top-1 {ranks[0]:.3f}, top-{NUM_RANKS} {sum(ranks):.3f}")

    out = args.model / "heads"
    out.mkdir(exist_ok=True)
    state = {f"{h}.0.linear.weight": heads.weight[h].detach().half().contiguous().cpu() for h in range(NUM_HEADS)}
    state |= {f"{h}.0.linear.bias": heads.bias[h, 0].detach().half().contiguous().cpu() for h in range(NUM_HEADS)}
    save_file(state, out / "medusa_lm_head.safetensors", metadata={"format": "pt"})
    config = {"medusa_num_heads": NUM_HEADS, "medusa_num_layers": 1, "base_model_name_or_path": "..", "version": "2"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    statistics = {
        "accuracy": [[round(p, 5) for p in ranks] for ranks in accuracy],
        "tokens": int(counts[0]),
        "source": "held-out answers of the built-in model, three of four greedy, the others at temperature 0.7",
    }
    (out / "tree_statistics.json").write_text(json.dumps(statistics, indent=1) + "\n")
    check = AutoTokenizer.from_pretrained(args.model)
    print(check.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True))


if __name__ == "__main__":
    main()
