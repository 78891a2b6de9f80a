"""Settings of the web server; the command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The web server needs to know this, beside what the engine does."""

    host: str = "0.0.0.0"
    port: int = 8000
    """At 0, the system chooses a free one."""
    api_key: str | None = None
    served_model_names: tuple[str, ...] = ()
    """Requests may call the model by these names; without any, by the model's own."""
    chat_template: str | None = None
    """It is a file, or the name of a known template; None takes the tokenizer's."""
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    access_log: bool = False
    watchdog: float = 60.0
    """An engine that does nothing for so many seconds is ended, and another goes on with its requests."""
    max_restarts: int = 5
    """So many engines may die in ten minutes; with the next, the server ends."""
    drain_timeout: float = 30.0
    """Running requests may go on for so many seconds after a signal to stop."""
    verbose: bool = False
