"""A report names the machine that the test ran on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def machine() -> dict[str, Any]:
    """Return processor, memory, GPUs and versions of the machine that made the load."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name.*?:(.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    tool = shutil.which("nvidia-smi")
    return {
        "cpu": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": (tool and ask_gpus(tool, "name")) or [],
        "python": platform.python_version(),
        "manyheads": version("manyheads"),
        "locust": version("locust"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def ask_gpus(nvidia_smi: str, field: str, *options: str) -> list[str] | None:
    """Return what each GPU has in a field, or None if that cannot be had."""
    command = [nvidia_smi, f"--query-gpu={field}", "--format=csv,noheader,nounits", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
