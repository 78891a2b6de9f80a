"""EAGLE-3 drafters on disk, read in every layout that is in use (export.py writes them; declared.py reads config.json).

All layouts have the same tensors, named as SafeAILab does here; speculators and vLLM say `layers.0` for `midlayer`:

| key | shape, for hidden size d, the base's D, vocabulary V, draft vocabulary v |
|---|---|
| `fc.weight` | [d, 3·D]: three hidden states of the base, side by side, become one feature |
| `midlayer.self_attn.{q,k,v}_proj.weight` | [heads · head_dim, 2·d]: embedding and feature side by side |
| `midlayer.self_attn.o_proj.weight` | [d, heads · head_dim] |
| `midlayer.self_attn.{q,k}_norm.weight` | [head_dim], only with `qk_norm` |
| `midlayer.mlp.{gate,up,down}_proj.weight` | [inner, d], [inner, d], [d, inner] |
| `midlayer.{input_layernorm,hidden_norm,post_attention_layernorm}.weight`, `norm.weight` | [d] |
| `lm_head.weight` | [v, d] |
| `input_norm.weight` | [3·D], only with `norm_before_fc` |
| `fc_norm.{0,1,2}.weight` | [D], only with `fc_norm` |
| `embed_tokens.weight` | [V, d], or absent: then it is the base's |
| `d2t`, `t2d` | [v] int64, [V] bool; absent where v = V |

Draft token i stands for the base's token i + d2t[i], and t2d says which tokens those are: it is checked and dropped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.checkpoint import read_tensors, tensor_files, tensor_keys
from manyheads.config import CheckpointError
from manyheads.models.config import ModelConfig
from manyheads.models.loader import IGNORED_ENDINGS
from manyheads.models.parallel import Share, shared_rows
from manyheads.models.rope import LinearScaling, Llama3Scaling, YarnScaling
from manyheads.speculation.eagle3.declared import LAYER_IDS, read_declared
from manyheads.speculation.medusa.checkpoint import read_accuracy

LAYER, SPECULATORS_LAYER = "midlayer.", "layers.0."
"""What the keys of the drafter's layer begin with: in the weights here, and in speculators' files."""
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Eagle3Config:
    """Shape of an EAGLE-3 drafter: one layer of a Llama between the base's hidden states and a draft vocabulary."""

    hidden_size: int
    target_hidden_size: int
    """The base's."""
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """The base's."""
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: LinearScaling | Llama3Scaling | YarnScaling | None
    max_position_embeddings: int
    """What config.json says. It limits nothing here: a drafter goes as far as its base does."""
    layer_ids: tuple[int, int, int] | None = None
    """The base's layers whose inputs are read, ascending; n, where the base has n, is the last one's output before the
    final norm. None: see `feature_layers`."""
    norm_before_residual: bool = False
    """Whether the residual stream of the layer begins after `hidden_norm`, not before it. False is EAGLE-3 as published
    (SafeAILab's cnets.py); speculators (`Eagle3FirstLayerMixin`) has both, and vLLM reads both."""
    norm_before_fc: bool = False
    """Whether the three hidden states, side by side, go through one norm before `fc` (`input_norm` in speculators)."""
    fc_norm: bool = False
    """EAGLE-3.1: whether each of them goes through a norm of its own before `fc` (vLLM: `combine_hidden_states`)."""
    norm_output: bool = False
    """EAGLE-3.1: whether the feature of the next pass is what `norm` gives, which `lm_head` reads in any case, and not
    what the layer gives before it (vLLM: `LlamaModel.forward`; absent means false there and in speculators)."""
    qk_norm: bool = False
    """Whether queries and keys are normed: a layer of a Qwen3 (speculators, vLLM: qwen3_eagle3.py)."""
    num_ranks: int = 1
    """That share the drafter, as `ModelConfig.num_ranks`."""

    def shared(self, num_ranks: int) -> Eagle3Config:
        """That of one of so many ranks. Raises ConfigError: the drafter cannot be shared so."""
        share = Share.of(num_ranks, self.num_heads, self.num_kv_heads, self.intermediate_size, "the drafter")
        return replace(self, num_ranks=num_ranks, **asdict(share))

    def feature_layers(self, num_layers: int) -> tuple[int, int, int]:
        """The layers whose inputs are read, of a base of that many: those of SafeAILab and vLLM unless named."""
        return self.layer_ids or (2, num_layers // 2, num_layers - 3)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor that a drafter must have, by its name; what ranks share is a rank's part."""
        hidden, states, inner = self.hidden_size, 3 * self.target_hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer: dict[str, Shape] = {
            "self_attn.q_proj": (q, 2 * hidden),
            "self_attn.k_proj": (kv, 2 * hidden),
            "self_attn.v_proj": (kv, 2 * hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            **dict.fromkeys(("input_layernorm", "hidden_norm", "post_attention_layernorm"), (hidden,)),
        }
        if self.qk_norm:
            layer |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (self.head_dim,))
        features, tokens = (shared_rows(size, self.num_ranks) for size in (hidden, self.draft_vocab_size))
        modules = {"fc": (features, states), "norm": (hidden,), "lm_head": (tokens, hidden)}
        modules |= {LAYER + name: shape for name, shape in layer.items()}
        if self.norm_before_fc:
            modules["input_norm"] = (states,)
        if self.fc_norm:
            modules |= {f"fc_norm.{i}": (self.target_hidden_size,) for i in range(3)}
        return {f"{name}.weight": shape for name, shape in modules.items()}


@dataclass(frozen=True, eq=False)
class Eagle3Weights:
    """A drafter as read or trained."""

    config: Eagle3Config
    tensors: dict[str, Tensor]
    """All of `config.shapes`; `embed_tokens.weight` where the drafter brings an embedding; `d2t` where its vocabulary
    is a part of the base's."""
    format: str = "made"
    """The layout that it was read from: `SafeAILab`, `SpecForge` or `speculators`."""
    base: str | None = None
    """The base model that the checkpoint names: a hub id or a path."""
    accuracy: list[list[float]] | None = None
    """[depth][rank] share of right candidates, where the checkpoint brings it."""
    extras: dict[str, Any] = field(default_factory=dict)
    """What config.json says beside all this, such as special tokens; it goes along to other layouts."""

    @property
    def embedding(self) -> Tensor | None:
        """[V, hidden], the drafter's own; None where it is the base's. Many checkpoints hold a copy of the base's."""
        return self.tensors.get("embed_tokens.weight")

    @property
    def token_map(self) -> Tensor | None:
        """[draft V] int64, the base's token that each draft token stands for; None where they are the same."""
        d2t = self.tensors.get("d2t")
        return None if d2t is None else torch.arange(len(d2t)) + d2t


def is_eagle3(folder: Path) -> bool:
    """Whether a folder holds an EAGLE-3 drafter, by the keys of its weights alone."""
    return any(key.startswith(LAYER) or key == f"{SPECULATORS_LAYER}hidden_norm.weight" for key in tensor_keys(folder))


def read_drafter(folder: Path, model: ModelConfig | None) -> Eagle3Weights:
    """Read a drafter for this base; None: for any base that fits it.

    Raises:
        CheckpointError: naming the file and the key that is missing, left over, of the wrong shape or type, not finite,
            or not supported.
        ConfigError: config.json is missing or no JSON, or its rotary embedding is not supported.
    """
    path = folder / "config.json"
    declared = read_declared(path)
    state = _State(folder)
    qk_norm = f"{LAYER}self_attn.q_norm.weight" in state.tensors if declared.qk_norm is None else declared.qk_norm
    config = Eagle3Config(**declared.fields, qk_norm=qk_norm)
    if model is not None:
        _check_base(config, model, path)
    tensors = _parameters(state, config)
    d2t = _d2t(state, config)
    if d2t is not None:
        tensors["d2t"] = d2t
    return Eagle3Weights(config, tensors, declared.format, declared.base, read_accuracy(folder), declared.extras)


class _State:
    """All tensors of a folder under SafeAILab's names, and how to name them in messages."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._spelled: dict[str, str] = {}
        files = tensor_files(folder)
        for path in files:
            for key, tensor in read_tensors(path):
                name = LAYER + key.removeprefix(SPECULATORS_LAYER) if key.startswith(SPECULATORS_LAYER) else key
                if key.endswith(IGNORED_ENDINGS):
                    continue
                if name in self.tensors:
                    raise CheckpointError(f"{path}: key {key} and {self._spelled[name]} are the same weight")
                self.tensors[name] = tensor
                self._spelled[name] = f"{path}: key {key}"
        self._where = files[0] if len(files) == 1 else folder
        is_speculators = any(f"key {SPECULATORS_LAYER}" in spelled for spelled in self._spelled.values())
        self._layer = SPECULATORS_LAYER if is_speculators else LAYER

    def spell(self, name: str) -> str:
        """The file and the key of a tensor, as they are or would be there."""
        return self._spelled.get(name, f"{self._where}: key {name.replace(LAYER, self._layer)}")

    def take(self, name: str, shape: Shape, dtype: torch.dtype | None = None) -> Tensor | None:
        """A tensor of this shape and type (None: floating point), checked; None where it is absent."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        kind = "floating point" if dtype is None else str(dtype)
        fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tensor.shape != shape or not fits:
            found = f"shape {tuple(tensor.shape)} in {tensor.dtype}"
            raise CheckpointError(f"{self.spell(name)} has {found}; needed is {shape} in {kind}")
        if dtype is None and not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise CheckpointError(f"{self.spell(name)} holds values that are not finite")
        return tensor


def _parameters(state: _State, config: Eagle3Config) -> dict[str, Tensor]:
    """What `config.shapes` asks for, and the drafter's own embedding if there is one."""
    shapes = config.shapes
    embedding = {"embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for name in state.tensors:
        if name not in shapes and name not in (*embedding, "d2t", "t2d"):
            raise CheckpointError(f"{state.spell(name)} belongs to no EAGLE-3 drafter of this config.json")
    if config.hidden_size != config.target_hidden_size:  # the base's embedding is of another width
        shapes |= embedding
    found: dict[str, Tensor] = {}
    for name, shape in (shapes | embedding).items():
        tensor = state.take(name, shape)
        if tensor is not None:
            found[name] = tensor
        elif name in shapes:
            raise CheckpointError(f"{state.spell(name)} is missing; needed is {shape} in floating point")
    return found


def _d2t(state: _State, config: Eagle3Config) -> Tensor | None:
    """The offsets from draft tokens to the base's; None where the vocabularies are the same."""
    size, vocab_size = config.draft_vocab_size, config.vocab_size
    d2t, t2d = state.take("d2t", (size,), torch.int64), state.take("t2d", (vocab_size,), torch.bool)
    if d2t is None:
        if size != vocab_size or t2d is not None:
            raise CheckpointError(f"{state.spell('d2t')} is missing; needed is {(size,)} in torch.int64")
        return None
    tokens = torch.arange(size) + d2t
    if outside := ((tokens < 0) | (tokens >= vocab_size)).nonzero().flatten().tolist():
        taken = f"draft token {outside[0]} to {int(tokens[outside[0]])}"
        raise CheckpointError(f"{state.spell('d2t')} takes {taken}, outside the vocabulary of {vocab_size}")
    reached = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, tokens, True)
    if int(reached.sum()) != size:
        raise CheckpointError(f"{state.spell('d2t')} takes several draft tokens to the same token")
    # NOTE: SafeAILab's Model saves both as zeros where the vocabularies are the same, and does not read them then
    is_unset = size == vocab_size and t2d is not None and not bool(t2d.any())
    if t2d is not None and not is_unset and not torch.equal(t2d, reached):
        first = int((t2d != reached).nonzero()[0])
        raise CheckpointError(f"{state.spell('t2d')} and d2t disagree about token {first}")
    if size < vocab_size:
        return d2t
    if bool(d2t.any()):  # vLLM reads them then, SafeAILab does not
        raise CheckpointError(f"{state.spell('d2t')} reorders a whole vocabulary, which readers take in different ways")
    return None


def _check_base(config: Eagle3Config, model: ModelConfig, path: Path) -> None:
    """The sizes that config.json promises must be the base's."""
    for what, needed, found in (
        ("hidden size", config.target_hidden_size, model.hidden_size),
        ("vocabulary", config.vocab_size, model.vocab_size),
    ):
        if needed != found:
            raise CheckpointError(f"{path}: the drafter is for a base with a {what} of {needed}; this one's is {found}")
    n = model.num_layers
    low, middle, high = layers = config.feature_layers(n)
    if not 0 <= low < middle < high <= n:
        named = "names" if config.layer_ids else f"names no {LAYER_IDS}, which means"
        raise CheckpointError(f"{path} {named} layers {layers}; the base has {n}, and three different ones are needed")
