"""What a checkpoint holds, declared once: loading, shapes and the estimate of memory read the same list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from manyheads.models.linear import Split


@dataclass(frozen=True)
class Plain:
    """A parameter that is used as it is, such as an embedding."""

    name: str
    """The module's name, without the leading `model.`."""
    shape: tuple[int, ...]
    offset: float = 0.0
    """Added to what the checkpoint holds, and the sum is float32: some families keep a norm's difference from 1."""
    leaf: str = "weight"
    """The rest of the parameter's name."""

    @property
    def key(self) -> str:
        """The parameter's name."""
        return f"{self.name}.{self.leaf}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its parameters, by name."""
        return {self.key: self.shape}


@dataclass(frozen=True)
class Normed:
    """A norm's weight, and its bias if it has one."""

    name: str
    """As of `Plain`."""
    size: int
    has_bias: bool = False
    offset: float = 0.0
    """As of `Plain`, of the weight."""

    @property
    def key(self) -> str:
        """The weight's name."""
        return f"{self.name}.weight"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its parameters, by name."""
        leaves = ("weight", "bias") if self.has_bias else ("weight",)
        return {f"{self.name}.{leaf}": (self.size,) for leaf in leaves}


@dataclass(frozen=True)
class Packed:
    """A product of the model, and the projections of the same input that it is packed of, one below the other."""

    prefix: str
    """What the projections' names begin with, such as `layers.0.mlp.`."""
    outputs: Mapping[str, int | tuple[int, ...]]
    """Outputs of each projection, by the rest of its name; several where a checkpoint holds several projections as one,
    one below the other."""
    inputs: int
    has_bias: bool = False
    split: Split = Split.OUTPUTS
    """How ranks share the weight."""
    whole: bool = False
    """Whether its result is wanted whole, as a norm of it comes next, and not in parts (`Linear`)."""
    order: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    """By the rest of a projection's name, in which order its outputs are read, [outputs] int64 (`rope.head_order`)."""

    def __post_init__(self) -> None:
        if self.split is Split.INPUTS and len(self.outputs) > 1:
            raise ValueError(f"{self.prefix}: projections that are packed read the same inputs, and cannot split them")

    @property
    def modules(self) -> list[str]:
        """Names of the projections."""
        return [self.prefix + name for name in self.outputs]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its parameters, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for module, outputs in zip(self.modules, self.outputs.values(), strict=True):
            total = outputs if isinstance(outputs, int) else sum(outputs)
            found[f"{module}.weight"] = (total, self.inputs)
            if self.has_bias:
                found[f"{module}.bias"] = (total,)
        return found


@dataclass(frozen=True)
class Stacked:
    """A product of each of a layer's experts, whose weights stand in one tensor of the checkpoint, [in, out] each.

    Instead of it there may be `name_blocks` and `name_scales`, [out, in] in 4 bits (`quantization/mxfp4.py`).
    """

    name: str
    """The tensor's, without the leading `model.`; `name_bias` holds the experts' biases."""
    count: int
    """Experts."""
    outputs: int
    inputs: int
    split: Split = Split.OUTPUTS
    """How ranks share each weight."""
    order: Tensor | None = field(default=None, compare=False)
    """In which order the outputs are read, [outputs] int64; None: as they are."""

    @property
    def bias(self) -> str:
        """The biases' name."""
        return f"{self.name}_bias"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its parameters, by name."""
        return {self.name: (self.count, self.inputs, self.outputs), self.bias: (self.count, self.outputs)}


Part = Plain | Normed | Packed | Stacked


@dataclass(frozen=True)
class Parameters:
    """All parameters of a model; iterating gives those that are read from its checkpoint."""

    embedding: Plain
    layers: list[dict[str, Part | tuple[Packed, ...]]]
    """The parameters of each layer, by the fields of the family's `layer`; several products are its experts'."""
    norm: Normed
    lm_head: Packed
    is_tied: bool
    """Whether the projection to the vocabulary is the embedding, and what a checkpoint holds of it is not read."""

    def __iter__(self) -> Iterator[Part]:
        yield self.embedding
        for layer in self.layers:
            for part in layer.values():
                yield from part if isinstance(part, tuple) else (part,)
        yield self.norm
        if not self.is_tied:
            yield self.lm_head

    @property
    def sections(self) -> dict[str, tuple[int, ...]]:
        """Outputs of each projection, of modules that hold several."""
        packed = [part for part in self if isinstance(part, Packed)]
        return {
            part.prefix + name: outputs
            for part in packed
            for name, outputs in part.outputs.items()
            if not isinstance(outputs, int)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters that are read, by name."""
        return {name: shape for declared in self for name, shape in declared.shapes.items()}
