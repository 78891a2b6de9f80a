"""Train the built-in base model: base.py DATA OUT [--seconds N]. One GPU; OUT holds the tokenizer already."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import conversations, documents
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 1024
ROWS = 64
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=128,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=4,
    pad_token_id=0,
)


def encode_conversations(talks: list[list[dict[str, str]]], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """(tokens, 1 where the assistant speaks) of each conversation."""
    special = {role: tokenizer.token_to_id(f"<|{role}|>") for role in ("system", "user", "assistant", "end")}
    flat = [message for talk in talks for message in talk]
    encoded = iter(tokenizer.encode_batch([message["content"] for message in flat]))
    result = []
    for talk in talks:
        tokens, mask = [], []
        for message in talk:
            ids = next(encoded).ids
            speaks = int(message["role"] == "assistant")
            tokens += [special[message["role"]], *ids, special["end"]]
            mask += [0, *[speaks] * (len(ids) + 1)]
        result.append((tokens, mask))
    return result


def pack(items: list[tuple[list[int], list[int]]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that begin at the beginning of an item; what does not fit starts the next row. [rows, length] each."""
    tokens, masks = [], []
    row: tuple[list[int], list[int]] = ([], [])
    for ids, mask in items:
        if len(row[0]) + min(len(ids), 256) > length:
            pad = length - len(row[0])
            tokens.append(row[0] + [0] * pad)
            masks.append(row[1] + [0] * pad)
            row = ([], [])
        room = length - len(row[0])
        row[0].extend([*ids, 0][:room])
        row[1].extend([*mask, 0][:room])
    return np.array(tokens, dtype=np.int16), np.array(masks, dtype=np.bool_)


def batches(tokens: Tensor, masks: Tensor, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch, shuffled."""
    while True:
        for index in torch.randperm(len(tokens), generator=rng).split(ROWS):
            if len(index) == ROWS:
                yield tokens[index].cuda(non_blocking=True).long(), masks[index].cuda(non_blocking=True)


def loss_of(model: torch.nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    weight = mask[:, 1:].flatten().float()
    return (loss * weight).sum() / weight.sum().clamp(min=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--chat-share", type=float, default=0.45, help="share of the time spent on conversations alone")
    parser.add_argument("--init", type=Path, help="go on from this checkpoint, on conversations alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    rng = random.Random(0)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))

    talks = conversations(args.data, rng)
    rng.shuffle(talks)
    chat = encode_conversations(talks, tokenizer)
    held_out, chat = chat[:600], chat[600:]
    known = {tuple(ids) for ids, _ in chat}
    held_out = [item for item in held_out if tuple(item[0]) not in known]
    text = [(e.ids, [1] * len(e.ids)) for e in tokenizer.encode_batch(documents(args.data))]
    first = [*text, *((ids, [1] * len(ids)) for ids, _ in chat)]
    rng.shuffle(first)
    phases = [tuple(map(torch.from_numpy, pack(items, LENGTH + 1))) for items in (first, chat)]
    valid = [t.cuda() for t in map(torch.from_numpy, pack(held_out, LENGTH + 1))]
    print("tokens:", [int(p[0].numel()) for p in phases], "held out:", len(held_out), flush=True)

    model = LlamaForCausalLM(CONFIG).cuda()
    if args.init:
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32).cuda()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    peak = 2e-3 if not args.init else 6e-4
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    compiled = torch.compile(model)
    generator = torch.Generator().manual_seed(0)
    sources = [batches(*phase, generator) for phase in phases]
    log, start, step = [], 0.0, 0
    while True:
        # the clock starts when everything is compiled
        if step == 5:
            start = time.time()
        done = 0.0 if step < 5 else (time.time() - start) / args.seconds
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 150)
        decay = 1.0 if done < 0.5 else 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * max(decay, 0.01)
        talking = args.init is not None or done > 1 - args.chat_share
        loss = loss_of(compiled, *next(sources[int(talking)]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 250 == 0:
            with torch.no_grad():
                held = torch.stack([loss_of(model, valid[0][i : i + 16], valid[1][i : i + 16])
                                    for i in range(0, len(valid[0]), 16)]).mean()  # fmt: skip
            log.append({"step": step, "done": round(done, 3), "loss": loss.item(), "held_out": held.item()})
            print(log[-1], flush=True)
    model.half().save_pretrained(args.out)
    summary = {"steps": step, "tokens": step * ROWS * LENGTH, "parameters": model.num_parameters(), "log": log}
    (args.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
