"""THE loop: every optimizer step of a run, in sight. The entry points wire it; nothing stands between it and `step()`."""

from __future__ import annotations

import math
import time
from typing import Callable

import torch
from torch import Tensor

from data.batches import Batches, StepBatch
from loop.config import Config
from loop.distributed.groups import Ranks
from loop.evaluate import evaluate
from loop.memory.phases import Memory, peak_gib
from loop.metrics import RunLog
from loop.optim import learning_rate, set_learning_rate, sync_and_clip
from loop.state import State, save
from model.moe.usage import load_balance

MAX_SKIPPED = 5  # steps in a row without a finite loss and gradient, after which the run stops


def fit(
    config: Config, state: State, batches: Batches, held_out: Batches,
    forward_backward: Callable[[StepBatch], Tensor], forward_only: Callable[[StepBatch], list[Tensor]],
    ranks: Ranks, log: RunLog, memory: Memory,
) -> None:
    """Trains from after step `state.step` to the end.

    Args:
        forward_backward: adds the gradients of this rank's microbatches, returns their losses (see accumulate.py).
        forward_only: the loss of each supervised position, by microbatch (likewise).

    Raises:
        ValueError: loss or gradients were not finite in 5 steps in a row.
    """
    train, num_skipped = config.train, 0
    total = train.total_steps(batches.steps_per_epoch)
    log.start(state.step, total)
    if state.step == 0:
        log.eval(0, *evaluate(held_out, config.eval.max_rows, forward_only, ranks, memory), memory.marks(ranks))
    for batch in batches.train_steps(state.step, total, train.seed):
        started = time.perf_counter()
        step = batch.step
        rate = learning_rate(step, total, train.learning_rate, train.warmup_fraction, train.schedule)
        set_learning_rate(state.optimizer, rate)
        torch.manual_seed(train.seed + (step * ranks.world_size + ranks.rank))  # dropout, the same after a resume

        with memory.step(batch):
            losses = share_losses(forward_backward(batch), batch, ranks)
            with memory.during("sync"):
                grad_norm = sync_and_clip(state.adapters.values(), train.max_grad_norm, ranks).item()
            loss = sum(losses)
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            with memory.during("update"):
                if finite:
                    state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)

        state.step = step
        log.step(batch, total, loss=loss, lr=rate, grad_norm=grad_norm, skipped=not finite,
                 step_s=time.perf_counter() - started, peak_gib=peak_gib(ranks.device))
        log.memory(step, memory.marks(ranks))
        if step == train.memory_trace:
            log.trace(step, memory, ranks)
        if train.router_stats:
            log.record({"step": step, "router": load_balance(state.stage.model, ranks.sum_replicas, ranks.gather_stages)})
        num_skipped = 0 if finite else num_skipped + 1
        if not finite:
            skip(not_finite(losses, grad_norm, batch), num_skipped, step, log)

        save_now = step % config.checkpoint.every == 0 or step == total
        if save_now or step % config.eval.every == 0:
            eval_loss, by_source = evaluate(held_out, config.eval.max_rows, forward_only, ranks, memory)
            log.eval(step, eval_loss, by_source, memory.marks(ranks))
            if save_now:
                log.sync()  # the checkpoint relies on the metrics up to its step
                save(config, state, eval_loss, ranks, log.say)


def skip(reason: str, num_skipped: int, step: int, log: RunLog) -> None:
    """Says that a step changed nothing; ends the run when it is one too many in a row."""
    log.say(f"step {step} skipped: {reason}")
    if num_skipped == MAX_SKIPPED:
        raise ValueError(f"loss or gradients were not finite in {MAX_SKIPPED} steps in a row, the last at step {step}: "
                         f"{reason}. Lower train.learning_rate, or look at these rows")


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
