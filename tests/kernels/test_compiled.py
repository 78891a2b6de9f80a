from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels import INTERPRETED


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the other tests compile them")
def test_kernels_compile_for_gpus() -> None:
    """The interpreter takes more than the compiler does."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compiled.py"))]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 25
