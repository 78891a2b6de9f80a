"""Tells of kernels as they are compiled: the first launch of each variant takes a second or so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton import knobs


def watch(tell: Callable[[str], None]) -> None:
    """Call this with the name of each kernel of which a variant is compiled (or loaded) from now on.

    NOTE: Triton has one such hook in a process; it takes the place of the one before.
    """

    def compiled(*, fn: Any, **_: Any) -> None:
        tell(f"kernel {fn.name}")

    knobs.runtime.jit_post_compile_hook = compiled
