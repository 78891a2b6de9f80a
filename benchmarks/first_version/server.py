"""The first version: medusa-llm behind FastAPI, one sequence at a time.

    python server.py /tmp/first-version/heads --port 8001

POST /generate {"prompt": "...", "parameters": {"temperature": 0.5, "max_steps": 100}} -> {"response": "..."}

The endpoint is a plain `def`: FastAPI runs concurrent calls in threads and keeps nothing apart, so all of them use
the model's one key/value cache and its one tree mask (README.md says what comes of it). `--one-at-a-time` puts a
lock around the generation, the least repair there is; an `async def` endpoint would serve the same way, its calls
queueing for the event loop.

Added for measuring, without effect on the work: replies also carry the numbers of tokens and steps;
`parameters.max_new_tokens` ends a reply after that many tokens; `--ignore-eos` keeps replies from ending before it;
GET /health says how many requests are being worked on. For `manyheads bench` there are POST /v1/completions (a stream,
a chunk for each step), GET /v1/models, POST /tokenize and GET /metrics, in the shapes that it reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reference
import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel


class Parameters(BaseModel):
    """The first version's two parameters, and one for measuring."""

    temperature: float = 0.5
    max_steps: int = 100
    max_new_tokens: int | None = None


class Body(BaseModel):
    """What POST /generate takes."""

    prompt: str
    parameters: Parameters = Parameters()


class Completion(BaseModel):
    """What POST /v1/completions takes; other fields are passed over."""

    prompt: str | list[int]
    max_tokens: int = 16
    temperature: float = 1.0


def make_app(model: Any, tree: reference.Tree | None, one_at_a_time: bool) -> FastAPI:
    """The application around a loaded model."""
    app = FastAPI()
    guard: contextlib.AbstractContextManager[Any]
    guard = threading.Lock() if one_at_a_time else contextlib.nullcontext()
    counting = threading.Lock()
    active = tokens = steps = 0
    errors: Counter[str] = Counter()

    @app.post("/generate")
    def generate(body: Body) -> dict[str, Any]:
        nonlocal active
        with counting:
            active += 1
        try:
            with guard:
                prompt_ids = model.tokenizer(body.prompt).input_ids
                result = reference.generate(model, prompt_ids, tree=tree, **body.parameters.model_dump())
            return {
                "response": result.text,
                "tokens": len(result.token_ids),
                "steps": result.steps,
                "prompt_tokens": len(prompt_ids),
            }
        except Exception as error:
            # The first version let it become FastAPI's plain 500; the load test wants to know what it was.
            where = traceback.extract_tb(error.__traceback__)[-1]
            cause = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {str(error)[:120]}"
            with counting:
                errors[cause] += 1
            raise HTTPException(status_code=500, detail=cause) from error
        finally:
            with counting:
                active -= 1

    def events(prompt_ids: list[int], body: Completion) -> Iterator[str]:
        """The stream of POST /v1/completions: what each step added, then the usage."""
        nonlocal active, tokens, steps
        with counting:
            active += 1
        try:
            with guard:
                reply = reference.Generation("", [], 0)
                most = body.max_tokens
                for now in reference.stream(
                    model, prompt_ids, max_new_tokens=most, temperature=body.temperature, max_steps=most, tree=tree
                ):
                    with counting:
                        tokens += len(now.token_ids) - len(reply.token_ids)
                        steps += 1
                    yield line({"choices": [{"index": 0, "text": now.text[len(reply.text) :], "finish_reason": None}]})
                    reply = now
            yield line({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
            count = len(reply.token_ids)
            usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": count, "decoding_steps": reply.steps}
            yield line({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield line({"error": {"message": f"{type(error).__name__}: {str(error)[:120]}"}})
        finally:
            with counting:
                active -= 1

    @app.post("/v1/completions")
    def completions(body: Completion) -> StreamingResponse:
        prompt_ids = body.prompt if isinstance(body.prompt, list) else model.tokenizer(body.prompt).input_ids
        return StreamingResponse(events(prompt_ids, body), media_type="text/event-stream")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        entry = {"id": "first-version", "object": "model", "owned_by": "medusa-llm", "num_medusa_heads": model.medusa}
        return {"object": "list", "data": [entry]}

    @app.post("/tokenize")
    def tokenize(body: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": model.tokenizer(body["prompt"]).input_ids}

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        lines = [f"manyheads_generation_tokens_total {tokens}", f"manyheads_decoding_row_steps_total {steps}"]
        lines += [f'manyheads_memory_bytes{{kind="{kind}"}} {n}' for kind, n in reference.memory(model).items()]
        return PlainTextResponse("\n".join(lines) + "\n")

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"active": active, "errors": dict(errors)}

    return app


def line(value: dict[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps({'object': 'text_completion', 'created': int(time.time())} | value)}\n\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="the heads that export_heads.py wrote")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--ignore-eos", action="store_true", help="never end a reply at the end token")
    parser.add_argument("--one-at-a-time", action="store_true", help="a lock around the generation")
    parser.add_argument("--tree", type=Path, help="JSON list of paths (default: the library's 1 x 7 x 6)")
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda:0 (float16)")
    parser.add_argument("--eight-bit", action="store_true", help="the layers in 8 bits, by bitsandbytes")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tree = json.loads(args.tree.read_text()) if args.tree else None
    model = reference.load(
        args.model, ignore_eos=args.ignore_eos, tree=tree, device=args.device, eight_bit=args.eight_bit
    )
    app = make_app(model, tree, args.one_at_a_time)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
