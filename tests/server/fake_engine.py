"""A test double with the engine's interface: it writes a canned text, several tokens a step."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from manyheads.config import EngineConfig
from manyheads.errors import QueueFull
from manyheads.request import EngineReady, EngineRequest, Guess, RequestDelta, StepTrace, TokenLogprobs
from manyheads.stats import AdapterStats, EngineStats, MemoryUse
from tests.server.tiny_tokenizer import END, make_backend

TEXT = "The cat 🐈 sat on the mat, 猫はマットの上に座った。 It was e\u0301legant. " * 40
"""What every reply says, from the beginning, to its end of text."""
MEMORY = MemoryUse(
    weights=27 * 2**29, heads=2**30, kv_cache=3 * 2**30, graphs=717 * 2**20, rest=2**29, kv_cache_tokens=1024
)


@dataclass
class _Open:
    request: EngineRequest
    tokens: list[int]
    done: int = 0
    steps: int = 0


@dataclass
class FakeEngine:
    """Set by magic words in the prompt's text: `SLOW` steps, `CRASH`, `FAIL`, `WHO` asks. Nobody starts within 1 s.

    Beside FAKE_ENGINE_PID_FOLDER, a file `hold` keeps it from starting, and a file `pause` from saying anything, or
    anything more than so many steps of a request as it says.
    What stands last in the prompt as `SAY[[…]]` is the reply; a grammar of calls makes it a call with no arguments,
    two if it allows several, and other grammars change nothing. An adapter says its name.
    """

    config: EngineConfig
    per_step: int = 3
    step_seconds: float = 0.0
    open: dict[str, _Open] = field(default_factory=dict)
    pending: list[RequestDelta] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "generated": 0, "steps": 0, "rows": 0})

    @staticmethod
    def admitted(request_ids: list[str]) -> None:
        """Nobody listens, until somebody does."""

    def __post_init__(self) -> None:
        self.tokenizer = make_backend()
        self.eos = self.tokenizer.token_to_id(END)
        self.text = [*self.tokenizer.encode(TEXT).ids, self.eos]
        self.ready = EngineReady(
            model="fake",
            max_model_len=self.config.max_model_len or 2048,
            vocab_size=self.tokenizer.get_vocab_size(),
            drafter="medusa",
            draft_depth=3,
            dtype="float32",
            device="cpu",
            num_pages=64,
            page_size=16,
            eos_token_ids=[self.eos],
            loras=list(self.config.loras),
            wanted_model_len=4096,
            memory=MEMORY,
        )

    def listen(self, admitted: Callable[[list[str]], None], beat: Callable[[], None]) -> None:
        self.admitted = admitted  # type: ignore[method-assign]

    def add_request(self, message: EngineRequest) -> None:
        self.ready.check(message.params, [message.prompt_token_ids], message.lora)
        if len(self.open) >= self.config.max_queue:
            raise QueueFull(f"{len(self.open)} requests are waiting")
        if message.timeout is not None and message.timeout < 1:
            raise QueueFull("it would start in about 9.0 s", retry_after=8.2)
        done, steps = len(message.output_token_ids), message.num_steps
        text = self._reply(message)
        assert message.output_token_ids == text[:done]
        self.open[message.request_id] = _Open(message, text, done, steps)
        self.admitted([message.request_id])
        self.counts["prompt"] += len(message.prompt_token_ids)

    def _reply(self, message: EngineRequest) -> list[int]:
        grammar = message.params.grammar
        if grammar is not None and '"arguments0"' in grammar.value:
            *several, schema = grammar.value.split("%json ")
            found = json.loads(schema)
            call = found.get("anyOf", [found])[0]["properties"]
            key = next(name for name in call if name != "name")
            text = json.dumps({"name": call["name"]["const"], key: {}})
            return [*self.tokenizer.encode(f"{text}; {text}." if several else text).ids, self.eos]
        if message.lora:
            return [*self.tokenizer.encode(message.lora).ids, self.eos]
        prompt = self.tokenizer.decode(message.prompt_token_ids, skip_special_tokens=False)
        if found := re.findall(r"SAY\[\[(.*?)\]\]", prompt, re.S):
            return [*self.tokenizer.encode(found[-1]).ids, self.eos]
        return list(self.text)

    def abort(self, request_id: str) -> None:
        entry = self.open.pop(request_id, None)
        if entry is not None:
            if folder := os.environ.get("FAKE_ENGINE_PID_FOLDER"):
                with Path(folder).with_name("aborts").open("a") as file:
                    file.write(request_id + "\n")
            self.pending.append(
                RequestDelta(request_id=request_id, new_token_ids=[], finish_reason="abort", num_steps=entry.steps)
            )

    def has_work(self) -> bool:
        return bool(self.open or self.pending)

    def step(self) -> list[RequestDelta]:
        deltas, self.pending = self.pending, []
        if self.open:
            if self._pauses():
                time.sleep(0.01)
                return deltas
            self.counts["steps"] += 1
            time.sleep(self.step_seconds)
        for request_id, entry in list(self.open.items()):
            delta = self._advance(request_id, entry)
            deltas.append(delta)
            if delta.finish_reason:
                del self.open[request_id]
        return deltas

    def _pauses(self) -> bool:
        if folder := os.environ.get("FAKE_ENGINE_PID_FOLDER"):
            with contextlib.suppress(FileNotFoundError):
                most = int(Path(folder).with_name("pause").read_text() or 0)
                return any(entry.steps >= most for entry in self.open.values())
        return False

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.open),
            num_pages=64,
            num_free_pages=64 - min(64, len(self.open)),
            prompt_tokens=self.counts["prompt"],
            generation_tokens=self.counts["generated"],
            steps=self.counts["steps"],
            row_steps=self.counts["rows"],
            drafted_by_depth=[10, 5, 2],
            accepted_by_depth=[6, 2, 1],
            adapters={name: AdapterStats(generation_tokens=3) for name in self.ready.loras},
            memory=MEMORY,
        )

    def _advance(self, request_id: str, entry: _Open) -> RequestDelta:
        params = entry.request.params
        prompt = self.tokenizer.decode(entry.request.prompt_token_ids[:200])
        if "SLOW" in prompt:
            time.sleep(0.05)
        if "CRASH" in prompt:
            raise RuntimeError("the fake engine was told to crash")
        if "WHO" in prompt:
            who = f"{entry.request.client}, priority {entry.request.priority}, timeout {entry.request.timeout}"
            return RequestDelta.failure(request_id, who, "engine")
        if "FAIL" in prompt:
            return RequestDelta(
                request_id=request_id,
                new_token_ids=[],
                finish_reason="error",
                error="told to fail",
                error_kind="engine",
            )
        room = self.ready.max_model_len - len(entry.request.prompt_token_ids)
        wanted = room if params.max_tokens is None else params.max_tokens
        limit = min(wanted, room, len(entry.tokens))
        if params.ignore_eos:
            limit = min(wanted, room)
            entry.tokens = (entry.tokens[:-1] * 4)[:limit]
        count = self.per_step if params.speculative else 1
        new = entry.tokens[entry.done : min(entry.done + count, limit)]
        entry.done += len(new)
        entry.steps += 1
        self.counts["rows"] += 1
        self.counts["generated"] += len(new)
        reason = None
        stop = None
        for i, token in enumerate(new):
            if (token == self.eos and not params.ignore_eos) or token in params.stop_token_ids:
                new, reason, stop = new[: i + 1], "stop", token
                break
        if reason is None and (entry.done >= limit or entry.steps == params.max_steps):
            reason = "length"
        logprobs = None
        if params.logprobs is not None:
            logprobs = [TokenLogprobs(t, -0.5, 1, [(t + k, -0.5 - k) for k in range(params.logprobs)]) for t in new]
        prompt_logprobs = None
        if params.prompt_logprobs is not None and entry.steps == 1:
            known = entry.request.prompt_token_ids[1:]
            prompt_logprobs = [TokenLogprobs(t, -1.5, 2, [(t, -1.5)] * min(params.prompt_logprobs, 1)) for t in known]
        trace = None
        if params.return_steps:
            right = [Guess(token, i - 1, True) for i, token in enumerate(new[:-1])]
            trace = StepTrace(len(new), [*right, Guess(self.eos - 1, len(right) - 1, False)])
        return RequestDelta(
            request_id=request_id,
            new_token_ids=new,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            trace=trace,
            finish_reason=reason,
            stop_token_id=stop,
            num_steps=entry.steps,
        )


def build(config: EngineConfig, progress: object = None) -> FakeEngine:
    """For the engine process: `tests.server.fake_engine:build`."""
    if text := os.environ.get("FAKE_ENGINE_ERROR"):
        raise ValueError(text)
    if folder := os.environ.get("FAKE_ENGINE_PID_FOLDER"):
        Path(folder, str(os.getpid())).touch()
        while Path(folder).with_name("hold").exists():
            time.sleep(0.02)
    time.sleep(float(os.environ.get("FAKE_ENGINE_START_SECONDS", "0")))
    return FakeEngine(config, step_seconds=float(os.environ.get("FAKE_ENGINE_STEP_SECONDS", "0.002")))
