"""The built-in model as a large one: it writes the same text, and costs what a model of that shape costs.

    python benchmarks/enlarge.py OUT                    # Vicuna-7B's shape in float16, 13.5 GB, and 1.2 GB of heads
    python benchmarks/enlarge.py OUT --num-kv-heads 8   # any other Llama shape

What a speculating engine gains depends on the text and on how often the heads are right, so random weights of the right
shape measure nothing. Here a small trained model sits inside a large one. Numbers that take no part in the result are
random rather than zero wherever that cannot change it: kernels do real arithmetic, caches hold real values. Zero are
only the rows and columns of `o_proj` and `down_proj` that would write something else to the hidden state.

**Hidden channels.** A hidden state x of d channels becomes D channels: copies of x, each times an *amplitude*, then
zeros. RMSNorm divides by the root of the mean square over all D channels; relative to the small model that is the
*ratio* r = √(Σ amplitude² · d / D). Each copy's norm weights are the small model's times a *gain*, with
Σ amplitude · gain = r, and whatever reads the hidden state reads the sum of the copies, which is what the small model
reads. Plain zero padding would need gain = √(d / D), which no half-precision weight can be multiplied by without
rounding; with several copies there often are amplitudes and gains that are all powers of two (384 → 4096: amplitudes
1, 1, 2, gains 1/2, 1/8, 1/16), so every weight is the small model's own, exactly. Where there are none, the norm
weights are rounded.

**Tokens that were added** are never produced: in the vocabulary projection they have the row of the padding token,
which is no target in training (its logit stayed 15 below the largest over 64 Spec-Bench replies). In the heads they
have the mean of all rows: its logit is the mean of all logits, which is never the largest (it stayed 6 below the
tenth).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from manyheads.checkpoint import BUILTIN_FOLDER, read_json, read_tensors, tensor_files
from manyheads.models.registry import read_config
from manyheads.speculation.medusa.checkpoint import STATISTICS, HeadWeights, read_heads, split_model

NOISE = 0.02
"""Standard deviation of the numbers that take no part; that of initial Llama weights."""
MOST_COPIES = 4
SHARD_BYTES = 2 * 2**30
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the large model looks like; its head_dim is the small one's."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    vocab_size: int = 32000
    max_position_embeddings: int = 16384


@dataclass(frozen=True)
class Copies:
    """How the small hidden state lies in the large one: copy j in channels j·d to (j + 1)·d, zeros after the last."""

    amplitudes: tuple[float, ...]
    gains: tuple[float, ...]
    """Factor of the norm weights, for each copy."""
    ratio_squared: float
    """Mean square of the large hidden state over that of the small one; eps is scaled by it."""
    exact: bool
    """Every factor is a power of two."""


def find_copies(small: int, large: int) -> Copies:
    """The fewest copies whose amplitudes and gains are powers of two; else one, with a gain that must be rounded."""
    if small > large:
        raise ValueError(f"a hidden size of {small} does not fit into {large}")
    gains = [2.0**-k for k in range(7)]
    for count in range(1, min(MOST_COPIES, large // small) + 1):
        for amplitudes in itertools.combinations_with_replacement((1.0, 2.0, 4.0), count):
            squared = Fraction(int(sum(a * a for a in amplitudes)) * small, large)
            ratio = Fraction(math.isqrt(squared.numerator), math.isqrt(squared.denominator))
            if ratio * ratio != squared:
                continue
            for chosen in itertools.product(gains, repeat=count):
                if sum(a * g for a, g in zip(amplitudes, chosen, strict=True)) == ratio:
                    return Copies(amplitudes, chosen, float(squared), True)
    return Copies((1.0,), (math.sqrt(small / large),), small / large, False)


class Enlarger:
    """Makes large tensors of small ones.

    Args:
        source: folder of a Llama without biases, and of its heads.
        dtype: of all results; float16 and float32 hold the built-in model's weights exactly.
        device: where results are made; on a GPU the random numbers take seconds.
        seed: of the random numbers, which differ between kinds of devices.

    Raises:
        ValueError: the source does not fit into the shape.
    """

    def __init__(self, source: Path, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.source, self.shape, self.dtype, self.device = source, shape, dtype, device
        self.small = small = read_config(source)
        self.copies = find_copies(small.hidden_size, shape.hidden_size)
        self.noise = torch.Generator(device).manual_seed(seed)
        if small.architecture != "LlamaForCausalLM" or small.qkv_bias or small.o_bias or small.mlp_bias:
            raise ValueError(f"{source} is no Llama without biases")
        if shape.hidden_size % shape.num_heads or shape.num_heads % shape.num_kv_heads:
            raise ValueError("num_heads must divide the hidden size, and be a multiple of num_kv_heads")
        # queries that share K and V must share them in the large model too: spread over `repeats` copies of K and V
        group, small_group = shape.num_heads // shape.num_kv_heads, small.num_heads // small.num_kv_heads
        self.repeats = math.ceil(small_group / group)
        for name, needed, there in (
            ("intermediate_size", small.intermediate_size, shape.intermediate_size),
            ("num_layers", small.num_layers, shape.num_layers),
            ("num_kv_heads", small.num_kv_heads * self.repeats, shape.num_kv_heads),
            ("vocab_size", small.vocab_size, shape.vocab_size),
        ):
            if needed > there:
                raise ValueError(f"{name} must be at least {needed}, not {there}")
        heads = torch.arange(small.num_heads)
        slots = heads // small_group * (self.repeats * group) + heads % small_group
        self.query_rows = (slots[:, None] * small.head_dim + torch.arange(small.head_dim)).flatten()  # [heads · dim]
        """Row in the large q_proj (column in o_proj) of each row in the small one."""

    def config(self) -> dict[str, Any]:
        """config.json of the large base model."""
        shape = self.shape
        return read_json(self.source / "config.json") | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "head_dim": self.small.head_dim,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "max_position_embeddings": shape.max_position_embeddings,
            "num_attention_heads": shape.num_heads,
            "num_hidden_layers": shape.num_layers,
            "num_key_value_heads": shape.num_kv_heads,
            "rms_norm_eps": self.small.rms_norm_eps * self.copies.ratio_squared,
            "tie_word_embeddings": False,
            "vocab_size": shape.vocab_size,
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every (key, tensor) of the large base model, one at a time."""
        shape, dim = self.shape, self.small.head_dim
        state = self._small_state()
        embedding = state["embed_tokens.weight"]
        lm_head = state.get("lm_head.weight", embedding)
        pad = int(read_json(self.source / "config.json").get("pad_token_id") or 0)
        tokens = torch.arange(shape.vocab_size)
        tokens[tokens >= len(embedding)] = pad
        yield "model.embed_tokens.weight", self.writing(embedding[tokens].T, len(tokens)).T.contiguous()
        yield "lm_head.weight", self.reading(lm_head[tokens], len(tokens))
        nothing = embedding.new_empty(0, self.small.hidden_size)
        for i in range(shape.num_layers):
            at = f"layers.{i}."
            # a layer that was added finds no weights: it computes on random ones, and writes nothing
            layer = {key.removeprefix(at): tensor for key, tensor in state.items() if key.startswith(at)}
            query_rows = self.query_rows if layer else None
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.{at}{name}.weight", self.norm(layer.get(f"{name}.weight"))
            weight = layer.get("self_attn.q_proj.weight", nothing)
            yield f"model.{at}self_attn.q_proj.weight", self.reading(weight, shape.num_heads * dim, query_rows)
            for name in ("k_proj", "v_proj"):
                weight = layer.get(f"self_attn.{name}.weight", nothing)
                by_head = weight.reshape(-1, dim, self.small.hidden_size)
                weight = by_head.repeat_interleave(self.repeats, dim=0).flatten(0, 1)
                yield f"model.{at}self_attn.{name}.weight", self.reading(weight, shape.num_kv_heads * dim)
            weight = layer.get("self_attn.o_proj.weight", nothing.T)
            yield f"model.{at}self_attn.o_proj.weight", self.writing(weight, shape.num_heads * dim, query_rows)
            for name in ("gate_proj", "up_proj"):
                weight = layer.get(f"mlp.{name}.weight", nothing)
                yield f"model.{at}mlp.{name}.weight", self.reading(weight, shape.intermediate_size)
            weight = layer.get("mlp.down_proj.weight", nothing.T)
            yield f"model.{at}mlp.down_proj.weight", self.writing(weight, shape.intermediate_size)
        yield "model.norm.weight", self.norm(state["norm.weight"])

    def heads(self) -> Iterator[tuple[str, Tensor]]:
        """Every (key, tensor) of the large heads in vLLM's format: a projection over all tokens for every head.

        The block of a head computes SiLU(W x + b) from the sum of the copies and adds it to the first copy; so the
        projection, which reads the sum too, sees x + SiLU(W x + b).
        """
        small = self._small_heads()
        hidden = self.shape.hidden_size
        for h, blocks in enumerate(small.blocks):
            for layer, (weight, bias) in enumerate(blocks):
                block = self.reading(weight, hidden)
                block[len(weight) :] = 0
                padded = torch.zeros(hidden, dtype=self.dtype, device=self.device)
                padded[: len(bias)] = bias
                yield f"blocks.{h}.layers.{layer}.weight", block
                yield f"blocks.{h}.layers.{layer}.bias", padded
        projections = small.projections or [self._small_lm_head()] * len(small.blocks)
        for h, projection in enumerate(projections):
            mean = projection.float().mean(dim=0).to(projection.dtype)
            tokens = torch.arange(len(projection)) if small.token_map is None else small.token_map
            whole = mean.repeat(self.shape.vocab_size, 1)
            whole[tokens] = projection
            yield f"lm_heads.{h}.weight", self.reading(whole, len(whole))

    def heads_config(self, base: str) -> dict[str, Any]:
        """config.json of the large heads; `base` is the base model's folder as seen from theirs."""
        blocks = self._small_heads().blocks
        return {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "base_model_name_or_path": base,
            "hidden_size": self.shape.hidden_size,
            "vocab_size": self.shape.vocab_size,
            "truncated_vocab_size": self.shape.vocab_size,
            "num_heads": len(blocks),
            "num_hidden_layers": len(blocks[0]),
            "medusa_fc_bias": True,
            "original_lm_head": False,
        }

    @property
    def heads_folder(self) -> Path:
        """The small heads."""
        folder = split_model(str(self.source), None)[1]
        if folder is None:
            raise ValueError(f"{self.source} has no Medusa heads")
        return folder

    def _small_state(self) -> dict[str, Tensor]:
        return {key.removeprefix("model."): t for path in tensor_files(self.source) for key, t in read_tensors(path)}

    def _small_lm_head(self) -> Tensor:
        state = self._small_state()
        return state.get("lm_head.weight", state["embed_tokens.weight"])

    def _small_heads(self) -> HeadWeights:
        return read_heads(self.heads_folder, self.small)

    def _random(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device).normal_(0, NOISE, generator=self.noise)

    def reading(self, weight: Tensor, rows: int, at: Tensor | None = None) -> Tensor:
        """A projection from the hidden state: [n, d] → [rows, D]; row i of `weight` goes to row at[i], or i."""
        n, d = weight.shape
        weight = weight.to(self.device, self.dtype)
        large = self._random(rows, self.shape.hidden_size)
        chosen = torch.arange(n, device=self.device) if at is None else at.to(self.device)
        for j in range(len(self.copies.amplitudes)):
            large[chosen, j * d : (j + 1) * d] = weight
        return large

    def writing(self, weight: Tensor, columns: int, at: Tensor | None = None) -> Tensor:
        """A projection to the hidden state: [d, n] → [D, columns]; column i of `weight` goes to column at[i], or i."""
        d, n = weight.shape
        weight = weight.to(self.device, self.dtype)
        large = torch.zeros(self.shape.hidden_size, columns, dtype=self.dtype, device=self.device)
        chosen = torch.arange(n, device=self.device) if at is None else at.to(self.device)
        for j, amplitude in enumerate(self.copies.amplitudes):
            large[j * d : (j + 1) * d, chosen] = weight * amplitude
        return large

    def norm(self, weight: Tensor | None) -> Tensor:
        """[d] → [D]; None: of a layer that was added."""
        large = torch.ones(self.shape.hidden_size, dtype=self.dtype, device=self.device)
        if weight is not None:
            d = len(weight)
            for j, gain in enumerate(self.copies.gains):
                large[j * d : (j + 1) * d] = (weight.double() * gain).to(self.dtype)
        return large


def enlarged_tensors(
    source: Path, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor) of the large base model, on the device, for use without a file."""
    return Enlarger(source, shape, dtype, device, seed).tensors()


def enlarged_heads(
    source: Path, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor) of the large heads, on the device, for use without a file."""
    return Enlarger(source, shape, dtype, device, seed).heads()


def write(out: Path, enlarger: Enlarger, heads_out: Path | None = None, weights: bool = True) -> None:
    """Write the large model to `out`, its heads to `out/heads` or to `heads_out`; False: no base weights, all else.

    Raises:
        FileExistsError: a folder is not empty; shards of another shape would mix with these.
    """
    heads_out = heads_out or out / "heads"
    for folder in (out, heads_out):
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty")
    for folder in (out, heads_out):
        folder.mkdir(parents=True, exist_ok=True)
    source = enlarger.source
    _write_json(out / "config.json", enlarger.config())
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    # vLLM takes the smaller of the model's and the tokenizer's lengths
    length = {"model_max_length": enlarger.shape.max_position_embeddings}
    _write_json(out / "tokenizer_config.json", read_json(source / "tokenizer_config.json") | length)
    _write_json(heads_out / "config.json", enlarger.heads_config(os.path.relpath(out, heads_out)))
    if (enlarger.heads_folder / STATISTICS).is_file():
        shutil.copyfile(enlarger.heads_folder / STATISTICS, heads_out / STATISTICS)
    save_file({key: t.cpu() for key, t in enlarger.heads()}, heads_out / "model.safetensors", {"format": "pt"})
    if weights:
        _write_shards(out, enlarger.tensors())


def _write_shards(out: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Files of SHARD_BYTES at most (unless a tensor is larger) and their index; one is in memory at a time."""
    shards: list[list[str]] = []
    total = size = 0
    shard: dict[str, Tensor] = {}
    start = time.perf_counter()

    def flush() -> None:
        nonlocal size
        save_file(shard, out / f"shard-{len(shards)}", {"format": "pt"})
        shards.append(list(shard))
        shard.clear()
        size = 0
        print(f"{total / 1e9:6.2f} GB after {time.perf_counter() - start:.0f} s", flush=True)

    for key, tensor in tensors:
        if size and size + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[key] = tensor.cpu()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"shard-{i}").rename(out / name)
        weight_map |= dict.fromkeys(keys, name)
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--source", type=Path, default=BUILTIN_FOLDER, help="the small model, its heads in heads/")
    parser.add_argument("--heads-out", type=Path, help="a new folder for the heads (default: OUT/heads)")
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = Shape(**{name: getattr(args, name) for name in vars(Shape())})
    try:
        enlarger = Enlarger(args.source, shape, getattr(torch, args.dtype), torch.device(args.device), args.seed)
        copies = enlarger.copies
        print(f"amplitudes {copies.amplitudes}, gains {copies.gains}, {'exact' if copies.exact else 'norms rounded'}")
        write(args.out, enlarger, args.heads_out)
    except (ValueError, FileExistsError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
