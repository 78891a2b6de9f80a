"""What a checkpoint holds, declared once: loading, shapes and the estimate of memory read the same list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from manyheads.models.linear import Split


@dataclass(frozen=True)
class Plain:
    """A parameter that is used as it is, such as a norm's weight."""

    name: str
    """The module's name, without the leading `model.`; the parameter is `name.weight`."""
    shape: tuple[int, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its parameters, by name."""
        return {f"{self.name}.weight": self.shape}


@dataclass(frozen=True)
class Packed:
    """A product of the model, and the projections of the same input that it is packed of, one below the other."""

    prefix: str
    """What the projections' names begin with, such as `layers.0.mlp.`."""
    outputs: Mapping[str, int]
    """Outputs of each projection, by the rest of its name."""
    inputs: int
    has_bias: bool = False
    split: Split = Split.OUTPUTS
    """How ranks share the weight."""

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
            found[f"{module}.weight"] = (outputs, self.inputs)
            if self.has_bias:
                found[f"{module}.bias"] = (outputs,)
        return found


@dataclass(frozen=True)
class Parameters:
    """All parameters of a model; iterating gives those that are read from its checkpoint."""

    embedding: Plain
    layers: list[dict[str, Plain | Packed]]
    """The parameters of each layer, by the fields of the family's `layer`."""
    norm: Plain
    lm_head: Packed
    is_tied: bool
    """Whether the projection to the vocabulary is the embedding, and what a checkpoint holds of it is not read."""

    def __iter__(self) -> Iterator[Plain | Packed]:
        yield self.embedding
        for layer in self.layers:
            yield from layer.values()
        yield self.norm
        if not self.is_tied:
            yield self.lm_head

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters that are read, by name."""
        return {name: shape for declared in self for name, shape in declared.shapes.items()}
