"""Trains LoRA adapters on one device, or data-parallel on several: config -> ranks -> data -> model -> optimizer -> fit.

python train.py --config configs/demo.yaml [key=value ...]
torchrun --nproc-per-node 2 train.py --config configs/4b.yaml [key=value ...]
"""

from __future__ import annotations

from functools import partial

from data.batches import Batches
from loop import accumulate
from loop.config import parse_command_line
from loop.errors import run_command
from loop.evaluate import evaluate
from loop.fit import fit
from loop.forecast import comparison, foresee, gathered, sentence
from loop.memory import Memory
from loop.metrics import LoadingBar, RunLog
from loop.oom import reporting
from loop.optim import make_optimizer
from loop.ranks import Ranks
from loop.run import course, load_splits, prepare_directory, resume, save
from model.balance import load_balance, start_counting
from model.build import build_empty
from model.fetch import model_directory


def main() -> None:
    config = parse_command_line("Train LoRA adapters on one device or, under torchrun, data-parallel on several.")
    ranks = Ranks.from_launcher(deterministic=config.train.deterministic)
    model_dir = model_directory(config.model.path, quiet=ranks.local_rank != 0)
    ranks.connect(config.distributed)
    log = RunLog(config.run_dir, config.log, enabled=ranks.is_main)
    ranks.on_main(lambda: prepare_directory(config, log.say))

    train_rows, eval_rows = load_splits(config, model_dir, ranks)
    shares = (config.train.rows_per_step, config.train.microbatch_tokens, ranks.replica, ranks.num_replicas)
    train_batches, eval_batches = Batches(train_rows, *shares), Batches(eval_rows, *shares)

    plan, planned_gib = foresee(config, model_dir, ranks, train_batches)
    log.say(sentence(plan, planned_gib))
    log.plan(planned_gib, ranks.device)
    memory = Memory(ranks.device, run_dir=config.run_dir, rank=ranks.rank, trace_step=config.train.memory_trace, say=log.say)
    with reporting(config, model_dir, ranks, train_batches, eval_batches, plan, memory):
        with memory.during("build"):
            stage, weights = build_empty(
                model_dir, config.model.base, config.lora,
                seed=config.train.seed, device=ranks.device, recompute=config.train.recompute,
                keep_layers=config.train.keep_layers,
            )
        with memory.during("load"), LoadingBar(ranks.device, enabled=ranks.is_main) as bar:
            weights.load(model_dir, bar.advance)
        if config.train.router_stats:
            start_counting(stage.model)
        adapters = stage.adapters()
        optimizer = make_optimizer(config.train.optimizer, adapters.values(), config.train.weight_decay)
        memory.attach(stage.model, adapters.values(), optimizer)
        settings = course(config, train_rows, eval_rows)
        done = resume(config, settings, adapters, optimizer, ranks, log.say)

        log.say(describe(train_batches, ranks, sum(p.numel() for p in adapters.values())))
        fit(
            config.train, done, train_batches, adapters, optimizer,
            forward_backward=partial(accumulate.forward_backward, stage, memory),
            evaluate=lambda: evaluate(eval_batches, config.eval.max_rows, partial(accumulate.forward_only, stage), ranks),
            save=lambda step, eval_loss: save(config, step, eval_loss, settings, adapters, optimizer, ranks, log),
            eval_every=config.eval.every, save_every=config.checkpoint.every,
            ranks=ranks, log=log, memory=memory,
            load_balance=partial(load_balance, stage.model, ranks.sum_replicas) if config.train.router_stats else None,
        )
    log.say(comparison(planned_gib, gathered(memory.most_bytes, ranks)))
    log.say(f"finished: {config.run_dir}")
    log.close()
    ranks.disconnect()


def describe(batches: Batches, ranks: Ranks, num_trained: int) -> str:
    return (
        f"{batches.num_rows:,} rows, {batches.steps_per_epoch:,} steps an epoch, {num_trained:,} trained parameters, "
        f"{ranks.world_size} rank(s) on {ranks.device.type}"
    )


if __name__ == "__main__":
    run_command(main)
