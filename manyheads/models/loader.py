"""Checkpoint → model: strict, tensor by tensor, straight to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from manyheads.checkpoint import read_tensors, tensor_files
from manyheads.config import CheckpointError, ConfigError
from manyheads.models.config import ModelConfig
from manyheads.models.linear import Linear, Split
from manyheads.models.llama import Llama
from manyheads.models.norm import LayerNorm, Norm, RmsNorm
from manyheads.models.parallel import ALONE, Ranks
from manyheads.models.parameters import Normed, Packed, Part, Plain, Stacked
from manyheads.models.registry import FAMILIES, parameters
from manyheads.ops import blocks, ops_for
from manyheads.ops.base import GroupedProduct, Ops
from manyheads.quantization import mxfp4
from manyheads.quantization.base import Weight
from manyheads.quantization.formats import read_format
from manyheads.quantization.schemes import compress, compress_vocabulary, find, join, reorder

W = TypeVar("W", bound=Weight)
IGNORED_ENDINGS = (".rotary_emb.inv_freq",)
"""Buffers that some exports store and nobody needs."""
IGNORED_PREFIXES = ("medusa_head.",)
"""Medusa heads in a full-model file; speculation/medusa/checkpoint.py reads them."""


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str], None] | None = None,
    quantization: str | None = None,
    ops: Ops | None = None,
    ranks: Ranks = ALONE,
) -> Llama:
    """Read the base model of a checkpoint: every parameter is filled, every key is used.

    Args:
        config: of the whole model.
        quantization: one of `config.QUANTIZATIONS` rounds the weights of linear layers one by one as they come, so that
            they are never all in memory in full; None leaves them as they come, quantized or not.
        ops: of the device; None takes those that serve it best.
        ranks: that share the model; this one's part is kept.

    Raises:
        CheckpointError: naming the key that is missing, left over, of the wrong shape, or not finite.
        ConfigError: the checkpoint is quantized in a way that is not supported, or in another than `quantization`.
    """
    weights = _Weights(folder, config, dtype, device, quantization, ranks)
    files = tensor_files(folder)
    for number, path in enumerate(files, 1):
        if progress and len(files) > 1:
            progress(f"loading {folder.name}: file {number} of {len(files)}")
        for key, tensor in read_tensors(path, widen=weights.layout is None):
            if not key.endswith(IGNORED_ENDINGS) and not key.startswith(IGNORED_PREFIXES):
                weights.take(path, key, tensor)
    weights.finish()
    return weights.build(ops or ops_for(device))


class _Weights:
    """The parameters of a model, or a rank's part of them, as they come from a checkpoint, on their device, by name."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None,
        ranks: Ranks,
    ) -> None:
        self.folder, self.dtype, self.device, self.ranks = folder, dtype, device, ranks
        whole = parameters(config)
        self.expected = whole.shapes
        keeps_blocks = ranks.size == 1 and blocks.serves(dtype, device)
        self.tied = whole.lm_head.shapes if whole.is_tied and keeps_blocks else {}
        """Shapes of a projection to the vocabulary that may come in blocks, beside the embedding that it is."""
        self.vocab_size = config.vocab_size
        self.config = config.shared(ranks.size)
        self.declared = parameters(self.config)
        self.kept = self.declared.shapes
        """Shapes of this rank's parts."""
        self.sections = {module: (sizes, self.declared.sections[module]) for module, sizes in whole.sections.items()}
        """Of modules that hold several projections: rows of each, and this rank's."""
        packed = [part for part in self.declared if isinstance(part, Packed)]
        self.linear = {module for part in (*packed, self.declared.lm_head) for module in part.modules}
        self.stacks = {part.name: part for part in self.declared if isinstance(part, Stacked)}
        """Products of experts whose weights stand in one tensor."""
        self.order = {part.prefix + name: order.to(device) for part in packed for name, order in part.order.items()}
        """In which order the outputs of some are kept."""
        self.layout = read_format(folder)
        self.scheme = find(quantization)
        """What weights are rounded to; None where they stay as they come."""
        if self.layout is not None and self.layout.can_be_widened and self.scheme is not None:
            self.layout = None
        if self.layout is not None and self.scheme not in (None, self.layout.scheme):
            raise ConfigError(
                f"{folder} is quantized already ({self.layout.name}, {self.layout.scheme}), and cannot be "
                f"{self.scheme}; leave quantization out"
            )
        if self.layout is not None:
            self.scheme = None
        self.state: dict[str, Weight] = {}
        self.parts: dict[str, dict[str, Tensor]] = {}
        """Tensors of weights that are quantized in the checkpoint, by module and the last part of their keys."""
        self.experts: dict[str, list[Weight]] = {}
        """Weights of each expert, by the tensor that they stand in."""
        self.blocks: dict[str, dict[str, Tensor]] = {}
        """Of those that are in 4 bits, `blocks` or `scales` while the other one is yet to come."""

    def take(self, path: Path, key: str, tensor: Tensor) -> None:
        """Check a tensor of a file and keep it."""
        name = key.removeprefix("model.")
        module, _, leaf = name.rpartition(".")
        is_vocabulary = module in self.declared.lm_head.modules
        if is_vocabulary and self.declared.is_tied and (leaf == "weight" or not self.tied):
            return
        stack, _, form = name.rpartition("_")
        if stack in self.stacks and form in ("blocks", "scales"):
            if tensor.dtype != torch.uint8:
                raise CheckpointError(f"{path}: {key} is {tensor.dtype}, and MXFP4 comes in bytes")
            self.blocks.setdefault(stack, {})[form] = self._checked(path, key, tensor, self._block_shapes(stack)[form])
            if len(self.blocks[stack]) == 2:
                found = self.blocks.pop(stack)
                pairs = zip(found["blocks"].to(self.device), found["scales"].to(self.device), strict=True)
                self._take_experts(f"{path}: {key}", stack, (mxfp4.widen(*pair, self.dtype) for pair in pairs))
            return
        shape = self.expected.get(name)
        if self.layout is not None and module in self.linear:
            if self.layout.holds(leaf, tensor):
                self.parts.setdefault(module, {})[leaf] = tensor.to(self.device)
                return
            if leaf == "bias" and shape is None and not tensor.any():
                return  # AutoGPTQ gives every module a bias
        if shape is None:
            raise CheckpointError(f"{path}: key {key} belongs to no parameter of a {self.config.architecture}")
        self._checked(path, key, tensor, shape)
        if name in self.stacks:
            self._take_experts(f"{path}: {key}", name, (weight.T for weight in tensor.to(self.device)))
            return
        rounded = None
        if self.scheme is not None and module in self.linear and leaf == "weight":
            rounded = partial(compress_vocabulary if is_vocabulary else compress, scheme=self.scheme)
        rows, order = self._rows(module, tensor), self.order.get(module)
        self.state[name] = self._kept(f"{path}: {key}", rows, self.kept[name], order, rounded)

    def _take_experts(self, where: str, name: str, weights: Iterable[Tensor]) -> None:
        """Keep the weights [out, in] of all experts.

        Args:
            where: file and key, for messages.
        """
        part, rounded = self.stacks[name], None if self.scheme is None else partial(compress, scheme=self.scheme)
        order = None if part.order is None else part.order.to(self.device)
        shape = (part.outputs, part.inputs)
        self.experts[name] = [self._kept(where, weight, shape, order, rounded) for weight in weights]

    def _block_shapes(self, stack: str) -> dict[str, tuple[int, ...]]:
        """What experts in 4 bits have instead of their tensor."""
        count, inputs, outputs = self.expected[stack]
        scales = (count, outputs, -(-inputs // mxfp4.BLOCK))
        return {"blocks": (*scales, mxfp4.BLOCK // 2), "scales": scales}

    @staticmethod
    def _checked(path: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tensor, which has to have this shape."""
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{path}: {key} has shape {tuple(tensor.shape)}, not {shape}")
        return tensor

    def _kept(
        self,
        where: str,
        tensor: Tensor,
        shape: tuple[int, ...],
        order: Tensor | None,
        rounded: Callable[[Tensor], Weight] | None,
    ) -> Weight:
        """This rank's part of a parameter, of this shape, on its device.

        Args:
            where: file and key, for messages.
            order: in which its rows are read, or None.
            rounded: what makes a weight of it, or None.
        """
        part = self.ranks.tensor_part(tensor, shape if rounded is None else shape[:1])
        value = part.to(self.device, self.dtype)
        # summed on the device, where a large checkpoint takes no time
        wide = torch.float64 if self.device.type == "cpu" else torch.float32
        if not torch.isfinite(value.sum(dtype=wide)):
            raise CheckpointError(f"{where} holds values that are not finite")
        if order is not None:
            value = value[order]
        return value if rounded is None else self.ranks.rounded_part(value, shape, rounded)

    def _rows(self, module: str, weight: W) -> W:
        """This rank's rows of a module that holds several projections; any other as it is."""
        if module not in self.sections or self.ranks.size == 1:
            return weight
        return self.ranks.sections(weight, *self.sections[module])  # type: ignore[return-value]

    def finish(self) -> None:
        """Read what was quantized already, and see that nothing is missing."""
        for module in list(self.parts):
            assert self.layout is not None
            name = f"{module}.weight"
            if name in self.state:
                raise CheckpointError(f"{self.folder}: {module} has a weight that is quantized and one that is not")
            shape = (self.expected | self.tied)[name]
            weight: Weight = self.layout.read(f"{self.folder}: {module}", self.parts.pop(module), shape)
            weight = self._rows(module, weight)
            for dim, size in enumerate((self.kept | self.declared.lm_head.shapes)[name]):
                weight = self.ranks.part(weight, dim, size)
            self.state[name] = reorder(weight, self.order[module]) if module in self.order else weight
        missing = self.expected.keys() - self.state.keys() - self.experts.keys()
        if missing:
            raise CheckpointError(f"{self.folder}: parameter {min(missing)} is missing ({len(missing)} in all)")

    def build(self, ops: Ops) -> Llama:
        """The model of all that was taken."""
        family = FAMILIES[self.config.architecture]
        declared = self.declared

        def made(part: Part | tuple[Packed, ...]) -> Any:
            if isinstance(part, tuple):
                return self._grouped(part, ops)
            if isinstance(part, Stacked):
                return self._stacked(part, ops)
            if isinstance(part, Packed):
                return self._linear(part, ops)
            return self._norm(part, ops) if isinstance(part, Normed) else self._plain(part)

        layers = [family.layer(**{field: made(part) for field, part in layer.items()}) for layer in declared.layers]
        embedding = made(declared.embedding)
        if declared.is_tied and not self.tied.keys() & self.state.keys():
            weight = compress_vocabulary(embedding, self.scheme)
            lm_head = Linear(weight, None, self.dtype, ops, Split.GATHERED, self.ranks, self.vocab_size)
        else:
            lm_head = made(declared.lm_head)
        return family.model(self.config, embedding, layers, made(declared.norm), lm_head, ops, self.ranks)

    def _plain(self, part: Plain | Normed) -> Tensor:
        value = self._tensor(part.key)
        return value if part.offset == 0.0 else value.float() + part.offset

    def _norm(self, part: Normed, ops: Ops) -> Norm:
        weight, eps, multiplier = self._plain(part), self.config.rms_norm_eps, self.config.residual_multiplier
        if self.config.norm == "rms":
            return RmsNorm(weight, eps, ops, multiplier)
        bias = self._tensor(f"{part.name}.bias") if part.has_bias else None
        return LayerNorm(weight, bias, eps, ops, multiplier)

    def _tensor(self, name: str) -> Tensor:
        value = self.state.pop(name)
        assert isinstance(value, Tensor)
        return value

    def _linear(self, part: Packed, ops: Ops) -> Linear:
        """One product for projections that read the same input."""
        size = self.vocab_size if part is self.declared.lm_head else None
        return Linear(*self._joined(part), self.dtype, ops, part.split, self.ranks, size, part.whole)

    def _grouped(self, parts: tuple[Packed, ...], ops: Ops) -> GroupedProduct:
        """One product for all experts, each of which is packed alike."""
        weights, biases = zip(*(self._joined(part) for part in parts), strict=True)
        return ops.grouped(weights, torch.cat(biases) if parts[0].has_bias else None, self.dtype)

    def _stacked(self, part: Stacked, ops: Ops) -> GroupedProduct:
        """One product for all experts, of a tensor of all of them."""
        bias = self._tensor(part.bias)
        bias = bias if part.order is None else bias[:, part.order.to(self.device)]
        is_added_elsewhere = part.split is Split.INPUTS and self.ranks.rank > 0
        return ops.grouped(self.experts.pop(part.name), None if is_added_elsewhere else bias.flatten(), self.dtype)

    def _joined(self, part: Packed) -> tuple[Weight, Tensor | None]:
        """The weight and the bias of projections one below the other; the parts are let go as they are joined."""
        weights = [self.state.pop(f"{module}.weight") for module in part.modules]
        biases = [self._tensor(f"{module}.bias") for module in part.modules if part.has_bias]
        try:
            weight = join(weights)
        except ValueError as error:
            names = ", ".join(part.outputs)
            raise CheckpointError(f"{self.folder}: {part.prefix}{names} do not go together: {error}") from error
        return weight, torch.cat(biases) if biases else None
