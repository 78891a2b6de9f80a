"""The training loop, the same for every kind of drafter."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from manyheads.config import ConfigError
from manyheads.train.base import Base
from manyheads.train.dataset import Batch, Order
from manyheads.train.drafter import TrainedDrafter
from manyheads.train.progress import Progress
from manyheads.train.settings import TrainSettings
from manyheads.train.state import METRICS, load_state, open_metrics, save_state


class Trainer:
    """One run.

    Args:
        base: trained along with the drafter if its parameters take gradients.
        teacher: the base as it was, for joint training; None else.
        data: packed rows, on the CPU.
        folder: for checkpoints and metrics.
    """

    def __init__(
        self,
        settings: TrainSettings,
        base: Base,
        teacher: Base | None,
        drafter: TrainedDrafter,
        data: Batch,
        folder: Path,
    ) -> None:
        self.settings, self.base, self.teacher, self.drafter = settings, base, teacher, drafter
        self.data, self.folder = data, folder
        self.order = Order(len(data.tokens), settings.rows * settings.accumulate, settings.seed)
        self.total = settings.max_steps or settings.epochs * self.order.steps_per_epoch
        groups: list[dict[str, Any]] = [{"params": list(drafter.parameters()), "peak": settings.rate}]
        self.parts: dict[str, Any] = {"drafter": drafter}
        if settings.joint:
            peak = settings.base_rate if settings.base_rate is not None else settings.rate / 4
            groups.append({"params": list(base.model.parameters()), "peak": peak})
            self.parts["base"] = base.model
        fused, decay = base.device.type == "cuda", settings.weight_decay
        self.optimizer = torch.optim.AdamW(groups, settings.rate, betas=(0.9, 0.98), weight_decay=decay, fused=fused)
        self.parts["optimizer"] = self.optimizer

    def run(self, progress: Progress, evaluate: Callable[[], dict[str, Any]]) -> None:
        """Train from the last checkpoint, if there is one, to the end; `evaluate` adds metrics at each checkpoint."""
        done = load_state(self.folder, self.parts)
        metrics = open_metrics(self.folder / METRICS, done)
        with metrics, progress.task("training", self.total, done) as advance:
            advance(0, "")
            for step in range(done, self.total):
                record = {"step": step + 1} | self.step(step)
                at_checkpoint = step + 1 == self.total or (step + 1) % self.settings.checkpoint_every == 0
                if at_checkpoint:
                    record |= evaluate()
                metrics.write(json.dumps(record) + "\n")
                if at_checkpoint:
                    save_state(self.folder, step + 1, self.parts)
                advance(1, f"loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s")

    def step(self, step: int) -> dict[str, Any]:
        """One step of the optimizer; what came of it."""
        settings, device = self.settings, self.base.device
        start = time.perf_counter()
        rates = self._set_rates(step)
        rows = self.data.take(self.order.rows(step))
        wanted = rows.ahead(self.drafter.depth)  # [R, L, 1 + depth]
        wanted[..., 1:] = self.drafter.place(wanted[..., 1:], len(self.base.projection))
        # of the whole step, so that accumulated groups of rows are as one large group
        counts = (wanted >= 0).sum(dim=(0, 1)).clamp(min=1)
        losses = torch.zeros(self.drafter.depth + 1, device=device)
        teacher = self.teacher if settings.joint and rates[1] > 0 else None
        for part in torch.split(torch.arange(len(rows.tokens)), settings.rows):
            targets = wanted[part].flatten(0, 1)
            losses += self.drafter.backward(settings, self.base, teacher, rows.take(part), targets, counts)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        *sums, norm = torch.cat([losses, norm[None]]).tolist()  # the one place where the host waits for the device
        base_loss, *own = [round(v, 6) for v in (torch.tensor(sums) / counts).tolist()]
        seconds, tokens = time.perf_counter() - start, int((rows.part > 0).sum())
        record: dict[str, Any] = {
            "loss": round(sum(settings.discount**h * loss for h, loss in enumerate(own)), 6),
            f"{self.drafter.part}_losses": own,
            "grad_norm": round(norm, 6),
            "rate": rates[0],
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(tokens / seconds, 1),
        }
        if settings.joint:
            record |= {"base_rate": rates[1], "base_loss": base_loss}
        if device.type == "cuda":
            record["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        if not math.isfinite(record["loss"]):
            raise ConfigError(f"the loss of step {step + 1} is not finite; try a lower rate")
        return record

    def _set_rates(self, step: int) -> list[float]:
        """Learning rate of each group: up in a line, down in a cosine; the base joins late and warms up then."""
        warmup = max(1, round(self.settings.warmup * self.total))
        down = 0.5 * (1 + math.cos(math.pi * step / self.total))
        begins = (0, round(self.settings.joint_start * self.total))
        for group, begin in zip(self.optimizer.param_groups, begins, strict=False):
            group["lr"] = group["peak"] * down * min(1.0, max(0, step + 1 - begin) / warmup)
        return [group["lr"] for group in self.optimizer.param_groups]
