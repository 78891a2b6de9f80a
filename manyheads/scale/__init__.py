"""Many engines on Ray Serve; `manyheads.scale:app` is what a Serve config file imports. It needs the extra `ray`."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import on first use: what does not need Ray does not wait for it."""
    if name == "app":
        from manyheads.scale.serve_app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
