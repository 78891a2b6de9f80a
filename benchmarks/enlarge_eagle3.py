"""An EAGLE-3 drafter for a model that enlarge.py made: it guesses what the small one guesses, at a large one's cost.

    python benchmarks/enlarge.py LARGE
    python benchmarks/enlarge_eagle3.py DRAFTER LARGE OUT        # DRAFTER: of the built-in model
    manyheads serve LARGE --heads OUT                            # vLLM takes OUT as it is, too

A drafter's hidden states lie in the large ones as the base's do (enlarge.py's copies), so its layer becomes large as a
layer of the base does, with embedding and feature side by side. What is a drafter's own is `fc`: it reads three hidden
states that have gone through no norm, in which copy j is the small state times amplitude j. It reads Σ share · copy
with Σ share · amplitude = 1, all shares powers of two, and writes copies with their amplitudes. So every weight is the
small one's times a power of two wherever the base's are. The layers that are read keep their numbers: the base's layers
come first in the large model, and those that were added write nothing.

Draft tokens that were added (--draft-vocab-size; 32,000 rows cost what public drafters cost) have the mean of all rows,
whose logit is the mean of all logits: it is never the largest, and takes little from the chances of the others.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import torch
from enlarge import Enlarger, Shape
from torch import Tensor

from manyheads.checkpoint import BUILTIN_FOLDER
from manyheads.config import CheckpointError, ConfigError
from manyheads.models.registry import read_config
from manyheads.speculation.eagle3.checkpoint import LAYER, Eagle3Config, Eagle3Weights, read_drafter
from manyheads.speculation.eagle3.declared import FLAGS
from manyheads.speculation.eagle3.export import FORMATS, write_drafter
from manyheads.speculation.medusa.checkpoint import STATISTICS


def find_shares(amplitudes: tuple[float, ...]) -> tuple[float, ...]:
    """Powers of two by which copies of a state add up to the state."""
    powers = [2.0**-k for k in range(7)]
    for shares in itertools.product(powers, repeat=len(amplitudes)):
        if sum(a * s for a, s in zip(amplitudes, shares, strict=True)) == 1.0:
            return shares
    raise ValueError(f"no powers of two make one state of copies with amplitudes {amplitudes}")


class DrafterEnlarger:
    """Makes a large drafter of a small one.

    Args:
        base: what made the large base.
        small: a drafter of the small base.
        draft_vocab_size: of the large drafter; None leaves it as it is.

    Raises:
        ValueError: the drafter cannot be enlarged exactly, or does not fit.
    """

    def __init__(self, base: Enlarger, small: Eagle3Weights, draft_vocab_size: int | None = None) -> None:
        self.base, self.small = base, small
        config, size = small.config, base.small
        # with any of these the residual stream, or what a pass hands on, is a normed state: other copies, other factors
        if found := [name for name in FLAGS if getattr(config, name)]:
            raise ValueError(f"a drafter with {found[0]} cannot be enlarged")
        own = (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        if own != (size.hidden_size, size.num_heads, size.num_kv_heads, size.head_dim):
            raise ValueError(f"the drafter has another hidden size or other heads than its base: {own}")
        if config.intermediate_size > base.shape.intermediate_size:
            raise ValueError(f"intermediate_size must be at least {config.intermediate_size}")
        self.draft_vocab_size = draft_vocab_size or config.draft_vocab_size
        if not config.draft_vocab_size <= self.draft_vocab_size <= base.shape.vocab_size:
            most = f"{config.draft_vocab_size} and {base.shape.vocab_size}"
            raise ValueError(f"draft_vocab_size must be between {most}, not {self.draft_vocab_size}")
        self.shares = find_shares(base.copies.amplitudes)

    def weights(self) -> Eagle3Weights:
        """The large drafter, on the CPU."""
        tokens = self._tokens()
        tensors = {name: tensor.cpu() for name, tensor in self._tensors(tokens).items()}
        if len(tokens) < self.base.shape.vocab_size:
            tensors["d2t"] = tokens - torch.arange(len(tokens))
        return replace(self.small, config=self.config(), tensors=tensors)

    def config(self) -> Eagle3Config:
        """The large drafter's shape."""
        shape, small = self.base.shape, self.small.config
        return replace(
            small,
            hidden_size=shape.hidden_size,
            target_hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            vocab_size=shape.vocab_size,
            draft_vocab_size=self.draft_vocab_size,
            rms_norm_eps=small.rms_norm_eps * self.base.copies.ratio_squared,
            max_position_embeddings=shape.max_position_embeddings,
            layer_ids=small.feature_layers(self.base.small.num_layers),
        )

    def _tokens(self) -> Tensor:
        """[large draft V] int64, the base's token of each draft token: first those that the small drafter has."""
        small = self.small.token_map
        if small is None:
            small = torch.arange(self.small.config.draft_vocab_size)
        unused = torch.ones(self.base.shape.vocab_size, dtype=torch.bool).index_fill_(0, small, False).nonzero()[:, 0]
        if self.draft_vocab_size == self.base.shape.vocab_size:  # a whole vocabulary has its own order
            return torch.arange(self.base.shape.vocab_size)
        return torch.cat((small, unused[: self.draft_vocab_size - len(small)]))

    def _tensors(self, tokens: Tensor) -> dict[str, Tensor]:
        base, shape, small = self.base, self.base.shape, self.small.tensors
        dim, hidden = base.small.head_dim, self.small.config.hidden_size

        def layer(name: str) -> Tensor:
            return small[f"{LAYER}{name}.weight"]

        def pair(weight: Tensor, rows: int, at: Tensor | None = None) -> Tensor:
            """A projection that reads embedding and feature: [n, 2d] → [rows, 2D]."""
            return torch.cat([base.reading(half, rows, at) for half in torch.split(weight, hidden, dim=1)], dim=1)

        def by_kv_head(weight: Tensor) -> Tensor:
            heads = weight.reshape(-1, dim, weight.shape[1])
            return heads.repeat_interleave(base.repeats, dim=0).flatten(0, 1)

        q, kv = shape.num_heads * dim, shape.num_kv_heads * dim
        large = {
            "self_attn.q_proj": pair(layer("self_attn.q_proj"), q, base.query_rows),
            "self_attn.k_proj": pair(by_kv_head(layer("self_attn.k_proj")), kv),
            "self_attn.v_proj": pair(by_kv_head(layer("self_attn.v_proj")), kv),
            "self_attn.o_proj": base.writing(layer("self_attn.o_proj"), q, base.query_rows),
            "mlp.gate_proj": base.reading(layer("mlp.gate_proj"), shape.intermediate_size),
            "mlp.up_proj": base.reading(layer("mlp.up_proj"), shape.intermediate_size),
            "mlp.down_proj": base.writing(layer("mlp.down_proj"), shape.intermediate_size),
        }
        large |= {n: base.norm(layer(n)) for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
        if self.small.config.qk_norm:
            names = ("self_attn.q_norm", "self_attn.k_norm")
            large |= {name: layer(name).to(base.device, base.dtype) for name in names}
        found = {f"{LAYER}{name}.weight": tensor for name, tensor in large.items()}
        found |= {"fc.weight": self._fc(small["fc.weight"]), "norm.weight": base.norm(small["norm.weight"])}
        found["lm_head.weight"] = base.reading(self._lm_head(tokens), len(tokens))
        if self.small.embedding is not None:
            own = self.small.embedding
            rows = torch.cat((own, own[:1].expand(shape.vocab_size - len(own), -1)))
            found["embed_tokens.weight"] = base.writing(rows.T, len(rows)).T.contiguous()
        return found

    def _lm_head(self, tokens: Tensor) -> Tensor:
        """[large draft V, d]: the small rows where their tokens are, and the mean of all elsewhere."""
        small = self.small.tensors["lm_head.weight"]
        mean = small.float().mean(dim=0).to(small.dtype)
        token_map = self.small.token_map
        of_token = mean.repeat(self.base.shape.vocab_size, 1)
        of_token[torch.arange(len(small)) if token_map is None else token_map] = small
        return of_token[tokens]

    def _fc(self, weight: Tensor) -> Tensor:
        """From three states with their copies to a feature with its copies: [d, 3d] → [D, 3D]."""
        d, large = weight.shape[0], self.base.shape.hidden_size
        states = [torch.zeros(d, large, dtype=weight.dtype) for _ in range(3)]
        for part, state in zip(torch.split(weight, d, dim=1), states, strict=True):
            for j, share in enumerate(self.shares):
                state[:, j * d : (j + 1) * d] = part * share
        return self.base.writing(torch.cat(states, dim=1), 3 * large)


def shape_of(folder: Path) -> tuple[Shape, torch.dtype]:
    """What enlarge.py was asked for when it wrote a folder."""
    model = read_config(folder)
    return Shape(**{name: getattr(model, name) for name in vars(Shape())}), model.dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("drafter", type=Path, help="an EAGLE-3 drafter of the small model")
    parser.add_argument("large", type=Path, help="what enlarge.py wrote")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--source", type=Path, default=BUILTIN_FOLDER, help="the small model")
    parser.add_argument("--draft-vocab-size", type=int, help="default: the drafter's own")
    parser.add_argument("--format", choices=FORMATS, default="specforge")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        if args.out.is_dir() and any(args.out.iterdir()):
            raise FileExistsError(f"{args.out} is not empty")
        shape, dtype = shape_of(args.large)
        base = Enlarger(args.source, shape, dtype, torch.device(args.device), args.seed)
        enlarger = DrafterEnlarger(base, read_drafter(args.drafter, base.small), args.draft_vocab_size)
        write_drafter(
            enlarger.weights(),
            args.out,
            args.format,
            base=str(args.large.resolve()),
            statistics=args.drafter / STATISTICS,
        )
    except (ValueError, FileExistsError, ConfigError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
