"""A pipeline computes what one process computes: every cut, both schedules, several replicas."""

from __future__ import annotations

import sys
from datetime import timedelta
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.batches import Microbatch, StepBatch
from loop import accumulate
from loop.distributed.groups import Ranks
from loop.fit import share_losses
from loop.memory.phases import Memory
from loop.metrics import RunLog
from loop.optim import make_optimizer, set_learning_rate, sync_and_clip
from loop.pipeline.gpipe import Pipeline
from model.build import build
from model.config import LoraConfig
from model.stages import Stage
from model.tiny.write import write_tiny
from tests.processes import Run

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MEMORY = Memory(CPU)
LOG = RunLog(Path(), "", CPU, enabled=False)
SIZES = {"qwen3": {}, "llama": {}, "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2}, "qwen3_5_moe": {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_experts": 4, "num_experts_per_tok": 2}}
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = {"qwen3": FEED_FORWARD, "llama": FEED_FORWARD, "qwen3_moe": (),
           "qwen3_5_moe": FEED_FORWARD + ("in_proj_qkv", "in_proj_z", "out_proj")}
NUM_SUBLAYERS = 6
RUNS = ((4, "gpipe", 5), (4, "1f1b", 2), (2, "1f1b", 3))  # stages among four processes, schedule, optimizer steps


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    return {kind: write_tiny(root / kind, kind=kind, num_hidden_layers=3, **sizes) for kind, sizes in SIZES.items()}


def make(model_dir: Path, first: int = 0, stop: int = NUM_SUBLAYERS, recompute: bool = False, rank: int = 4) -> Stage:
    """A stage whose adapters compute something: B is not zero."""
    kind = model_dir.name
    lora = LoraConfig(rank=rank, alpha=8, target=ATTENTION + TARGETS[kind], experts=kind.endswith("moe"))
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


# Run by each of several processes


def every_cut(model_dir: Path, ranks: Ranks, num_stages: int) -> int:
    """All ways to cut the model into so many stages, under both schedules; each replica computes the whole batch.

    Returns:
        The number of ways.
    """
    whole, batch = make(model_dir), make_batch(4)
    expected_losses = accumulate.forward_backward(whole, MEMORY, batch)
    expected = take_gradients(whole)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    all_cuts = list(combinations(range(1, NUM_SUBLAYERS), num_stages - 1))
    for number, cuts in enumerate(all_cuts):
        ranks.split = cuts
        stage = Stage(whole.model, ranks.first, ranks.stop or NUM_SUBLAYERS, recompute=number % 2 == 1).train()
        held = set(range(ranks.first, ranks.stop or NUM_SUBLAYERS))
        for schedule in ("gpipe", "1f1b"):
            losses = Pipeline(stage, ranks, schedule, LOG, MEMORY).forward_backward(batch)
            if stage.is_last:
                assert difference(losses, expected_losses) < 1e-6, (cuts, schedule)
            gradients = {name: gradient for name, gradient in take_gradients(whole).items() if gradient is not None}
            assert {sublayer_of(name) for name in gradients} == held, (cuts, schedule)
            check(gradients, expected)
    return len(all_cuts)


def sublayer_of(name: str) -> int:
    layer = int(name.split(".layers.")[1].partition(".")[0])
    return 2 * layer + (".mlp." in name)


def without_adapters(model_dir: Path, ranks: Ranks) -> None:
    """Such as a first stage that holds attention alone, where only feed-forwards are adapted."""
    def build_part(first: int, stop: int) -> Stage:
        lora = LoraConfig(rank=4, alpha=8, target=("down_proj",))
        return build(model_dir, "float32", lora, seed=0, device=CPU, recompute=True, first=first, stop=stop)

    ranks.split = (1,)
    stage, whole, batch = build_part(ranks.first, ranks.stop or NUM_SUBLAYERS), build_part(0, NUM_SUBLAYERS), make_batch(2)
    expected_losses = accumulate.forward_backward(whole, MEMORY, batch)
    losses = Pipeline(stage, ranks, "1f1b", LOG, MEMORY).forward_backward(batch)
    expected = take_gradients(whole)
    if stage.is_first:
        assert not stage.adapters()
    else:
        assert torch.equal(losses, expected_losses) and stage.adapters().keys() == expected.keys()
        assert all(torch.equal(p.grad, expected[name]) for name, p in stage.adapters().items() if name.endswith("lora_B"))


def many_steps(model_dir: Path, ranks: Ranks, schedule: str, num_steps: int) -> None:
    """Steps of a split model against those of the whole one. One replica equals it to the last bit; two add up gradients
    in another order."""
    alone = Ranks()
    ranks.split = {4: (1, 2, 5), 2: (3,)}[ranks.num_stages]
    stage, whole = make(model_dir, ranks.first, ranks.stop or NUM_SUBLAYERS, recompute=True), make(model_dir)
    pipeline = Pipeline(stage, ranks, schedule, LOG, MEMORY)
    optimizers = [make_optimizer("adamw", s.adapters().values(), 0.01) for s in (stage, whole)]
    tolerance = 1e-5 if ranks.num_replicas > 1 else 0.0
    for step in range(1, num_steps + 1):
        # microbatches and their length change between steps; in one, no microbatch falls to the second replica
        num_microbatches, length = ((6, 128), (6, 256), (1, 128), (5, 256))[step % 4]
        share = make_batch(num_microbatches, length, step, ranks.replica, ranks.num_replicas)
        everything = make_batch(num_microbatches, length, step)
        evaluated = pipeline.forward_only(share)
        assert (len(evaluated) == len(share.microbatches)) == (stage.is_last or not share.microbatches)
        for losses_N, expected_N in zip(evaluated, accumulate.forward_only(whole, MEMORY, everything)[share.slots.start:]):
            assert difference(losses_N, expected_N) <= tolerance
        losses, _ = share_losses(pipeline.forward_backward(share), share, ranks)
        expected_losses, _ = share_losses(accumulate.forward_backward(whole, MEMORY, everything), everything, alone)
        norm = sync_and_clip(stage.adapters().values(), 0.5, ranks)
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
    gathered = ranks.gather_stages({name: parameter.detach() for name, parameter in stage.adapters().items()})
    if ranks.is_main:
        assert gathered.keys() == expected.keys()
        assert max(difference(gathered[name], expected[name]) for name in expected) <= tolerance


def worker(root: Path) -> None:
    """Everything above, as far as this number of processes can be split for it."""
    torch.set_num_threads(1)
    launched = Ranks.from_launcher()
    launched.connect(60)
    for num_stages in {3: (3,), 4: (4, 2)}[launched.world_size]:
        ranks = Ranks(launched.rank, launched.world_size, num_stages, watch=launched.watch)
        ranks.make_groups(timedelta(seconds=60))
        for kind in SIZES:
            num_ways = every_cut(root / kind, ranks, num_stages)
            say(ranks, f"{kind}, {num_stages} stages: {num_ways} ways to cut are equal")
        for steps_of, schedule, num_steps in RUNS:
            if steps_of == num_stages:
                many_steps(root / "qwen3_5_moe", ranks, schedule, num_steps)
                say(ranks, f"{num_stages} stages, {ranks.num_replicas} replicas, {schedule}: equal")
        if num_stages == 2:
            without_adapters(root / "llama", ranks)
            say(ranks, "a stage without adapters: equal")
    launched.disconnect()


def say(ranks: Ranks, line: str) -> None:
    ranks.all_reduce(torch.zeros(1))  # everyone has come this far
    if ranks.is_main:
        print(line, flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [3, 4])
def test_every_cut_and_many_steps_across_processes(checkpoints, num_processes, tmp_path):
    """2 to 4 stages under both schedules; also with replicas, with shapes that change from step to step, and with a
    replica that gets no microbatch."""
    root = checkpoints["llama"].parent
    run = Run(__file__, root, ranks=num_processes, directory=tmp_path)
    assert run.wait(400) == [0] * num_processes, run.said[-4000:]
    said = [line for line in run.said.splitlines() if "equal" in line]
    if num_processes == 3:
        assert said == [f"{kind}, 3 stages: 10 ways to cut are equal" for kind in SIZES]
    else:
        assert said == [
            *(f"{kind}, 4 stages: 10 ways to cut are equal" for kind in SIZES),
            "4 stages, 1 replicas, gpipe: equal", "4 stages, 1 replicas, 1f1b: equal",
            *(f"{kind}, 2 stages: 5 ways to cut are equal" for kind in SIZES),
            "2 stages, 2 replicas, 1f1b: equal", "a stage without adapters: equal"]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
