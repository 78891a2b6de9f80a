"""Locust with our users: the rows of its tables."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from tests.bench.mock import Script, running

ROOT = Path(__file__).parents[2]


def test_rows(tmp_path: Path) -> None:
    with running(Script()) as url:
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "locustfile.py"), "-H", url, "--headless"]
        command += ["-u", "2", "-r", "10", "-t", "2s", "--stop-timeout", "2", "--csv", str(tmp_path / "x")]
        done = subprocess.run([*command, "--output-tokens", "5"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "x_stats.csv", newline="") as file:
        rows = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
    for kind, name in (("POST", "/v1/completions"), ("TTFT", "time to first token"), ("TPOT", "time per output token")):
        assert int(rows[kind, name]["Request Count"]) > 2
        assert rows[kind, name]["Failure Count"] == "0"
