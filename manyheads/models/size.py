"""What a model's weights take, known before they are loaded."""

from __future__ import annotations

import math

import torch

from manyheads.models.config import ModelConfig
from manyheads.models.parameters import Packed, Stacked
from manyheads.models.registry import parameters
from manyheads.ops.products import is_packed, number_bytes
from manyheads.quantization.base import Scheme
from manyheads.quantization.schemes import for_vocabulary


def weights_bytes(config: ModelConfig, dtype: torch.dtype, device: torch.device, scheme: Scheme | None = None) -> int:
    """Bytes of a model's weights.

    Args:
        dtype: of activations.
        scheme: of the layers' weights.
    """
    declared = parameters(config)
    layer, vocabulary = matrix_bytes(dtype, device, config.dtype, scheme)
    total = 0.0
    for part in declared:
        is_product = isinstance(part, Packed | Stacked)
        matrix = vocabulary if part is declared.lm_head else layer
        for name, shape in part.shapes.items():
            total += math.prod(shape) * (matrix if is_product and not name.endswith("bias") else dtype.itemsize)
    if declared.is_tied and (is_packed(dtype, device) or vocabulary != dtype.itemsize):
        total += math.prod(declared.embedding.shape) * vocabulary  # a projection that is not the embedding itself
    return int(total)


def matrix_bytes(
    dtype: torch.dtype, device: torch.device, checkpoint: torch.dtype, scheme: Scheme | None = None
) -> tuple[float, float]:
    """Bytes of a number in a weight that is multiplied with: a layer's, and a projection's to the vocabulary.

    Args: as of `weights_bytes`, and checkpoint: the type of the numbers in the file.
    """
    plain = number_bytes(dtype, device, checkpoint)
    layer, vocabulary = (plain if s is None else s.number_bytes for s in (scheme, for_vocabulary(scheme)))
    return layer, vocabulary
