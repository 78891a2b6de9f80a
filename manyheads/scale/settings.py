"""The settings of the Serve application. They are read without Ray, for a config file is written without a cluster."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manyheads.config import ConfigError, EngineConfig
from manyheads.server.config import ServerConfig

T = TypeVar("T")


class Strict(BaseModel):
    """What is not known is an error."""

    model_config = ConfigDict(extra="forbid")


class Scaling(Strict):
    """How many replicas there are."""

    replicas: int = Field(default=1, ge=0)
    """So many, or at first, where they follow the load."""
    most: int | None = None
    """They follow the load, up to so many; None leaves them as many as there are."""
    least: int = Field(default=1, ge=0)
    open_requests: float = Field(default=32.0, gt=0)
    """A replica is for so many open requests, those that wait included."""
    up_seconds: float = Field(default=10.0, ge=0)
    down_seconds: float = Field(default=300.0, ge=0)
    """The load must have changed for so long."""

    @model_validator(mode="after")
    def _check(self) -> Scaling:
        if self.most is None and self.replicas == 0:
            raise ValueError("replicas must be at least 1 where they do not follow the load, not 0")
        if self.least > self.replicas:
            raise ValueError(f"replicas must be at least {self.least}, the least there may be, not {self.replicas}")
        if self.most is not None and self.replicas > self.most:
            raise ValueError(f"replicas must be at most {self.most}, the most there may be, not {self.replicas}")
        return self

    def options(self) -> dict[str, Any]:
        """Serve's options of the deployment."""
        if self.most is None:
            return {"num_replicas": self.replicas}
        scaling = {
            "min_replicas": self.least,
            "initial_replicas": self.replicas,
            "max_replicas": self.most,
            "target_ongoing_requests": self.open_requests,
            "upscale_delay_s": self.up_seconds,
            "downscale_delay_s": self.down_seconds,
        }
        return {"autoscaling_config": scaling}


class Resources(Strict):
    """What Ray keeps for each replica."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float | None = Field(default=None, ge=0)
    """None: one for each rank where the model runs on GPUs."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Ray's custom resources, by name."""


class AppSettings(Strict):
    """The `args` of the application."""

    engine: dict[str, Any] = Field(default_factory=dict)
    """Fields of `EngineConfig`, such as model, heads, tensor_parallel_size."""
    server: dict[str, Any] = Field(default_factory=dict)
    """Fields of `ServerConfig` that are not about sockets, such as api_key_file, served_model_names."""
    scaling: Scaling = Scaling()
    resources: Resources = Resources()
    ingresses: int = Field(default=1, ge=1)
    routing: dict[str, float] = Field(default_factory=dict)
    """Settings of `routing.Chooser`."""

    @classmethod
    def read(cls, given: dict[str, Any]) -> AppSettings:
        """Check what somebody gives. Raises ConfigError in one line."""
        try:
            settings = cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error
        settings.engine_config()
        settings.server_config()
        return settings

    def engine_config(self) -> EngineConfig:
        """What each engine is told. Raises ConfigError."""
        return _checked("engine", self.engine, EngineConfig)

    def server_config(self) -> ServerConfig:
        """What each ingress is told. Raises ConfigError."""
        return _checked("server", self.server, ServerConfig)


def _checked(name: str, given: dict[str, Any], kind: type[T]) -> T:
    """Raise ConfigError for what is no setting, or has another type."""
    if unknown := sorted(given.keys() - {field.name for field in fields(kind)}):  # type: ignore[arg-type]
        raise ConfigError(f"{name}: there is no setting {unknown[0]!r}")
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {error}") from error
