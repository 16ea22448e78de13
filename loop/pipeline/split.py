"""Decides where a model is cut into stages: what each sublayer holds and computes, and the cuts that balance both.
Computes with shapes on the meta device, in a few seconds. `loop.plan` says what a stage takes in all."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Sequence

from torch import nn

from data.tokenized import TokenizedRows
from loop.config import Config
from model.build import FEED_FORWARD, GATES, skeleton
from model.ops.gated_delta import CHUNK

# bytes of a frozen weight: int8 with a scale a row; nf4 with double-quantized scales
WEIGHT_BYTES = {"int8": 1.01, "nf4": 0.516, "bf16": 2.0, "float32": 4.0}
FLOAT32_BYTES = 4


def choose_split(config: Config, model_dir: Path, rows: TokenizedRows, num_stages: int) -> tuple[tuple[int, ...], list[Cost]]:
    """Where the model is cut, and what each of its sublayers costs."""
    costs = sublayer_costs(model_dir, config, RowLengths.of(rows))
    automatic = num_stages == 1 or config.pipeline.split == "auto"
    return tuple(balance(costs, num_stages) if automatic else config.pipeline.split), costs


@dataclass(frozen=True)
class Cost:
    """What one sublayer, or several, hold and compute."""

    num_parameters: int = 0
    num_bytes: float = 0.0  # of weights
    flops: float = 0.0  # a token of the stream: forward, backward and recomputation
    recomputed: float = 0.0  # flops of the recomputation alone, where there is one

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(mine + others for mine, others in zip(vars(self).values(), vars(other).values())))


@dataclass(frozen=True)
class RowLengths:
    """What costs depend on of a data set."""

    longest: int  # tokens of the longest row
    mean: float  # tokens of a row, on average
    context: float  # tokens that a token attends to, on average
    supervised: float  # share of the tokens

    @classmethod
    def of(cls, rows: TokenizedRows) -> RowLengths:
        lengths_E = rows.lengths_E.double()
        tokens = float(lengths_E.sum())
        context = float(lengths_E.square().sum()) / tokens / 2
        return cls(int(lengths_E.max()), tokens / len(rows), context, float(rows.supervised_N.double().sum()) / tokens)


def sublayer_costs(model_dir: Path, config: Config, rows: RowLengths) -> list[Cost]:
    """Costs of all sublayers of the model; the embedding counts with the first one and the head with the last one."""
    model = skeleton(model_dir, config.model.base)
    costs = []
    for layer in model.model.layers:
        for half in (False, True):
            children = [module for name, module in layer.named_children() if (name in FEED_FORWARD) == half]
            costs.append(sum((module_cost(child, model, config, rows) for child in children), Cost()))
    num_embedded = model.config.vocab_size * model.config.hidden_size
    costs[0] += Cost(num_embedded, num_embedded * model.dtype.itemsize)
    # the head computes logits, and the gradient of its input, at supervised positions; they are never recomputed
    costs[-1] += Cost(num_embedded, num_embedded * model.dtype.itemsize, 2 * 2 * num_embedded * rows.supervised)
    return costs


def module_cost(module: nn.Module, model: Any, config: Config, rows: RowLengths) -> Cost:
    """What one norm, mixer or feed-forward costs. A matmul takes 2 flops a weight and token, and as many again for the
    gradient of its input; a weight that is trained, or experts that compute their forward pass again, take 2 more."""
    shape, lora = model.config, config.lora
    frozen = quantized = trained = 0
    simple = thorough = 0.0  # flops of one forward pass, of what takes two and three times as many with its backward pass
    unread = 0.0  # flops of the layer's last product, which is not computed again: see `last_summand` in model/stages.py
    linears = {name: child for name, child in module.named_modules()
               if isinstance(child, nn.Linear) and not name.endswith(GATES)}
    for name, parameter in module.named_parameters():
        count = parameter.numel()
        frozen += count
        if ".experts." in f".{name}":
            quantized += count
            in_experts = 2 * count * shape.num_experts_per_tok / shape.num_experts
            thorough, unread = thorough + in_experts, unread + in_experts
            if lora.experts:
                trained += lora.rank * parameter.shape[0] * sum(parameter.shape[1:])
        elif name.rpartition(".")[0] in linears:
            quantized += count
            simple += 2 * count
    last_parts = {name: name.rpartition(".")[2] for name in linears}
    adapted = [linear for name, linear in linears.items() if last_parts[name] in lora.adapted(last_parts.values())]
    in_linears = sum(lora.rank * (linear.in_features + linear.out_features) for linear in adapted)
    trained += in_linears
    thorough += 2 * in_linears + mixing_flops(module, shape, rows.context)
    num_bytes = quantized * WEIGHT_BYTES[config.model.base] + (frozen - quantized) * model.dtype.itemsize
    if "down_proj" in linears:  # its adapter's first matrix is needed all the same
        unread += 2 * linears["down_proj"].weight.numel()
        unread += 2 * lora.rank * linears["down_proj"].out_features * (linears["down_proj"] in adapted)
    recomputed = (simple + thorough - unread) * config.train.recompute
    return Cost(frozen + trained, num_bytes + trained * FLOAT32_BYTES, 2 * simple + 3 * thorough + recomputed, recomputed)


def mixing_flops(module: Any, shape: Any, context: float) -> float:
    """What a mixer computes for a token in one forward pass beside its linears."""
    if hasattr(module, "q_proj"):
        return 4 * shape.num_attention_heads * module.head_dim * context
    if hasattr(module, "in_proj_qkv"):
        k, v = shape.linear_key_head_dim, shape.linear_value_head_dim
        return shape.linear_num_value_heads * (6 * k * v + 4 * CHUNK * (k + v))
    return 0.0


def balance(costs: Sequence[Cost], num_stages: int) -> list[int]:
    """The cuts under which the fullest stage is least full. How full a stage is: its share of the model's flops or of its
    bytes, whichever is larger.

    Raises:
        ValueError: more stages than sublayers.
    """
    num = len(costs)
    if num_stages > num:
        raise ValueError(f"{num_stages} stages for a model of {num} sublayers: start fewer processes")
    upto = list(accumulate(costs, initial=Cost()))

    def extended(start: int, stop: int) -> tuple[float, float, list[int]]:
        """The best way to cut the first `start` sublayers, with one more stage that ends at `stop`."""
        fullest, squares, cuts = best[start]
        full = max((upto[stop].flops - upto[start].flops) / upto[-1].flops,
                   (upto[stop].num_bytes - upto[start].num_bytes) / upto[-1].num_bytes)
        return max(fullest, full), squares + full * full, [*cuts, start]

    # by number of sublayers: the fullest stage, the sum of squares (least where the stages are most even), and the cuts
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(1, num_stages + 1):
        stops = range(stage, num - num_stages + stage + 1)
        best = {stop: min(extended(start, stop) for start in best if start < stop) for stop in stops}
    return best[num][2][1:]


def reason(costs: Sequence[Cost], split: Sequence[int]) -> str:
    """Why the automatic cuts lie where they do, in a line: what each stage computes and holds, and other cuts would."""
    whole = sum(costs, Cost())

    def shares(cuts: Sequence[int]) -> list[tuple[float, float]]:
        stages = (sum(costs[start:stop], Cost()) for start, stop in zip([0, *cuts], [*cuts, len(costs)]))
        return [(100 * stage.flops / whole.flops, 100 * stage.num_bytes / whole.num_bytes) for stage in stages]

    def fullest(cuts: Sequence[int]) -> float:
        return max(map(max, shares(cuts)))

    each = ", ".join(f"stage {stage} {time:.1f} % and {held:.1f} %" for stage, (time, held) in enumerate(shares(split)))
    moved = [[*split[:i], cut + by, *split[i + 1:]] for i, cut in enumerate(split) for by in (-1, 1)]
    others = [fullest(cuts) for cuts in moved if all(a < b for a, b in zip([0, *cuts], [*cuts, len(costs)]))]
    otherwise = f"; with a cut one sublayer away it would be at least {min(others):.1f} %" if others else ""
    return (f"split auto, cut at {', '.join(map(str, split))}, balances time and memory (shares of the flops and of the "
            f"weights' bytes): {each}; the largest share is {fullest(split):.1f} %{otherwise}")


def table(costs: Sequence[Cost], split: Sequence[int], device: str, num_replicas: int) -> str:
    """One line for each stage: its ranks, sublayers, parameters and share of the computation."""
    whole = sum(costs, Cost())
    bounds = [0, *split, len(costs)]
    lines = [f"{'stage':>5}  {'device':<16}  {'sublayers':>10}  {'parameters':>14}  compute"]
    for stage, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        cost = sum(costs[start:stop], Cost())
        ranks = ", ".join(str(replica * (len(bounds) - 1) + stage) for replica in range(num_replicas))
        lines.append(
            f"{stage:>5}  {f'{device} (rank {ranks})':<16}  {f'{start} to {stop - 1}':>10}  {cost.num_parameters:>14,}  "
            f"{100 * cost.flops / whole.flops:>5.1f} %"
        )
    return "\n".join(lines)
