"""Adapters on a model: the weights of all of them stand beside those of each product that some of them add to."""

from __future__ import annotations

from collections.abc import Sequence

from manyheads.models.config import ModelConfig
from manyheads.models.llama import Llama
from manyheads.models.lora import Adapter
from manyheads.models.parameters import Packed
from manyheads.models.registry import parameters
from manyheads.ops.adapters import LowRank


def attach(model: Llama, adapters: Sequence[Adapter]) -> None:
    """Let a model's products add what adapters do; their weights are the model's from now on."""
    model.adapters = products = model.ops.adapters(len(adapters))
    for layer, declared in zip(model.layers, parameters(model.config).layers, strict=True):
        for field, part in declared.items():
            if isinstance(part, Packed) and (weights := _stacked(part, adapters, model)) is not None:
                getattr(layer, field).adapt(weights, products)


def _stacked(part: Packed, adapters: Sequence[Adapter], model: Llama) -> LowRank | None:
    """What adapters add to a product; None if none does."""
    held = [[adapter.weights.pop(module, None) for module in part.modules] for adapter in adapters]
    rank = max((len(own[0]) for found in held for own in found if own is not None), default=0)
    if rank == 0:
        return None
    sizes = _sizes(part)
    weights = LowRank.zeros(len(adapters), rank, part.inputs, sizes, dtype=model.dtype, device=model.device)
    for number, found in enumerate(held):
        for place, (name, own) in enumerate(zip(part.outputs, found, strict=True)):
            if own is not None:
                down, up, scale = own
                order = part.order.get(name)
                up = (up if order is None else up[order]).float() * scale
                weights.a[number, :, place * rank : place * rank + len(down)] = down.T.to(model.device)
                weights.parts[place][number, : up.shape[1]] = up.T.to(model.device)
    return weights


def count_numbers(adapters: Sequence[Adapter], config: ModelConfig) -> int:
    """How many numbers `attach` will keep, known before there is a model."""
    total = 0
    parts = (part for layer in parameters(config).layers for part in layer.values() if isinstance(part, Packed))
    for part in parts:
        found = [adapter.weights.get(module) for adapter in adapters for module in part.modules]
        rank = max((len(own[0]) for own in found if own is not None), default=0)
        outputs = sum(_sizes(part))
        total += len(adapters) * rank * (len(part.outputs) * part.inputs + outputs)
    return total


def _sizes(part: Packed) -> list[int]:
    """Outputs of each projection."""
    return [outputs if isinstance(outputs, int) else sum(outputs) for outputs in part.outputs.values()]
