"""Trains LoRA adapters on one device, or data-parallel on several: config -> ranks -> rows -> model -> optimizer -> fit.

python train.py --config configs/demo.yaml [key=value ...]
torchrun --nproc-per-node 2 train.py --config configs/4b.yaml [key=value ...]
"""

from __future__ import annotations

import gc
from functools import partial

from loop.config.command_line import parse_command_line
from loop.distributed.preflight import preflight
from loop.errors import run_command

if __name__ == "__main__":  # mistakes in settings, rows and model are answered here, before torch is imported
    run_command(preflight)
    gc.disable()  # until the model is built: it would go through all that is imported, again and again

from loop import accumulate
from loop.compiling import total_tokens
from loop.fit import fit
from loop.memory.phases import Memory
from loop.out_of_memory import reporting
from loop.paths import prove
from loop.planned import Plan
from loop.run import earlier_start, finish, headline, leave, load_batches, load_state, prepare_directory, start
from loop.state import resume


def main() -> None:
    config = parse_command_line()
    ranks, model_dir, log = start(config)
    ranks.on_main(lambda: prepare_directory(config, log.say))

    batches, held_out, chat = load_batches(config, model_dir, ranks)
    earlier = earlier_start(config, model_dir, batches, held_out, ranks, log.say)  # of this run, and where it ended
    if earlier.is_finished:
        return leave(config, log, ranks)
    prove(config, model_dir, ranks, log.say, total_tokens(config, batches))  # that what runs fast here computes right
    plan = Plan(config, ranks, log.planned, earlier.done)  # of memory, by a process beside this one
    memory = Memory(ranks.device, trace_step=config.train.memory_trace)
    with reporting(config, batches, held_out, ranks, memory, plan):
        state = load_state(config, model_dir, earlier, chat, ranks, memory, log.say)
        resume(config, state, ranks, log.say)
        log.say(headline(batches, held_out, state, ranks))
        fit(
            config, state, batches, held_out,
            partial(accumulate.forward_backward, state.stage, memory), partial(accumulate.forward_only, state.stage, memory),
            ranks, log, memory,
        )
    finish(config, plan, memory, log, ranks)


if __name__ == "__main__":
    run_command(main)
