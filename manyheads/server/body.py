"""Bodies of requests are checked strictly in what they know, and tell what they do not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import BaseModel, field_validator


class Body(BaseModel, extra="allow", allow_inf_nan=False, strict=True):
    """No part of a body has values of another type, NaN, or text that is none; it may have fields that nobody knows."""

    keeps_unknown: ClassVar[bool] = False
    """Whether unknown fields mean something all the same, as a chat template may read them."""

    @field_validator("*", mode="after")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        # JSON can spell half a surrogate pair, which no encoding of Unicode has
        for text in value if isinstance(value, list) else (value,):
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ValueError("not valid Unicode: half a surrogate pair") from None
        return value

    def unknown_fields(self, path: str = "") -> Iterator[str]:
        """Name the fields that mean nothing here, those of inner objects as `outer.inner`."""
        if not self.keeps_unknown:
            yield from (path + name for name in self.__pydantic_extra__ or ())
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Body):
                yield from value.unknown_fields(f"{path}{name}.")
            elif (
                isinstance(value, list) and value and isinstance(value[0], Body)
            ):  # others hold up to a million numbers
                for place, item in enumerate(value):
                    yield from item.unknown_fields(f"{path}{name}.{place}.")

    def ignored_fields(self) -> Iterator[str]:
        """Name the fields that ask for what this server does not do, where the answer is of use without."""
        return iter(())

    @classmethod
    def closed(cls) -> Iterator[str]:
        """Name the kinds of bodies, this one's subclasses, in which an unknown field means nothing."""
        for kind in cls.__subclasses__():
            if not kind.keeps_unknown:
                yield kind.__name__
            yield from kind.closed()
