"""Heads made, trained a little and saved by medusa-llm 0.1 itself: save_heads.py BASE OUT --prompts FILE.

The model class, its forward and what is saved are the library's (`MedusaModel`, `MedusaConfig.save_pretrained`,
`torch.save(model.medusa_head.state_dict(), "medusa_lm_head.pt")`, as its train.py ends). The loss is that of train.py's
`CustomizedTrainer.compute_loss`; the trainer around it needs fschat and a GPU, so a plain loop stands in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from medusa.model import medusa_model
from medusa.model.medusa_model import MedusaConfig, MedusaModel
from medusa.model.modeling_llama_kv import LlamaForCausalLM


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base", help="a base model in the spelling of its time (export_heads.py writes one)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of lists of token ids to learn from")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(args.base, torch_dtype=torch.float32)
    for parameter in base.parameters():
        parameter.requires_grad = False
    model = MedusaModel(base, args.heads, args.layers, args.base)
    rows = [torch.tensor([ids]) for ids in json.loads(args.prompts.read_text())]
    optimizer = torch.optim.AdamW(model.medusa_head.parameters(), lr=1e-3)
    for step in range(args.steps):
        ids = rows[step % len(rows)]
        logits = model(ids)  # [heads, 1, tokens, V]
        loss = sum(
            torch.nn.functional.cross_entropy(logits[h, 0, : -(2 + h)], ids[0, 2 + h :]) for h in range(args.heads)
        )
        assert isinstance(loss, torch.Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step} loss {float(loss):.3f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    config = MedusaConfig(medusa_num_heads=args.heads, medusa_num_layers=args.layers, base_model_name_or_path=args.base)
    config.save_pretrained(args.out)
    torch.save(model.medusa_head.state_dict(), args.out / "medusa_lm_head.pt")
    print(f"saved by {medusa_model.__name__}: {args.heads} heads of {args.layers} blocks")


if __name__ == "__main__":
    main()
