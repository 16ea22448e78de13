"""THE loop: every optimizer step of a run, in sight. The entry points wire it; nothing stands between it and `step()`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Callable, Literal

import torch
from torch import Tensor, nn

from data.batches import Batches, StepBatch
from loop.memory import Memory, peak_gib
from loop.metrics import RunLog
from loop.optim import learning_rate, set_learning_rate, sync_and_clip
from loop.ranks import Ranks

MAX_SKIPPED = 5  # steps in a row without a finite loss and gradient, after which the run stops


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and on how much at once the adapters are trained."""

    epochs: int
    rows_per_step: int  # rows of one optimizer step, over all ranks
    microbatch_tokens: int  # most tokens of one forward and backward pass
    learning_rate: float  # at the end of the warmup
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = 0.03  # of all steps
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw8bit"
    recompute: bool = True  # recompute activations in the backward pass, decoder layer by decoder layer
    keep_layers: int = 0  # but keep those of the last so many layers of each stage: `loop.plan --fit` says how many fit
    max_steps: int | None = None  # optimizer steps; null: as many as `epochs` take
    seed: int = 42
    deterministic: bool = False  # on GPU: bit-equal repeats, slower; the CPU always repeats
    router_stats: bool = False  # record each step how evenly every layer's routed experts were used
    memory_trace: int | None = None  # optimizer step whose every allocation is recorded, as a page in the run's directory

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("rows_per_step", 1), ("microbatch_tokens", 128), ("seed", 0), ("keep_layers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"train.{name} is {getattr(self, name)}, expected at least {least}")
        if self.keep_layers and not self.recompute:
            raise ValueError("train.keep_layers keeps layers from being recomputed, but train.recompute is false: all are kept")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"train.max_steps is {self.max_steps}, expected at least 1, or null")
        if self.memory_trace is not None and self.memory_trace < 1:
            raise ValueError(f"train.memory_trace is {self.memory_trace}, expected the number of a step from 1, or null")
        if self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError("train.learning_rate and train.max_grad_norm must be above 0")
        if not 0 <= self.warmup_fraction <= 1 or self.weight_decay < 0:
            raise ValueError("train.warmup_fraction must be from 0 to 1, train.weight_decay at least 0")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.max_steps or self.epochs * steps_per_epoch


def fit(
    config: TrainConfig,
    done: int,
    batches: Batches,
    adapters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    forward_backward: Callable[[StepBatch], Tensor],
    evaluate: Callable[[], tuple[float, dict[str, float]]],
    save: Callable[[int, float], None],
    eval_every: int,
    save_every: int,
    ranks: Ranks,
    log: RunLog,
    memory: Memory,
    load_balance: Callable[[], dict[str, Any]] | None = None,
    timings: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Trains from after step `done` to the end.

    Args:
        forward_backward: adds the gradients of this rank's microbatches, returns their losses (see accumulate.py).
        evaluate: held-out loss, overall and by source.
        save: writes the checkpoint of a step and its held-out loss.
        load_balance: how evenly experts were used in the step, by layer (see model/balance.py).
        timings: more to record of each step (see gpipe.py).

    Raises:
        ValueError: loss or gradients were not finite in 5 steps in a row.
    """
    total = config.total_steps(batches.steps_per_epoch)
    skipped_in_a_row = 0
    log.start(done, total)
    if done == 0:
        with memory.during("eval"):
            eval_loss, by_source = evaluate()
        log.eval(0, eval_loss, by_source, memory.marks(ranks))
    for batch in batches.train_steps(done, total, config.seed):
        started = time.perf_counter()
        step = batch.step
        rate = learning_rate(step, total, config.learning_rate, config.warmup_fraction, config.schedule)
        set_learning_rate(optimizer, rate)
        torch.manual_seed(config.seed + (step * ranks.world_size + ranks.rank))  # dropout, the same after a resume

        with memory.step(batch):
            losses = share_losses(forward_backward(batch), batch, ranks)
            with memory.during("sync"):
                grad_norm = sync_and_clip(adapters.values(), config.max_grad_norm, ranks).item()
            loss = sum(losses)
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            with memory.during("step"):
                if finite:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
        if not finite:
            log.say(f"step {step} skipped: {not_finite(losses, grad_norm, batch)}")
        seconds = time.perf_counter() - started
        log.step(total, {
            "step": step, "epoch": batch.epoch, "loss": loss, "lr": rate, "grad_norm": grad_norm, "skipped": not finite,
            "rows": batch.num_rows, "tokens": batch.num_tokens, "supervised_tokens": batch.num_supervised_tokens,
            "microbatches": len(batch.lines_by_slot), "microbatch_length": batch.length,
            "step_s": seconds, "tokens_per_s": batch.num_tokens / seconds, "peak_gib": peak_gib(ranks.device),
            **timings(),
        })
        log.memory(step, memory.marks(ranks))
        if load_balance is not None:
            log.record({"step": step, "router": load_balance()})
        if skipped_in_a_row == MAX_SKIPPED:
            raise ValueError(
                f"loss or gradients were not finite in {MAX_SKIPPED} steps in a row, the last at step {step}: "
                f"{not_finite(losses, grad_norm, batch)}. Lower train.learning_rate, or look at these rows"
            )

        save_now = step % save_every == 0 or step == total
        if save_now or step % eval_every == 0:
            with memory.during("eval"):
                eval_loss, by_source = evaluate()
            log.eval(step, eval_loss, by_source, memory.marks(ranks))
            if save_now:
                save(step, eval_loss)


def share_losses(losses_M: Tensor, batch: StepBatch, ranks: Ranks) -> list[float]:
    """Loss of every microbatch of the step, all ranks' in one list: each rank fills its own slots of the sum."""
    slots = torch.zeros(len(batch.lines_by_slot), dtype=torch.float64, device=ranks.device)
    slots[batch.slots.start : batch.slots.stop] = losses_M.double()
    return ranks.all_reduce(slots).tolist()  # waits for the device: once a step


def not_finite(losses: list[float], grad_norm: float, batch: StepBatch) -> str:
    """Which rows to look at."""
    bad = [slot for slot, loss in enumerate(losses) if not math.isfinite(loss)]
    lines = sorted({line for slot in bad or range(len(losses)) for line in batch.lines_by_slot[slot]})
    what = f"loss {sum(losses)}" if bad else f"gradient norm {grad_norm}"
    return f"{what} in the rows at lines {', '.join(map(str, lines))}"
