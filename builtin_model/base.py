"""Train the built-in base model: base.py DATA OUT. OUT holds the tokenizer already. Seven minutes on an H200.

The heads learn beside it from the first step on (their loss is the recipe of Medusa-2, Cai et al. 2024, section 2.2.2),
so that the base's hidden states hold what is to come; `manyheads train` then fits them to what the finished base says.
They have one vocabulary projection for all, of their own: with the base's ("V2") they would be hardly better than
guesses, for what a block adds is almost nowhere negative (SiLU), so it cannot take back the next token that the hidden
state stands for.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import conversations, documents, entries
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.speculation.medusa.export import write_heads
from manyheads.train.dataset import ahead
from manyheads.train.medusa import TrainedHeads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH = 1024
ROWS = 32 if DEVICE == "cuda" else 8
NUM_HEADS = 4
DISCOUNT = 0.8
"""Each head's loss counts so much of the one before (Cai et al. 2024, section 2.2.1)."""
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
    vocabulary = tokenizer.get_vocab()
    special = {role: vocabulary[f"<|{role}|>"] for role in ("system", "user", "assistant", "end")}
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


def rows_of(items: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Packed rows on the device: tokens int64 and masks bool, [rows, LENGTH + 1] each."""
    tokens, masks = pack(items, LENGTH + 1)
    return torch.from_numpy(tokens).to(DEVICE).long(), torch.from_numpy(masks).to(DEVICE)


def add_dropout(model: LlamaForCausalLM, p: float) -> None:
    """Dropout on the embedding and on what each block adds; Llama has none of its own."""
    layers = [module for layer in model.model.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in (model.model.embed_tokens, *layers):
        module.register_forward_hook(lambda module, args, out: F.dropout(out, p, module.training))


class Joint(torch.nn.Module):
    """The base and its heads, from tokens to losses."""

    def __init__(self, base: LlamaForCausalLM) -> None:
        super().__init__()
        self.base = base
        self.heads = TrainedHeads(NUM_HEADS, 1, torch.randn_like(base.lm_head.weight) * 0.02, "shared")

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of base and heads on the tokens that `mask` marks; both [B, LENGTH + 1]."""
        with torch.autocast(DEVICE, torch.bfloat16):
            hidden = self.base.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
            loss = F.cross_entropy(self.base.lm_head(hidden).float(), tokens[:, 1:].flatten(), reduction="none")
            weight = mask[:, 1:].flatten().float()
            wanted = ahead(tokens, mask, NUM_HEADS)[:, :-1].flatten(0, 1)  # [N, 1 + heads], the next token first
            losses = [self._head_loss(h, hidden, wanted[:, h + 1]) for h in range(NUM_HEADS)]
            heads = sum(DISCOUNT**h * value for h, value in enumerate(losses))
            assert isinstance(heads, Tensor)
        return (loss * weight).sum() / weight.sum().clamp(min=1), heads

    def _head_loss(self, h: int, hidden: Tensor, wanted: Tensor) -> Tensor:
        counted = (wanted >= 0).float()
        loss = F.cross_entropy(self.heads.logits(h, hidden).float(), wanted.clamp(min=0), reduction="none")
        return (loss * counted).sum() / counted.sum().clamp(min=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text-epochs", type=int, default=10, help="passages and conversations, every token counts")
    parser.add_argument("--chat-epochs", type=int, default=8, help="conversations alone, the answers count")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--heads-weight", type=float, default=0.3, help="of the heads' loss")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    start = time.time()
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    everyday, others = entries(args.data)
    # whole entries are held out, so that no variant of them is seen
    held_out, others = others[: len(others) // 40], others[len(others) // 40 :]
    items = everyday + others
    valid = rows_of(encode_conversations(conversations(held_out, random.Random(0)), tokenizer))
    passages = documents(args.data) if args.text_epochs else []
    text = [(e.ids, [1] * len(e.ids)) for e in tokenizer.encode_batch(passages)]

    def epoch(number: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(number)
        chat = encode_conversations(conversations(items, rng), tokenizer)
        if number < args.text_epochs:
            chat = [*text, *((ids, [1] * len(ids)) for ids, _ in chat)]
            rng.shuffle(chat)
        return rows_of(chat)

    epochs = [epoch(number) for number in range(args.text_epochs + args.chat_epochs)]
    total = sum(len(tokens) // ROWS for tokens, _ in epochs)
    print(f"tokens: {[t.numel() for t, _ in epochs]}, steps: {total}, {time.time() - start:.0f} s", flush=True)

    base = LlamaForCausalLM(CONFIG)
    add_dropout(base, args.dropout)
    model = Joint(base).to(DEVICE)
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n and "projection" not in n]
    rest = [p for n, p in named.items() if p.ndim != 2 or "embed" in n or "projection" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    compiled = torch.compile(model) if DEVICE == "cuda" else model
    log, step = [], 0
    for number, (tokens, masks) in enumerate(epochs):
        model.train()
        losses = []
        for index in torch.randperm(len(tokens))[: len(tokens) // ROWS * ROWS].to(DEVICE).split(ROWS):  # type: ignore[no-untyped-call]
            scale = min((step + 1) / min(150, total / 10), max(0.01, 0.5 * (1 + math.cos(math.pi * step / total))))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.rate * scale
            loss, heads_loss = compiled(tokens[index], masks[index])
            (loss + args.heads_weight * heads_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(torch.stack((loss, heads_loss)).detach())
            step += 1
        model.eval()
        with torch.no_grad():
            parts = [torch.stack(model(*(t[i : i + 16] for t in valid))) for i in range(0, len(valid[0]), 16)]
        train, held = (torch.stack(values).mean(0).tolist() for values in (losses, parts))
        names = ("loss", "heads_loss", "held_out", "held_out_heads")
        log.append({"epoch": number, "step": step} | dict(zip(names, (round(v, 4) for v in train + held), strict=True)))
        print(log[-1], f"{time.time() - start:.0f} s", flush=True)
    begun = model.heads.weights(torch.float32)
    write_heads(begun, args.out / "heads-begun", base=str(args.out.resolve()), vocab_size=CONFIG.vocab_size)
    base.half().save_pretrained(args.out)  # type: ignore[no-untyped-call]
    summary = {
        "settings": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        "parameters": base.num_parameters(),
        "tokens": sum(t.numel() for t, _ in epochs),
        "log": log,
    }
    (args.out / "training.json").write_text(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
