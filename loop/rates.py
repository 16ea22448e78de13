"""How fast a device computes and moves data: of known cards from a table, of this machine by timing a model's own operations.
Measuring builds the model's last layers with random weights and takes a second or two for a small model."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Iterable, Sequence

import torch

from loop.config import Config
from loop.memory.counter import Counter, Operation
from loop.optim import make_optimizer
from model.build import Weights, build_empty, text_config
from model.mixers import Segments
from model.ops.work import Work
from model.weights.shards import Weight

NUM_LAYERS = 4  # among the last four of Qwen3.5's layers are both kinds
ROUNDS = 2
FEW_TOKENS = 16  # so few that a layer's time is that of its calls
MOST_TOKENS = {"cuda": 8192, "cpu": 1024}  # that these layers are timed with, fewer where they have many weights
MOST_FLOPS = {"cuda": 1e14, "cpu": 2e11}
MOST_HEAD = 2e8  # weights of the head of a model that is timed on a CPU
Rate = tuple[float, float]  # floating-point operations and bytes a second
UNLIMITED = float("inf")
GENERAL = ("matmul", "grouped matmul", "float32 matmul", "attention forward", "attention backward")
COMPUTES = ("matmul", "ward")  # how kinds of operations end that are limited by floating-point operations
CPU_LINK, PCIE_LINK = 1e9, 1e10  # gloo between two processes of a host; NCCL by way of the host
KERNEL_S = 2e-6
BLOCKS = ("aten::bmm", "aten::baddbmm", "aten::baddbmm_")  # matmuls of attention on a CPU
MATMULS, TILE_FLOPS = ("aten::mm", "aten::addmm", "aten::addmm_"), 2.0 * 128 * 64 * 1024


@dataclass(frozen=True)
class Rates:
    """What a device reaches in practice.

    `by_kind` has the rates of kinds of operations, see `kind_of`, and those of all others under "matmul", "float32 matmul",
    "grouped matmul" (of experts, in one kernel), "attention forward", "attention backward" and "other".
    """

    name: str
    by_kind: dict[str, Rate]
    call_s: float  # from one operation to the next where the device has nothing to do
    link: float  # bytes a second between two ranks
    memory_gib: float | None = None
    generation: int | None = None  # of the card, as in model/devices.py
    kernel_s: float = 0.0  # the shortest kernel, with the pause behind it
    wave: float = 0.0  # floating-point operations of a matmul that is just large enough for all processors of a card
    waits: bool = True  # whether a call ends when its work is done, as on a CPU; else the device works through a queue

    @classmethod
    def of_card(cls, name: str, tflops: float, float32: float, forward: float, backward: float, tb_s: float, gb_s: float,
                memory_gib: float, generation: int, processors: int) -> Rates:
        speeds = {"matmul": tflops, "float32 matmul": float32, "attention forward": forward, "attention backward": backward,
                  "grouped matmul": tflops / 2, "other": float32}
        return cls(name, {kind: (1e12 * speed, 1e12 * tb_s) for kind, speed in speeds.items()}, 7e-6, 1e9 * gb_s, memory_gib,
                   generation, KERNEL_S, processors * TILE_FLOPS, waits=False)

    def seconds(self, operation: Operation) -> float:
        """How long the device takes for one operation."""
        kind, work = kind_of(operation), operation.work
        flops, num_bytes = self.by_kind.get(kind) or self.by_kind[general(kind, operation)]
        if operation.name in MATMULS and work.flops < self.wave:  # between one tile a processor and splitting sums evenly
            flops *= math.sqrt(work.flops / self.wave)
        return max(work.flops / flops, work.num_bytes / num_bytes, self.kernel_s * work.launches)

    def total(self, operations: Iterable[Operation]) -> dict[str, float]:
        """How long operations take one after the other, in seconds by purpose. Where calls do not wait, the device begins an
        operation once it is called and the one before is done; idle time before an operation counts with the operation."""
        seconds: dict[str, float] = defaultdict(float)
        called = done = 0.0
        for operation in operations:
            took = self.seconds(operation)
            called += self.call_s * operation.work.launches
            end = done + self.call_s + took if self.waits else max(called, done) + took
            seconds[operation.purpose] += end - done
            done = end
        return dict(seconds)


# What is reached, not what is printed on the box. Peaks by NVIDIA's data sheets: bf16 with sums in float32, without sparsity,
# 209, 165 and 989 TFLOP/s; 1.79, 1.01 and 3.35 TB/s. Matmuls of these shapes reach 80 to 90 % of the peak, on an H100 under its
# power limit 65; copies 80 to 90 % of the bandwidth; FlashAttention 2 (arXiv:2307.08691) about 70 % of matmul forward and 60 %
# backward. Grouped kernels with few rows an expert are taken to reach half. A call of PyTorch takes 5 to 10 microseconds of a
# CPU. Links: PCIe 5 and 4 by way of the host, NVLink. None of this was measured here.
CARDS = {
    "rtx5090": Rates.of_card("rtx5090", 175, 70, 125, 105, 1.45, 20, 32, 12, 170),
    "rtx4090": Rates.of_card("rtx4090", 145, 55, 105, 85, 0.88, 10, 24, 8, 128),
    "h100": Rates.of_card("h100", 640, 45, 370, 300, 2.8, 300, 80, 9, 132),
}


def kind_of(operation: Operation) -> str:
    """Operations of one kind run at one rate."""
    if operation.purpose == "attention" and operation.work.flops and operation.name not in BLOCKS:  # one kernel
        return "attention backward" if "backward" in operation.name else "attention forward"
    purpose = operation.purpose
    return f"{purpose} matmul" if operation.work.flops and not purpose.endswith("matmul") else purpose


def general(kind: str, operation: Operation) -> str:
    if kind in GENERAL:
        return kind
    if not kind.endswith("matmul"):
        return "other"
    if operation.purpose == "experts" and operation.name not in MATMULS:
        return "grouped matmul"
    return "float32 matmul" if operation.dtype == torch.float32 else "matmul"


# Measuring


def measure(config: Config, model_dir: Path, device: torch.device, lengths: Sequence[int], num_threads: int) -> Rates:
    """Times the operations of the last layers, the loss and an update; and the same with hardly a token, for the calls.

    On a CPU one thread is timed, by the time that it computes, which other processes hardly change; `num_threads` are taken
    to be as many times as fast, except at calls.

    Args:
        lengths: of a microbatch's segments; as many of them are timed as take about a second.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return timed(LastLayers(config, model_dir, device), lengths, num_threads)
    finally:
        torch.set_num_threads(before)


def is_for_gpus(model: Any) -> bool:
    """Whether a model's layers and head would take gigabytes and minutes to be timed on a CPU."""
    return bool(model.vocab_size * model.hidden_size > MOST_HEAD)


def timed(step: LastLayers, lengths: Sequence[int], num_threads: int) -> Rates:
    device, some = step.device, list[int]()
    for length in lengths:
        some += [min(length, step.most_tokens - sum(some))] * (sum(some) < step.most_tokens)
    step.operations(some)  # makes gradients, optimizer states and oneDNN's kernels
    few = step.operations([FEW_TOKENS])
    least_s = sorted(operation.seconds for operation in few)[len(few) // 10]  # of an operation that does hardly anything
    alike: dict[tuple[str, str, Work], list[float]] = defaultdict(list)
    for operation in (operation for _ in range(ROUNDS) for operation in step.operations(some)):
        alike[kind_of(operation), operation.name, operation.work].append(operation.seconds)
    units, seconds = defaultdict[str, float](float), defaultdict[str, float](float)
    for (kind, _, work), took in alike.items():
        units[kind] += len(took) * (work.flops or work.num_bytes)
        took_s = median(took)  # leaves out when the operating system did something else
        seconds[kind] += len(took) * max(took_s - least_s, took_s / 5)  # each call is counted by itself, below
    speed = num_threads if device.type == "cpu" else 1
    by_kind = {kind: (UNLIMITED, speed * units[kind] / took) for kind, took in seconds.items() if units[kind]}
    # a matmul so small that it only reads its weights takes as long as other operations with as many bytes
    by_kind |= {kind: (rate, by_kind["elementwise"][1]) for kind, (_, rate) in by_kind.items() if kind.endswith(COMPUTES)}
    by_kind |= {kind: by_kind["base matmul"] for kind in GENERAL if kind not in by_kind} | {"other": by_kind["elementwise"]}
    rates = Rates(f"{num_threads} thread(s) of this machine", by_kind, 0.0, CPU_LINK)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        rates = replace(rates, name=card.name, link=PCIE_LINK, memory_gib=card.total_memory / 2**30, generation=card.major,
                        kernel_s=KERNEL_S, waits=False)
    whole = median(step.seconds([FEW_TOKENS]) for _ in range(2 * ROUNDS))
    known = speed * sum(rates.total(few).values()) if rates.waits else 0.0
    return replace(rates, call_s=max(whole - known, 0.0) / len(few))


class LastLayers:
    """A step of the model's last layers, few but more than a cache holds, with its head."""

    def __init__(self, config: Config, model_dir: Path, device: torch.device) -> None:
        torch.manual_seed(0)
        num = text_config(model_dir).num_hidden_layers
        self.stage, weights = build_empty(model_dir, config.model.base, config.lora, seed=0, device=device, recompute=False,
                                          first=2 * max(num - NUM_LAYERS, 0), stop=2 * num)
        put_some(weights)
        num_weights = sum(math.prod(item.shape) for item in weights.wanted if isinstance(item, Weight))
        self.most_tokens = max(min(MOST_TOKENS[device.type], int(MOST_FLOPS[device.type] / (8 * num_weights))), FEW_TOKENS)
        self.device, self.rank = device, config.lora.rank
        parameters = list(self.stage.adapters().values())
        self.optimizer = make_optimizer(config.train.optimizer, parameters, config.train.weight_decay)

    def run(self, lengths: Sequence[int], counter: Counter | None = None) -> None:
        tokens = sum(lengths)
        bounds = torch.tensor([0, *lengths], device=self.device).cumsum(0).int()
        shape = self.stage.model.config
        ids_T = torch.arange(tokens, device=self.device)
        x = torch.randn(1, tokens, shape.hidden_size, device=self.device).to(shape.dtype).requires_grad_()
        x = ids_T[None] % shape.vocab_size if self.stage.is_first else x
        y_1TD = self.stage(x, ids_T, Segments(bounds, tuple(lengths)))
        predict_N = ids_T[: max(tokens // 4, 1)]
        self.stage.losses(y_1TD, predict_N, predict_N % shape.vocab_size).sum().backward()
        if counter is not None:
            counter.only = "optimizer"
        self.optimizer.step()

    def clock(self) -> float:
        if self.device.type == "cpu":
            return time.thread_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def operations(self, lengths: Sequence[int]) -> list[Operation]:
        with Counter([self.rank], lengths, self.clock) as counter:
            self.run(lengths, counter)
        return counter.operations

    def seconds(self, lengths: Sequence[int]) -> float:
        """Of one step, without a counter."""
        started = self.clock()
        self.run(lengths)
        return self.clock() - started


def put_some(weights: Weights) -> None:
    """Random numbers for every weight but those of experts, of which the first shows what all take."""
    for item in weights.wanted:
        if isinstance(item, Weight):
            item.put(0, torch.randn(item.shape, dtype=torch.bfloat16) * 0.02)
        else:
            item.put(0, torch.randn(2 * item.intermediate, item.hidden).bfloat16() * 0.02,
                     torch.randn(item.hidden, item.intermediate).bfloat16() * 0.02)
