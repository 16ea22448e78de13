"""A pipeline computes what one process computes: every cut, both schedules, several replicas."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.batches import Microbatch, StepBatch
from loop import accumulate
from loop.fit import share_losses
from loop.gpipe import Pipeline
from loop.memory import Memory
from loop.optim import make_optimizer, set_learning_rate, sync_and_clip
from loop.ranks import DistributedConfig, Ranks
from model.build import build
from model.lora import LoraConfig
from model.stages import Stage
from model.tiny import write_tiny

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MEMORY = Memory(CPU)
SIZES = {"qwen3": {}, "llama": {}, "qwen3_5_moe": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}}
TARGETS = {"qwen3": (), "llama": (), "qwen3_5_moe": ("in_proj_qkv", "in_proj_z", "out_proj")}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUM_SUBLAYERS = 6
RUNS = ((4, "gpipe", 10), (4, "1f1b", 2), (2, "1f1b", 3))  # stages among four processes, schedule, optimizer steps


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    return {kind: write_tiny(root / kind, kind=kind, num_hidden_layers=3, **sizes) for kind, sizes in SIZES.items()}


@pytest.fixture(scope="module")
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, CPU)
    dist.destroy_process_group()


def make(model_dir: Path, first: int = 0, stop: int = NUM_SUBLAYERS, recompute: bool = False, rank: int = 4) -> Stage:
    """A stage whose adapters compute something: B is not zero."""
    kind = model_dir.name
    lora = LoraConfig(rank=rank, alpha=8, target=ATTENTION + TARGETS[kind], experts=kind == "qwen3_5_moe")
    stage = build(model_dir, "float32", lora, seed=0, device=CPU, recompute=recompute, first=first, stop=stop)
    with torch.no_grad():
        for name, parameter in stage.adapters().items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(sum(name.encode())))
    return stage


def make_batch(num_microbatches: int, length: int = 128, step: int = 1, replica: int = 0, num_replicas: int = 1) -> StepBatch:
    """Rows of several lengths, and padding; a replica gets its share of the same microbatches."""
    microbatches = []
    for number in range(num_microbatches):
        draw = torch.Generator().manual_seed(100 * step + number)
        lengths = (40 + number, 50, length - 90 - number)
        predict_N = torch.arange(5, 20 + 3 * number)
        microbatches.append(Microbatch(
            ids_T=torch.randint(0, 256, (length,), generator=draw), positions_T=torch.cat([torch.arange(n) for n in lengths]),
            cu_seqlens_R1=torch.tensor((0, *lengths)).cumsum(0).int(), lengths=lengths, predict_N=predict_N,
            labels_N=torch.randint(0, 256, (len(predict_N),), generator=draw), sources_N=torch.zeros_like(predict_N),
            lines=(number,), num_tokens=length,
        ))
    share = -(-num_microbatches // num_replicas)
    slots = range(min(replica * share, num_microbatches), min((replica + 1) * share, num_microbatches))
    return StepBatch(
        step=step, epoch=0, microbatches=[microbatches[slot] for slot in slots], length=length, slots=slots,
        lines_by_slot=[[number] for number in range(num_microbatches)], num_rows=num_microbatches,
        num_tokens=length * num_microbatches, num_supervised_tokens=sum(len(mb.predict_N) for mb in microbatches),
    )


def take_gradients(stage: Stage) -> dict[str, Tensor]:
    gradients = {name: parameter.grad for name, parameter in stage.adapters().items()}
    for parameter in stage.adapters().values():
        parameter.grad = None
    return gradients


def difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    worst = max((difference(gradient, expected[name]), name) for name, gradient in gradients.items())
    assert worst[0] < 1e-6, worst


@pytest.mark.parametrize("kind", SIZES)
def test_every_cut_into_2_3_and_4_stages_gives_the_same_losses_and_gradients(checkpoints, world_of_one, kind):
    whole, batch = make(checkpoints[kind]), make_batch(3)
    expected_losses = accumulate.forward_backward(whole, MEMORY, batch)
    expected = take_gradients(whole)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    num_tried = 0
    for num_stages in (2, 3, 4):
        for cuts in combinations(range(1, NUM_SUBLAYERS), num_stages - 1):
            stages = [Stage(whole.model, *bounds, recompute=num_tried % 2 == 1).train()
                      for bounds in zip((0, *cuts), (*cuts, NUM_SUBLAYERS))]
            for schedule in ("gpipe", "1f1b"):
                losses = Pipeline(stages, world_of_one, schedule, MEMORY).forward_backward(batch)
                assert difference(losses, expected_losses) < 1e-6, (cuts, schedule)
                check(take_gradients(whole), expected)
            num_tried += 1
    assert num_tried == 5 + 10 + 10


@pytest.mark.parametrize("kind", SIZES)
def test_a_stage_is_built_as_its_part_of_the_whole(checkpoints, kind):
    """Only its modules, with the same names, weights and first adapters; a tied head is a copy of the embedding."""
    whole = make(checkpoints[kind])
    tensors = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    for cut in range(1, NUM_SUBLAYERS):
        parts = [make(checkpoints[kind], 0, cut), make(checkpoints[kind], cut, NUM_SUBLAYERS)]
        names = [{**dict(part.named_parameters()), **dict(part.named_buffers())} for part in parts]
        shared = {name for name in names[0].keys() & names[1].keys() if "rotary_emb" not in name}
        assert not shared
        for name, tensor in {**names[0], **names[1]}.items():
            source = name if name in tensors else name.replace("lm_head", "model.embed_tokens")
            assert torch.equal(tensor, tensors[source]), name
        missing = tensors.keys() - names[0].keys() - names[1].keys()
        assert not missing


def test_a_stage_without_adapters_is_passed_through(checkpoints, world_of_one):
    """Such as a first stage that holds attention alone, where only feed-forwards are adapted."""
    def cut(model_dir, first, stop):
        lora = LoraConfig(rank=4, alpha=8, target=("down_proj",))
        return build(model_dir, "float32", lora, seed=0, device=CPU, recompute=True, first=first, stop=stop)

    stages = [cut(checkpoints["llama"], first, stop) for first, stop in ((0, 1), (1, 6))]
    whole, batch = cut(checkpoints["llama"], 0, 6), make_batch(2)
    expected_losses = accumulate.forward_backward(whole, MEMORY, batch)
    assert torch.equal(Pipeline(stages, world_of_one, "1f1b", MEMORY).forward_backward(batch), expected_losses)
    expected = take_gradients(whole)
    assert not stages[0].adapters() and stages[1].adapters().keys() == expected.keys()
    assert all(torch.equal(p.grad, expected[name]) for name, p in stages[1].adapters().items() if name.endswith("lora_B"))


def worker(model_dir: Path) -> None:
    """One of four processes: 4 stages, then 2 stages of 2 replicas, against the whole model.

    One replica equals it to the last bit; two add up gradients in another order.
    """
    torch.set_num_threads(1)
    cuts = {4: (1, 2, 5), 2: (3,)}
    ranks = Ranks.from_launcher()
    ranks.connect(DistributedConfig(timeout_s=60))
    alone = Ranks(0, 1, 0, CPU)
    for num_stages, schedule, num_steps in RUNS:
        split = Ranks(ranks.rank, ranks.world_size, ranks.local_rank, CPU, num_stages, watch=ranks.watch)
        split.make_groups(timedelta(seconds=60))
        bounds = list(zip((0, *cuts[num_stages]), (*cuts[num_stages], NUM_SUBLAYERS)))[split.stage]
        stage, whole = make(model_dir, *bounds, recompute=True), make(model_dir)
        pipeline = Pipeline([stage], split, schedule, MEMORY)
        optimizers = [make_optimizer("adamw", s.adapters().values(), 0.01) for s in (stage, whole)]
        tolerance = 1e-5 if split.num_replicas > 1 else 0.0
        for step in range(1, num_steps + 1):
            # microbatches and their length change between steps; in one, no microbatch falls to the second replica
            num_microbatches, length = ((6, 128), (6, 256), (1, 128), (5, 256))[step % 4]
            share = make_batch(num_microbatches, length, step, split.replica, split.num_replicas)
            everything = make_batch(num_microbatches, length, step)
            evaluated = pipeline.forward_only(share)
            assert (len(evaluated) == len(share.microbatches)) == (stage.is_last or not share.microbatches)
            for losses_N, expected_N in zip(evaluated, accumulate.forward_only(whole, everything)[share.slots.start:]):
                assert difference(losses_N, expected_N) <= tolerance
            losses = share_losses(pipeline.forward_backward(share), share, split)
            expected_losses = share_losses(accumulate.forward_backward(whole, MEMORY, everything), everything, alone)
            norm = sync_and_clip(stage.adapters().values(), 0.5, split)
            expected_norm = sync_and_clip(whole.adapters().values(), 0.5, alone)
            assert difference(torch.tensor(losses), torch.tensor(expected_losses)) <= tolerance
            if step == 1:
                assert difference(norm, expected_norm) < 1e-6
                expected = {name: parameter.grad for name, parameter in whole.adapters().items()}
                check({name: parameter.grad for name, parameter in stage.adapters().items()}, expected)
            for optimizer in optimizers:
                set_learning_rate(optimizer, 1e-2)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        expected = whole.adapters()
        for name, parameter in stage.adapters().items():
            assert difference(parameter, expected[name]) <= tolerance, name
        gathered = split.gather_stages({name: parameter.detach() for name, parameter in stage.adapters().items()})
        if split.is_main:
            assert gathered.keys() == expected.keys()
            assert max(difference(gathered[name], expected[name]) for name in expected) <= tolerance
            print(f"{num_stages} stages, {split.num_replicas} replicas, {schedule}: equal", flush=True)
    ranks.disconnect()


def test_across_processes_ten_steps_stay_equal(checkpoints):
    """Also with replicas, with shapes that change from step to step, and with a replica that gets no microbatch."""
    command = [sys.executable, "-m", "loop.launch", "--standalone", "--nproc-per-node", "4", __file__,
               str(checkpoints["qwen3_5_moe"])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line for line in done.stdout.splitlines() if "equal" in line] == [
        f"{num_stages} stages, {4 // num_stages} replicas, {schedule}: equal" for num_stages, schedule, _ in RUNS]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
