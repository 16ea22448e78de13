"""Trains LoRA adapters on a model that is split over several devices: the calls of train.py, one stage a rank.

torchrun pipeline_train.py --split 40 [--config configs/35b.yaml] [key=value ...]
torchrun --nproc-per-node 2 pipeline_train.py --split 40       # the same: started alone, it starts the other ranks itself
"""

from __future__ import annotations

from loop.config import parse_pipeline_command_line
from loop.errors import run_command

if __name__ == "__main__":  # a mistyped setting is answered here, before torch is imported
    run_command(parse_pipeline_command_line)

import torch

from loop.config import Config
from loop.distributed.groups import launched_ranks
from loop.distributed.launch import restart_as_ranks
from loop.fit import fit
from loop.memory.phases import Memory
from loop.out_of_memory import reporting
from loop.pipeline.gpipe import passes
from loop.pipeline.split import check_split, choose_ranks, choose_split, table
from loop.planned import Plan
from loop.run import finish, headline, load_batches, load_state, prepare_directory, start
from loop.state import resume
from model.build import text_config


def main() -> None:
    config = parse_pipeline_command_line()
    num_stages = stages_to_start(config)
    ranks, model_dir, log = start(config, num_stages)
    if num_stages > 1:
        ranks.on_main(lambda: check_split(config.pipeline.split, 2 * text_config(model_dir).num_hidden_layers))
    ranks.on_main(lambda: prepare_directory(config, log.say))

    batches, held_out = load_batches(config, model_dir, ranks)
    ranks.split, costs = choose_split(config, model_dir, batches.rows, num_stages)
    log.say(table(costs, ranks.split, ranks.device.type, ranks.num_replicas))
    plan = Plan(config, ranks, log.planned)  # of memory, by a process beside this one
    memory = Memory(ranks.device, trace_step=config.train.memory_trace)
    with reporting(config, batches, held_out, ranks, memory, plan):
        state = load_state(config, model_dir, batches, held_out, ranks, memory)
        resume(config, state, ranks, log.say)
        log.say(headline(batches, state, ranks))
        forward_backward, forward_only = passes(state.stage, ranks, config.pipeline.schedule, log, memory)
        fit(config, state, batches, held_out, forward_backward, forward_only, ranks, log, memory)
    finish(config, plan, memory, log, ranks)


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
