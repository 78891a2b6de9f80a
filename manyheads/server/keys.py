"""A server's API keys are known by their hashes, and stand in a file that may change while it runs."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from manyheads.config import ConfigError

DEFAULT_NAME = "default"
"""The key of --api-key has this name."""
NAME = re.compile(r"[\w.@-]{1,64}", re.A)
"""A key's name is of this form."""
_LINE = re.compile(
    rf"(?P<name>{NAME.pattern})\s+sha256:(?P<digest>[0-9a-fA-F]{{64}})(?P<limits>(\s+\w+=\d{{1,15}})*)", re.A
)
_LOOK_SECONDS = 1.0
"""The file of keys is looked at no more often than this."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key is known by its hash alone."""

    name: str
    digest: bytes
    """SHA-256 of the key."""
    max_requests: int | None = None
    """It may have so many requests open at once."""
    tokens_per_minute: int | None = None
    """It may use so many tokens a minute, of prompts and output together; a request is counted when it ends."""


def hash_key(key: str) -> str:
    """Return what stands for a key in a file of keys."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def parse_keys(path: Path, taken: Iterable[str] = ()) -> list[Key]:
    """Read a file of keys: a line `NAME sha256:HEX [max_requests=N] [tokens_per_minute=N]` for each.

    Empty lines and those that begin with # say nothing.

    Raises:
        ConfigError: it cannot be read, or a line is not of this form, or its name or key stands in an earlier one or is
            among those taken.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys in {path}: {getattr(error, 'strerror', None) or error}") from error
    keys: list[Key] = []
    names = set(taken)
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"line {number} of {path}"
        match = _LINE.fullmatch(line.strip())
        if match is None:
            form = "NAME sha256:HEX [max_requests=N] [tokens_per_minute=N]"
            raise ConfigError(f"{where} is not of the form {form}; `manyheads key NAME` makes one")
        name = match["name"]
        limits = {what: int(most) for what, _, most in (limit.partition("=") for limit in match["limits"].split())}
        if unknown := limits.keys() - {"max_requests", "tokens_per_minute"}:
            raise ConfigError(f"{where}: there is no limit {min(unknown)!r}, only max_requests and tokens_per_minute")
        if 0 in limits.values():
            raise ConfigError(f"{where}: a limit must be at least 1; delete the line to withdraw the key")
        key = Key(name=name, digest=bytes.fromhex(match["digest"]), **limits)
        if name in names or any(key.digest == other.digest for other in keys):
            raise ConfigError(f"{where}: the name {name!r} or its key is taken")
        names.add(name)
        keys.append(key)
    return keys


class Keys:
    """These are the keys that may ask: one given at the start, and those in a file.

    The file is read again when it has changed. While it cannot be read, the keys that it had remain.

    Raises:
        ConfigError: the file is wrong now.
    """

    def __init__(self, key: str | None = None, path: str | None = None) -> None:
        self._given = [Key(name=DEFAULT_NAME, digest=hashlib.sha256(key.encode()).digest())] if key else []
        self._path = Path(path) if path else None
        self._seen: object = self._stamp()
        self._looked = time.monotonic()
        self._keys = self._read()

    def find(self, key: bytes) -> Key | None:
        """Return the key if it is one of these."""
        if self._path is not None and time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._look()
        digest = hashlib.sha256(key).digest()
        found = None
        for known in self._keys:  # all of them, so that the time tells nothing about which one it was
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found

    def _look(self) -> None:
        self._looked = time.monotonic()
        if (stamp := self._stamp()) == self._seen:
            return
        self._seen = stamp
        try:
            self._keys = self._read()
        except ConfigError as error:
            _log.error("the API keys remain what they were: %s", error)

    def _read(self) -> list[Key]:
        return self._given + (parse_keys(self._path, [key.name for key in self._given]) if self._path else [])

    def _stamp(self) -> object:
        try:
            about = os.stat(self._path) if self._path else None
        except OSError:
            return None
        return about and (about.st_mtime_ns, about.st_size, about.st_ino)
