"""Trains LoRA adapters on a model that is split over several devices: the calls of train.py, one stage a rank.

torchrun pipeline_train.py --split 40 [--config configs/35b.yaml] [key=value ...]
torchrun --nproc-per-node 2 pipeline_train.py --split 40       # the same: started alone, it starts the other ranks itself
"""

from __future__ import annotations

from functools import partial

import torch

from data.batches import Batches
from loop import accumulate
from loop.config import Config, parse_pipeline_command_line
from loop.errors import run_command
from loop.evaluate import evaluate
from loop.fit import fit
from loop.forecast import comparison, foresee, gathered, sentence
from loop.gpipe import Pipeline
from loop.launch import restart_as_ranks
from loop.memory import Memory
from loop.metrics import LoadingBar, RunLog
from loop.oom import reporting
from loop.optim import make_optimizer
from loop.ranks import Ranks, launched_ranks
from loop.run import course, load_splits, prepare_directory, resume, save
from loop.split import Load, balance, check_split, choose_ranks, sublayer_costs, table
from model.balance import load_balance, start_counting
from model.build import build_empty, skeleton
from model.fetch import model_directory


def main() -> None:
    config = parse_pipeline_command_line("Train LoRA adapters on a model split over several devices.")
    num_stages = stages_to_start(config)
    ranks = Ranks.from_launcher(deterministic=config.train.deterministic, num_stages=num_stages)
    model_dir = model_directory(config.model.path, quiet=ranks.local_rank != 0)
    ranks.connect(config.distributed)
    log = RunLog(config.run_dir, config.log, enabled=ranks.is_main)
    model = skeleton(model_dir, config.model.base)
    num_sublayers = 2 * model.config.num_hidden_layers
    if num_stages > 1 and config.pipeline.split != "auto":
        ranks.on_main(lambda: check_split(config.pipeline.split, num_sublayers))
    ranks.on_main(lambda: prepare_directory(config, log.say))

    train_rows, eval_rows = load_splits(config, model_dir, ranks)
    shares = (config.train.rows_per_step, config.train.microbatch_tokens, ranks.replica, ranks.num_replicas)
    train_batches, eval_batches = Batches(train_rows, *shares), Batches(eval_rows, *shares)

    costs = sublayer_costs(model, Load.of(
        config.model.base, config.lora, config.train, train_rows, config.pipeline.schedule, num_stages, ranks.num_replicas
    ))
    automatic = num_stages == 1 or config.pipeline.split == "auto"
    split = balance(costs, num_stages) if automatic else config.pipeline.split
    log.say(table(costs, split, ranks.device.type, ranks.num_replicas))

    first, stop = [0, *split][ranks.stage], [*split, num_sublayers][ranks.stage]
    plan, planned_gib = foresee(config, model_dir, ranks, train_batches, first, stop)
    log.say(sentence(plan, planned_gib))
    log.plan(planned_gib, ranks.device)
    memory = Memory(ranks.device, run_dir=config.run_dir, rank=ranks.rank, trace_step=config.train.memory_trace, say=log.say)
    with reporting(config, model_dir, ranks, train_batches, eval_batches, plan, memory, first, stop):
        with memory.during("build"):
            stage, weights = build_empty(
                model_dir, config.model.base, config.lora,
                seed=config.train.seed, device=ranks.device, recompute=config.train.recompute,
                keep_layers=config.train.keep_layers, first=first, stop=stop,
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

        pipeline = Pipeline([stage], ranks, config.pipeline.schedule, memory)
        alone = num_stages == 1
        forward_backward = partial(accumulate.forward_backward, stage, memory) if alone else pipeline.forward_backward
        forward_only = partial(accumulate.forward_only, stage) if alone else pipeline.forward_only
        log.say(
            f"{train_batches.num_rows:,} rows, {train_batches.steps_per_epoch:,} steps an epoch, "
            f"{num_stages} stage(s), {ranks.num_replicas} replica(s) on {ranks.device.type}"
        )
        fit(
            config.train, done, train_batches, adapters, optimizer, forward_backward,
            evaluate=lambda: evaluate(eval_batches, config.eval.max_rows, forward_only, ranks),
            save=lambda step, eval_loss: save(config, step, eval_loss, settings, adapters, optimizer, ranks, log),
            eval_every=config.eval.every, save_every=config.checkpoint.every,
            ranks=ranks, log=log, memory=memory,
            load_balance=partial(load_balance, stage.model, ranks.sum_replicas, ranks.gather_stages)
            if config.train.router_stats else None,
            timings=dict if alone else partial(pipeline.timings, config.run_dir),
        )
    log.say(comparison(planned_gib, gathered(memory.most_bytes, ranks)))
    log.say(f"finished: {config.run_dir}")
    log.close()
    ranks.disconnect()


def stages_to_start(config: Config) -> int:
    """The number of stages; where one process was started for several, it does not return but becomes their launcher."""
    launched = launched_ranks()
    num_stages, num_ranks = choose_ranks(config.pipeline, launched, torch.cuda.device_count())
    if num_stages == 1:
        print("one GPU: there is nothing to split, the whole model trains on it", flush=True)
    elif num_ranks > launched:
        replicas = num_ranks // num_stages
        print(f"starting {num_ranks} processes, one for each of {num_stages} stages"
              + (f" and {replicas} replicas" if replicas > 1 else ""), flush=True)
        restart_as_ranks(num_ranks)
    return num_stages


if __name__ == "__main__":
    run_command(main)
