"""Medusa heads on the base's own answers: heads.py DATA MODEL [--seconds N].

The base answers prompts (greedily, and some at temperature 0.7), and the heads, which base.py has left beside it, go on
learning to predict what it says two and more tokens ahead (Medusa-1, Cai et al. 2024, section 2.2.1, with
self-distillation, section 2.3.2). Their vocabulary projection is cut to the tokens that the base uses.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from base import DEVICE, pack
from data import clean, entries, read
from medusa import NUM_HEADS, Heads, ahead
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

NUM_TOKENS = 3000
RATE = 2e-3
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


@torch.no_grad()
def examples(model: LlamaForCausalLM, said: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D], and the tokens [N, heads] that follow the next one; -1 where the answer is over."""
    hidden, wanted = [], []
    for tokens, masks in zip(*(torch.from_numpy(a).split(8) for a in pack(said, 1024)), strict=True):
        tokens, masks = tokens.to(DEVICE).long(), masks.to(DEVICE)
        states = model.model(input_ids=tokens).last_hidden_state
        targets = ahead(tokens, masks)
        use = targets[..., 0] >= 0
        hidden.append(states[use])
        wanted.append(targets[use])
    return torch.cat(hidden), torch.cat(wanted)


@torch.no_grad()
def report(heads: Heads, valid: tuple[Tensor, Tensor]) -> list[list[float]]:
    """Share of held-out tokens that the candidate of each [head][rank] is."""
    accuracy = []
    for h in range(NUM_HEADS):
        use = valid[1][:, h] != -1
        top = heads.logits(h, valid[0][use]).topk(NUM_RANKS).indices
        accuracy.append((top == valid[1][use, h, None]).double().mean(0).tolist())
        print(f"head {h}: top-1 {accuracy[h][0]:.3f}, top-{NUM_RANKS} {sum(accuracy[h]):.3f}", flush=True)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=75, help="for training")
    parser.add_argument("--answer-seconds", type=float, default=75)
    parser.add_argument("--answers", type=Path, help="file that keeps the answers, for another try")
    parser.add_argument("--longest", type=int, default=400, help="tokens of a question")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    user, assistant, end = (tokenizer.token_to_id(f"<|{name}|>") for name in ("user", "assistant", "end"))
    questions = {talk[0]["content"]: None for entry in chain(*entries(args.data)) for talk in entry.variants[:2]}
    # and what the base was not asked: its answers to strangers are what it is used for
    unseen = dict.fromkeys(clean(row["prompt"]) for row in read(args.data / "t0_50k.jsonl.gz"))
    questions |= dict.fromkeys(random.Random(3).sample(list(unseen), min(len(unseen), len(questions))))
    encoded = tokenizer.encode_batch(list(questions))
    prompts = [[user, *e.ids, end, assistant] for e in encoded if len(e.ids) < args.longest]
    random.Random(1).shuffle(prompts)
    if args.answers and args.answers.exists():
        said = json.loads(args.answers.read_text())
    else:
        said = answers(generator(args.model), prompts, args.answer_seconds)
        if args.answers:
            args.answers.write_text(json.dumps(said))
    random.Random(2).shuffle(said)
    counts = Counter(token for tokens, masks in said for token, mask in zip(tokens, masks, strict=True) if mask)
    token_map = sorted(token for token, _ in counts.most_common(NUM_TOKENS))
    place = torch.full((tokenizer.get_vocab_size() + 1,), -2)  # of a token in the map; -2 outside
    place[token_map] = torch.arange(len(token_map))
    place[-1] = -1  # no token
    held_out, said = said[: len(said) // 20], said[len(said) // 20 :]
    # float32: hidden states as the engine sees them on a CPU
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE).eval().requires_grad_(False)
    train, valid = examples(model, said), examples(model, held_out)
    train, valid = ((hidden, place.to(DEVICE)[wanted]) for hidden, wanted in (train, valid))
    torch.set_float32_matmul_precision("high")
    trained = torch.load(args.model / "heads.pt", map_location="cpu", weights_only=True)
    trained["projection"] = trained["projection"][token_map]
    heads = Heads(trained["projection"])
    heads.load_state_dict(trained)
    heads = heads.to(DEVICE)
    report(heads, valid)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    start, step, done = time.time(), 0, 0.0
    while done < 1:
        for index in torch.randperm(len(train[0])).to(DEVICE).split(4096 if DEVICE == "cuda" else 1024):
            done = (time.time() - start) / args.seconds
            hidden, wanted = train[0][index], train[1][index]
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = heads.loss(hidden, wanted)
            for group in optimizer.param_groups:
                group["lr"] = (
                    RATE * min(1.0, (step + 1) / 50) * max(0.01, 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                print(step, f"{done:.2f} loss {loss.item():.3f}", flush=True)
            if done >= 1:
                break

    accuracy = report(heads, valid)
    out = args.model / "heads"
    out.mkdir(exist_ok=True)
    state = {"lm_head.weight": heads.projection}
    for h in range(NUM_HEADS):
        state |= {f"blocks.{h}.layers.0.weight": heads.weight[h], f"blocks.{h}.layers.0.bias": heads.bias[h]}
    half = {key: tensor.detach().half().contiguous().cpu() for key, tensor in state.items()}
    half["token_map"] = torch.tensor(token_map)
    save_file(half, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "base_model_name_or_path": "..",
        "hidden_size": model.config.hidden_size,
        "vocab_size": model.config.vocab_size,
        "truncated_vocab_size": len(token_map),
        "num_heads": NUM_HEADS,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": True,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    statistics = {
        "accuracy": [[round(p, 5) for p in ranks] for ranks in accuracy],
        "tokens": len(valid[0]),
        "source": "held-out answers of the built-in model, three of four greedy, the others at temperature 0.7",
    }
    (out / "tree_statistics.json").write_text(json.dumps(statistics, indent=1) + "\n")
    check = AutoTokenizer.from_pretrained(args.model)
    print(check.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True))


if __name__ == "__main__":
    main()
