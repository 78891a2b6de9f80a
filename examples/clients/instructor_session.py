"""Instructor (pip install instructor): answers as objects, by a function that must be called and by JSON."""

from __future__ import annotations

import argparse

import instructor
from openai import OpenAI
from pydantic import BaseModel


class City(BaseModel):
    """What the model is asked to say about a city."""

    name: str
    is_capital: bool


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    args = parser.parse_args()

    plain = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    model = plain.models.list().data[0].id
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(plain, mode=mode)
        city = client.chat.completions.create(
            model=model,
            response_model=City,
            messages=[{"role": "user", "content": "Is Paris a capital?"}],
            max_tokens=100,
            temperature=0,
        )
        print(f"{mode.name}: {city!r}")
