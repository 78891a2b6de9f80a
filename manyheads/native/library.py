"""Compiles a C file, once for a machine, and loads what came of it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from manyheads.cache import cache_folder

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def load(name: str) -> ctypes.CDLL | None:
    """What the machine's compiler makes of a file of this folder; None where there is none that can."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.byteorder != "little":
        return None
    source = Path(__file__).with_name(name)
    file = cache_folder("compiled") / f"{_digest(source, compiler)}.so"
    try:
        if not file.is_file():
            _compile(compiler, source, file)
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError):  # no such compiler, none that knows this, or nowhere to put it
        return None


def _digest(source: Path, compiler: str) -> str:
    """A name for what this compiler makes of a file for this processor."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.is_file() else []
    known = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))][:2]
    parts = (source.read_bytes(), compiler.encode(), *map(str.encode, FLAGS), *map(str.encode, known))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, source: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        command = [compiler, *FLAGS, str(source), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        made.replace(file)
