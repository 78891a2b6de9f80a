"""Settings of the web server; the command line takes its defaults from here."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field, fields

from manyheads.config import ConfigError
from manyheads.frontend.reply import check_parsers
from manyheads.server.keys import Keys


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """A client may take so long, in seconds, and so many connections may be open."""

    header_timeout: float = 10.0
    """From when a connection is opened, or a further request begun, until its headers are whole."""
    body_timeout: float = 30.0
    """From when the headers are whole until the body is; for a body above 1 MiB, so long for each MiB."""
    write_timeout: float = 30.0
    """A client may read nothing for so long while something is to be written."""
    keep_alive: int = 20
    """From an answer to the next request. Clients that keep connections (httpx for 5 s, aiohttp for 15 s) should close
    them first: a request sent while the server closes is lost."""
    max_connections: int | None = None
    """None is as many as the limit of open files allows."""

    def __post_init__(self) -> None:
        for some in fields(self):
            value = getattr(self, some.name)
            if value is not None and not value > 0:
                raise ConfigError(f"{some.name} must be above 0, not {value}")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The web server needs to know this, beside what the engine does."""

    host: str = "127.0.0.1"
    port: int = 8000
    """At 0, the system chooses a free one."""
    api_key: str | None = None
    api_key_file: str | None = None
    """It has a line for each further key (`keys.parse_keys`), and is read again when it changes."""
    protect_info: bool = False
    """Ask for a key at `auth.INFO_PATHS`, too."""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    """None: the key stands in the certificate's file."""
    root_path: str = ""
    """A proxy offers the server below this path, and takes it off the requests that it hands on."""
    served_model_names: tuple[str, ...] = ()
    """Requests may call the model by these names; without any, by the model's own."""
    chat_template: str | None = None
    """It is a file, or the name of a known template; None takes the tokenizer's."""
    tool_parser: str | None = None
    """What reads calls of functions, one of `frontend.tools.kinds.TOOL_PARSERS` or `none`; None: as the chat template
    has them."""
    reasoning_parser: str | None = None
    """What tells thoughts from the answer, one of `frontend.reasoning.REASONING_PARSERS` or `none`; None: as the chat
    template has them."""
    strict: bool = False
    """Refuse fields in requests that nobody knows, instead of ignoring them."""
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    access_log: bool = False
    log_format: str = "text"
    """One of `logs.LOG_FORMATS`."""
    watchdog: float = 60.0
    """An engine that does nothing for so many seconds is ended, and another goes on with its requests."""
    max_restarts: int = 5
    """So many engines may die in ten minutes; with the next, the server ends."""
    drain_timeout: float = 30.0
    """Running requests may go on for so many seconds after a signal to stop."""
    verbose: bool = False

    def __post_init__(self) -> None:
        check_parsers(self.tool_parser, self.reasoning_parser)

    @property
    def needs_key(self) -> bool:
        """Tell whether requests must bring a key."""
        return bool(self.api_key or self.api_key_file)

    @property
    def is_exposed(self) -> bool:
        """Tell whether other machines may ask without a key."""
        try:
            is_local = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            is_local = self.host == "localhost"
        return not is_local and not self.needs_key

    def check(self) -> None:
        """Raise ConfigError for what cannot hold on this machine, before anything is loaded."""
        Keys(self.api_key, self.api_key_file)
        if self.protect_info and not self.needs_key:
            raise ConfigError("--protect-info needs a key: give --api-key or --api-key-file")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"--root-path must begin with / and not end with it, not {self.root_path!r}")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")
        if self.ssl_certfile:
            files = self.ssl_certfile + (f" with {self.ssl_keyfile}" if self.ssl_keyfile else "")
            try:  # with a password that is none, for otherwise an encrypted key would ask the terminal
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.ssl_certfile, self.ssl_keyfile, "")
            except (OSError, ValueError) as error:
                raise ConfigError(f"no TLS with the certificate {files}: {error}") from error
