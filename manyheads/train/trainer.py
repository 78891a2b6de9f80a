"""The training loop: Medusa-1, where the base stays as it is, or Medusa-2 (Cai et al. 2024, section 2.2)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.config import ConfigError
from manyheads.train.base import Base, half_precision, send
from manyheads.train.dataset import Batch, Order
from manyheads.train.heads import TrainedHeads
from manyheads.train.loss import chunked, cross_entropy, divergence
from manyheads.train.progress import Progress
from manyheads.train.settings import TrainSettings
from manyheads.train.state import METRICS, load_state, open_metrics, save_state


class Trainer:
    """One run.

    Args:
        base: trained along with the heads if its parameters take gradients.
        teacher: the base as it was, for joint training; None else.
        data: packed rows, on the CPU.
        folder: for checkpoints and metrics.
    """

    def __init__(
        self, settings: TrainSettings, base: Base, teacher: Base | None, heads: TrainedHeads, data: Batch, folder: Path
    ) -> None:
        self.settings, self.base, self.teacher, self.heads, self.data = settings, base, teacher, heads, data
        self.folder = folder
        self.order = Order(len(data.tokens), settings.rows * settings.accumulate, settings.seed)
        self.total = settings.max_steps or settings.epochs * self.order.steps_per_epoch
        groups: list[dict[str, Any]] = [{"params": list(heads.parameters()), "peak": settings.rate}]
        self.parts: dict[str, Any] = {"heads": heads}
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
        wanted = rows.ahead(settings.heads)  # [R, L, 1 + heads]
        wanted[..., 1:] = self.heads.place(wanted[..., 1:], len(self.base.projection))
        # of the whole step, so that accumulated groups of rows are as one large group
        counts = (wanted >= 0).sum(dim=(0, 1)).clamp(min=1)
        losses = torch.zeros(settings.heads + 1, device=device)
        joint = settings.joint and rates[1] > 0
        for part in torch.split(torch.arange(len(rows.tokens)), settings.rows):
            losses += self._backward(rows.take(part), wanted[part].flatten(0, 1), counts, joint)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        *sums, norm = torch.cat([losses, norm[None]]).tolist()  # the one place where the host waits for the device
        base_loss, *head_losses = [round(v, 6) for v in (torch.tensor(sums) / counts).tolist()]
        seconds, tokens = time.perf_counter() - start, int((rows.part > 0).sum())
        record: dict[str, Any] = {
            "loss": round(sum(settings.discount**h * loss for h, loss in enumerate(head_losses)), 6),
            "head_losses": head_losses,
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

    def _backward(self, batch: Batch, targets: Tensor, counts: Tensor, joint: bool) -> Tensor:
        """Add the gradients of a group of rows; the sums of the losses [1 + heads], base first.

        Args:
            batch, targets: on the CPU, where finding what counts makes nobody wait.
            targets: [R · L, 1 + heads] int64, rows of the projections; negative ones do not count.
            counts: [1 + heads], targets of the whole step.
        """
        device = self.base.device
        indices = [send((column >= 0).nonzero()[:, 0], device) for column in targets.T]
        targets = send(targets, device)
        with torch.set_grad_enabled(joint):
            states = self.base.hidden(batch)
        hidden = states.detach()
        grad = torch.zeros_like(hidden, dtype=torch.float32) if joint else None
        scale = self.settings.heads_weight if joint else 1.0
        sums = [torch.zeros((), device=device)]
        if joint:
            sums[0] = self._base_loss(batch, hidden, indices[0], counts, grad)
        for h in range(self.heads.num_heads):

            def loss(states: Tensor, index: Tensor, h: int = h) -> Tensor:
                with half_precision(device):
                    logits = self.heads.logits(h, states)
                return cross_entropy(logits, targets[index, h + 1])

            weight = scale * self.settings.discount**h / int(counts[h + 1])
            sums.append(chunked(loss, hidden, indices[h + 1], weight, self.settings.chunk, grad))
        if grad is not None:
            states.backward(grad.to(states.dtype))  # type: ignore[no-untyped-call]
        return torch.stack(sums)

    def _base_loss(self, batch: Batch, hidden: Tensor, index: Tensor, counts: Tensor, grad: Tensor | None) -> Tensor:
        """How far the base has gone from what it was: where it is to say what it said."""
        teacher = self.teacher
        assert teacher is not None
        with torch.no_grad():
            was = teacher.hidden(batch)

        def loss(states: Tensor, index: Tensor) -> Tensor:
            with half_precision(self.base.device):
                with torch.no_grad():
                    wanted = teacher.logits(was[index])
                return divergence(wanted, self.base.logits(states))

        return chunked(loss, hidden, index, 1 / int(counts[0]), self.settings.chunk, grad)

    def _set_rates(self, step: int) -> list[float]:
        """Learning rate of each group: up in a line, down in a cosine; the base joins late and warms up then."""
        warmup = max(1, round(self.settings.warmup * self.total))
        down = 0.5 * (1 + math.cos(math.pi * step / self.total))
        begins = (0, round(self.settings.joint_start * self.total))
        for group, begin in zip(self.optimizer.param_groups, begins, strict=False):
            group["lr"] = group["peak"] * down * min(1.0, max(0, step + 1 - begin) / warmup)
        return [group["lr"] for group in self.optimizer.param_groups]
