"""Ray is an extra of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from manyheads.config import ConfigError


@contextlib.contextmanager
def needs_ray() -> Iterator[None]:
    """Raise ConfigError, saying what to install, where an import in its body does not find Ray."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "ray":
            raise
        raise ConfigError("several replicas need Ray: pip install 'manyheads[ray]'") from error
