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
from loop.errors import FOR_USER
from loop.evaluate import evaluate
from loop.line_file import LOCK
from loop.memory.phases import Memory
from loop.metrics import RunLog
from loop.optim import learning_rate, set_learning_rate, sync_and_clip
from loop.samples import samples
from loop.state import State, save, save_on_signals
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
    log.start(state.step, total, state.evaluated)
    save_on_signals(config, state, ranks, log.sync, log.say)
    if not state.evaluated:  # a new run, or one that a signal has stopped
        conclude(config, state, total, held_out, forward_only, ranks, log, memory)
    for batch in batches.train_steps(state.step, total, train.seed):
        started = time.perf_counter()
        step = batch.step
        rate = learning_rate(step, total, train.learning_rate, train.warmup_fraction, train.schedule)
        set_learning_rate(state.optimizer, rate)
        torch.manual_seed(train.seed + (step * ranks.world_size + ranks.rank))  # dropout, the same after a resume

        with memory.step(batch):
            losses, since_saved_s = share_losses(forward_backward(batch), batch, ranks, time.monotonic() - state.saved_at)
            with memory.during("sync"):
                grad_norm = sync_and_clip(state.adapters.values(), train.max_grad_norm, ranks).item()
            loss = sum(losses)
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            ranks.signals.update_begins(step)  # a signal waits until `step_ends`, or this line waits for ever
            with memory.during("update"):
                if finite:
                    state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)

        state.step = step
        log.step(batch, total, loss=loss, lr=rate, grad_norm=grad_norm, skipped=not finite,
                 step_s=time.perf_counter() - started, memory=memory, marks=memory.marks(ranks))
        if step == train.memory_trace:
            log.trace(step, memory, ranks)
        if train.router_stats:
            log.record({"step": step, "router": load_balance(state.stage.model, ranks.sum_replicas, ranks.gather_stages)})
        ranks.signals.step_ends(step)
        num_skipped = 0 if finite else num_skipped + 1
        if not finite:
            skip(not_finite(losses, grad_norm, batch), num_skipped, step, log)
        conclude(config, state, total, held_out, forward_only, ranks, log, memory,
                 late=since_saved_s > config.checkpoint.every_s)
    state.writer.wait()  # until the last checkpoint is there


def conclude(
    config: Config, state: State, total: int, held_out: Batches, forward_only: Callable[[StepBatch], list[Tensor]],
    ranks: Ranks, log: RunLog, memory: Memory, late: bool = False,
) -> None:
    """Evaluates and saves, where one of them is due after step `state.step`.

    Args:
        late: whether a checkpoint is due by time.
    """
    step = state.step
    save_now = step > 0 and (step % config.checkpoint.every == 0 or step == total)
    eval_loss = None
    if save_now or step % config.eval.every == 0:
        eval_loss, by_source = evaluate(held_out, config.eval.max_rows, forward_only, ranks, memory)
        log.eval(step, eval_loss, by_source, memory.marks(ranks))
        if state.chat is not None:
            log.samples(samples(state.stage, held_out.rows, config.eval.samples, step, state.chat))
    if save_now or late:
        log.sync()  # the checkpoint relies on the metrics up to its step
        save(config, state, eval_loss, ranks, log.say)
    state.writer.check()  # so that a full disk ends the run now, and not at the next checkpoint
    if log.is_lost():
        if (log.run_dir / LOCK).exists():  # what this run still draws or saves makes the directory anew, without a lock
            raise ValueError(f"{log.run_dir}: another directory took its place while the run trained. Start it with another "
                             "run=NAME, or put its own directory back")
        ranks.signals.stop(f"{log.run_dir}, which was removed or renamed while the run trained", FOR_USER)


def skip(reason: str, num_skipped: int, step: int, log: RunLog) -> None:
    """Says that a step changed nothing; ends the run when it is one too many in a row."""
    log.say(f"step {step} skipped: {reason}")
    if num_skipped == MAX_SKIPPED:
        raise ValueError(f"loss or gradients were not finite in {MAX_SKIPPED} steps in a row, the last at step {step}: "
                         f"{reason}. Lower train.learning_rate, or look at these rows")


def share_losses(losses_M: Tensor, batch: StepBatch, ranks: Ranks, clock_s: float = 0.0) -> tuple[list[float], float]:
    """Loss of every microbatch of the step, all ranks' in one list, and rank 0's clock: each rank fills its own slots of the
    sum."""
    slots = torch.zeros(len(batch.lines_by_slot) + 1, dtype=torch.float64, device=ranks.device)
    slots[batch.slots.start : batch.slots.stop] = losses_M.double()
    slots[-1] = clock_s if ranks.is_main else 0
    *losses, clock_s = ranks.all_reduce(slots).tolist()  # waits for the device: once a step
    return losses, clock_s


def not_finite(losses: list[float], grad_norm: float, batch: StepBatch) -> str:
    """Which rows to look at."""
    bad = [slot for slot, loss in enumerate(losses) if not math.isfinite(loss)]
    lines = sorted({line for slot in bad or range(len(losses)) for line in batch.lines_by_slot[slot]})
    what = f"loss {sum(losses)}" if bad else f"gradient norm {grad_norm}"
    return f"{what} in the rows at lines {', '.join(map(str, lines))}"
