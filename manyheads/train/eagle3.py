"""EAGLE-3 drafters as they are trained (Li et al. 2025, "EAGLE-3: Scaling up Inference Acceleration of Large Language
Models via Training-Time Test").

A drafter is one decoder layer. At each place t its first pass reads the base's hidden states where they enter three of
the base's layers, and the embedding of the token t + 1, and guesses the token t + 2. A further pass reads what the one
before gave instead of the base's states, and the embedding of the next token. Training-time test: in training, too, the
passes follow one another like this, so that the drafter learns to go on from its own features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.config import ConfigError
from manyheads.models import llama
from manyheads.models.config import ModelConfig
from manyheads.models.registry import FAMILIES
from manyheads.models.rope import LongScaling
from manyheads.speculation.eagle3.checkpoint import Eagle3Config, Eagle3Weights
from manyheads.speculation.eagle3.export import write_drafter
from manyheads.train.attention import Spans, chain_attention
from manyheads.train.base import Base, half_precision, send
from manyheads.train.dataset import Batch
from manyheads.train.drafter import Guesses, TrainedDrafter, most_used
from manyheads.train.loss import chunked
from manyheads.train.prompts import Answer
from manyheads.train.settings import TrainSettings

DRAFT_VOCAB = 32_000
"""Tokens that a drafter can say unless the settings give a number."""


def layers_read(num_layers: int) -> tuple[int, int, int]:
    """The base's layers whose inputs a drafter reads: those of the paper's code, 2, n // 2 and n - 3.

    Of fewer than seven layers these are not three that ascend; then they are three that follow one another about the
    middle. Layer n stands for the last one's output. Raises ConfigError where there are not so many.
    """
    if num_layers < 2:
        raise ConfigError("EAGLE-3 reads the inputs of three layers; a base of one layer has too few")
    if num_layers >= 7:
        return 2, num_layers // 2, num_layers - 3
    low = max(num_layers // 2 - 1, min(1, num_layers - 2))
    return low, low + 1, low + 2


class TrainedEagle3(TrainedDrafter):
    """The drafter; its parameters have the names of the checkpoint's tensors.

    Args:
        config: of the base, whose shape its layers have.
        passes: how many follow one another in training and measuring.
        layers: the base's, whose inputs are read.
        norm: [hidden], to begin with; copied.
        projection: [V, hidden], to begin with; copied.
        token_map: [V] int64, the token of each row of `projection`; None: all tokens in order.
    """

    part = "pass"
    follows_path = True
    midlayer: Any

    def __init__(
        self,
        config: ModelConfig,
        passes: int,
        layers: tuple[int, int, int],
        norm: Tensor,
        projection: Tensor,
        token_map: Tensor | None,
    ) -> None:
        super().__init__()
        if FAMILIES[config.architecture].parameters is not llama.parameters:
            raise ConfigError(f"EAGLE-3 drafters begin as a Llama's layer, and a {config.architecture} has other ones")
        rope = config.rope
        if rope.dim != config.head_dim or isinstance(rope.scaling, LongScaling):
            raise ConfigError(f"EAGLE-3 drafters do not know the rotary embedding of a {config.architecture}: {rope}")
        self._theta, self._scaling = rope.theta, rope.scaling
        self.depth, self.layers = passes, layers
        self.head_dim, self.vocab_size = config.head_dim, config.vocab_size
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        q, kv = config.num_heads * dim, config.num_kv_heads * dim

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        def rms_norm() -> nn.RMSNorm:
            return nn.RMSNorm(hidden, eps=config.rms_norm_eps)

        attention = {f"{name}_proj": linear(2 * hidden, size) for name, size in (("q", q), ("k", kv), ("v", kv))}
        mlp = {"gate_proj": linear(hidden, inner), "up_proj": linear(hidden, inner), "down_proj": linear(inner, hidden)}
        self.fc = linear(3 * hidden, hidden)
        self.midlayer = nn.ModuleDict(
            {
                "self_attn": nn.ModuleDict(attention | {"o_proj": linear(q, hidden)}),
                "mlp": nn.ModuleDict(mlp),
                "hidden_norm": rms_norm(),
                "input_layernorm": rms_norm(),
                "post_attention_layernorm": rms_norm(),
            }
        )
        self.norm, self.lm_head = rms_norm(), linear(hidden, len(projection))
        with torch.no_grad():
            self.norm.weight.copy_(norm)
            self.lm_head.weight.copy_(projection)
        self.register_buffer("token_map", token_map, persistent=False)

    @classmethod
    def start(cls, settings: TrainSettings, base: Base, config: ModelConfig, answers: list[Answer]) -> TrainedEagle3:
        projection, token_map = base.projection.detach().float().cpu(), None
        count = min(settings.draft_vocab or DRAFT_VOCAB, config.vocab_size)
        if count < config.vocab_size:
            token_map = most_used(answers, count, config.vocab_size)
            projection = projection[token_map]
        norm = base.model.model.norm.weight.detach().float().cpu()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            drafter = cls(config, settings.passes, layers_read(config.num_layers), norm, projection, token_map)
        drafter.begin_as(base.model.model.layers[-1])
        return drafter

    @torch.no_grad()
    def begin_as(self, layer: Any) -> None:
        """Take what there is from a layer of the base (one of transformers), and the last of the three states as it is.

        What remains at random is what reads embeddings and the other states. So the features go with the base's
        projection from the beginning, which saves many steps.
        """
        mine, hidden = self.midlayer, len(self.fc.weight)
        for name in ("q_proj", "k_proj", "v_proj"):
            mine.self_attn[name].weight[:, hidden:].copy_(getattr(layer.self_attn, name).weight)
        mine.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight)
        for name, linear in mine.mlp.items():
            linear.weight.copy_(getattr(layer.mlp, name).weight)
        mine.hidden_norm.weight.copy_(layer.input_layernorm.weight)
        mine.post_attention_layernorm.weight.copy_(layer.post_attention_layernorm.weight)
        self.fc.weight.mul_(0.1)
        self.fc.weight[:, 2 * hidden :].copy_(torch.eye(hidden))

    def logits(self, features: Tensor) -> Tensor:
        """What a pass makes of its features: [N, hidden] → [N, V] in the order of `token_map`."""
        output: Tensor = self.lm_head(_normed(self.norm, features))
        return output

    def unroll(self, base: Base, batch: Batch, inputs: Tensor, places: Tensor) -> Tensor:
        """The features of each pass, [passes, M, hidden].

        Args:
            inputs: [R · L, 3 · hidden], the base's states.
            places: [M] int64 on the CPU, where chains of passes begin: the last ones of each conversation.
        """
        device, bounds = base.device, batch.bounds
        starts = torch.searchsorted(places, bounds)
        spans = Spans(list(zip(starts.diff().tolist(), bounds.diff().tolist(), strict=True)), device)
        tokens, positions, index = (send(t.flatten(), device) for t in (batch.tokens, batch.positions, places))
        following = torch.cat([tokens[1:], tokens[-1:]])
        mlp = self.midlayer.mlp
        feature = self.fc(inputs)
        x = self._joined(base, following, feature)  # [R · L, 2 · hidden]
        rotation = base.rotation(positions)
        key, value = self._heads("k_proj", x, rotation), self._heads("v_proj", x)
        feature, x, own, features = feature[index], x[index], [], []
        for number in range(self.depth):
            rotation = base.rotation(positions[index] + number)
            if number:
                # past the end of a conversation this is another's token, in a chain that does not count
                x = self._joined(base, following[(index + number).clamp(max=len(tokens) - 1)], feature)
                own.append((self._heads("k_proj", x, rotation), self._heads("v_proj", x)))
            seen = chain_attention(self._heads("q_proj", x, rotation), key, value, own, spans)
            feature = feature + self.midlayer.self_attn.o_proj(seen.flatten(1))
            x = _normed(self.midlayer.post_attention_layernorm, feature)
            feature = feature + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
            features.append(feature)
        return torch.stack(features)

    def _joined(self, base: Base, tokens: Tensor, feature: Tensor) -> Tensor:
        """What attention reads: embeddings and features side by side."""
        embedding = _normed(self.midlayer.input_layernorm, base.embed(tokens))
        return torch.cat([embedding, _normed(self.midlayer.hidden_norm, feature)], dim=-1)

    def _heads(self, name: str, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Queries, keys or values [N, heads, head_dim]; with a `rotation` (cos, sin), turned by it."""
        heads: Tensor = self.midlayer.self_attn[name](x).unflatten(-1, (-1, self.head_dim))
        if rotation is None:
            return heads
        cos, sin = rotation
        first, second = heads.chunk(2, dim=-1)
        return (heads * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)

    def guesses(self, base: Base, batch: Batch, places: Tensor) -> Guesses:
        chains = _chains(batch)
        _, inputs = base.hidden_and_inputs(batch, self.layers)
        with half_precision(base.device):
            features = self.unroll(base, batch, inputs, chains)
        features = features[:, send(torch.searchsorted(chains, places), base.device)]
        return lambda number, part: self.logits(features[number, part])

    def backward(
        self,
        settings: TrainSettings,
        base: Base,
        teacher: Base | None,
        batch: Batch,
        targets: Tensor,
        counts: Tensor,
    ) -> Tensor:
        device, chains = base.device, _chains(batch)
        with torch.no_grad():
            hidden, inputs = base.hidden_and_inputs(batch, self.layers)
        with half_precision(device):
            features = self.unroll(base, batch, inputs, chains)
        # by the places whose next token is guessed, so that what the base says there is computed once for all passes
        places = (batch.ahead(1)[..., 1].flatten() >= 0).nonzero()[:, 0] + 1  # [P]
        numbers = torch.arange(self.depth)
        begins = places[:, None] - 1 - numbers  # [P, passes], where the chain of each pass that is there begins
        counted = (begins >= 0) & (targets[begins.clamp(min=0), numbers + 1] >= 0)
        rows = torch.searchsorted(chains, begins).clamp(max=len(chains) - 1)
        states = features[send(numbers, device), send(rows, device)]  # [P, passes, hidden]
        counted, places = send(counted, device), send(places, device)
        token_map, known = self._vocabulary(device)

        def loss(states: Tensor, index: Tensor) -> Tensor:
            with torch.no_grad():
                said = base.logits(hidden[places[index]]).float()
                right = counted[index] & known[said.argmax(-1)][:, None]  # [n, passes]
                wanted = (said if token_map is None else said[:, token_map]).softmax(-1)
            with half_precision(device):
                logits = self.logits(states)
            logits = logits.float()
            # cross-entropy with a distribution: its weights add up to one
            each = logits.logsumexp(-1) - torch.einsum("nv,nkv->nk", wanted, logits)
            return (each * right).sum(0)

        weights = settings.discount**numbers / counts[1:]
        grad = torch.zeros_like(states, dtype=torch.float32)
        chunk = max(1, settings.chunk // self.depth)
        every = torch.arange(len(places), device=device)
        sums = chunked(loss, states.detach(), every, send(weights, device), chunk, grad)
        states.backward(grad.to(states.dtype))  # type: ignore[no-untyped-call]
        return F.pad(sums, (1, 0))

    def _vocabulary(self, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """`token_map`, and whether the drafter can say each of the base's tokens, [base's V] bool."""
        known = torch.ones(self.vocab_size, dtype=torch.bool, device=device)
        if self.token_map is not None:
            known = torch.zeros_like(known)
            known[self.token_map] = True
        return self.token_map, known

    def write(self, out: Path, name: str, config: ModelConfig) -> None:
        tensors = {key: tensor.detach().to("cpu", config.dtype) for key, tensor in self.state_dict().items()}
        if self.token_map is not None:
            tokens = self.token_map.cpu()
            tensors["d2t"] = tokens - torch.arange(len(tokens))
        weights = Eagle3Weights(
            self.shape(config), tensors, extras={"torch_dtype": str(config.dtype).removeprefix("torch.")}
        )
        # SpecForge's layout cannot name the input of layer 0, which only a base of two layers needs
        write_drafter(weights, out, "specforge" if self.layers[0] else "speculators", base=name, model=config)

    def shape(self, config: ModelConfig) -> Eagle3Config:
        """What config.json is to say of it, for a base of this shape."""
        return Eagle3Config(
            hidden_size=config.hidden_size,
            target_hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            draft_vocab_size=len(self.lm_head.weight),
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=self._theta,
            rope_scaling=self._scaling,
            max_position_embeddings=config.max_position_embeddings,
            layer_ids=self.layers,
        )


def _chains(batch: Batch) -> Tensor:
    """The places in the R · L of a batch where chains begin, [M] int64: from the last one before each answer."""
    return (batch.answer | F.pad(batch.answer[:, 1:], (0, 1))).flatten().nonzero()[:, 0]


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Root mean square norm in float32, also where x is bfloat16."""
    output: Tensor = norm(x.float())
    return output
