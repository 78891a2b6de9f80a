"""Writes a model with Medusa heads that share a projection in the form that medusa-llm 0.1 reads.

medusa-llm 0.1 (with transformers 4.36) wants a base checkpoint of its time and, beside it, `medusa_lm_head.pt`
whose every head carries a vocabulary projection of its own. The built-in model's heads share one (vLLM's format,
`lm_head.weight`; without it, the base's), and all is stored in half precision by newer libraries, so this script

- copies that projection into every head (`{h}.1.weight`),
- writes all weights in float32 (what a CPU computes in; the values are unchanged), or with `--link` the heads as they
  are, and links to the base's files (large models, for a GPU),
- spells `config.json` and `tokenizer.json` as the libraries of 2023 did (`rope_theta` as a plain key, merges as
  strings): they cannot read today's spelling.

    python export_heads.py manyheads/builtin/model /tmp/first-version [--heads DIR] [--num-heads 2] [--link]

`--num-heads` is what the exported config declares, and so how many heads the library loads; all heads are always
written. The default is 2, as in the heads published for Vicuna: medusa-llm 0.1's default tree (1 x 7 x 6 candidates)
works with exactly two heads and raises an IndexError with more.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def read_weights(folder: Path, pattern: str, dtype: torch.dtype | None = torch.float32) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder` whose names match `pattern`; None: in their own precision."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise SystemExit(f"no {pattern} in {folder}")
    read = ((key, value) for file in files for key, value in load_file(file).items())
    return {key: value if dtype is None else value.to(dtype) for key, value in read}


def old_config(config: dict[str, Any], context: int | None) -> dict[str, Any]:
    """`config.json` for transformers 4.36: drops what it does not know and refuses what it would get wrong."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config.get("head_dim", hidden // heads) * heads != hidden:
        raise SystemExit("medusa-llm 0.1 needs head_dim = hidden_size / num_attention_heads")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise SystemExit("scaled rotary embeddings are not exported")
    kept = {
        key: config[key]
        for key in (
            "bos_token_id",
            "eos_token_id",
            "hidden_act",
            "hidden_size",
            "intermediate_size",
            "max_position_embeddings",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "rms_norm_eps",
            "tie_word_embeddings",
            "vocab_size",
        )
        if config.get(key) is not None
    }
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if isinstance(kept.get("eos_token_id"), list):
        kept["eos_token_id"] = kept["eos_token_id"][0]
    if context is not None:  # the library's key/value cache has room for all of it
        kept["max_position_embeddings"] = context
    return kept | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": theta,
        "torch_dtype": "float32",
    }


def write_tokenizer(model: Path, base: Path) -> None:
    """`tokenizer.json` with merges as strings, and a `tokenizer_config.json` with the special tokens only."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    bpe = tokenizer["model"]
    if bpe.get("merges") and isinstance(bpe["merges"][0], list):
        bpe["merges"] = [" ".join(pair) for pair in bpe["merges"]]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))

    settings = json.loads((model / "tokenizer_config.json").read_text())
    kept: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(key)
        if token is not None:
            kept[key] = token["content"] if isinstance(token, dict) else token
    (base / "tokenizer_config.json").write_text(json.dumps(kept, indent=2))


def export(model: Path, heads: Path, out: Path, num_heads: int, link: bool = False, context: int | None = None) -> None:
    """Writes `out/base` and `out/heads`; the path to give to `MedusaModel.from_pretrained` is `out/heads`."""
    base_out, heads_out = out / "base", out / "heads"
    base_out.mkdir(parents=True, exist_ok=True)
    heads_out.mkdir(parents=True, exist_ok=True)

    config = json.loads((model / "config.json").read_text())
    (base_out / "config.json").write_text(json.dumps(old_config(config, context), indent=2))
    write_tokenizer(model, base_out)

    projection = None
    if link:
        for file in [*model.glob("*.safetensors"), *model.glob("*.safetensors.index.json")]:
            (base_out / file.name).symlink_to(file.resolve())
    else:
        base = read_weights(model, "*.safetensors")
        projection = base.get("lm_head.weight", base["model.embed_tokens.weight"])
        # NOTE: transformers 4.36 refuses a safetensors file without this metadata.
        save_file(base, base_out / "model.safetensors", metadata={"format": "pt"})

    state = {}
    for key, tensor in read_weights(heads, "*.safetensors", None if link else torch.float32).items():
        key = re.sub(r"^blocks\.(\d+)\.layers\.0\.", r"\1.0.linear.", key)
        state[re.sub(r"^lm_heads\.(\d+)\.", r"\1.1.", key)] = tensor
    if "lm_head.weight" in state:
        own = state.pop("lm_head.weight")
        tokens = state.pop("token_map", torch.arange(len(own))).long()
        # a token outside the map gets the logit 0, far below any candidate's
        projection = torch.zeros(config["vocab_size"], own.shape[1], dtype=own.dtype).index_copy_(0, tokens, own)
    found = 1 + max(int(key.split(".")[0]) for key in state)
    for key in state:
        if not re.fullmatch(r"\d+\.(0\.linear\.(weight|bias)|1\.weight)", key):
            raise SystemExit(f"unexpected key {key}: expected heads of one residual block each")
    for head in range(found):
        if projection is not None:
            state.setdefault(f"{head}.1.weight", projection.clone())
        elif f"{head}.1.weight" not in state:
            raise SystemExit("--link needs heads with a projection of their own")
    torch.save(state, heads_out / "medusa_lm_head.pt")
    if num_heads > found:
        raise SystemExit(f"{num_heads} heads asked for, {found} in {heads}")
    (heads_out / "config.json").write_text(
        json.dumps(
            {
                "medusa_num_heads": num_heads,
                "medusa_num_layers": 1,
                "base_model_name_or_path": str(base_out.resolve()),
            },
            indent=2,
        )
    )
    print(f"{found} heads written, {num_heads} declared; load {heads_out}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--heads", type=Path, help="folder of the heads (default: MODEL/heads)")
    parser.add_argument("--num-heads", type=int, default=2, help="heads that the exported config declares")
    parser.add_argument("--link", action="store_true", help="link the base's weights, in the precision that they have")
    parser.add_argument("--context", type=int, help="tokens of the key/value cache (default: the model's)")
    args = parser.parse_args()
    export(args.model, args.heads or args.model / "heads", args.out, args.num_heads, args.link, args.context)


if __name__ == "__main__":
    main()
