"""Trains LoRA adapters on a model that is split over several devices: the calls of train.py, one stage a rank.

torchrun pipeline_train.py --split 40 [--config configs/35b.yaml] [key=value ...]
torchrun --nproc-per-node 2 pipeline_train.py --split 40       # the same: started alone, it starts the other ranks itself
"""

from __future__ import annotations

import gc

from loop.config.command_line import parse_command_line
from loop.distributed.launch import start_stages
from loop.distributed.preflight import check_split, preflight
from loop.errors import run_command

if __name__ == "__main__":  # mistakes are answered, and the other ranks started, before everything else is imported
    run_command(lambda: start_stages(preflight(splits=True).pipeline))
    gc.disable()  # until the model is built: it would go through all that is imported, again and again

from loop.compiling import total_tokens
from loop.fit import fit
from loop.memory.phases import Memory
from loop.out_of_memory import reporting
from loop.paths import prove
from loop.pipeline.gpipe import passes
from loop.pipeline.split import choose_split, reason, table
from loop.planned import Plan
from loop.run import earlier_start, finish, headline, leave, load_batches, load_state, prepare_directory, start
from loop.state import resume
from model.build import text_config


def main() -> None:
    config = parse_command_line(splits=True)
    num_stages = start_stages(config.pipeline)
    ranks, model_dir, log = start(config, num_stages)
    if num_stages == 1:
        log.say("one GPU: there is nothing to split, the whole model trains on it")
    else:
        ranks.on_main(lambda: check_split(config.pipeline.split, 2 * text_config(model_dir).num_hidden_layers))
    ranks.on_main(lambda: prepare_directory(config, log.say))

    batches, held_out, chat = load_batches(config, model_dir, ranks)
    earlier = earlier_start(config, model_dir, batches, held_out, ranks, log.say)  # of this run, and where it ended
    if earlier.is_finished:
        return leave(config, log, ranks)
    prove(config, model_dir, ranks, log.say, total_tokens(config, batches))  # that what runs fast here computes right
    ranks.split, costs = choose_split(config, model_dir, batches.rows, num_stages)
    log.say(table(costs, ranks.split, ranks.device.type, ranks.num_replicas))
    if config.pipeline.split == "auto" and ranks.split:
        log.say(reason(costs, ranks.split))
    plan = Plan(config, ranks, log.planned, earlier.done)  # of memory, by a process beside this one
    memory = Memory(ranks.device, trace_step=config.train.memory_trace)
    with reporting(config, batches, held_out, ranks, memory, plan):
        state = load_state(config, model_dir, earlier, chat, ranks, memory, log.say)
        resume(config, state, ranks, log.say)
        log.say(headline(batches, held_out, state, ranks))
        forward_backward, forward_only = passes(state.stage, ranks, config.pipeline.schedule, log, memory)
        fit(config, state, batches, held_out, forward_backward, forward_only, ranks, log, memory)
    finish(config, plan, memory, log, ranks)


if __name__ == "__main__":
    run_command(main)
