"""medusa-llm 0.1 loaded and run on the CPU, for the server and the worker of this folder.

Everything that differs from the library as published is in this file, each with its reason:

- `initialize_past_key_values` makes room for `num_attention_heads` key/value heads. The library's own attention then
  fails for every model with grouped heads (ours has one key/value head for three query heads: "size of tensor a (3)
  must match the size of tensor b (9)"). Ours makes room for `num_key_value_heads`.
- The library ignores `rope_theta`. It is passed on where it is not the library's 10,000.
- `ignore_eos`: the library stops at the end-of-sequence token; for equal work it is told of none.
- `max_new_tokens`: the library counts steps only; its generator is closed once that many tokens are there. A step's
  tokens are kept whole, so a reply can be a few tokens longer: replies carry their number.
- `tree`: the published default is a full tree of 1 x 7 x 6 candidates from two heads, 50 nodes. A list of paths, for
  example [[0], [1], [0, 0]], is run instead as a sparse tree over any number of heads, as later versions do.

No patch changes what is computed for a step of a given tree, or how.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from medusa.model import medusa_model, modeling_llama_kv
from medusa.model.kv_cache import KVCache
from medusa.model.medusa_model import MedusaModel

DEFAULT_TREE = [1, 7, 6]
Tree = Sequence[Sequence[int]]


@dataclass
class Generation:
    """One reply. `token_ids` are the new tokens only; `steps` the tree steps they took."""

    text: str
    token_ids: list[int]
    steps: int


def grouped_key_values(model: Any) -> tuple[list[list[KVCache]], torch.Tensor, torch.Tensor]:
    """The library's `initialize_past_key_values` with the number of key/value heads that the model has."""
    config = model.config
    data = torch.zeros(
        config.num_hidden_layers * 2,
        1,
        config.num_key_value_heads,
        config.max_position_embeddings,
        config.hidden_size // config.num_attention_heads,
        device=model.device,
        dtype=model.dtype,
    )
    lengths = torch.zeros(config.num_hidden_layers * 2, dtype=torch.long, device="cpu")
    caches = [
        [KVCache(data[2 * layer + j], lengths[2 * layer + j]) for j in range(2)]
        for layer in range(config.num_hidden_layers)
    ]
    return caches, data, lengths


class SparseTree:
    """A tree of given paths in the shape of the library's buffers and candidates.

    A path [a, b] stands for: the a-th best token of head 0, then the b-th best of head 1. Every prefix of a path must
    be a path itself. Node 0 is the root, the token of the model's own projection.
    """

    def __init__(self, paths: Tree) -> None:
        nodes = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        index = {path: i for i, path in enumerate(nodes, start=1)} | {(): 0}
        missing = [path for path in nodes if path[:-1] not in index]
        if missing:
            raise ValueError(f"paths without their parent: {missing}")
        self.depth = max(len(path) for path in nodes)
        self.topk = [1 + max(p[d] for p in nodes if len(p) > d) for d in range(self.depth)]
        offsets = [1, *itertools.accumulate(self.topk, initial=1)][1:]
        # Into [root, head 0's best, head 1's best, ...]: [nodes]
        self.tree_indices = torch.tensor([0, *(offsets[len(p) - 1] + p[-1] for p in nodes)])
        self.position_ids = torch.tensor([0, *(len(p) for p in nodes)])
        self.mask = torch.zeros(len(index), len(index))
        for path, i in index.items():
            for length in range(len(path) + 1):
                self.mask[i, index[path[:length]]] = 1
        leaves = [p for p in nodes if not any(q[: len(p)] == p for q in nodes if len(q) > len(p))]
        rows = [[index[p[:length]] for length in range(len(p) + 1)] for p in leaves]
        width = self.depth + 1
        # [leaves, depth + 1]; short paths are padded with their last node, whose candidate is `pad` below
        self.retrieve = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])
        self.is_padding = torch.tensor([[False] * len(row) + [True] * (width - len(row)) for row in rows])

    def buffers(self, _choices: Any, device: Any = "cpu") -> dict[str, torch.Tensor]:
        """In place of the library's `generate_medusa_buffers`."""
        return {
            "medusa_attn_mask": self.mask[None, None].to(device),
            "tree_indices": self.tree_indices.to(device),
            "medusa_position_ids": self.position_ids.to(device),
            "retrieve_indices": self.retrieve.to(device),
        }

    def candidates(
        self,
        medusa_logits: torch.Tensor,
        logits: torch.Tensor,
        _topk: Any,
        tree_indices: torch.Tensor,
        _temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of the library's `generate_candidates`: ([leaves, depth + 1], [1, nodes])."""
        best = [torch.argmax(logits[:, -1]).unsqueeze(0)]
        for head, k in enumerate(self.topk):
            best.append(torch.topk(medusa_logits[head, 0, -1], k).indices)
        tokens = torch.cat(best)[tree_indices]
        # Padding must match nothing. Token 0, a special token that is never produced, as in the later versions.
        paths = tokens[self.retrieve].masked_fill(self.is_padding, 0)
        return paths, tokens.unsqueeze(0)


def load(path: str, *, ignore_eos: bool = False, tree: Tree | None = None) -> MedusaModel:
    """The exported model, in float32 on the CPU. `tree` None: the library's default."""
    medusa_model.initialize_past_key_values = grouped_key_values
    if tree is not None:
        sparse = SparseTree(tree)
        medusa_model.generate_medusa_buffers = sparse.buffers
        medusa_model.generate_candidates = sparse.candidates
    config = medusa_model.MedusaConfig.from_pretrained(path)
    base = modeling_llama_kv.LlamaConfig.from_pretrained(config.base_model_name_or_path)
    rotary = modeling_llama_kv.LlamaRotaryEmbedding
    if base.rope_theta != 10000.0:
        modeling_llama_kv.LlamaRotaryEmbedding = functools.partial(rotary, base=base.rope_theta)
    model = MedusaModel.from_pretrained(path, torch_dtype=torch.float32).eval()
    modeling_llama_kv.LlamaRotaryEmbedding = rotary
    if ignore_eos:
        kind = type(model.tokenizer)
        # -1 is in no reply, so the library's `eos_token_id in input_ids` is never true.
        model.tokenizer.__class__ = type("NoEnd", (kind,), {"eos_token_id": -1})
    return model


def steps(
    model: MedusaModel,
    prompt_ids: Sequence[int],
    *,
    temperature: float,
    max_steps: int,
    max_new_tokens: int | None = None,
    tree: Tree | None = None,
) -> Iterator[Generation]:
    """Runs the library's generator to its end, or to `max_new_tokens`; the reply so far after every step."""
    stream = model.medusa_generate(
        torch.tensor([list(prompt_ids)]),
        temperature=temperature,
        max_steps=max_steps,
        medusa_choices=DEFAULT_TREE if tree is None else list(tree),
    )
    for step in itertools.count(1):
        with torch.inference_mode():  # by the step, for it belongs to the thread, and FastAPI may take another for each
            piece = next(stream, None)
        if piece is None:
            return
        # The generator yields text only. Its local variable has the tokens; looking at it costs nothing.
        token_ids = stream.gi_frame.f_locals["input_ids"][0, len(prompt_ids) :]
        yield Generation(piece["text"], token_ids.tolist(), step)
        if max_new_tokens is not None and len(token_ids) >= max_new_tokens:
            stream.close()
            return


def generate(model: MedusaModel, prompt_ids: Sequence[int], **how: Any) -> Generation:
    """The whole reply; see `steps`."""
    replies = list(steps(model, prompt_ids, **how))
    return replies[-1] if replies else Generation("", [], 0)
