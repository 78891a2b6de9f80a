"""Without a GPU the kernels run in Triton's interpreter, which it decides on when they are imported."""

import importlib.util
import os
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2 if INTERPRETED else 4e-3}
"""Relative errors. bfloat16's own rounding is 2e-3; Triton 3.6's interpreter cuts it off instead of rounding."""

torch.set_num_threads(1)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, NaN if found has any."""
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter takes int() of arrays of shape [1] for loop bounds, which numpy 2.4 refuses.

    And where it rounds a mantissa up to the next power of two on the way to fp8, it halves the number.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.float8e4nv:
            return torch.tensor(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(values, source, target, rounding)

    interpreter._convert_float = converted


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    _mend_interpreter()
